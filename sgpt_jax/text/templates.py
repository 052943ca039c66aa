"""How re-rankers read a (query, document) pair: the text around the two, what is tokenised together, and what is cut.

Each form below is one of the layouts in which re-rankers are published; `folder/scoring.py` tells which a folder has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sgpt_jax.errors import InputError
from sgpt_jax.text.encoder import TextEncoder

if TYPE_CHECKING:  # transformers takes most of a second to import
    from transformers import PreTrainedTokenizerFast

# What stands for query and document to see what a template makes of them: as in sentence-transformers.
_FILLERS = ("0", "1 2 3 4")
_PROBES = (("alpha", "bravo"), ("charlie", "bravo"), ("alpha", "foxtrot"))


@dataclasses.dataclass(frozen=True)
class PairIds:
    """Pairs as token ids.

    Attributes:
        ids: of each pair, never none.
        documents_cut: bool [n]: the document was too long; where a rendered text is cut, the query may be meant.
        queries_cut: bool [n]: the query was too long.
    """

    ids: list[list[int]]
    documents_cut: np.ndarray
    queries_cut: np.ndarray


class PairForm(Protocol):
    """How pairs become token ids."""

    def check(self, tokenizer: PreTrainedTokenizerFast, instruction: str) -> None:
        """Refuses, as an InputError, a tokenizer or an instruction that the form cannot have."""

    def usual_limit(self, text: TextEncoder) -> int | None:
        """How many tokens a pair has at the most unless the user asks for more; None for no such limit."""

    def tokenise(
        self,
        text: TextEncoder,
        instruction: str,
        queries: Sequence[str],
        documents: Sequence[str],
        *,
        show_progress: bool | None = None,
    ) -> PairIds:
        """Token ids of pairs, at most `text.max_seq_length` each.

        Args:
            text: the tokenizer and the limit.
            instruction: what is asked for, "" for nothing; where it stands is the form's.
            queries, documents: [n] each.
            show_progress: None shows a bar on a terminal after a second.

        Raises:
            InputError: the limit leaves no room for a pair.
        """
        ...


@dataclasses.dataclass(frozen=True)
class TwoTexts:
    """A pair of texts, which the tokenizer joins with its special tokens; the instruction stands before the query.

    A pair that is too long loses tokens of the longer text until both are as long, then of both in turn: the
    strategy "longest_first" of the tokenizers library.

    Attributes:
        query, document: what each is written as, with `{}` for the text.
    """

    query: str = "{}"
    document: str = "{}"

    def check(self, tokenizer: PreTrainedTokenizerFast, instruction: str) -> None:
        if instruction and self.query != "{}":
            raise InputError("this re-ranker takes no instruction: leave prompt out")

    def usual_limit(self, text: TextEncoder) -> int | None:
        return None

    def tokenise(
        self,
        text: TextEncoder,
        instruction: str,
        queries: Sequence[str],
        documents: Sequence[str],
        *,
        show_progress: bool | None = None,
    ) -> PairIds:
        before, between, after = _special_ids_of_pair(text.tokenizer)
        room = text.max_seq_length - len(before) - len(between) - len(after)
        _check_room(room, text)
        asked = [instruction + _fill(self.query, query) for query in queries]
        shown = [_fill(self.document, document) for document in documents]
        ids_of = _ids_of(text, [*asked, *shown], show_progress)
        keep = _keep(text)
        rows, cuts = [], []
        for query, document in zip(asked, shown, strict=True):
            first, second = ids_of[query], ids_of[document]
            kept = _longest_first(len(first), len(second), room)
            row = before + keep(first, kept[0]) + between + keep(second, kept[1]) + after
            rows.append(row or [text.eos_id])
            cuts.append((kept[0] < len(first), kept[1] < len(second)))
        queries_cut, documents_cut = np.array(cuts, bool).reshape(-1, 2).T
        return PairIds(rows, documents_cut, queries_cut)


class _Rendered:
    """A text that holds both query and document, tokenised as one, without special tokens.

    Where it is too long, it is cut, and the tokens of what stands behind query and document in every text overwrite the
    last ones that are left, as sentence-transformers does.
    """

    def render(
        self, tokenizer: PreTrainedTokenizerFast, instruction: str, pairs: Sequence[tuple[str, str]]
    ) -> list[str]:
        """The text of each pair."""
        raise NotImplementedError

    def tokenise(
        self,
        text: TextEncoder,
        instruction: str,
        queries: Sequence[str],
        documents: Sequence[str],
        *,
        show_progress: bool | None = None,
    ) -> PairIds:
        limit, keep = text.max_seq_length, _keep(text)
        fillers = self.render(text.tokenizer, instruction, [(filler, filler) for filler in _FILLERS])
        end = _common_end(*text.plain_ids(fillers, show_progress=False))
        if len(end) >= limit:
            raise InputError(
                f"max_seq_length {limit} leaves no room: the template alone ends in {len(end)} tokens"
            )
        rendered = self.render(text.tokenizer, instruction, list(zip(queries, documents, strict=True)))
        ids_of = _ids_of(text, rendered, show_progress)
        rows = []
        for whole in rendered:
            ids = keep(ids_of[whole], limit)
            rows.append((ids[: len(ids) - len(end)] + end if len(ids) == limit else ids) or [text.eos_id])
        cut = np.array([len(ids_of[whole]) > limit for whole in rendered], bool)
        return PairIds(rows, cut, np.zeros(len(rows), bool))


@dataclasses.dataclass(frozen=True)
class ChatTemplate(_Rendered):
    """A Jinja template for messages of the roles "query" and "document", and "system" for an instruction.

    Attributes:
        template: its source.
        structured: whether messages have a list of parts, rather than a text.
        variables: what the template gets besides messages.
    """

    template: str
    structured: bool = False
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def check(self, tokenizer: PreTrainedTokenizerFast, instruction: str) -> None:
        base, *varied = self.render(tokenizer, instruction, _PROBES)
        lost = [role for role, text in zip(("query", "document"), varied, strict=True) if text == base]
        if lost:
            raise InputError(
                f"the chat template leaves out the {' and the '.join(lost)}: it has no message of that role, "
                "so this folder cannot score pairs"
            )

    def usual_limit(self, text: TextEncoder) -> int | None:
        return None

    def render(
        self, tokenizer: PreTrainedTokenizerFast, instruction: str, pairs: Sequence[tuple[str, str]]
    ) -> list[str]:
        chats = [
            [self._message("system", instruction)] * bool(instruction)
            + [self._message("query", query), self._message("document", document)]
            for query, document in pairs
        ]
        if not chats:
            return []
        try:
            rendered = tokenizer.apply_chat_template(
                chats, chat_template=self.template, tokenize=False, **self.variables
            )
        except Exception as error:  # a template may raise anything
            raise InputError(f"the chat template fails: {type(error).__name__}: {error}") from error
        return [str(text) for text in rendered]

    def _message(self, role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}] if self.structured else text}


@dataclasses.dataclass(frozen=True)
class FixedTemplate(_Rendered):
    """A template whose text is known, for folders that lack it.

    Attributes:
        template: with `{query}` and `{document}`, and `{instruction}` if it takes one.
        instruction: what stands for an instruction that is not given.
        limit: tokens of a pair at the most, unless the user asks for more.
    """

    template: str
    instruction: str = ""
    limit: int | None = None

    def check(self, tokenizer: PreTrainedTokenizerFast, instruction: str) -> None:
        if instruction and "{instruction}" not in self.template:
            raise InputError("this re-ranker takes no instruction: leave prompt out")

    def usual_limit(self, text: TextEncoder) -> int | None:
        return self.limit

    def render(
        self, tokenizer: PreTrainedTokenizerFast, instruction: str, pairs: Sequence[tuple[str, str]]
    ) -> list[str]:
        asked = instruction or self.instruction
        return [
            self.template.format(instruction=asked, query=query, document=document)
            for query, document in pairs
        ]


@dataclasses.dataclass(frozen=True)
class Parts:
    """Query and document with fixed texts before, between and behind them, each tokenised apart.

    The query has three quarters of the room for both at the most, the document what is left; both lose their end.

    Attributes:
        before, after: the fixed texts.
        query, document: what each is written as, with `{}` for the text; a newline stands between them.
        limit: room for both, in tokens, unless the user asks for another number of tokens of a pair.
        bos: whether the tokenizer's first token stands before the query, in the query's and document's room.
        instruction: the line for an instruction, with `{}` for it; "" where it takes none.
    """

    before: tuple[str, ...]
    query: str
    document: str
    after: tuple[str, ...]
    limit: int
    bos: bool = False
    instruction: str = ""

    def check(self, tokenizer: PreTrainedTokenizerFast, instruction: str) -> None:
        if instruction and not self.instruction:
            raise InputError("this re-ranker takes no instruction: leave prompt out")
        if self.bos and tokenizer.bos_token_id is None:
            raise InputError("this re-ranker's texts begin with a token (bos_token) that its tokenizer lacks")

    def usual_limit(self, text: TextEncoder) -> int | None:
        return self.limit + sum(map(len, self._around(text, "")))

    def tokenise(
        self,
        text: TextEncoder,
        instruction: str,
        queries: Sequence[str],
        documents: Sequence[str],
        *,
        show_progress: bool | None = None,
    ) -> PairIds:
        before, after = self._around(text, instruction)
        room = text.max_seq_length - len(before) - len(after)
        first = [text.tokenizer.bos_token_id] if self.bos else []
        most = room * 3 // 4
        _check_room(most, text)
        asked = [_fill(self.query, query) for query in queries]
        shown = [_fill(self.document, document) for document in documents]
        ids_of = _ids_of(text, [*asked, *shown, "\n"], show_progress)
        rows, cuts = [], []
        for query, document in zip(asked, shown, strict=True):
            start = first + ids_of[query][:most]
            rest = ids_of["\n"] + ids_of[document]
            rows.append(before + start + rest[: room - len(start)] + after)
            cuts.append((len(ids_of[query]) > most, len(rest) > room - len(start)))
        queries_cut, documents_cut = np.array(cuts, bool).reshape(-1, 2).T
        return PairIds(rows, documents_cut, queries_cut)

    def _around(self, text: TextEncoder, instruction: str) -> tuple[list[int], list[int]]:
        """The token ids before and behind query and document."""
        line = (_fill(self.instruction, instruction), "\n") if instruction else ()
        before, after = (
            [id for ids in text.plain_ids(parts, show_progress=False) for id in ids]
            for parts in ((*self.before, *line), self.after)
        )
        return before, after


def _fill(written: str, text: str) -> str:
    return written.replace("{}", text)


def _check_room(room: int, text: TextEncoder) -> None:
    if room < 1:
        raise InputError(f"max_seq_length {text.max_seq_length} leaves no room for query and document")


def _ids_of(text: TextEncoder, texts: Sequence[str], show_progress: bool | None) -> dict[str, list[int]]:
    """The token ids of each different text, without special tokens."""
    different = list(dict.fromkeys(texts))
    return dict(zip(different, text.plain_ids(different, show_progress=show_progress), strict=True))


def _keep(text: TextEncoder) -> Callable[[list[int], int], list[int]]:
    """Cuts ids to a number, at the side at which the tokenizer cuts."""
    if text.tokenizer.truncation_side == "left":
        return lambda ids, number: ids[len(ids) - number :] if number < len(ids) else ids
    return lambda ids, number: ids[:number]


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts are left, by the rule of the tokenizers library."""
    if first + second <= room:
        return first, second
    short = min(first, second)
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    return (short, long) if first <= second else (long, short)


def _common_end(first: list[int], second: list[int]) -> list[int]:
    """The ids in which both end; none where they end in all they have."""
    same = 0
    while same < min(len(first), len(second)) and first[-1 - same] == second[-1 - same]:
        same += 1
    return first[len(first) - same :] if same < min(len(first), len(second)) else []


def _special_ids_of_pair(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int], list[int]]:
    """The ids that the tokenizer itself puts before, between and behind two texts."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    whole = backend.encode("a", "a")
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    seen = 0
    for id, of in zip(whole.ids, whole.sequence_ids, strict=True):
        if of is None:
            parts[seen].append(id)
        else:
            seen = of + 1
    return parts
