"""MS MARCO passages in their published files, with hard negatives by mining system.

The four files (the first two from MS MARCO, the others from the data set
sentence-transformers/msmarco-hard-negatives): collection.tsv, queries.train.tsv,
msmarco-hard-negatives.jsonl.gz and cross-encoder-ms-marco-MiniLM-L-6-v2-scores.pkl.gz. Each may be gzip or not.
"""

from __future__ import annotations

import array
import gzip
import hashlib
import mmap
import pickle
from typing import Any

import numpy as np
from etils import epath

from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import line_error, parse_json, read_lines

from .data import Example

COLLECTION = "collection.tsv"
QUERIES = "queries.train.tsv"
NEGATIVES = "msmarco-hard-negatives.jsonl.gz"
SCORES = "cross-encoder-ms-marco-MiniLM-L-6-v2-scores.pkl.gz"

_BOM = b"\xef\xbb\xbf"

Scores = dict[int, dict[int, float]]


class _Plain(pickle.Unpickler):
    """Builds dictionaries, numbers and what else the pickle format has of itself, and refuses everything named."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to an object outside the file")


def read_scores(path: Any) -> Scores:
    """Reads cross-encoder scores, {query id: {passage id: score}}, from a pickle, and runs nothing that is in it.

    Only dictionaries with integer keys and numbers as values are accepted.

    Raises:
        InputError: not there, damaged, or holding anything else.
    """
    try:
        with epath.Path(path).open("rb") as raw:
            magic = raw.read(2)
            raw.seek(0)
            value = _Plain(gzip.GzipFile(fileobj=raw) if magic == b"\x1f\x8b" else raw).load()
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    except Exception as error:  # a damaged pickle raises almost anything
        raise InputError(f"{path}: not a plain pickle of scores: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}, not {{query: {{passage: score}}}}")
    for query, scores in value.items():
        if type(query) is not int or type(scores) is not dict:
            raise InputError(f"{path}: entry {query!r}: not a query id with a dictionary of scores")
        if not all(type(key) is int and type(score) in (int, float) for key, score in scores.items()):
            raise InputError(f"{path}: query {query}: not all passage ids are int with scores int or float")
    return value


class TextTable:
    """Texts of a two-column TSV by integer id, read when asked for: in memory are the offsets of 8.8 million passages.

    An uncompressed local file is memory-mapped; anything else is read whole.
    """

    def __init__(self, path: epath.Path):
        self.path = path
        with path.open("rb") as stream:
            packed = stream.read(2) == b"\x1f\x8b"
        if packed:
            with path.open("rb") as stream, gzip.open(stream) as plain:
                self.data: Any = plain.read()
        elif "://" in str(path):
            self.data = path.read_bytes()
        else:
            with open(path, "rb") as stream:
                empty = not stream.read(1)  # which cannot be mapped
                self.data = b"" if empty else mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        ids, starts = array.array("q"), array.array("q")
        start = len(_BOM) if self.data[: len(_BOM)] == _BOM else 0
        line = 0
        while start < len(self.data):
            line += 1
            end = self._end(start)
            tab = self.data.find(b"\t", start, end)
            if tab > 0:
                try:
                    ids.append(int(self.data[start:tab]))
                except ValueError:
                    raise line_error(path, line, f"not an integer id: {self.data[start:tab]!r}") from None
                starts.append(tab + 1)
            elif self.data[start:end].strip():
                raise line_error(path, line, "an id, a tab and a text are needed")
            start = end + 1
        if not ids:
            raise InputError(f"{path}: holds no texts")
        order = np.argsort(np.asarray(ids), kind="stable")
        self.ids, self.starts = np.asarray(ids)[order], np.asarray(starts)[order]

    def _end(self, start: int) -> int:
        end = self.data.find(b"\n", start)
        return len(self.data) if end < 0 else end

    def _row(self, key: int) -> int | None:
        row = int(np.searchsorted(self.ids, key))
        return row if row < len(self.ids) and self.ids[row] == key else None

    def __contains__(self, key: int) -> bool:
        return self._row(key) is not None

    def __getitem__(self, key: int) -> str:
        row = self._row(key)
        if row is None:
            raise KeyError(key)
        start = int(self.starts[row])
        try:
            return self.data[start : self._end(start)].decode("utf-8").rstrip("\r")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path}, id {key}: invalid UTF-8: {error}") from None


class RotatingExamples:
    """One example a query and epoch; positives and negatives take turns from epoch to epoch (SGPT repository).

    Args:
        queries, passages: texts by id.
        records: (query id, positive ids, negative ids) for each example.
        negatives: hard negatives an example.
        scores: a teacher's scores, for distillation; None for none.
    """

    def __init__(
        self,
        queries: TextTable,
        passages: TextTable,
        records: list[tuple[int, list[int], list[int]]],
        negatives: int,
        scores: Scores | None = None,
    ):
        self.queries, self.passages, self.records = queries, passages, records
        self.negatives, self.scores = negatives, scores

    def __len__(self) -> int:
        return len(self.records)

    def _ids(self, index: int, epoch: int) -> tuple[int, int, list[int]]:
        query, positives, negatives = self.records[index]
        count = min(self.negatives, len(negatives))
        turn = [negatives[(epoch * count + number) % len(negatives)] for number in range(count)]
        return query, positives[epoch % len(positives)], turn

    def get(self, index: int, epoch: int) -> Example:
        query, positive, negatives = self._ids(index, epoch)
        texts = tuple(self.passages[key] for key in negatives)
        scores = None
        if self.scores is not None:
            known = self.scores.get(query, {})
            missing = [key for key in (positive, *negatives) if key not in known]
            if missing:
                raise InputError(f"no teacher score for query {query} with passage {missing[0]}")
            scores = tuple(float(known[key]) for key in (positive, *negatives))
        return Example(self.queries[query], self.passages[positive], texts, scores)

    def keys(self, index: int, epoch: int) -> tuple[int, ...]:
        query, positive, negatives = self._ids(index, epoch)
        return (-1 - query, positive, *negatives)  # queries and passages are numbered apart

    def digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for content in (self.queries.data, self.passages.data):
            digest.update(content)
        for record in self.records:
            digest.update(repr(record).encode())
            if self.scores is not None:
                known, (query, positives, negatives) = self.scores, record
                digest.update(repr([known[query].get(key) for key in positives + negatives]).encode())
        return digest.hexdigest()


def open_msmarco(
    folder: str,
    *,
    negatives: int = 1,
    per_system: int = 5,
    systems: tuple[str, ...] = (),
    margin: float = 3.0,
    seed: int = 0,
    keep_scores: bool = False,
) -> RotatingExamples:
    """Opens the four files of MS MARCO training.

    Of each mining system's list, in its order, those passages are taken that score at most (lowest score of a
    positive) minus `margin` with the cross-encoder and that no system before gave, until the system has given
    `per_system`. Queries left without positive or negative are passed over. (SGPT repository,
    train_bi-encoder_mnrl.py.)

    Args:
        folder: where the files are.
        negatives: hard negatives an example.
        per_system: the most negatives from one system.
        systems: which mining systems; all of the first record when empty.
        margin: of cross-encoder scores, between the worst positive and any negative.
        seed: of the one shuffle of each query's negatives.
        keep_scores: keep the cross-encoder scores for distillation.

    Raises:
        InputError: a file is missing or a line of it is wrong, naming it.
    """
    paths = {name: _find(folder, name) for name in (COLLECTION, QUERIES, NEGATIVES, SCORES)}
    passages, queries = TextTable(paths[COLLECTION]), TextTable(paths[QUERIES])
    scores = read_scores(paths[SCORES])
    shuffle = np.random.default_rng(seed)
    records = []
    known_systems: dict[str, None] = {}
    asked = systems
    path = paths[NEGATIVES]
    for line, text in read_lines(path):
        try:
            record = parse_json(text)
            query, positives, mined = int(record["qid"]), list(map(int, record["pos"])), record["neg"]
            systems = systems or tuple(mined)
            known_systems |= dict.fromkeys(mined)
            known = scores.get(query, {})
            if not positives:
                continue
            limit = min(known[key] for key in positives) - margin
            chosen: dict[int, None] = {}
            for system in systems:
                new = 0
                for key in map(int, mined.get(system, ())):
                    if new == per_system:
                        break
                    if known[key] <= limit and key not in chosen:
                        chosen[key] = None
                        new += 1
        except (ValueError, TypeError, AttributeError) as error:
            raise line_error(path, line, f"not a record with qid, pos and neg by system: {error}") from None
        except KeyError as error:
            raise line_error(path, line, f"no field, or no cross-encoder score, for {error}") from None
        unknown = [key for key in (*positives, *chosen) if key not in passages]
        if unknown or query not in queries:
            what = f"passage {unknown[0]}" if unknown else f"query {query}"
            raise line_error(path, line, f"{what} has no text in {COLLECTION if unknown else QUERIES}")
        if chosen:
            order = list(chosen)
            shuffle.shuffle(order)
            records.append((query, positives, order))
    if unknown_systems := [system for system in asked if system not in known_systems]:
        raise InputError(
            f"--systems {unknown_systems[0]}: {path} has negatives of {', '.join(known_systems) or 'none'}"
        )
    if not records:
        raise InputError(f"{path}: no query has both a positive and a negative within the margin")
    return RotatingExamples(queries, passages, records, negatives, scores if keep_scores else None)


def _find(folder: str, name: str) -> epath.Path:
    plain = epath.Path(folder) / name.removesuffix(".gz")
    for path in (plain, epath.Path(f"{plain}.gz")):
        if path.exists():
            return path
    raise InputError(f"{folder}: {name} is missing")
