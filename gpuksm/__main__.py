"""`python -m gpuksm` is `gpuksm`."""

import sys

from gpuksm.cli import main

sys.exit(main())
