"""This project beside what else one would use, in one process, in turn, with the same weights, texts and precision.

  encode  texts to vectors: sentence-transformers, and a plain loop over transformers
  score   query log-probabilities of pairs: one by one with all logits, as the SGPT repository does, and in batches
  train   a step that trains biases alone: the same in torch, by sentence-transformers' trainer, and our own step that
          trains everything
  search  the best of many vectors: FAISS flat, usearch's exact search, and NumPy; of vectors held on the device
          (--held), torch
  start   a new process until it has searched a small index, with warm caches; sentence-transformers' until it has a
          query's vector

All but start when none is named. What is not installed is left out by name. Torch runs on the GPU if it finds one. "of
limit" is the share of the rate of large matmuls in the same dtype, measured in the same rounds; useful matmuls alone
are counted. "compile s" is how much longer the first call took, "peak MB" what one more call adds to this
process's memory, or the device's peak.

On a machine that does other work too, set OMP_WAIT_POLICY=passive: torch's threads otherwise wait for each other by
spinning, which can make torch several times slower than it is.

Before a release: --against FILE, the figures of the release before. A peer that this project is now less ahead of than
it was there, by more than a tenth, ends the command with code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from etils import epath

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.checkpoint.untrusted import read_object
from sgpt_jax.cli.given import flags_given
from sgpt_jax.cli.options import SOURCE, add_options, dtype, option, positive
from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import write_json
from sgpt_jax.load import token_limit

from ..plan.models import MODELS
from ..provenance import provenance
from ..results import make_folder
from .benchmark import Benchmark, measure, print_table, threads
from .encode import encode_benchmark
from .models import INT8, mixed_texts, open_data, random_model
from .search import READ, held_benchmark, search_benchmark
from .start import start_benchmark

PARTS = ("encode", "score", "train", "search", "start")
# Sizes by part: option, default, what it counts.
SIZES = {
    "encode": [("texts", 500, "four documents, one query, and so on")],
    "score": [("pairs", 200, "pairs of query and document")],
    "train": [("batch_size", 32, "triplets a step")],
    "search": [
        ("vectors", 100_000, "vectors of dimension 768"),
        ("queries", 100, "queries of a batch"),
        ("results", 100, "results of a query"),
    ],
}
SLOWER = 0.9  # of a stored factor: what --against lets pass, since medians of five differ by a few percent
TRAIN_LENGTH = 75  # of the SGPT paper's NLI models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this program."""
    data = os.environ.get("SGPT_DATA")
    here = "$SGPT_DATA/{}" if data is None else os.path.join(data, "{}")
    add_options(
        parser,
        option("part", nargs="?", choices=PARTS, help="what to measure (default: all but start)"),
        option("--model", help=f"{SOURCE}; search needs none"),
        option(
            "--shape",
            choices=list(MODELS),
            help="in its place: this shape, with random weights, which take as long",
        ),
        option(
            "--tokenizer",
            default=data and here.format("gpt2_tokenizer"),
            metavar="FOLDER",
            help="of --shape: vocab.json and merges.txt (default: $SGPT_DATA/gpt2_tokenizer)",
        ),
        option(
            "--data",
            default=data and here.format("scifact"),
            metavar="FOLDER",
            help="texts, a folder in BEIR's format or the name of a set (default: $SGPT_DATA/scifact)",
        ),
        dtype(of="of weights and matmuls; search is float32 without --held (default: float32)"),
        option(
            "--weights",
            choices=("int8",),
            help="encode and train: measure this too; train leaves out the step that trains everything",
        ),
        option(
            "--held",
            choices=("bfloat16", "int8"),
            help="search: vectors that are made on the device and stay there, in place of an index",
        ),
        option("--alone", action="store_true", help="leave out what is not this project's"),
        option(
            "--max-seq-length",
            type=positive,
            metavar="N",
            help=f"tokens of a text that are read (default: the model's limit; of train {TRAIN_LENGTH})",
        ),
    )
    option(
        "--rounds", type=positive, default=5, metavar="N", help="timed turns of each (default: %(default)s)"
    ).add_to(parser)
    for part, sizes in SIZES.items():
        for name, default, what in sizes:
            text = f"{part}: {what} (default: {default})"
            option(f"--{name.replace('_', '-')}", type=positive, metavar="N", help=text).add_to(parser)
    option("--output", metavar="FILE", help="write the figures to this JSON file").add_to(parser)
    option("--json", action="store_true", help="print the figures as JSON, and no table").add_to(parser)
    option("--against", metavar="FILE", help="compare with the figures of an earlier --output").add_to(parser)


def main(args: argparse.Namespace) -> None:
    """Measures, prints and writes."""
    before = None if args.against is None else read_object(epath.Path(args.against))
    if args.output:
        make_folder(epath.Path(args.output).parent)
    parts = [args.part] if args.part else [part for part in PARTS if part != "start"]
    if parts != ["search"] and (args.model is None) == (args.shape is None):
        raise InputError("give a model: either --model or --shape")
    if args.shape and parts != ["search"] and not args.tokenizer:
        raise InputError("no tokenizer: give --tokenizer, or set SGPT_DATA")
    if args.weights and args.part not in ("encode", "train"):
        raise InputError("--weights int8 is for encode and train")
    if args.held and args.part != "search":
        raise InputError("--held is for search")
    unused = flags_given(args, ("model", "shape", "max_seq_length") if args.part == "search" else ())
    for part, sizes in SIZES.items():
        if args.part not in (None, part):
            unused += flags_given(args, [name for name, _, _ in sizes])
        vars(args).update({name: default for name, default, _ in sizes if vars(args)[name] is None})
    if unused:
        raise InputError(f"{', '.join(unused)}: not for {args.part}")
    result: dict[str, Any] = {"left_out": {}}
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            try:
                benchmark = _benchmark(part, args, folder)
            except InputError as error:
                if args.part:
                    raise
                result["left_out"][part] = str(error)
                if not args.json:
                    print(f"left out: {part}: {error}")
                continue
            result[part] = measure(benchmark, args.rounds)
            if not args.json:
                print_table(part, benchmark, result[part])
            del benchmark  # and its models
    loads = {"threads": threads(), "load_average": os.getloadavg()}
    loads["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY")
    peers = ("torch", "sentence-transformers", "faiss-cpu", "faiss-gpu", "usearch")
    figures = result | loads | provenance(*peers)
    if args.output:
        write_json(args.output, figures)
    if args.json:
        print(json.dumps(figures, indent=2))
    if before is not None and (slower := _slower(before, result)):
        raise InputError(f"slower than {args.against}: " + "; ".join(slower))


def _slower(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Of what both measured, the peers that this project is less ahead of now; seconds would tell of the machine.

    Raises:
        InputError: they did not measure the same, or no peer that both have.
    """
    slower, compared = [], 0
    for part in PARTS:
        old, new = (figures.get(part) or {} for figures in (before, now))
        if not old or not new:
            continue
        for key in ("work", "dtype"):
            if old[key] != new[key]:
                raise InputError(f"cannot be compared: {key} of {part} was {old[key]}, and is {new[key]} now")
        for name in sorted(old["ways"].keys() & new["ways"].keys()):
            if name.startswith(("ours", READ)):
                continue
            compared += 1
            factors = [figures["ways"][name]["ours_over"] for figures in (old, new)]
            if factors[1] < SLOWER * factors[0]:
                slower.append(f"{part}: {factors[1]:.2f} times {name}, {factors[0]:.2f} before")
    if not compared:
        raise InputError("cannot be compared: no peer was measured in both")
    return slower


def _benchmark(part: str, args: argparse.Namespace, folder: str) -> Benchmark:
    alone = args.alone
    if part == "search":
        sizes = args.vectors, args.queries, args.results
        if args.held:
            return held_benchmark(*sizes, args.held, alone=alone)
        return search_benchmark(*sizes, folder, alone=alone)
    length = args.max_seq_length or (TRAIN_LENGTH if part == "train" else None)

    def load(weights: str | None = None) -> BiEncoder:
        if args.shape:
            return random_model(args.shape, args.tokenizer, args.dtype, length, weights)
        return BiEncoder.from_pretrained(args.model, dtype=args.dtype, max_seq_length=length, weights=weights)

    model, int8 = load(), load(args.weights) if args.weights else None
    if part == "start":
        return start_benchmark(model, open_data(args.data), folder, alone=alone)
    if part == "score":
        with _extra("eval"):
            from .score import score_benchmark
        # Of a pair all is read, whatever the folder says of texts.
        limit = token_limit(model.decoder.config, args.max_seq_length)
        return score_benchmark(model, limit, open_data(args.data), args.pairs, alone=alone)
    if part == "encode":
        texts = mixed_texts(open_data(args.data), args.texts)
        benchmark = encode_benchmark(model, texts, int8=int8, alone=alone)
    else:
        with _extra("train"):
            from .train import train_benchmark
        benchmark = train_benchmark(model, open_data(args.data), args.batch_size, int8=int8, alone=alone)
    if args.shape:  # its int8 weights are drawn anew
        compare = benchmark.compare
        benchmark.compare = lambda found: compare({name: found[name] for name in found if name != INT8})
    return benchmark


@contextlib.contextmanager
def _extra(name: str) -> Iterator[None]:
    """What is missing belongs to this extra of the project."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(f"needs {error.name}: pip install -e '.[{name}]'") from None
