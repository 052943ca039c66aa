"""The rows of an index by the ids of their documents."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document
from sgpt_jax.files.lines import fix_surrogates
from sgpt_jax.index.search import Index

_ROWS = 1 << 14  # at a time


class Lookup:
    """Finds rows by ids; 16 bytes of memory a document.

    Args:
        index: of which removed documents are not found.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        hashes = np.empty(len(index), np.uint64)
        for start in range(0, len(index), _ROWS):
            ids = index.ids(index.rows(start, start + _ROWS))
            hashes[start : start + len(ids)] = _hashes(ids)
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._rows = hashes[order], index.rows()[order]

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """The row of each id, int64; -1 where there is none."""
        result = np.full(len(ids), -1, np.int64)
        hashes = _hashes(ids)
        first = np.searchsorted(self._hashes, hashes, side="left")
        last = np.searchsorted(self._hashes, hashes, side="right")
        for number in np.flatnonzero(last > first).tolist():
            candidates = self._rows[first[number] : last[number]]
            for row, id in zip(candidates.tolist(), self._index.ids(candidates), strict=True):
                if id == ids[number]:
                    result[number] = row
        return result

    def new(self, documents: Iterable[Document], size: int, replaced: list[int]) -> Iterator[Document]:
        """The documents that are not in the index with the same text.

        Args:
            documents: with distinct ids.
            size: how many are looked up at a time.
            replaced: gets the rows of those that are there with another text, before they are yielded.

        Raises:
            InputError: a document has no id but its number, which says nothing of those that are there.
        """
        stream = iter(documents)
        while chunk := list(itertools.islice(stream, size)):
            if (numbered := next((document for document in chunk if document.numbered), None)) is not None:
                raise InputError(
                    f"{numbered.text[:40]!r} has no id of its own, and its number {numbered.id} would stand for a "
                    "document that is there: what is added needs an `_id` each"
                )
            rows = self.rows([document.id for document in chunk])
            there = np.flatnonzero(rows >= 0).tolist()
            same: set[int] = set()
            if self._index.manifest.store_texts and there:
                texts = self._index.texts(rows[there])
                same = {
                    number
                    for number, text in zip(there, texts, strict=True)
                    if text == fix_surrogates(chunk[number].text)
                }
            replaced += [int(rows[number]) for number in there if number not in same]
            yield from (document for number, document in enumerate(chunk) if number not in same)


def _hashes(ids: Sequence[str]) -> np.ndarray:
    digests = [hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8).digest() for id in ids]
    return np.frombuffer(b"".join(digests), "<u8")
