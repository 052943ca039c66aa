"""Documents that were found, and how they are shown."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TITLE, _SNIPPET = 140, 320
_SENTENCE_END = re.compile(r"[.!?](?=\s)|[。！？\n]")


@dataclass(frozen=True)
class Hit:
    """A document that was found.

    Attributes:
        id: the document's.
        score: float32's value.
        title: the document's own title; where it has none, its first line or sentence.
        snippet: the beginning of what follows.
        text: the whole document, title and text; empty, like title and snippet, in an index without texts.
    """

    id: str
    score: float
    title: str
    snippet: str
    text: str


def title_and_snippet(text: str, title: str | None = None) -> tuple[str, str]:
    """What stands for a document in a list.

    Args:
        text: the whole document; a title that is known stands at its beginning.
        title: None where it has none. Then it is the first line or sentence.
    """
    if title is not None and text.startswith(title):
        rest = text[len(title) :]
    elif end := _SENTENCE_END.search(text := text.strip(), 0, _TITLE):
        title, rest = text[: end.end()], text[end.end() :]
    else:
        title, rest = _cut(text, _TITLE)
    return " ".join(title.split()), _cut(" ".join(rest.split()), _SNIPPET)[0]


def _cut(text: str, size: int) -> tuple[str, str]:
    """The beginning of a text, with dots if it is not the whole, and the rest. Words stay whole where there are any."""
    if len(text) <= size:
        return text, ""
    end = text.rfind(" ", size // 2, size)
    end = size if end < 0 else end
    return f"{text[:end]} ...", text[end:]
