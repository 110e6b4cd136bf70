"""Long runs that look for a lost write: faults, kills, real programs, hours of all of them.

Each module is a command, `python -m tests.campaign.NAME --help`, that prints a table and
ends with 0 only when nothing was wrong.
"""
