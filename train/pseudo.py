"""Pseudo queries: texts of a corpus that stand for queries, each with the document that it was taken from.

What became a query is taken out of every document that the query is compared with, else finding the source would be a
matter of equal words. So each kind of query has a side of documents of its own.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

import numpy as np

from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document

# Words that a query has at least and at most, and that the rest of its document has at least.
SHORTEST, LONGEST, SHORTEST_REST = 3, 48, 8
# A sentence begins behind a full stop and a space, with a capital letter, a digit, a quote or a bracket.
_ENDS = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\"'(\[])")


@dataclasses.dataclass(frozen=True)
class PseudoQueries:
    """The queries of one kind.

    Attributes:
        kind: "title", "sentence", "generated", or "query" for given texts.
        queries: {id: text}; the id of a pseudo query is that of its source.
        documents: {document id: text}, without what became a query.
        counts: how many documents there were, and how many each rule kept or dropped, in order.
    """

    kind: str
    queries: dict[str, str]
    documents: dict[str, str]
    counts: dict[str, int]

    @property
    def have_sources(self) -> bool:
        """Whether the id of a query is that of the document it was taken from."""
        return self.kind != "query"


def titles(documents: Iterable[Document]) -> PseudoQueries:
    """The titles, each asking for the text below it."""
    found = {
        document.id: (document.title.strip(), document.text.removeprefix(document.title).strip())
        for document in documents
    }
    return checked("title", found, "without a title")


def sentences(documents: Iterable[Document], seed: int) -> PseudoQueries:
    """One sentence of each document, drawn at random, asking for the title and the other sentences."""
    found = {}
    for document in documents:
        below = document.text.removeprefix(document.title).strip()
        parts = _ENDS.split(below)
        usable = [number for number, part in enumerate(parts) if SHORTEST <= len(part.split()) <= LONGEST]
        if len(parts) < 2 or not usable:
            found[document.id] = "", document.text
            continue
        # A generator of each document's own: what is drawn must not depend on the other documents.
        draw = np.random.default_rng((seed, *document.id.encode("utf-8", "surrogatepass")))
        chosen = usable[draw.integers(len(usable))]
        rest = [document.title.strip(), *parts[:chosen], *parts[chosen + 1 :]]
        found[document.id] = parts[chosen].strip(), " ".join(filter(None, rest))
    return checked("sentence", found, "without a sentence of that length")


def given(queries: Mapping[str, str], documents: Iterable[Document]) -> PseudoQueries:
    """Texts of real queries, whose documents nobody knows."""
    texts = {document.id: document.text for document in documents if document.text.strip()}
    counts = {"queries": len(queries)}
    kept: dict[str, str] = {}
    for id, text in queries.items():
        if text.strip():
            kept[id] = text.strip()
    counts["blank"] = len(queries) - len(kept)
    return PseudoQueries("query", kept, texts, counts)


KINDS = ("title", "sentence")


def make(kind: str, documents: Iterable[Document], seed: int) -> PseudoQueries:
    """The pseudo queries of a kind.

    Raises:
        InputError: there is no such kind.
    """
    if kind == "title":
        return titles(documents)
    if kind == "sentence":
        return sentences(documents, seed)
    raise InputError(f"--pseudo {kind}: the kinds are {', '.join(KINDS)}")


def checked(
    kind: str,
    found: Mapping[str, tuple[str, str]],
    missing: str,
    *,
    others: Mapping[str, str] | None = None,
    known: Iterable[str] = (),
) -> PseudoQueries:
    """Applies the rules.

    Args:
        kind: of the queries.
        found: {document id: (query, the rest of the document)}; the query is empty where there is none.
        missing: what to call it that there is none.
        others: {document id: text} of more documents, before those.
        known: queries that are dropped as repeated.
    """
    counts = {"documents": len(found), missing: 0, "too short or too long": 0, "no letter": 0}
    counts |= {"too little beside it": 0, "stands in the rest too": 0, "repeated": 0}
    queries: dict[str, str] = {}
    seen = set(map(_plain, known))
    for id, (query, rest) in found.items():
        same = _plain(query)
        if not query:
            reason = missing
        elif not SHORTEST <= len(query.split()) <= LONGEST:
            reason = "too short or too long"
        elif not any(character.isalpha() for character in query):
            reason = "no letter"
        elif len(rest.split()) < SHORTEST_REST:
            reason = "too little beside it"
        elif same in _plain(rest):
            reason = "stands in the rest too"
        elif same in seen:
            reason = "repeated"
        else:
            seen.add(same)
            queries[id] = query
            continue
        counts[reason] += 1
    documents = {**(others or {}), **{id: rest for id, (_, rest) in found.items() if rest}}
    return PseudoQueries(kind, queries, documents, counts)


def _plain(text: str) -> str:
    """Without case and runs of spaces."""
    return " ".join(text.lower().split())
