"""Data sets in BEIR's layout: a folder with corpus, queries, and judgements by split."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from etils import epath

from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document, read_corpus, read_queries
from sgpt_jax.files.hub_tables import configs, is_hub
from sgpt_jax.files.lines import PathLike, ReadReport
from sgpt_jax.files.runs import read_qrels

RECORDS = ("jsonl", "tsv", "csv", "json")  # endings of corpus and queries, each also before .gz
JUDGEMENTS = ("tsv", "txt", "qrels", "trec")


@dataclass
class DataSet:
    """One BEIR folder: where its files are, and its judged queries once `load` has read them.

    Attributes:
        name: of the data set; results are filed under it.
        folder: with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv (or the other endings that `find` is given); or a
            data set of the hub, such as hf:BeIR/scifact.
        split: which judgements.
        encoding_errors, skip_bad_lines: how files are read, see `read_corpus`.
        queries: {id: text} of the judged queries, in the file's order.
        qrels: {query id: {document id: grade}}, queries that the queries file lacks included.
        reports: what the readers met, by "corpus", "queries" and "qrels".
    """

    name: str
    folder: epath.Path
    split: str
    encoding_errors: str = "strict"
    skip_bad_lines: bool = False
    queries: dict[str, str] = field(default_factory=dict)
    qrels: dict[str, dict[str, int]] = field(default_factory=dict)
    reports: dict[str, ReadReport] = field(default_factory=dict)

    def load(self) -> DataSet:
        """Reads judgements and queries; `queries` then holds the judged ones, in the file's order.

        Raises:
            InputError: a file is missing or breaks a rule, or no query of the queries file is judged.
        """
        qrels_file = self.file("qrels")
        self.qrels = read_qrels(qrels_file, errors=self.encoding_errors, report=self._report("qrels"))
        queries_file = self.file("queries")
        queries = read_queries(
            queries_file,
            errors=self.encoding_errors,
            skip_bad_lines=self.skip_bad_lines,
            report=self._report("queries"),
        )
        self.queries = {query: text for query, text in queries.items() if query in self.qrels}
        if not self.queries:
            raise InputError(f"{qrels_file}: judges no query that {queries_file} holds")
        return self

    def documents(self) -> Iterator[Document]:
        """The corpus as a stream of documents (title and text already joined), in the file's order.

        Raises:
            InputError: as `sgpt_jax.files.corpora.read_corpus`.
        """
        return read_corpus(
            self.file("corpus"),
            errors=self.encoding_errors,
            skip_bad_lines=self.skip_bad_lines,
            report=self._report("corpus"),
        )

    def facts(self) -> dict[str, Any]:
        """What tells these files from others, without reading the corpus: digests of judgements and queries, its size.

        A data set of the hub is told by its name alone, and a folder without a corpus has no size.

        Raises:
            InputError: judgements or queries are missing.
        """
        if is_hub(self.folder):
            return {"source": os.fspath(self.folder)}
        found: dict[str, Any] = {}
        for part in ("qrels", "queries"):
            digest = hashlib.sha256(epath.Path(self.file(part)).read_bytes())
            found[part] = f"sha256:{digest.hexdigest()[:16]}"
        with contextlib.suppress(InputError):  # a run that was given needs none
            found["corpus_bytes"] = epath.Path(self.file("corpus")).stat().length
        return found

    @property
    def ignores_identical_ids(self) -> bool:
        """BEIR's rule: in ArguAna and Quora the queries are themselves in the corpus."""
        return self.name in ("arguana", "quora")

    def file(self, part: str) -> PathLike:
        """Where "corpus", "queries" or "qrels" are read from.

        Of the hub's data sets, as BEIR and mteb publish them, corpus and queries are configurations, and judgements the
        configuration "default" or "qrels", or the data set of that name with "-qrels" behind it.
        """
        if not is_hub(self.folder):
            if part == "qrels":
                return find(self.folder / "qrels", self.split, JUDGEMENTS)
            return find(self.folder, part, RECORDS)
        source = os.fspath(self.folder)
        names = configs(source)
        if part != "qrels":
            if part not in names:
                raise InputError(f"{source}: has no configuration {part!r} (there are: {', '.join(names)})")
            return f"{source}:{part}:"
        own = next((name for name in ("qrels", "default") if name in names), None)
        return f"{source}:{own}:{self.split}" if own else f"{source}-qrels:{self.split}"

    def _report(self, part: str) -> ReadReport:
        self.reports[part] = ReadReport()
        return self.reports[part]


def find(folder: epath.Path, stem: str, endings: tuple[str, ...]) -> epath.Path:
    """The file ``stem.ending`` or ``stem.ending.gz`` in a folder.

    Raises:
        InputError: there is none, or more than one and so no telling which is meant.
    """
    names = [f"{stem}.{ending}{zipped}" for ending in endings for zipped in ("", ".gz")]
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) > 1:
        raise InputError(f"{folder}: holds both {found[0].name} and {found[1].name}; keep one")
    if not found:
        raise InputError(f"{folder}: holds no {stem}.{endings[0]} (or .{endings[0]}.gz)")
    return found[0]
