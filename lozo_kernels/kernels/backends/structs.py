"""Fields of the C structs that the libraries of ``csrc`` read."""

import ctypes


def int64s(names: str) -> list[tuple[str, type[ctypes.c_int64]]]:
    """Fields of type int64_t. Names are separated by spaces."""
    return [(name, ctypes.c_int64) for name in names.split()]


def pointers(names: str) -> list[tuple[str, type[ctypes.c_void_p]]]:
    """Fields that are pointers."""
    return [(name, ctypes.c_void_p) for name in names.split()]
