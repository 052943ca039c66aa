"""Which mesh and how many rows at a time: every way of running a program on a target, by arithmetic, and the best."""

from __future__ import annotations

import argparse
import bisect
import dataclasses
from collections.abc import Iterator
from typing import Any

from sgpt_jax.decoder.build import Lora
from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.decoder.sharding import mesh_sizes
from sgpt_jax.errors import InputError
from sgpt_jax.packing.layout import BATCH_TOKENS

from ..training import RECIPES, lora_of
from .devices import Target
from .estimate import Memory, Sizes, Times, chunks_of, memory, times
from .programs import Work

# Texts of a training example: query, positive, one hard negative. Packing makes fewer rows of short texts.
TEXTS = 3
# Rows of a device that the search tries; more make no matmul faster.
MOST_ROWS = 512


@dataclasses.dataclass(frozen=True)
class Plan:
    """One way to run a program on a target."""

    sizes: Sizes
    work: Work
    memory: Memory
    times: Times
    fits: bool


def search(config: DecoderConfig, target: Target, args: argparse.Namespace) -> Iterator[Plan]:
    """All that is worth trying: every mesh (or the one asked for), with one row a device, two, four, ..."""
    lora = lora_of(config, args.trainable, args.lora_rank) if args.task == "train" else None
    meshes = [parse_sizes(args.mesh, target.count)] if args.mesh else list(all_sizes(config, target.count))
    for sizes in meshes:
        for work in works(args, sizes[0] * sizes[1], lora):
            yield evaluate(config, target, work, sizes)


def evaluate(config: DecoderConfig, target: Target, work: Work, sizes: Sizes) -> Plan:
    """One way to run it, by arithmetic."""
    use = memory(config, work, sizes, gpu=target.chip.kind == "gpu")
    roofline = times(config, work, sizes, target.chip)
    return Plan(sizes, work, use, roofline, use.total <= target.chip.budget)


def largest(config: DecoderConfig, target: Target, work: Work, sizes: Sizes) -> int | None:
    """The most rows at a time that fit on this mesh by arithmetic, up to `MOST_ROWS` a device; None for none.

    In training they are the chunk, and None also where the batch goes through at once.
    """
    shards = sizes[0] * sizes[1]
    most = MOST_ROWS
    if work.task == "train":
        if chunks_of(work) == 1:
            return None
        most = min(most, work.rows // shards - 1)

    def is_too_much(rows: int) -> bool:
        more = dataclasses.replace(work, chunk=rows * shards)
        if work.task != "train":
            more = dataclasses.replace(work, rows=rows * shards)
        return not evaluate(config, target, more, sizes).fits

    return bisect.bisect_left(range(1, most + 1), True, key=is_too_much) * shards or None


def works(args: argparse.Namespace, shards: int, lora: Lora | None) -> Iterator[Work]:
    """The batches and chunks to try where rows are split into `shards`."""
    fixed: dict[str, Any] = {
        "task": args.task, "length": args.length, "dtype": args.dtype, "weights": args.weights
    }  # fmt: skip
    if args.task != "train":
        rows = args.batch_size or max(1, BATCH_TOKENS // (args.length * shards)) * shards
        if args.batch_size and rows % shards:
            return
        each = rows // shards
        for share in {each} if args.batch_size else {each, *_powers(MOST_ROWS)}:
            yield Work(rows=share * shards, **fixed)
        return
    examples = args.batch_size or RECIPES["msmarco"][0].batch_size
    if examples % shards:
        return
    rows = TEXTS * examples
    fixed |= {"examples": examples, "trainable": args.trainable, "lora": lora}
    if args.chunk_size:
        yield Work(rows=rows, chunk=-(-args.chunk_size // shards) * shards, **fixed)
        return
    for share in _powers(min(MOST_ROWS, rows // shards - 1)):
        yield Work(rows=rows, chunk=share * shards, **fixed)
    yield Work(rows=rows, **fixed)


def choose(plans: list[Plan]) -> Plan:
    """The fastest of those that fit with the least tensor parallelism; where none fits, the one that needs least.

    Raises:
        InputError: there is nothing to choose from.
    """
    if not plans:
        raise InputError(
            "no mesh of these devices splits this batch evenly; choose another --batch-size or --mesh"
        )
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return min(plans, key=lambda plan: plan.memory.total)
    least = min(plan.sizes[2] for plan in fitting)
    fitting = [plan for plan in fitting if plan.sizes[2] == least]
    # Per row; where the parts that overlap hide the rest, the plan with least of the rest.
    best = min(plan.times.step / plan.work.rows for plan in fitting)
    near = [plan for plan in fitting if plan.times.step / plan.work.rows <= 1.01 * best]
    return min(near, key=lambda plan: sum(dataclasses.astuple(plan.times)) / plan.work.rows)


def needed(config: DecoderConfig, target: Target, work: Work) -> int | None:
    """How many chips of the kind it takes, a power of two, with weights split over all; None beyond 4,096."""
    for count in _powers(4096):
        rows = work.rows if work.task == "train" else count
        smallest = dataclasses.replace(
            work, rows=max(rows, count), chunk=count if work.task == "train" else 0
        )
        if evaluate(config, target, smallest, (1, count, 1)).fits:
            return count
    return None


def all_sizes(config: DecoderConfig, count: int) -> Iterator[Sizes]:
    """Every mesh of `count` devices whose tensor axis divides the heads."""
    for tensor in range(1, count + 1):
        if count % tensor or config.num_heads % tensor or config.num_kv_heads % tensor:
            continue
        for fsdp in range(1, count // tensor + 1):
            if count // tensor % fsdp == 0:
                yield count // tensor // fsdp, fsdp, tensor


def parse_sizes(spec: str, count: int) -> Sizes:
    """Reads a mesh such as "data=2,fsdp=4" for `count` devices, which need not exist.

    Raises:
        InputError: see `sgpt_jax.make_mesh`.
    """
    sizes = mesh_sizes(spec, count)
    return sizes["data"], sizes["fsdp"], sizes["tensor"]


def mesh_spec(sizes: Sizes) -> str:
    """The inverse of `parse_sizes`."""
    data, fsdp, tensor = sizes
    return f"data={data},fsdp={fsdp},tensor={tensor}"


def _powers(most: int) -> list[int]:
    return [1 << power for power in range(max(1, most).bit_length())]
