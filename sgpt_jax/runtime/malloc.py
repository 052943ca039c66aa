"""The C library's malloc, told to keep what XLA frees: on a CPU, a training step's buffers come from it."""

from __future__ import annotations

import ctypes
import os
import sys

# Of glibc's malloc.h: memory is never mapped apart, never handed back, taken 256 MB at a time, by all threads from one
# arena. With fewer of these the pages of every step are mapped anew.
_PARAMETERS = {
    "M_MMAP_MAX": (-4, 0),
    "M_TRIM_THRESHOLD": (-1, -1),
    "M_TOP_PAD": (-2, 1 << 28),
    "M_ARENA_MAX": (-8, 1),
}


def keep_freed_memory() -> bool:
    """Makes glibc's malloc keep all that was ever used; to be called before threads start.

    A step of bias-only training of a 135M decoder, 32 triplets in float32, had 1.8 million page faults without it, and
    has none with it, a quarter less processor time. The process holds what it has used until it ends, or until
    `give_back_freed_memory`.

    Returns:
        False, having done nothing, where the C library is another one or the user has settings of malloc's in the
        environment.
    """
    chosen = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") and name.endswith("_") for name in os.environ
    )
    if sys.platform != "linux" or chosen:
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    taken = [library.mallopt(number, value) for number, value in _PARAMETERS.values()]
    return all(taken)


def give_back_freed_memory() -> None:
    """Hands freed memory back to the system, which `keep_freed_memory` forbids malloc; only with glibc.

    Of programs with different buffers each needs a hole of its own in what is kept, so that together they hold the sum.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
