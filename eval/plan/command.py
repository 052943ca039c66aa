"""What a run would need, before a machine for it is rented: memory, FLOPs, time, and the mesh to ask for.

The programs are this project's own: the training step, the encoding of the bi-encoder, the scoring of the
cross-encoder, in bfloat16, and exact search. Memory and time are worked out from the model's config; where libtpu or
JAX's CUDA plugin is installed, the program is compiled for the target as well, which needs no TPU and no GPU. Without
--full, two shallow versions are compiled and the other layers extrapolated, unless that comes near the memory (a whole
program was seen to need twice as much): a deep program takes a CPU many minutes. The time is the least that published
peaks allow; real programs reach perhaps half of it.

With --output, the same command of the same commit goes on after an interruption with the plans that are not there yet
(those of search are quickly made again).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import re
import sys
from typing import Any

import jax
from etils import epath

from sgpt_jax.cli.given import flags_given
from sgpt_jax.cli.options import WEIGHTS, add_options, dtype, option, positive
from sgpt_jax.decoder.build import Build
from sgpt_jax.decoder.config import DecoderConfig, compute_dtype
from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import parse_json, write_json
from sgpt_jax.index.topk import MAX_QUERIES
from sgpt_jax.load import UNLIMITED_DEFAULT

from ..provenance import provenance
from ..training import RECIPES, trained_kinds
from . import compile as compiler
from .choosing import Plan, choose, evaluate, largest, mesh_spec, needed, search
from .devices import CHIPS, GIB, Target, parse_target
from .estimate import chunks_of, device_bytes, flops
from .models import MODELS, find_model, with_biases
from .programs import Work, at_depth
from .search import describe_search, make_search_plans
from .table import describe, write_table

# Options that say nothing of other tasks, with what they are where they are not given.
_OPTIONS: dict[str, dict[str, Any]] = {
    "train": {"trainable": "bias", "lora_rank": None, "chunk_size": None},
    "search": {"rows": None, "dim": None, "queries": MAX_QUERIES, "hits": 100},
    "a model": {
        "model": None, "length": 300, "batch_size": None, "mesh": None, "dtype": "bfloat16", "weights": None
    },
}  # fmt: skip
# Options that the name of a plan's file does not tell.
_SAID = ("length", "batch_size", "chunk_size", "mesh", "dtype", "lora_rank")
# The share of the usable memory from which a program is compiled whole.
NEAR = 0.4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m eval plan`."""
    models, chips = ", ".join(MODELS), ", ".join(CHIPS)
    batch = RECIPES["msmarco"][0].batch_size
    add_options(
        parser,
        option(
            "--model",
            nargs="+",
            metavar="MODEL",
            help=f"a folder with a config.json, or by name (not for search): {models}",
        ),
        option(
            "--topology",
            nargs="+",
            required=True,
            metavar="DEVICES",
            help=f"a TPU slice such as v5e:2x4 or v5e-8 (Cloud TPU's name), or GPUs such as h100:8; known: {chips}",
        ),
        option(
            "--task",
            choices=("train", "encode", "score", "search"),
            default="train",
            help="search: vectors that stay on the chips, for each dtype they can be held as (default: %(default)s)",
        ),
        option("--rows", type=positive, metavar="N", help="of search: how many vectors"),
        option("--dim", type=positive, metavar="E", help="of search: their dimension"),
        option(
            "--queries",
            type=positive,
            metavar="Q",
            help=f"of search: queries of a batch (default: {MAX_QUERIES})",
        ),
        option(
            "--hits",
            type=positive,
            metavar="K",
            help="of search: results of a query (default: 100)",
        ),
        option(
            "--trainable",
            metavar="RULE",
            help="what trains: bias, lora, lora,bias, all, or a regular expression (default: bias)",
        ),
        option(
            "--lora-rank",
            type=positive,
            metavar="N",
            help="of the adapters of --trainable lora (default: 8)",
        ),
        option("--length", type=positive, metavar="N", help="tokens of a row (default: 300)"),
        option(
            "--batch-size",
            type=positive,
            metavar="N",
            help=f"examples of a training step (default: the MS MARCO recipe's {batch}), or rows of a batch "
            "(default: what the library takes at a time)",
        ),
        option(
            "--chunk-size",
            type=positive,
            metavar="N",
            help="rows at a time in training, over all devices (default: the most that fit)",
        ),
        option("--mesh", metavar="SPEC", help="such as fsdp=8 (default: what is suggested)"),
        dtype(default=None, of="of weights and matmuls (default: bfloat16)"),
        WEIGHTS,
        option("--full", action="store_true", help="compile all layers, however much memory is left"),
        option("--no-compile", action="store_true", help="the analytic part alone"),
        option("--output", metavar="FOLDER", help="write a JSON file a plan, and README.md of all in there"),
    )


def main(args: argparse.Namespace) -> None:
    """Runs the task."""
    settle(args)
    targets = [parse_target(topology) for topology in args.topology]
    if all(target.chip.kind == "tpu" for target in targets):
        # libtpu would look for a TPU where JAX starts; a plan only needs its compiler.
        jax.config.update("jax_platforms", "cpu")
    else:
        # JAX's CUDA plugin would refuse to be loaded without a GPU, of which a plan only needs the compiler.
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if args.task == "search":
        _search(targets, args)
        return
    for name in args.model:
        for target in targets:
            if not args.output:
                print(describe(make_plan(name, target, args)), flush=True)
                continue
            part = "" if args.task != "train" or args.trainable == "bias" else f"-{args.trainable}"
            part = re.sub(r"[^\w.,-]+", "_", part)  # of a regular expression
            part += "-int8" if args.weights else ""
            stem = f"{epath.Path(name).name}_{target.name.replace(':', '-')}_{args.task}{part}"
            file = epath.Path(args.output) / f"{stem}.json"
            facts = {"asked": _asked(name, args)} | provenance("libtpu", "jax-cuda12-pjrt", "jax-cuda13-pjrt")
            result = parse_json(file.read_text()) if file.exists() else {}
            before = result.get("asked", {})
            if other := [name for name in _SAID if name in before and before[name] != facts["asked"][name]]:
                raise InputError(
                    f"{file}: is a plan of other options ({', '.join(other)}): give another --output"
                )
            known = not (facts["versions"]["commit"] or "-dirty").endswith("-dirty")
            if not known or any(result.get(key) != facts[key] for key in ("asked", "versions", "device")):
                result = make_plan(name, target, args) | facts
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, result)
            print(describe(result), flush=True)
            write_table(file.parent)


def settle(args: argparse.Namespace) -> None:
    """Fills in the defaults of the task.

    Raises:
        InputError: for options that are not of the task, or that it needs.
    """
    of_task = {args.task} if args.task == "search" else {args.task, "a model"}
    for task, defaults in _OPTIONS.items():
        if task not in of_task and (unused := flags_given(args, defaults)):
            raise InputError(f"{', '.join(unused)}: not for --task {args.task}")
        vars(args).update({name: value for name, value in defaults.items() if vars(args)[name] is None})
    if args.task == "search" and (args.rows is None or args.dim is None):
        raise InputError("--task search needs --rows and --dim")
    if args.task != "search" and not args.model:
        raise InputError("--model is needed for every task but search")
    names = [epath.Path(name).name for name in args.model or ()]
    if args.output and (twice := {name for name in names if names.count(name) > 1}):
        raise InputError(f"--model has several {', '.join(sorted(twice))}, whose plans would have one file")
    if args.lora_rank and "lora" not in trained_kinds(args.trainable):
        raise InputError("--lora-rank is for --trainable lora")
    if args.full and (args.no_compile or args.task == "search"):
        raise InputError(
            f"--full compiles all layers: not with {'--no-compile' if args.no_compile else '--task search'}"
        )


def _asked(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a plan depends on beside its target."""
    found = {
        key: value
        for key, value in vars(args).items()
        if key not in ("command", "model", "topology", "output")
    }
    return found | {"config": hashlib.sha256(repr(find_model(name)).encode()).hexdigest()[:16]}


def _search(targets: list[Target], args: argparse.Namespace) -> None:
    for target in targets:
        for plan in make_search_plans(target, args):
            print(describe_search(plan), flush=True)
            if args.output:
                folder = epath.Path(args.output)
                folder.mkdir(parents=True, exist_ok=True)
                stem = f"search_{args.rows}x{args.dim}_{plan['dtype']}_{target.name.replace(':', '-')}"
                write_json(folder / f"{stem}.json", plan | provenance())


def make_plan(name: str, target: Target, args: argparse.Namespace) -> dict[str, Any]:
    """A plan, ready for JSON.

    Raises:
        InputError: the model or the options are not possible.
    """
    config, added = find_model(name), False
    if args.task == "train" and "bias" in trained_kinds(args.trainable):
        config, added = with_biases(config)
    limit = config.max_positions or UNLIMITED_DEFAULT
    if args.length > limit:
        raise InputError(f"--length {args.length}, but the model has {limit} positions")
    plans = list(search(config, target, args))
    chosen = choose(plans)
    compiled, chosen, notes = _compile(config, target, chosen, args)
    work, sizes, time = chosen.work, chosen.sizes, chosen.times
    return {
        "model": name,
        "task": work.task,
        "trainable": work.trainable if work.task == "train" else None,
        "biases_added": added,
        "dtype": work.dtype,
        "weights": work.weights,
        "topology": target.name,
        "chip": target.chip_name,
        "devices": target.count,
        "mesh": mesh_spec(sizes),
        "length": work.length,
        "rows": work.rows,
        "examples": work.examples or None,
        "chunk": work.chunk or None,
        "largest": largest(config, target, work, sizes),
        "parameters": device_bytes(config, "", Build(compute_dtype("bfloat16")), (1, 1, 1))[0] / 2,
        "memory": dataclasses.asdict(chosen.memory)
        | {"total": chosen.memory.total, "usable": target.chip.usable, "chip": target.chip.memory},
        "fits": chosen.fits,
        "compiled": compiled,
        "notes": notes,
        "devices_needed": target.count if chosen.fits else needed(config, target, work),
        "flops": flops(config, work),
        "flops_check": _check_flops(config, work),
        "seconds": dataclasses.asdict(time) | {"step": time.step},
        "tokens_per_second": work.rows * work.length / time.step,
    }


def _check_flops(config: DecoderConfig, work: Work) -> dict[str, Any]:
    """Both counts of FLOPs, of few layers and rows, where XLA's is quick."""
    small = at_depth(config, 2 * compiler.depth_step(config))
    few = dataclasses.replace(work, rows=8)
    if work.task == "train":
        few = dataclasses.replace(few, chunk=4 if chunks_of(work) > 1 else 0, examples=4)
    return {
        "layers": small.num_layers,
        "analytic": flops(small, few, loops_once=True),
        "xla": compiler.counted_flops(small, few),
    }


def _compile(
    config: DecoderConfig, target: Target, plan: Plan, args: argparse.Namespace
) -> tuple[dict[str, Any] | None, Plan, list[str]]:
    """(what the compiler says or None, the plan, with a smaller chunk or batch where the first does not fit, notes)."""
    if args.no_compile:
        return None, plan, []
    devices = compiler.devices_of(target)
    if devices is None:
        return None, plan, [compiler.missing(target)]
    notes = [compiler.WITHOUT_GPU] if compiler.is_described(devices[0]) else []
    while True:
        print(f"compiling for {target.name}, {mesh_spec(plan.sizes)} ...", file=sys.stderr, flush=True)
        try:
            found = compiler.compile_work(config, plan.work, mesh_spec(plan.sizes), devices, full=args.full)
            if len(found.layers) > 1 and plan.memory.resident + found.temporaries > NEAR * target.chip.usable:
                print(
                    f"near the limit: compiling all {config.num_layers} layers ...",
                    file=sys.stderr,
                    flush=True,
                )
                found = compiler.compile_work(config, plan.work, mesh_spec(plan.sizes), devices, full=True)
        except compiler.DoesNotFit as error:
            total, result = error.needed, {"layers": [error.layers], "total": error.needed, "fits": False}
            notes.append(f"the compiler refuses: {error}")
        else:
            total = plan.memory.resident + found.temporaries
            result = dataclasses.asdict(found) | {"total": total, "fits": total <= target.chip.usable}
        smaller = _smaller(plan.work, plan.sizes[0] * plan.sizes[1], args)
        if total <= target.chip.usable or not plan.fits or smaller is None:
            return result, dataclasses.replace(plan, fits=bool(result["fits"])), notes
        notes.append(
            f"{plan.work.chunk or plan.work.rows} rows at a time need {total / GIB:.2f} GiB compiled: tried fewer"
        )
        plan = evaluate(config, target, smaller, plan.sizes)


def _smaller(work: Work, shards: int, args: argparse.Namespace) -> Work | None:
    """Half the rows at a time, or None where there is no half, or the user said how many."""
    now = work.chunk if work.task == "train" and chunks_of(work) > 1 else work.rows
    half = now // shards // 2 * shards
    if half == 0 or (args.chunk_size if work.task == "train" else args.batch_size):
        return None
    return (
        dataclasses.replace(work, chunk=half)
        if work.task == "train"
        else dataclasses.replace(work, rows=half)
    )
