"""mteb's own evaluator over this project's models: on a BEIR folder of one's own, or on mteb's tasks by name.

`BiEncoderModel` and `CrossEncoderModel` satisfy mteb 2's EncoderProtocol and CrossEncoderProtocol, so they also go
into any other call of ``mteb.evaluate``. Local folders need no network: they run as an mteb retrieval task; with
--cross-encoder as an mteb re-ranking of BM25's (or --first-stage's) best documents. Tasks by name read mteb's data sets
from the Hugging Face hub, or from its cache.

  python -m eval mteb DATA/scifact --model MODEL --output OUT
  python -m eval mteb --tasks STSBenchmark NFCorpus --model MODEL --output OUT

A model's prompts by the name of a task, of a type of tasks, or of "query" and "document" are used as mteb uses
sentence-transformers' (--prompts FILE adds some); --instruction puts a task's instruction before queries.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import datasets
import jax
import mteb
import numpy as np
from etils import epath
from mteb.abstasks.abstask import get_abstask_prompt
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.abs_encoder import get_prompt_name
from mteb.types import PromptType

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.checkpoint.untrusted import read_object
from sgpt_jax.cross_encoder import CrossEncoder
from sgpt_jax.decoder.model import split
from sgpt_jax.errors import InputError
from sgpt_jax.files.beir import DataSet
from sgpt_jax.metrics import CUTS, Run, cut

from .beir import add_data_arguments, data_sets
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
from .provenance import provenance
from .results import of_mteb, write_result
from .stages import Stages, first_stage
from .sts import similarities

# our metrics -> mteb's, per query
_NAMES = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P"}


class BiEncoderModel:
    """A `BiEncoder` as mteb's EncoderProtocol.

    Args:
        model_name: a loaded `BiEncoder`, or what `BiEncoder.from_pretrained` takes.
        revision: the model's revision, for mteb's records; of a hub id, the one that is loaded.
        device: not used; JAX decides.
        prompts: more named prompts, by the names that mteb looks for: a task (`NFCorpus`), a task and a side
            (`NFCorpus-query`), a type of tasks (`Retrieval`, `Retrieval-query`), or a side (`query`).
        instruction: a template with {instruction} for the task's, such as "Instruct: {instruction}\\nQuery: ". It goes
            before queries, and before the texts of tasks without sides, where no named prompt fits.
        options: for `BiEncoder.from_pretrained`.

    Raises:
        InputError: the template lacks {instruction}.
    """

    def __init__(
        self,
        model_name: str | BiEncoder,
        revision: str | None = None,
        *,
        device: str | None = None,
        prompts: dict[str, str] | None = None,
        instruction: str | None = None,
        **options: Any,
    ) -> None:
        if instruction is not None and "{instruction}" not in instruction:
            raise InputError(f"the instruction's template {instruction!r} has no {{instruction}}")
        self.model = (
            BiEncoder.from_pretrained(_at(model_name, revision), **options)
            if isinstance(model_name, str)
            else model_name
        )
        self.prompts = self.model.text.prompts | (prompts or {})
        self.instruction = instruction
        self.mteb_model_meta = _meta(self.model, revision, self.model.dimension, instruction is not None)

    def prompt(self, task: TaskMetadata | None, prompt_type: PromptType | None) -> str | None:
        """What goes before the texts of a task; None where its side says it all."""
        name = None if task is None else get_prompt_name(self.prompts, task, prompt_type)
        if name not in (None, "query", "document"):
            return self.prompts[name]
        if name is not None and self.prompts[name] != self.model.text.prompts.get(name):
            return self.prompts[name]
        if task is None or self.instruction is None or prompt_type == PromptType.document:
            return None
        asked = task.prompt
        if isinstance(asked, dict):
            asked = asked.get((prompt_type or PromptType.query).value)
        asked = asked or get_abstask_prompt(task.name)
        return self.instruction.replace("{instruction}", asked) if asked else None

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: TaskMetadata | None = None,
        prompt_type: PromptType | None = None,
        batch_size: int | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Vectors of a loader's texts, float32 [n, E]; queries and documents with the model's brackets, if any."""
        encode = {
            PromptType.query: self.model.encode_query,
            PromptType.document: self.model.encode_document,
            None: self.model.encode,
        }[prompt_type]
        return encode(
            _texts(inputs),
            prompt=self.prompt(task_metadata, prompt_type),
            batch_size=batch_size,
            show_progress=options.get("show_progress_bar"),
        )

    def similarity(self, embeddings1: np.ndarray, embeddings2: np.ndarray) -> np.ndarray:
        """The model's own similarity, [n, E] x [m, E] -> [n, m]."""
        # torch warns of arrays that it may not write to, and JAX's are such
        return np.array(self.model.similarity(np.asarray(embeddings1), np.asarray(embeddings2)))

    def similarity_pairwise(self, embeddings1: np.ndarray, embeddings2: np.ndarray) -> np.ndarray:
        """The same of row with row, [n, E] x [n, E] -> [n]."""
        return similarities(np.asarray(embeddings1), np.asarray(embeddings2))[self.model.similarity_name]


class CrossEncoderModel:
    """A `CrossEncoder` as mteb's CrossEncoderProtocol; arguments as `BiEncoderModel`."""

    def __init__(
        self,
        model_name: str | CrossEncoder,
        revision: str | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        self.model = (
            CrossEncoder.from_pretrained(_at(model_name, revision), **options)
            if isinstance(model_name, str)
            else model_name
        )
        self.mteb_model_meta = _meta(self.model, revision, None, False)

    def predict(
        self, inputs1: Any, inputs2: Any, *, batch_size: int | None = None, **options: Any
    ) -> np.ndarray:
        """Scores of pairs, float32 [n]: queries from the first loader, documents from the second."""
        pairs = list(zip(_texts(inputs1), _texts(inputs2), strict=True))
        return self.model.predict(
            pairs, batch_size=batch_size, show_progress=options.get("show_progress_bar")
        )


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
        help="JSON object of more prompts by name: a task, a type of tasks, query, document, or TASK-query",
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
    check_stages(args)
    lazy = bi_encoder(args) if args.model else cross_encoder(args)
    depth = args.rerank_depth or RERANK_DEPTH
    stages = Stages(None, None, depth, epath.Path(args.first_stage) if args.first_stage else None)
    for task in _tasks(args.tasks):
        run_task(_adapter(lazy.model, args), task, lazy, args.output)
    for _, parts in data_sets(args):
        for data in parts:
            start = time.perf_counter()
            ignore = (
                data.ignores_identical_ids if args.ignore_identical_ids is None else args.ignore_identical_ids
            )
            data.load()
            top_ranked = None
            if args.cross_encoder:
                run, _ = first_stage(data, stages, max(CUTS) + ignore, data.documents())
                top_ranked, _ = cut(run, depth, ignore_identical_ids=ignore)
            adapter = _adapter(lazy.model, args)
            task = local_task(data, top_ranked=top_ranked, ignore_identical_ids=ignore)
            scores = evaluate(adapter, task)
            result = {
                "kind": "mteb",
                "name": data.name,
                "metrics": {key: value for key, value in scores.items() if "@" in key},
                "mteb": {
                    key: value for key, value in scores.items() if "_at_" in key and math.isfinite(value)
                },
                "model" if args.model else "cross_encoder": lazy.describe(),
                "seconds": {"total": time.perf_counter() - start},
                **provenance("mteb", "pytrec_eval-terrier"),
            }
            write_result(args.output / f"{data.name}.json", result)
            print(f"{data.name}: ndcg@10 {scores['ndcg@10']:.6f} by mteb {mteb.__version__}")


def _adapter(model: Any, args: argparse.Namespace) -> BiEncoderModel | CrossEncoderModel:
    if args.cross_encoder:
        return CrossEncoderModel(model)
    prompts = read_object(args.prompts) if args.prompts else {}
    if not all(isinstance(text, str) for text in prompts.values()):
        raise InputError(f"{args.prompts}: must be an object of texts by name")
    instruction = args.instruction.replace("\\n", "\n") if args.instruction else None
    return BiEncoderModel(model, prompts=prompts, instruction=instruction)


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


def run_task(adapter: Any, task: Any, lazy: LazyModel, output: epath.Path) -> None:
    """Evaluates one task of mteb and writes OUTPUT/TASK.json."""
    start = time.perf_counter()
    found = mteb.evaluate(adapter, task, cache=None, co2_tracker=False, show_progress_bar=False)
    path = output / f"{task.metadata.name}.json"
    result = of_mteb(path, found.task_results[0].to_dict()) | {
        "model": lazy.describe(),
        "seconds": {"total": time.perf_counter() - start},
        **provenance("mteb"),
    }
    write_result(path, result)
    print(f"{task.metadata.name}: {result['main_score']:.6f} by mteb {mteb.__version__}")


def evaluate(model: Any, task: AbsTaskRetrieval) -> dict[str, float]:
    """mteb's scores for one local task. Nothing is read from or written to mteb's cache of results."""
    found = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
    (scores,) = found.task_results[0].scores[task.metadata.eval_splits[0]]
    return dict(scores)


def _texts(loader: Any) -> list[str]:
    return [text for batch in loader for text in batch["text"]]


def _at(source: str, revision: str | None) -> str:
    """A source with the revision that mteb asks for; local files have none."""
    return f"{source}@{revision}" if revision and not Path(source).exists() else source


def _meta(model: Any, revision: str | None, dimension: int | None, instructed: bool) -> ModelMeta:
    name = model.name if "/" in model.name else f"local/{model.name or 'model'}"
    leaves = jax.tree.leaves(split(model.decoder)[1])
    config = model.decoder.config
    facts = {
        "name": name,
        "revision": revision or "local",
        "n_parameters": sum(leaf.size for leaf in leaves),
        "n_embedding_parameters": config.vocab_size * config.embed_dim,
        "memory_usage_mb": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 2**20,
        "max_tokens": model.text.max_seq_length,
        "embed_dim": dimension,
        "similarity_fn_name": model.similarity_name if dimension else None,
        "use_instructions": instructed,
        "model_type": ["dense"] if dimension else ["cross-encoder"],
        "framework": ["JAX"],
    }
    return ModelMeta.create_empty(facts)
