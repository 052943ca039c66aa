"""BEIR: retrieval with a bi-encoder or BM25, and re-ranking with a cross-encoder.

The first stage is the bi-encoder (--model), a run file (--first-stage), or, when neither is given, BM25. With
--cross-encoder its best documents are re-ranked. For every data set the folder OUT gets NAME.json (metrics, and what
is needed to repeat them) and NAME.trec (the run). A data set whose result is there already is not computed again;
one of other models, options or files is refused.
CQADupStack's twelve forums are averaged into cqadupstack.json; where all the sets of one of the SGPT paper's averages
are there, of the system at hand, averages.json holds it.

  python -m eval beir scifact nfcorpus --model MODEL --output OUT
  python -m eval beir DATA/scifact --output OUT                                  BM25 alone
  python -m eval beir DATA/scifact --cross-encoder MODEL --rerank-depth 100 --output OUT
  python -m eval beir DATA/scifact --model MODEL --hybrid --output OUT           with BM25, by scaled scores

Several processes (--distributed, or --coordinator) share the encoding and the re-ranking, each with a whole model on
its own devices; the figures are those of one.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.cli.options import PROCESSES, add_options
from sgpt_jax.cross_encoder import CrossEncoder
from sgpt_jax.errors import InputError, whole
from sgpt_jax.files.beir import DataSet
from sgpt_jax.files.runs import write_json_run, write_run
from sgpt_jax.runtime import processes

from .datasets import AVERAGES, default_split, forums_of, obtain
from .models import (
    RERANK_DEPTH,
    LazyModel,
    add_bi_encoder_arguments,
    add_common_arguments,
    add_cross_encoder_arguments,
    bi_encoder,
    check_stages,
    cross_encoder,
)
from .results import Result, check_settings, make_folder, mean_metrics, read_result, split_of, write_result
from .stages import Stages, measure

CACHE = Path("~/.cache/sgpt-jax/beir").expanduser()


def evaluate(
    data: str | os.PathLike[str],
    model: BiEncoder | None = None,
    *,
    cross_encoder: CrossEncoder | None = None,
    rerank_depth: int = RERANK_DEPTH,
    split: str | None = None,
) -> Result:
    """Measures models on one BEIR data set, as the command does, and writes nothing.

    Args:
        data: a folder, or the name of a set that BEIR publishes, which is downloaded once.
        model: the first stage; None for BM25.
        cross_encoder: re-ranks the `rerank_depth` best documents of the first stage.
        split: judgements; None for test (dev for msmarco).

    Returns:
        What the command writes as NAME.json: "metrics" ({"ndcg@10": ..., "recall@100": ..., ...}), "queries" and
        "per_query" with their values, "counts", "seconds".

    Raises:
        InputError: the data cannot be had or break a rule, or are CQADupStack's forums, each a folder of its own;
            rerank_depth is no number of documents.
    """
    folder = obtain(os.fspath(data), CACHE)
    name = folder.resolve().name
    if forums := forums_of(folder):
        raise InputError(f"{folder}: holds {len(forums)} data sets, such as {forums[0]}: give one of them")
    if whole("rerank_depth", rerank_depth) < 1:
        raise InputError(f"rerank_depth must be positive, not {rerank_depth}")
    found = DataSet(name, folder, split or default_split(name)).load()
    result, _ = measure(
        found, Stages(_loaded(model), _loaded(cross_encoder), rerank_depth, None), found.ignores_identical_ids
    )
    return result


def _loaded(model: BiEncoder | CrossEncoder | None) -> LazyModel | None:
    return None if model is None else LazyModel(model.name, {}, lambda: model)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_data_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="compute again what is in OUT already")
    add_bi_encoder_arguments(parser, required=False)
    add_cross_encoder_arguments(parser)
    parser.add_argument(
        "--first-stage", metavar="RUN", help="a run (TREC or JSON), or a folder with NAME.trec files"
    )
    parser.add_argument(
        "--hybrid",
        action="store_true",
        help="join the first stage with BM25 by the mean of scaled scores, before any re-ranking",
    )
    add_common_arguments(parser)
    add_options(parser, PROCESSES)


def add_data_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Data sets, where results go, and how files are read."""
    parser.add_argument(
        "data",
        nargs="+" if required else "*",
        metavar="DATA",
        help="a BEIR folder, the name of a set that BEIR publishes, or a data set of the Hugging Face hub in BEIR's or "
        "mteb's layout (hf:BeIR/scifact)",
    )
    parser.add_argument(
        "--output", required=True, type=epath.Path, metavar="OUT", help="folder for the results"
    )
    parser.add_argument("--split", help="judgements to use (default: test; dev for msmarco)")
    parser.add_argument(
        "--ignore-identical-ids",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="drop a document that has the query's id (default: for arguana and quora)",
    )
    parser.add_argument(
        "--encoding-errors", choices=("strict", "replace"), default="strict", help="invalid UTF-8"
    )
    parser.add_argument("--skip-bad-lines", action="store_true", help="skip and count lines of broken JSON")
    parser.add_argument(
        "--cache",
        type=Path,
        default=CACHE,
        metavar="FOLDER",
        help="where published sets are downloaded to (default: %(default)s)",
    )


def data_sets(args: argparse.Namespace) -> Iterator[tuple[str, list[DataSet]]]:
    """The data sets asked for, by the name of their result; CQADupStack is twelve under one name.

    Raises:
        InputError: a set cannot be had, or two have the same name and would share a file.
    """
    seen: dict[str, str] = {}
    for source in args.data:
        folder = obtain(source, args.cache)
        name = folder.resolve().name
        if seen.setdefault(name, source) != source:
            raise InputError(f"{source}: has the name of {seen[name]}; give it an --output of its own")
        parts = [(f"{name}-{forum.name}", forum) for forum in forums_of(folder)] or [(name, folder)]
        yield (
            name,
            [
                DataSet(
                    part, path, args.split or default_split(part), args.encoding_errors, args.skip_bad_lines
                )
                for part, path in parts
            ],
        )


def main(args: argparse.Namespace) -> None:
    """Measures every data set that is not in the output folder yet."""
    if args.model and args.first_stage:
        raise InputError("--model and --first-stage are both a first stage: give one of them")
    check_stages(args)
    stages = Stages(
        bi_encoder(args) if args.model else None,
        cross_encoder(args) if args.cross_encoder else None,
        args.rerank_depth or RERANK_DEPTH,
        epath.Path(args.first_stage) if args.first_stage else None,
        args.batch_tokens,
        args.hybrid,
    )
    if args.hybrid and not (args.model or args.first_stage):
        raise InputError("--hybrid joins BM25 with another ranking: give --model or --first-stage")
    with processes.first_goes_ahead():  # it may have to download
        sets = list(data_sets(args))
    result: Result = {}
    for name, parts in sets:
        results = [run_data_set(data, stages, args.output, args) for data in parts]
        result = results[-1]
        if len(parts) > 1 and processes.first():
            result = mean_of(name, results)
            write_result(args.output / f"{name}.json", result)
            print(_line(name, result["metrics"], f"mean of {len(parts)} forums"))
    if processes.first():
        _write_averages(args.output, result)


def run_data_set(data: DataSet, stages: Stages, output: epath.Path, args: argparse.Namespace) -> Result:
    """The result of one data set: read if it is in the output folder, else computed and written.

    Of several processes the first one does both, and the others, which share the work, get an empty result.

    Raises:
        InputError: the data or the run break a rule, or the folder holds a result of other settings.
    """
    ignore = data.ignores_identical_ids if args.ignore_identical_ids is None else args.ignore_identical_ids
    settings = stages.settings(data, ignore)
    if processes.count() > 1:
        processes.check_alike(settings | {"data": data.facts()})
    path = output / f"{data.name}.json"
    found = processes.from_first(path.exists() and not args.overwrite)
    if found and processes.first():
        result = check_settings(path, "beir", settings, data.facts, "give another --output, or --overwrite")
        print(_line(data.name, result["metrics"], "found in the output folder"))
        return result
    if found:
        return {}
    result, run = measure(data.load(), stages, ignore)
    if not processes.first():
        return {}
    result["settings"] = settings | {"data": data.facts()}
    make_folder(output)
    _write_run(output, data.name, run)
    write_result(path, result)
    print(_line(data.name, result["metrics"], _notes(result["counts"])))
    return result


def _write_run(folder: epath.Path, name: str, run: dict[str, dict[str, float]]) -> None:
    """NAME.trec; as NAME.run.json where an id holds white space, which TREC's columns cannot."""
    path, other = folder / f"{name}.trec", folder / f"{name}.run.json"
    try:
        write_run(path, run)
    except InputError:
        path, other = other, path
        write_json_run(path, run)
    other.unlink(missing_ok=True)  # of an earlier result, and `Stages.run_file` would read it for this one's


def mean_of(name: str, results: list[Result]) -> Result:
    """The mean over CQADupStack's forums, every forum with the same weight."""
    first = results[0]
    kept = ("model", "cross_encoder", "command", "created", "versions", "device")
    return {
        "kind": first["kind"],
        "name": name,
        "metrics": mean_metrics([result["metrics"] for result in results]),
        **{key: first[key] for key in kept},
        "settings": {key: value for key, value in first["settings"].items() if key != "data"},
        "first_stage": {key: value for key, value in first["first_stage"].items() if key != "metrics"},
        "forums": {result["name"]: result["metrics"]["ndcg@10"] for result in results},
        "counts": {"queries": sum(result["counts"]["queries"] for result in results)},
        "seconds": {"total": sum(result["seconds"]["total"] for result in results)},
    }


def _write_averages(folder: epath.Path, latest: Result) -> None:
    """averages.json, if all the sets of one of the paper's averages have been measured with the system of `latest`."""
    names = {name for names in AVERAGES.values() for name in names}
    paths = {name: folder / f"{name}.json" for name in names}
    found = {name: read_result(path) for name, path in paths.items() if path.exists()}
    system = _system(latest)
    metrics = {
        name: result["metrics"]
        for name, result in found.items()
        if _system(result) == system and split_of(result) is None
    }
    averages = {
        key: mean_metrics([metrics[name] for name in names])
        for key, names in AVERAGES.items()
        if all(name in metrics for name in names)
    }
    if averages:
        models = {key: latest[key] for key in ("model", "cross_encoder")}
        write_result(
            folder / "averages.json", {"kind": "averages", "metrics": averages, **models, "system": system}
        )
        for key, values in averages.items():
            print(_line(key, values, f"mean of {len(AVERAGES[key])} sets"))


def _system(result: Result) -> dict[str, Any]:
    """What a result has in common with those of the same system on other data sets, as JSON has it.

    Run files of which nothing is known are taken for one system's.
    """
    settings = dict(result.get("settings") or {})
    for key in ("split", "ignore_identical_ids", "encoding_errors", "skip_bad_lines", "data"):  # of the data
        settings.pop(key, None)
    for key in ("model", "cross_encoder"):  # which results of earlier versions do not say
        if key in settings:
            settings[key] = {name: value for name, value in settings[key].items() if name != "base"}
    if "run" in settings.get("first_stage", {}):  # a file for each data set: what it says of the ranking
        first = result["first_stage"].items()
        settings["first_stage"] = {key: value for key, value in first if key not in ("run", "metrics")}
    return json.loads(json.dumps(settings))


def _line(name: str, metrics: dict[str, float], note: str) -> str:
    shown = "  ".join(f"{key} {metrics[key]:.4f}" for key in ("ndcg@10", "recall@100", "mrr@10"))
    return f"{name}: {shown}  ({note})"


def _notes(counts: dict[str, int]) -> str:
    """The number of queries, and every other count that is not 0."""
    notes = [f"{counts['queries']} queries"]
    notes += [
        f"{what.replace('_', ' ')}: {count}"
        for what, count in counts.items()
        if count and what not in ("queries", "documents")
    ]
    return ", ".join(notes)
