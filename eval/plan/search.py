"""What exact search over vectors that stay on the chips would need: bytes of a chip, the time of a batch, what fits.

The programs are those of `sgpt_jax.index.held`. They are compiled where `eval plan` can.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sgpt_jax.index.device_top_k import look, merge_devices
from sgpt_jax.index.held import ACCELERATOR_ELEMENTS, HELD, Layout
from sgpt_jax.index.resident import LEAST_CANDIDATES

from . import compile as compiler
from .devices import GIB, Target

# Passes of the matrix unit through a float32 product (of GPUs: how much slower float32 is), and through one of float32
# queries in three bfloat16 parts.
_FLOAT32_PASSES = {"tpu": 6, "gpu": 16}
_PARTS = 3


@dataclasses.dataclass(frozen=True)
class Search:
    """A search: how many rows, of which dimension, held as which dtype; and how many queries ask for how many hits."""

    rows: int
    dim: int
    dtype: Any
    queries: int
    hits: int

    @property
    def kept(self) -> int:
        """Candidates of a query on each device, as `Resident.search` keeps them for float32 rows on disk."""
        if self.dtype == "float32":
            return self.hits + 1
        return min(self.rows, max(4 * self.hits, LEAST_CANDIDATES))

    @property
    def parts(self) -> int:
        """Parts of the queries."""
        return 1 if self.dtype == "float32" else _PARTS


def make_search_plans(target: Target, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One plan for each dtype, ready for JSON."""
    searches = [Search(args.rows, args.dim, dtype, args.queries, args.hits) for dtype in HELD]
    return [plan_of(search, target, compiles=not args.no_compile) for search in searches]


def plan_of(search: Search, target: Target, *, compiles: bool) -> dict[str, Any]:
    """A plan, ready for JSON; ``compiles``: with what the compiler says, where it can."""
    usable = target.chip.usable
    layout = _layout(search, target.count, usable)
    fits = layout.fits(usable)
    # Rows that would fit, in whole blocks of the smallest size.
    small = Layout.of(search.rows, search.dim, search.dtype, target.count, ACCELERATOR_ELEMENTS[-1])
    most = math.floor((usable - small.scratch) / (small.rows * small.row_bytes))
    most = max(0, most) * small.rows * target.count
    devices = None
    if not fits:
        counts = (1 << power for power in range(13))
        devices = next((count for count in counts if _layout(search, count, usable).fits(usable)), None)
    compiled, note = _compiled(search, layout, target) if compiles else (None, None)
    return {
        "task": "search",
        **dataclasses.asdict(search),
        "topology": target.name,
        "devices": target.count,
        "layout": dataclasses.asdict(layout),
        "usable": usable,
        "fits": fits,
        "most_rows": most,
        "devices_needed": target.count if fits else devices,
        "milliseconds": _milliseconds(search, layout, target),
        "compiled": compiled,
        "note": note,
    }


def _layout(search: Search, devices: int, usable: float) -> Layout:
    return Layout.fitting(search.rows, search.dim, search.dtype, devices, usable, ACCELERATOR_ELEMENTS)


def _milliseconds(search: Search, layout: Layout, target: Target) -> dict[str, float]:
    """The least time of a batch by its parts, and of one query, which reads all rows once."""
    chip, rows = target.chip, layout.blocks * layout.rows
    passes = _FLOAT32_PASSES[chip.kind] if search.dtype == "float32" else _PARTS
    found = {
        "rows": layout.held / chip.bandwidth,
        # One block at a time, float32: written by the product, and read.
        "scores": 2 * 4 * search.parts * search.queries * rows / chip.bandwidth,
        "matmuls": 2 * search.queries * rows * search.dim * passes / chip.flops,
        "exchange": 2 * 8 * search.queries * search.kept / chip.exchange if target.count > 1 else 0.0,
    }
    batch = max(found["rows"] + found["scores"], found["matmuls"]) + found["exchange"]
    return {
        name: 1000 * value for name, value in (found | {"batch": batch, "one_query": found["rows"]}).items()
    }


def _compiled(search: Search, layout: Layout, target: Target) -> tuple[dict[str, Any] | None, str | None]:
    """What the compiler says of the program that looks at a block, and of the merge; or why it says nothing."""
    devices = compiler.devices_of(target)
    if devices is None:
        return None, compiler.missing(target)
    mesh = Mesh(np.array(devices), ("rows",))

    def sharded(shape: tuple[int, ...], dtype: Any, by_rows: bool) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P("rows") if by_rows else P()))

    count, total = target.count, target.count * layout.rows
    best = (
        sharded((count, search.queries, search.kept), jnp.float32, True),
        sharded((count, search.queries, search.kept), jnp.int32, True),
    )
    parts_dtype = jnp.float32 if search.parts == 1 else jnp.bfloat16
    programs = [
        look.lower(
            mesh,
            best,
            sharded((search.parts, search.queries, search.dim), parts_dtype, False),
            sharded((search.queries,), jnp.float32, False),
            sharded((total, search.dim), HELD[search.dtype], True),
            sharded((total,), jnp.float32, True) if search.dtype == "int8" else None,
            sharded((3,), jnp.int32, False),
        ),
        merge_devices.lower(mesh, best),
    ]
    temporaries, largest = [], 0
    for program in programs:
        compiled = compiler.compile_lowered(program, devices[0])
        memory = compiled.memory_analysis()
        assert memory is not None
        temporaries.append(
            memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        )
        largest = max(largest, largest_array(compiled.as_text() or "", search.queries))
    scratch = max(temporaries)
    return {
        "scratch": scratch,
        "total": layout.held + scratch,
        "fits": layout.held + scratch <= target.chip.usable,
        "largest_of_queries": largest,
        "all_scores": search.queries * layout.blocks * layout.rows,
    }, None


def largest_array(text: str, queries: int) -> int:
    """Elements of the largest array of a compiled program with the number of queries, or of their parts, among its
    dimensions: rows themselves have none such."""
    most = 0
    for shape in re.findall(r"\b(?:f32|bf16|s32|u32|s8|pred)\[([0-9,]+)\]", text):
        sizes = [int(size) for size in shape.split(",")]
        if {queries, _PARTS * queries} & set(sizes):
            most = max(most, math.prod(sizes))
    return most


def describe_search(plan: dict[str, Any]) -> str:
    """A plan in words."""
    layout, ms, compiled = plan["layout"], plan["milliseconds"], plan["compiled"]
    needed = f" ({plan['devices_needed']} chips would do)" if plan["devices_needed"] else ""
    lines = [
        f"{plan['rows']:,} rows of dimension {plan['dim']} as {plan['dtype']} on {plan['topology']}: "
        + ("fits" if plan["fits"] else f"does not fit{needed}"),
        f"  a device    {layout['blocks'] * layout['rows']:,} rows in {layout['blocks']} blocks: "
        f"{layout['held'] / GIB:.2f} GiB, and {layout['scratch'] / GIB:.2f} beside them by arithmetic, of "
        f"{plan['usable'] / GIB:.2f}; up to {plan['most_rows']:,} rows fit on all",
    ]
    if compiled is not None:
        share = compiled["largest_of_queries"] / compiled["all_scores"]
        lines.append(
            f"  compiled    {compiled['total'] / GIB:.2f} of {plan['usable'] / GIB:.2f} GiB, of which "
            f"{compiled['scratch'] / GIB:.2f} beside the rows; the largest array of scores has {share:.2%} of "
            "queries times rows"
        )
    lines.append(
        f"  least time  {ms['one_query']:.3g} ms for one query; {ms['batch']:.3g} ms for {plan['queries']} queries "
        f"with {plan['hits']} hits: rows {ms['rows']:.3g}, scores {ms['scores']:.3g}, matmuls {ms['matmuls']:.3g}, "
        f"exchange {ms['exchange']:.3g}"
    )
    if plan["note"]:
        lines.append(f"  note        {plan['note']}")
    return "\n".join(lines)
