"""What the fields of people's files are called: the one table of spellings, for JSON keys and for headers of tables.

A key that nobody knows is passed over (BEIR's records have `metadata`), unless it looks like one that is read: then
silence would lose what it holds, and it is refused by name. Two keys that mean the same thing and differ are an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Named = dict[str, tuple[str, Any]]  # field -> the key as it is spelled, and the value

_NUMBER = re.compile("_?[0-9]+$")
_WORDS = re.compile("[A-Z]?[a-z]+|[A-Z]+|[0-9]+")


class Columns:
    """The fields of one kind of record.

    Args:
        spellings: field -> its keys, the usual one first.
        needed: fields without which a first line is no header.
        header: whether a CSV file has to begin with a header.
        repeated: a field that several columns of a table may have; its values come as a list. So may several keys with
            a number behind them (`negative_1`, `negative_2`, ...).
        words: an unknown key with one of these words in it looks like a field, unless it is about ids.
    """

    def __init__(
        self,
        spellings: Mapping[str, Sequence[str]],
        needed: Sequence[str],
        *,
        header: bool = True,
        repeated: str | None = None,
        words: Mapping[str, str] | None = None,
    ) -> None:
        self.spellings, self.needed, self.header, self.repeated = spellings, needed, header, repeated
        self._fields = {key: field for field, keys in spellings.items() for key in keys}
        self._squashed = {_squash(key): key for key in reversed(self._fields)}
        self._words = words or {}
        self._alike: dict[str, str | None] = {}

    def of_object(self, record: Mapping[str, Any]) -> Named:
        """The known fields of a JSON object; a value that is null or empty gives way to another of its field.

        Raises:
            ValueError: two keys of one field differ, or an unknown key looks like a known one.
        """
        found: Named = {}
        for key, value in record.items():
            field = self._fields.get(key)
            if field is None and (field := self._numbered(key)) is not None:
                values = found.setdefault(field, (key, []))[1]
                if not isinstance(values, list) or found[field][0] in self._fields:
                    raise ValueError(f"`{found[field][0]}` and `{key}` mean the same thing")
                if value not in (None, ""):
                    values.append(value)
                continue
            if field is None:
                self._refuse_alike(key)
                continue
            if field in found:
                other, earlier = found[field]
                if value in (None, "") or value == earlier:
                    continue
                if earlier not in (None, ""):
                    raise ValueError(f"`{other}` and `{key}` mean the same thing, and differ")
            found[field] = key, value
        return found

    def of_header(self, cells: Sequence[str]) -> list[str | None] | None:
        """The field of every column if the cells are a header (None for a column that is not read), else None.

        Raises:
            ValueError: they are nothing but names, but not the ones that are needed, or two mean the same thing.
        """
        keys = [cell.strip().lower() for cell in cells]
        fields = [self.field(key) for key in keys]
        if not set(self.needed) <= set(fields):
            if all(field or self._looks_like(key) for field, key in zip(fields, keys, strict=True)):
                missing = next(self.spellings[field][0] for field in self.needed if field not in fields)
                raise ValueError(f"{', '.join(cells)} looks like a header, but names no `{missing}`")
            return None
        for position, (field, key) in enumerate(zip(fields, keys, strict=True)):
            if field is None:
                self._refuse_alike(key)
            elif field in fields[:position] and field != self.repeated:
                other = keys[fields.index(field)]
                raise ValueError(f"the columns `{other}` and `{key}` mean the same thing")
        return fields

    def of_cells(self, header: Sequence[str | None], cells: Sequence[str]) -> Named:
        """The fields of a line of a table; empty cells of the repeated field are left out."""
        found: Named = {}
        for field, cell in zip(header, cells, strict=True):
            if field == self.repeated and field is not None:
                values = found.setdefault(field, (field, []))[1]
                if cell:
                    values.append(cell)
            elif field is not None:
                found[field] = field, cell
        return found

    def field(self, key: str) -> str | None:
        """The field that a key names."""
        return self._fields.get(key) or self._numbered(key)

    def _numbered(self, key: str) -> str | None:
        """The repeated field, if the key is one of its spellings with a number behind it."""
        stem = _NUMBER.sub("", key)
        field = self._fields.get(stem) if stem != key else None
        return field if field == self.repeated else None

    def _refuse_alike(self, key: str) -> None:
        if key not in self._alike:
            self._alike[key] = self._looks_like(key)
        if (known := self._alike[key]) is not None:
            raise ValueError(f"`{key}` is not a known key; `{known}` is one that looks like it")

    def _looks_like(self, key: str) -> str | None:
        """The known key that an unknown one looks like, if any."""
        if (known := self._squashed.get(_squash(key))) is not None:
            return known
        words = [word.lower() for word in _WORDS.findall(key)]
        if "id" in words or "ids" in words:
            return None
        if (word := next((word for word in words if word in self._words), None)) is not None:
            return self._words[word]
        if len(words) > 1 and any(len(word) == 1 for word in words):  # such as answer_a
            return None
        return next((known for word, known in self._squashed.items() if _mistyped(_squash(key), word)), None)


def _mistyped(key: str, word: str) -> bool:
    """Whether a longer word has a letter too many or too few, or two swapped; a wrong one makes other words of it."""
    long, short = sorted((key, word), key=len, reverse=True)
    if len(short) < 6:
        return False
    if len(long) == len(short):
        return any(long[:i] + long[i + 1] + long[i] + long[i + 2 :] == short for i in range(len(long) - 1))
    return any(long[i].isalpha() and long[:i] + long[i + 1 :] == short for i in range(len(long)))


def _squash(key: str) -> str:
    """A key without case, punctuation and plural."""
    return re.sub("[^a-z0-9]", "", key.lower()).removesuffix("s")


_DOCUMENT_IDS = ("_id", "id", "docid", "doc_id", "pid", "corpus-id", "corpus_id")
_QUERY_IDS = ("_id", "id", "qid", "query-id", "query_id")
_TEXTS = ("text", "contents", "content", "passage", "body", "segment")
_QUERY_TEXTS = (*_TEXTS, "query", "question")

DOCUMENT = Columns({"id": _DOCUMENT_IDS, "title": ("title",), "text": _TEXTS}, ("id", "text"))
DOCUMENT_ID = Columns({"id": _DOCUMENT_IDS}, ("id",))
QUERY = Columns({"id": _QUERY_IDS, "title": ("title",), "text": _QUERY_TEXTS}, ("id", "text"))
TEXT = Columns({"title": ("title",), "text": _QUERY_TEXTS}, ("text",))
EXAMPLE = Columns(
    {
        "query": ("query", "anchor", "question", "sentence1"),
        "positive": ("positive", "pos", "answer", "document", "sentence2", "positive_passages"),
        "negatives": (
            *("negatives", "negative", "neg", "hard_negatives", "hard_negative"),
            "negative_passages",
        ),
        "scores": ("scores",),
        "positive scores": ("pos_scores",),
        "negative scores": ("neg_scores",),
        "label": ("label",),
    },
    ("query", "positive"),
    repeated="negatives",
    words={
        **dict.fromkeys(("pos", "positive", "positives"), "positive"),
        **dict.fromkeys(("neg", "negs", "negative", "negatives"), "negatives"),
        **dict.fromkeys(("anchor", "anchors"), "anchor"),
    },
)
STS = Columns(
    {
        "first": ("sentence1", "sentence_1", "text1"),
        "second": ("sentence2", "sentence_2", "text2"),
        "score": ("score", "similarity_score", "similarity", "label"),
    },
    ("first", "second", "score"),
    header=False,
)
