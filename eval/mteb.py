"""mteb's own evaluator over this project's models: on a BEIR folder of one's own, or on mteb's tasks by name.

`BiEncoderModel` and `CrossEncoderModel` satisfy mteb 2's EncoderProtocol and CrossEncoderProtocol, so they also go
into any other call of ``mteb.evaluate``. Local folders need no network: they run as an mteb retrieval task; with
--cross-encoder as an mteb re-ranking of BM25's (or --first-stage's) best documents. Tasks by name read mteb's data sets
from the Hugging Face hub, or from its cache.

  python -m eval mteb DATA/scifact --model MODEL --output OUT
  python -m eval mteb --tasks STSBenchmark NFCorpus --model MODEL --output OUT

A model's prompts by the name of a task, of a type of tasks, or of "query" and "document" are used as mteb uses
sentence-transformers' (--prompts FILE adds some); --instruction puts a task's instruction before queries.
OUT gets NAME.json or TASK.json; what is there of another model, other options or other data is not replaced.
"""

from __future__ import annotations

import argparse
import math
import time
import traceback
from typing import Any, get_args

import datasets
import mteb
from etils import epath
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata, TaskType

from sgpt_jax.checkpoint.untrusted import read_object
from sgpt_jax.errors import InputError
from sgpt_jax.files.beir import DataSet
from sgpt_jax.metrics import CUTS, Run, cut
from sgpt_jax.rerank import texts_of

from .beir import CACHE, add_data_arguments, data_sets, mean_of
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
from .mteb_models import BiEncoderModel, CrossEncoderModel
from .provenance import provenance
from .results import Result, check_settings, of_mteb, write_result
from .stages import Stages, first_stage

# our metrics -> mteb's, per query
_NAMES = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P"}
# What prompts are named by, besides tasks.
_NAMED = ("query", "document", *get_args(TaskType))


def local_task(
    data: DataSet, *, top_ranked: Run | None = None, ignore_identical_ids: bool = False
) -> AbsTaskRetrieval:
    """A BEIR folder as an mteb retrieval task, without the network.

    Besides mteb's scores, which are rounded to five digits, its result has the same means unrounded, under the names
    that `sgpt_jax.metrics` uses (``ndcg@10``).

    Args:
        data: a loaded data set.
        top_ranked: the documents to re-rank, which makes it a task for cross-encoders.
        ignore_identical_ids: drop documents that have the query's id.
    """

    class LocalRetrieval(AbsTaskRetrieval):
        """The folder's corpus, queries and judgements."""

        metadata = TaskMetadata(
            name=f"Local-{data.name}",
            description=f"The BEIR folder {data.name}.",
            dataset={"path": str(data.folder), "revision": "local"},
            type="Retrieval",
            category="t2t",
            eval_splits=[data.split],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )
        k_values = CUTS

        def load_data(self, num_proc: int | None = None, **options: Any) -> None:
            """Fills in the data set, in mteb's form."""
            corpus = [{"id": document.id, "text": document.text} for document in data.documents()]
            queries = [{"id": query, "text": text} for query, text in data.queries.items()]
            ranked = {query: list(hits) for query, hits in top_ranked.items()} if top_ranked else None
            self.dataset = {
                "default": {
                    data.split: {
                        "corpus": datasets.Dataset.from_list(corpus),
                        "queries": datasets.Dataset.from_list(queries),
                        "relevant_docs": {query: data.qrels[query] for query in data.queries},
                        "top_ranked": ranked,
                    }
                }
            }
            self.data_loaded = True

        def task_specific_scores(self, scores: Any, *_: Any, **__: Any) -> dict[str, float]:
            """The means of mteb's values per query, unrounded."""
            return {
                f"{name}@{k}": math.fsum(values[f"{column}_{k}"] for values in scores.values()) / len(scores)
                for k in CUTS
                for name, column in _NAMES.items()
            }

    task = LocalRetrieval()
    task.ignore_identical_ids = ignore_identical_ids
    return task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_data_arguments(parser, required=False)
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="TASK", help="tasks of mteb by name, such as STSBenchmark"
    )
    parser.add_argument(
        "--prompts",
        type=epath.Path,
        metavar="FILE",
        help="JSON object of more prompts by name: a task, a data set that is given, a type of tasks, query, document, "
        "or TASK-query",
    )
    parser.add_argument(
        "--instruction",
        metavar="TEMPLATE",
        help="before queries, with {instruction} for the task's, such as 'Instruct: {instruction}\\nQuery: ' "
        "(\\n is a line break)",
    )
    add_bi_encoder_arguments(parser, required=False)
    add_cross_encoder_arguments(parser)
    parser.add_argument("--first-stage", metavar="RUN", help="what to re-rank, as for beir (default: BM25)")
    add_common_arguments(parser)


def main(args: argparse.Namespace) -> None:
    """Runs mteb on every data set."""
    if bool(args.model) == bool(args.cross_encoder):
        raise InputError("give one of --model and --cross-encoder")
    if not (args.data or args.tasks):
        raise InputError("give a data set, or --tasks")
    if args.cross_encoder and (args.prompts or args.instruction):
        raise InputError("--prompts and --instruction are for --model; a cross-encoder has --prompt")
    if args.cross_encoder and args.tasks:
        raise InputError("--tasks are for --model; a cross-encoder re-ranks a data set of your own")
    if args.model and args.first_stage:
        raise InputError("--first-stage is for --cross-encoder, which re-ranks it")
    unused = [f"--{name.replace('_', '-')}" for name, usual in _OF_DATA.items() if vars(args)[name] != usual]
    if unused and not args.data:
        raise InputError(f"{', '.join(unused)}: only for a data set of your own; mteb's tasks have theirs")
    check_stages(args)
    sets = list(data_sets(args))
    asked: dict[str, Any] = {}
    if args.prompts:
        asked["prompts"] = _prompts(args.prompts, [data.name for _, parts in sets for data in parts])
    if args.instruction:
        asked["instruction"] = args.instruction.replace("\\n", "\n")
    lazy = bi_encoder(args) if args.model else cross_encoder(args)
    stages = Stages(
        lazy if args.model else None,
        lazy if args.cross_encoder else None,
        args.rerank_depth or RERANK_DEPTH,
        epath.Path(args.first_stage) if args.first_stage else None,
    )
    of_task = {"model": lazy.identity, **asked}
    for name in args.tasks:
        check_settings(args.output / f"{name}.json", "mteb", of_task)
    settings = {}
    for name, parts in sets:
        for data in parts:
            settings[data.name] = stages.settings(data, _ignores(data, args)) | asked
            check_settings(args.output / f"{data.name}.json", "mteb", settings[data.name], data.facts)
        if len(parts) > 1:
            check_settings(args.output / f"{name}.json", "mteb", settings[parts[0].name])
    tasks = _tasks(args.tasks)
    adapter = BiEncoderModel(lazy.model, **asked) if args.model else CrossEncoderModel(lazy.model)
    options = {"batch_tokens": args.batch_tokens}
    failed = []
    for task in tasks:
        try:
            run_task(adapter, task, lazy, args.output, of_task, options)
        except Exception as error:  # whatever it is, the other tasks can be had
            traceback.print_exc()
            failed.append(f"{task.metadata.name} ({type(error).__name__}: {error})")
    for name, parts in sets:
        results = []
        for data in parts:
            result = _run_data_set(data, stages, adapter, lazy, _ignores(data, args), options)
            result["settings"] = settings[data.name] | {"data": data.facts()}
            write_result(args.output / f"{data.name}.json", result)
            results.append(result)
        if len(parts) > 1:
            result = mean_of(name, results)
            write_result(args.output / f"{name}.json", result)
            print(f"{name}: ndcg@10 {result['metrics']['ndcg@10']:.6f}, mean of {len(parts)} forums")
    if failed:
        raise InputError(f"failed: {'; '.join(failed)}")


# Options of data sets, and what they are where they are not given.
_OF_DATA = {
    "split": None,
    "ignore_identical_ids": None,
    "encoding_errors": "strict",
    "skip_bad_lines": False,
    "cache": CACHE,
}


def _ignores(data: DataSet, args: argparse.Namespace) -> bool:
    return data.ignores_identical_ids if args.ignore_identical_ids is None else args.ignore_identical_ids


def _prompts(path: epath.Path, names: list[str]) -> dict[str, str]:
    """The prompts of a file; the name of a data set at hand stands for that of its task.

    Raises:
        InputError: the file holds something else, or a name of nothing that has prompts.
    """
    prompts = read_object(path)
    if not all(isinstance(text, str) for text in prompts.values()):
        raise InputError(f"{path}: must be an object of texts by name")
    found = {}
    for key, text in prompts.items():
        name = key.removesuffix("-query").removesuffix("-document")
        if name in names:
            key = f"Local-{key}"
        elif not (name.removeprefix("Local-") in names or name in _NAMED or _is_task(name)):
            raise InputError(
                f"{path}: {key!r} names no task of mteb {mteb.__version__}, no type of tasks, no data set that is "
                "given, and neither query nor document"
            )
        found[key] = text
    return found


def _is_task(name: str) -> bool:
    try:
        return mteb.get_task(name).metadata.name == name
    except KeyError:
        return False


def _run_data_set(
    data: DataSet, stages: Stages, adapter: Any, lazy: LazyModel, ignore: bool, options: dict[str, Any]
) -> Result:
    start = time.perf_counter()
    data.load()
    top_ranked, first = None, {"name": "bi-encoder"}
    if stages.cross_encoder:
        run, first = first_stage(data, stages, stages.depth + ignore, data.documents())
        top_ranked, _ = cut(run, stages.rerank_depth, ignore_identical_ids=ignore)
        if stages.runs:
            texts_of(top_ranked, data.documents())  # names a document that the corpus lacks
    scores = evaluate(adapter, local_task(data, top_ranked=top_ranked, ignore_identical_ids=ignore), options)
    print(f"{data.name}: ndcg@10 {scores['ndcg@10']:.6f} by mteb {mteb.__version__}")
    return {
        "kind": "mteb",
        "name": data.name,
        "metrics": {key: value for key, value in scores.items() if "@" in key},
        "mteb": {key: value for key, value in scores.items() if "_at_" in key and math.isfinite(value)},
        "first_stage": first,
        "model": lazy.describe() if stages.model else None,
        "cross_encoder": lazy.describe() if stages.cross_encoder else None,
        "counts": {"queries": len(data.queries)},
        "seconds": {"total": time.perf_counter() - start},
        **provenance("mteb", "pytrec_eval-terrier"),
    }


def _tasks(names: list[str]) -> list[Any]:
    """mteb's tasks by name, with their data.

    Raises:
        InputError: there is no such task, or its data cannot be had.
    """
    tasks = []
    for name in names:
        try:
            task = mteb.get_task(name)
        except KeyError as error:
            raise InputError(f"{name}: no task of mteb {mteb.__version__}: {error.args[0]}") from None
        try:
            task.load_data()
        except Exception as error:
            raise InputError(f"{name}: its data cannot be had: {type(error).__name__}: {error}") from error
        tasks.append(task)
    return tasks


def run_task(
    adapter: Any,
    task: Any,
    lazy: LazyModel,
    output: epath.Path,
    settings: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Evaluates one task of mteb and writes OUTPUT/TASK.json; `options` as in `evaluate`."""
    start = time.perf_counter()
    path = output / f"{task.metadata.name}.json"
    result = of_mteb(path, _evaluated(adapter, task, options).to_dict()) | {
        "model": lazy.describe(),
        "settings": settings,
        "seconds": {"total": time.perf_counter() - start},
        **provenance("mteb"),
    }
    write_result(path, result)
    score = "-" if result["main_score"] is None else f"{result['main_score']:.6f}"
    print(f"{task.metadata.name}: {score} by mteb {mteb.__version__}")


def evaluate(model: Any, task: AbsTaskRetrieval, options: dict[str, Any] | None = None) -> dict[str, float]:
    """mteb's scores for one local task; `options` are for the model's `encode` or `predict`."""
    (scores,) = _evaluated(model, task, options or {}).scores[task.metadata.eval_splits[0]]
    return dict(scores)


def _evaluated(model: Any, task: Any, options: dict[str, Any]) -> Any:
    """mteb's result of one task. Nothing is read from or written to mteb's cache of results."""
    given: Any = {"show_progress_bar": False, **options}
    found = mteb.evaluate(
        model, task, cache=None, co2_tracker=False, show_progress_bar=False, encode_kwargs=given
    )
    return found.task_results[0]
