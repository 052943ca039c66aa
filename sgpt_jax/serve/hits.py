"""How a document that was found is shown."""

from __future__ import annotations

import re
import textwrap

_TITLE, _SNIPPET = 140, 320
_SENTENCE_END = re.compile(r"[.!?](?=\s)|\n")


def title_and_snippet(text: str, title: str | None = None) -> tuple[str, str]:
    """What stands for a document in a list.

    Args:
        text: the whole document; a title that is known stands at its beginning.
        title: None where it is not known: an index keeps the text alone. Then it is the first line or sentence.
    """
    text = text.strip()
    if title is not None and text.startswith(title):
        rest = text[len(title) :]
    elif end := _SENTENCE_END.search(text, 0, _TITLE):
        title, rest = text[: end.end()], text[end.end() :]
    elif len(text) <= _TITLE:
        title, rest = text, ""
    else:
        cut = text.rfind(" ", 0, _TITLE)
        title, rest = (text[:cut] + " ...", text[cut:]) if cut > 0 else (text[:_TITLE], text[_TITLE:])
    return title.strip(), textwrap.shorten(rest, _SNIPPET, placeholder=" ...")
