"""Prompt study: one cross-encoder, one first stage, several prompts, one table.

The first stage is ranked once (BM25, --model, or --first-stage) and kept in OUT/first-stage; the model is loaded
once; every prompt's results are those of ``python -m eval beir``, in OUT/PROMPT. OUT/prompts.md has the table.

--prompts takes the prompts of the SGPT paper's ablation by name, and templates with one {} for the document:

  A to I, quoraA to quoraD   the query's log-probability after the document
  J, K, quoraE               the same, after one example
  L, M                       probability of "Yes" against "No", after one example

The example is, as in the SGPT repository, the judged pair that is shortest in tokens for its grade. It comes from the
very judgements that are measured: these prompts see one answer. Results say which pair it is.

  python -m eval prompts DATA/scifact --cross-encoder MODEL --rerank-depth 10 --output OUT \\
      --prompts A C G L 'Text: {} Question: '
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from sgpt_jax.cross_encoder import CrossEncoder, NaNScoreError
from sgpt_jax.errors import InputError
from sgpt_jax.files.beir import DataSet
from sgpt_jax.files.corpora import Document
from sgpt_jax.files.lines import atomic_write
from sgpt_jax.text.pairs import Prompt

from .beir import add_data_arguments, data_sets, run_data_set
from .models import (
    PROMPTS,
    RERANK_DEPTH,
    LazyModel,
    add_bi_encoder_arguments,
    add_common_arguments,
    add_depth_argument,
    bi_encoder,
    check_stages,
    cross_encoder,
)
from .results import Result
from .stages import Stages

_BOT = (
    'An intelligent, helpful bot is given. The bot responds "Yes" if the document is a fit to the query and "No" '
    "otherwise.\n###"
)


@dataclasses.dataclass(frozen=True)
class Example:
    """A judged pair that a prompt shows: ids, for the record, and texts."""

    document_id: str
    query_id: str
    document: str
    query: str


@dataclasses.dataclass(frozen=True)
class Study:
    """One prompt of a study.

    Attributes:
        template: the prompt, with one {} for the document.
        instruction: what stands before the one example; None for a prompt without any.
        answers: the two answers whose probabilities are compared; None scores the query itself.
        gap: stands before the example's query.
        shortest: tokens that document and query of the example have more than.
    """

    template: str
    instruction: str | None = None
    answers: tuple[str, str] | None = None
    gap: str = ""
    shortest: int = 0

    def prompt(self, example: Example | None) -> Prompt:
        """The prompt, with the example in it."""
        prompt = Prompt.parse(self.template)
        if example is None:
            return prompt
        if self.answers:
            shown, end = (join(example.document, example.query), self.answers[0]), ""
        else:
            shown, end = (example.document, self.gap + example.query), "\n"
        return prompt.with_examples([shown], instruction=self.instruction or "", end=end)


def join(document: str, query: str) -> str:
    """What stands for the document where the answer is asked for: the query follows it."""
    return f"{document}\nQuery: {query}"


# Strings of the SGPT repository's cross-encoder notebook.
STUDIES = {name: Study(template) for name, template in PROMPTS.items()} | {
    "J": Study("Document:\n{}\nQuery:\n", "Documents are searched to find matches with the same content.\n"),
    "K": Study("Document:\n{}\nQuery:\n", ""),
    "L": Study("\nDocument: {}\nBot:", _BOT, (" Yes", " No")),
    "M": Study("\nDocument: {}\nBot: ", _BOT, ("Yes", "No")),
    "quoraE": Study("Question Body: {} Question Title:", "", gap=" ", shortest=10),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_data_arguments(parser)
    group = parser.add_argument_group("study")
    group.add_argument(
        "--cross-encoder", required=True, metavar="MODEL", help="model folder, hub id, or .gguf file"
    )
    group.add_argument(
        "--prompts", nargs="+", required=True, metavar="PROMPT", help="names and templates, see above"
    )
    add_depth_argument(group)
    group.add_argument(
        "--first-stage", metavar="RUN", help="a run, or a folder with NAME.trec files (default: BM25)"
    )
    group.add_argument("--overwrite", action="store_true", help="compute again what is in OUT already")
    add_bi_encoder_arguments(parser, required=False)
    add_common_arguments(parser)
    parser.set_defaults(prompt="G", rerank_depth=RERANK_DEPTH)  # every study brings a prompt of its own


def main(args: argparse.Namespace) -> None:
    """Measures every prompt on every data set."""
    if args.model and args.first_stage:
        raise InputError("--model and --first-stage are both a first stage: give one of them")
    check_stages(args)
    studies = {name: STUDIES.get(name) or Study(name) for name in args.prompts}
    for study in studies.values():
        Prompt.parse(study.template)  # a wrong one shows before any work
    folders = {
        name: args.output / (name if name in STUDIES else f"prompt-{number}")
        for number, name in enumerate(studies, 1)
    }
    lazy = cross_encoder(args)
    first = Stages(bi_encoder(args) if args.model else None, None, args.rerank_depth, None, args.batch_tokens)
    runs = epath.Path(args.first_stage) if args.first_stage else args.output / "first-stage"
    table: dict[str, dict[str, Result]] = {name: {} for name in studies}
    for data in (data for _, parts in data_sets(args) for data in parts):
        if not args.first_stage:
            run_data_set(data, first, runs, args)
        data.load()
        limits = {study.shortest for study in studies.values() if study.instruction is not None}
        examples = {shortest: find_example(data, lazy, shortest) for shortest in limits}
        for name, study in studies.items():
            print(f"{name!r} on ", end="", flush=True)
            example = None if study.instruction is None else examples[study.shortest]
            stages = Stages(
                None, prompted(lazy, name, study, example), args.rerank_depth, runs, args.batch_tokens
            )
            table[name][data.name] = run_data_set(data, stages, folders[name], args)
    text = as_table(table, lazy.source, args.rerank_depth)
    with atomic_write(args.output / "prompts.md") as stream:
        stream.write(text.encode())
    print(text, end="")


def prompted(lazy: LazyModel, name: str, study: Study, example: Example | None) -> LazyModel:
    """The cross-encoder of another `LazyModel` with a study's prompt: the weights are the same ones."""
    prompt = study.prompt(example)

    def load() -> CrossEncoder | Answering:
        model = dataclasses.replace(lazy.model, prompt=prompt)
        return Answering(model, study.answers) if study.answers else model

    identity = lazy.identity | {
        "study": name if name in STUDIES else None,
        "prompt": dataclasses.asdict(prompt),
        "example": example and {"document": example.document_id, "query": example.query_id},
        "answers": study.answers and list(study.answers),
    }
    return LazyModel(lazy.source, identity, load)


class Answering:
    """Scores a pair by the log-probability of the first answer, the second being the only other one possible.

    Args:
        model: a cross-encoder whose prompt asks for the answer.
        answers: for example (" Yes", " No").
    """

    def __init__(self, model: CrossEncoder, answers: tuple[str, str]) -> None:
        self._model, self._answers = model, answers
        self.decoder, self.text = model.decoder, model.text

    def predict(self, pairs: Sequence[tuple[str, str]], **options: Any) -> np.ndarray:
        """Scores of (query, document) pairs, float32 [n]."""
        texts = [join(document, query) for query, document in pairs]
        asked = [(answer, text) for text in texts for answer in self._answers]  # both share the text's pass
        try:
            scores = self._model.predict(asked, **options)
        except NaNScoreError as error:
            raise NaNScoreError(str(error), error.index // 2) from error
        first, second = scores.reshape(-1, 2).astype(np.float64).T
        return (first - np.logaddexp(first, second)).astype(np.float32)


def find_example(data: DataSet, lazy: LazyModel, shortest: int = 0) -> Example:
    """The judged pair with the fewest tokens for its grade, among those with a grade above 0.

    Titles are left out, as in the SGPT repository.

    Args:
        data: a loaded data set.
        lazy: the model whose tokenizer counts.
        shortest: pairs with no more tokens than this are passed over.

    Raises:
        InputError: no pair is left.
    """
    judged = {id for query in data.queries for id, grade in data.qrels[query].items() if grade > 0}
    bodies = {document.id: _body(document) for document in data.documents() if document.id in judged}
    texts = [*bodies.values(), *data.queries.values()]
    lengths = [len(ids) for ids in lazy.model.text.plain_ids(texts, show_progress=False)]
    document_lengths = dict(zip(bodies, lengths, strict=False))
    query_lengths = dict(zip(data.queries, lengths[len(bodies) :], strict=True))
    best = None
    for query in data.queries:
        for id, grade in data.qrels[query].items():
            if grade > 0 and id in bodies and document_lengths[id] + query_lengths[query] > shortest:
                candidate = ((document_lengths[id] + query_lengths[query]) / grade, id, query)
                if best is None or candidate[0] < best[0]:
                    best = candidate
    if best is None:
        raise InputError(f"{data.name}: has no judged pair to show as an example")
    _, id, query = best
    return Example(id, query, bodies[id], data.queries[query])


def _body(document: Document) -> str:
    return document.text.removeprefix(f"{document.title} ") if document.title.strip() else document.text


def as_table(table: dict[str, dict[str, Result]], source: str, depth: int) -> str:
    """Markdown: prompts by data sets, nDCG@10; the first line is the first stage."""
    names = list(next(iter(table.values())))
    first = {name: next(iter(table.values()))[name]["first_stage"] for name in names}
    lines = [
        f"nDCG@10 of {Path(source).name} re-ranking {depth} documents, by prompt",
        "",
        f"| prompt | {' | '.join(names)} | text |",
        f"|--|{'--:|' * len(names)}--|",
        "| (first stage) | "
        + " | ".join(f"{first[name]['metrics']['ndcg@10']:.4f}" for name in names)
        + f" | {', '.join(dict.fromkeys(stage['name'] for stage in first.values()))} |",
    ]
    for prompt, results in table.items():
        study = STUDIES.get(prompt) or Study(prompt)
        shown = repr((study.instruction or "") + study.template)[1:-1].replace("|", "\\|")
        notes = " (one example)" * (study.instruction is not None)
        values = " | ".join(f"{results[name]['metrics']['ndcg@10']:.4f}" for name in names)
        lines.append(f"| {prompt if prompt in STUDIES else 'template'} | {values} | `{shown}`{notes} |")
    return "\n".join(lines) + "\n"
