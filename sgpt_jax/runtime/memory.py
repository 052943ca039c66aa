"""How much memory this process has."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import jax

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Of a control group, by the version of its hierarchy: limit, use, and how the names in its statistics begin.
_VERSION_1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
_VERSION_2 = "memory.max", "memory.current", ""


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
    """Bytes that can still be put on a device: what JAX may still take of it, or for a CPU, what the machine has left,
    and the control groups of this process allow.

    A device that does not say counts as having no limit.
    """
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        found = dict(line.split(":") for line in (_PROC / "meminfo").read_text().splitlines())
        available = int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        available = sys.maxsize
    return min(available, *_left_in_groups())


def _left_in_groups() -> list[int]:
    """Bytes that each control group around this process still allows, as those of Docker, Kubernetes and Slurm do."""
    left = [sys.maxsize]
    try:
        lines = (_PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return left
    for line in lines:
        _, controllers, name = line.split(":", 2)
        group = Path(name.lstrip("/"))
        if not controllers:
            root, files = _CGROUPS, _VERSION_2
        elif "memory" in controllers.split(","):
            root, files = _CGROUPS / "memory", _VERSION_1
        else:
            continue
        for folder in (root / each for each in (group, *group.parents)):
            try:
                limit, used = (int((folder / file).read_text()) for file in files[:2])
                found = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                cached = sum(int(found[files[2] + state]) for state in ("inactive_file", "active_file"))
                left.append(max(0, limit - used + cached))
            except (OSError, KeyError, ValueError):
                continue  # no limit, or a group that cannot be seen from within a container
    return left
