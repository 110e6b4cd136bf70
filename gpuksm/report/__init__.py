"""Rendering, apart from the verbs: `json` (the public contract), `text` (tables), `progress`.

Nothing here prints or asks the system anything; verbs hand in plain values and
print what comes back.
"""
