"""System calls, ioctls, kernel structs and /proc parsing: the only package that may.

Nothing here decides anything; callers get plain values or an exception.  Every
struct and ioctl cites its header.  Features are probed (ENOSYS, ENOTTY and
EINVAL mean "not here"), kernel versions are never compared.  Stdlib only.
"""
