"""The public JSON contract (docs/json.md): what `--json` prints, made from results.

Keys are only ever added; a key that is documented keeps its meaning and unit.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any


def as_object(result: Any) -> dict[str, Any]:
    """The JSON object of a result (a frozen dataclass of plain values, tuples and dataclasses)."""
    found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(result)))
    return found
