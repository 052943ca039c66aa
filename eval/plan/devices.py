"""Accelerators by their published figures, and what a user calls several of them.

TPU: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, tables of key specifications (peak compute in bfloat16, HBM
capacity and bandwidth; of the inter-chip bandwidth, one link in one direction). NVIDIA: data sheets of H100 and H200
(SXM), A100 (SXM), L40S and L4; peak of dense bfloat16 tensor operations; half of NVLink's two-way bandwidth, or PCIe's.
"""

from __future__ import annotations

import dataclasses
import math
import re

from sgpt_jax.errors import InputError

GB, GIB, TERA = 10**9, 2**30, 10**12

# The share of the usable memory that a program may need by arithmetic, whose model of activations is not exact. What
# a compiler says is exact: there all of it counts.
MARGIN = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator.

    Attributes:
        memory: bytes.
        usable: bytes that programs get; the rest is the runtime's. For TPU, what libtpu's compiler calls the limit.
        flops: peak bfloat16 FLOP/s. float32 matmuls are taken to run at a sixth (TPU) or a sixteenth of it (GPU).
        bandwidth: of its memory, bytes a second.
        exchange: bytes a second that it receives while devices gather from one another. On a TPU two links, one ring
            both ways, which every slice has; a torus with more of them can be faster.
    """

    kind: str
    memory: float
    usable: float
    flops: float
    bandwidth: float
    exchange: float

    @property
    def budget(self) -> float:
        """The bytes that a program may need by arithmetic: a tenth of what is usable stays free for its errors."""
        return MARGIN * self.usable


CHIPS: dict[str, Chip] = {
    "v4": Chip(kind="tpu", memory=32 * GIB, usable=30.75 * GIB, flops=275 * TERA, bandwidth=1228 * GB,
               exchange=2 * 50 * GB),
    "v5e": Chip(kind="tpu", memory=16 * GIB, usable=15.75 * GIB, flops=197 * TERA, bandwidth=819 * GB,
                exchange=2 * 50 * GB),
    "v5p": Chip(kind="tpu", memory=95 * GIB, usable=95.74 * GIB, flops=459 * TERA, bandwidth=2765 * GB,
                exchange=2 * 100 * GB),
    "v6e": Chip(kind="tpu", memory=32 * GIB, usable=31.25 * GIB, flops=918 * TERA, bandwidth=1640 * GB,
                exchange=2 * 100 * GB),
    "h100": Chip(kind="gpu", memory=80 * GB, usable=76 * GB, flops=989 * TERA, bandwidth=3350 * GB,
                 exchange=450 * GB),
    "h200": Chip(kind="gpu", memory=141 * GB, usable=134 * GB, flops=989 * TERA, bandwidth=4800 * GB,
                 exchange=450 * GB),
    "a100": Chip(kind="gpu", memory=80 * GB, usable=76 * GB, flops=312 * TERA, bandwidth=2039 * GB,
                 exchange=300 * GB),
    "a100-40gb": Chip(kind="gpu", memory=40 * GB, usable=38 * GB, flops=312 * TERA, bandwidth=1555 * GB,
                      exchange=300 * GB),
    "l40s": Chip(kind="gpu", memory=48 * GB, usable=45 * GB, flops=362 * TERA, bandwidth=864 * GB,
                 exchange=32 * GB),
    "l4": Chip(kind="gpu", memory=24 * GB, usable=22 * GB, flops=121 * TERA, bandwidth=300 * GB,
               exchange=32 * GB),
}  # fmt: skip

# Shapes of Cloud TPU slices by the number in their name: cores for v4 and v5p (two a chip), chips for v5e and v6e.
_SLICES = {
    2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4"},
}
_DIMENSIONS = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2}


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices of one kind.

    Attributes:
        name: as given.
        chip: one of them.
        chip_name: its name in `CHIPS`.
        count: how many.
        shape: of a TPU slice, such as "2x4".
    """

    name: str
    chip: Chip
    chip_name: str
    count: int
    shape: str | None = None


def parse_target(text: str) -> Target:
    """Reads "v5e:2x4" (a topology), "v5e-8" (a Cloud TPU name), "h100:8" or "h100" (GPUs and their number).

    Raises:
        InputError: for anything else, saying what is known.
    """
    name, _, rest = text.partition(":")
    if name in CHIPS and CHIPS[name].kind == "gpu":
        if rest and not re.fullmatch(r"[1-9]\d*", rest):
            raise InputError(f"--topology {text}: {rest!r} is not a number of GPUs")
        return Target(text, CHIPS[name], name, int(rest or 1))
    named = re.fullmatch(r"(v4|v5e|v5p|v6e)-(\d+)", text)
    if named:
        name, shapes = named[1], _SLICES[_DIMENSIONS[named[1]]]
        rest = shapes.get(int(named[2]), "")
        if not rest:
            known = ", ".join(f"{name}-{size}" for size in shapes)
            raise InputError(f"--topology {text}: no such slice; known: {known}")
    if name not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", rest):
        raise InputError(
            f"--topology {text}: give a TPU slice such as v5e:2x4 or v5e-8, or GPUs such as h100:8; "
            f"known: {', '.join(CHIPS)}"
        )
    sizes = [int(size) for size in rest.split("x")]
    if len(sizes) != _DIMENSIONS[name]:
        raise InputError(f"--topology {text}: a slice of {name} has {_DIMENSIONS[name]} dimensions")
    return Target(text, CHIPS[name], name, math.prod(sizes), rest)
