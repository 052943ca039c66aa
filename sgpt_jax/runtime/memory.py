"""How much memory this process has."""

from __future__ import annotations

import resource
import sys


def resident_memory() -> tuple[int, int] | None:
    """Bytes that this process has in memory now: (its own, of mapped files); None where there is no Linux /proc."""
    try:
        with open("/proc/self/statm") as file:
            pages, mapped = map(int, file.read().split()[1:3])
    except OSError:
        return None
    return (pages - mapped) * resource.getpagesize(), mapped * resource.getpagesize()


def peak_memory() -> int:
    """The most bytes that this process has had in memory, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
