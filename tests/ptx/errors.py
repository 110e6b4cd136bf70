"""The one error of the interpreter."""


class PtxError(Exception):
    """The program did something CUDA leaves undefined, or something the interpreter does not know."""
