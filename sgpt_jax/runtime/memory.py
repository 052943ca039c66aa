"""How much memory this process has."""

from __future__ import annotations

import resource
import sys

import jax


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


def free_memory(device: jax.Device) -> int:
    """Bytes that can still be put on a device: what JAX may still take of it, or for a CPU, what the machine has left.

    A device that does not say counts as having no limit.
    """
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        with open("/proc/meminfo") as file:
            found = dict(line.split(":") for line in file)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return sys.maxsize
