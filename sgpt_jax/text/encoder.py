"""Texts to token ids: the only tokenising code.

One rule for brackets and special tokens: a text becomes

    open bracket, the ids that the Hugging Face tokenizer gives for the text (with the special tokens that it adds by
    itself, such as the BOS of Llama), close bracket

where the brackets are there only for `side="query"` (`[`, `]`) and `side="document"` (`{`, `}`) of a model with
brackets. It is what the example code in the SGPT repository's README does. Truncation cuts the text's own ids and
keeps brackets and special tokens. A text that is empty or white space is the two brackets alone, or, without brackets,
the one end-of-text token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from sgpt_jax.errors import InputError, check_list
from sgpt_jax.files.lines import fix_surrogates
from sgpt_jax.runtime.progress import progress
from sgpt_jax.text.tokenizer import special_ids

if TYPE_CHECKING:  # transformers takes most of a second to import
    from transformers import PreTrainedTokenizerFast

Side = Literal["query", "document"]

BRACKETS: dict[str, tuple[str, str]] = {"query": ("[", "]"), "document": ("{", "}")}


# Texts given to the tokenizer at once: enough for its threads, few enough for a progress bar and little memory.
_CHUNK = 4096


class TextEncoder:
    """Turns texts into token ids for one model.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        max_seq_length: the most ids a text may have, brackets and special tokens included.
        brackets: whether queries and documents get brackets (SGPT's "specb" models).
        prompts: texts by name; one of them is put before every text, as sentence-transformers does, see `prompt`.
        default_prompt_name: the one for texts that are neither query nor document; None for none.

    Attributes:
        pad_id: a valid id for padding (pad token, else end-of-text, else 0). Padding is masked, so it never counts.
        eos_id: the id that stands for an empty text without brackets (end-of-text, else `pad_id`).

    Raises InputError when a bracket is not one token, or `max_seq_length` leaves no room for a text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        max_seq_length: int,
        brackets: bool = False,
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_seq_length = max_seq_length
        self.prompts = {"query": "", "document": ""} | dict(prompts or {})
        self.default_prompt_name = default_prompt_name
        known = [i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None]
        self.pad_id: int = known[0] if known else 0
        self.eos_id: int = known[-1] if known else 0
        self._before, self._after = special_ids(tokenizer)
        self._bracket_ids = (
            {side: self._bracket_pair(*pair) for side, pair in BRACKETS.items()} if brackets else {}
        )
        fixed = len(self._before) + len(self._after) + 2 * brackets
        if max_seq_length <= fixed:
            raise InputError(
                f"max_seq_length {max_seq_length} leaves no room for a text: brackets and special tokens take {fixed}"
            )

    @property
    def brackets(self) -> bool:
        """Whether queries and documents get brackets."""
        return bool(self._bracket_ids)

    def prompt(self, side: Side | None = None, name: str | None = None) -> str:
        """The text that goes before every text, by the rules of sentence-transformers 6.

        Args:
            side: of the texts: queries get the prompt "query", documents "document" (both empty unless the model has
                them), others the default one.
            name: of the prompt to use instead.

        Raises:
            InputError: there is no prompt of that name.
        """
        name = name or side or self.default_prompt_name
        if name is not None and name not in self.prompts:
            raise InputError(f"there is no prompt {name!r}; this model has: {', '.join(self.prompts)}")
        return self.prompts[name] if name else ""

    def prompt_length(self, prompt: str, side: Side | None = None) -> int:
        """How many first tokens of a text with this prompt are the prompt's, counted as sentence-transformers does.

        That is as many as the prompt has alone with what the tokenizer puts before it (and an opening bracket). A
        token that joins the prompt's end and the text's beginning is the text's.
        """
        bracketed = self.brackets and side is not None
        if bracketed:  # `ids` strips what it puts into brackets
            prompt = prompt.lstrip()
        if not prompt:
            return 0
        (content,) = self._tokenise([prompt], False)
        ids = [*self._before, *content, *self._after]
        last_is_special = ids[-1] in self.tokenizer.all_special_ids
        return len(ids) - last_is_special + bracketed

    def ids(
        self,
        texts: Sequence[str],
        side: Side | None = None,
        *,
        prompt: str | None = None,
        show_progress: bool | None = None,
        on_cut: Callable[[int], object] | None = None,
    ) -> list[list[int]]:
        """Token ids of every text, at most `max_seq_length` each and never none.

        `prompt` goes before every text; None is that of the side, see the method `prompt`. One warning a call says how
        many texts were cut; with `on_cut` their number goes there instead. `show_progress` None shows a bar on a
        terminal after a second.

        Raises TypeError, naming the index, for anything that is not a str.
        """
        if side is not None and side not in BRACKETS:
            raise ValueError(f"side must be None, 'query' or 'document', not {side!r}")
        pair = self._bracket_ids.get(side) if side else None
        if prompt is None:
            prompt = self.prompt(side)
        cleaned = [prompt + text for text in check_texts(texts)]
        if pair:
            cleaned = [text.strip() for text in cleaned]
        open_ids, close_ids = ([pair[0]], [pair[1]]) if pair else ([], [])
        empty = open_ids + close_ids or [self.eos_id]
        before, after = open_ids + self._before, self._after + close_ids
        room = self.max_seq_length - len(before) - len(after)
        keep = slice(-room, None) if self.tokenizer.truncation_side == "left" else slice(room)

        rows: list[list[int]] = []
        cut = 0
        for text, content in zip(cleaned, self._tokenise(cleaned, show_progress), strict=True):
            if not content or not text.strip():
                rows.append(list(empty))
                continue
            cut += len(content) > room
            rows.append(before + content[keep] + after)
        if on_cut is not None:
            on_cut(cut)
        else:
            self.warn_cut(cut, len(rows))
        return rows

    def warn_cut(self, cut: int, texts: int) -> None:
        """Warns that so many of the texts were cut, if any were."""
        if cut:
            warnings.warn(
                f"{cut} of {texts} texts are longer than {self.max_seq_length} tokens and were cut",
                stacklevel=3,
            )

    def plain_ids(self, texts: Sequence[str], *, show_progress: bool | None = None) -> list[list[int]]:
        """Token ids of every text as it is: no special tokens, no brackets, no stripping, no truncation.

        Raises TypeError, naming the index, for anything that is not a str.
        """
        return self._tokenise(check_texts(texts), show_progress)

    def _tokenise(self, texts: list[str], show_progress: bool | None) -> list[list[int]]:
        backend = self.tokenizer.backend_tokenizer
        # A tokenizer.json may carry padding and truncation, which act on every call to the backend.
        backend.no_padding()
        backend.no_truncation()
        rows: list[list[int]] = []
        with progress("tokenising", "text", len(texts), show=show_progress) as bar:
            for start in range(0, len(texts), _CHUNK):
                chunk = texts[start : start + _CHUNK]
                rows.extend(e.ids for e in backend.encode_batch_fast(chunk, add_special_tokens=False))
                bar.update(len(chunk))
        return rows

    def _bracket_pair(self, opening: str, closing: str) -> tuple[int, int]:
        ids = []
        for bracket, row in zip((opening, closing), self._tokenise([opening, closing], False), strict=True):
            if len(row) != 1 or row[0] == self.tokenizer.unk_token_id:
                raise InputError(
                    f"brackets need a tokenizer that has {bracket!r} as one token; this one gives the ids {row}"
                )
            ids.append(row[0])
        return ids[0], ids[1]


def check_texts(texts: Sequence[str]) -> list[str]:
    """The texts as they can be tokenised.

    Raises:
        TypeError: one of them is not a str, naming its index.
    """
    check_list("texts", texts)
    checked = []
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {index} is {type(text).__name__}, not str")
        checked.append(fix_surrogates(text))
    return checked


def check_ids(ids: Sequence[Sequence[int]], vocab_size: int, indices: Sequence[int] | None = None) -> None:
    """Raises InputError when an id has no row in an embedding of `vocab_size` rows (a look-up would be clamped).

    It names the text by its place in `ids`, or by what `indices` has there.
    """
    for index, row in zip(indices or range(len(ids)), ids, strict=True):
        if row and (max(row) >= vocab_size or min(row) < 0):
            bad = next(i for i in row if not 0 <= i < vocab_size)
            raise InputError(
                f"text {index} has token id {bad}, outside the model's {vocab_size} embeddings: "
                "the tokenizer does not belong to this model"
            )
