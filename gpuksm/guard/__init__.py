"""The guard: attaches to targets, owns the store, verifies and applies commit plans.

Stdlib only and single-threaded, and both are safety properties: nothing heavy
can crash it, and the kernel closes a dying single-threaded process's files
before it releases its tracees, on which the agent's check for a dead guard
rests (docs/hazards.md, 10).
"""
