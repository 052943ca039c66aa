"""Prompts of the cross-encoder: the text around a document, and how (query, document) pairs become token ids."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import fix_surrogates
from sgpt_jax.text.encoder import TextEncoder

DEFAULT_PROMPT = (
    "Documents are searched to find matches with the same content.\n"
    'The document "{}" is a good search result for "'
)
"""Prompt "G" of the SGPT paper's ablation, with which its cross-encoder results were made."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The text around a document: what a query follows is prefix + document + suffix.

    Attributes:
        prefix: before the document. It is never cut.
        suffix: between the document and the query. It is never cut.
        query_start: put in front of every query and scored with it, such as the space of " word" tokens.
    """

    prefix: str
    suffix: str
    query_start: str = ""

    @classmethod
    def parse(cls, template: str) -> Prompt:
        """The prompt of a template such as "Document: {} Query: "; braces other than its one `{}` are plain text.

        Raises:
            InputError: when `{}` does not occur exactly once.
        """
        if template.count("{}") != 1:
            raise InputError(
                f"a prompt has one {{}} where the document goes, this one has {template.count('{}')}: {template!r}"
            )
        return cls(*template.split("{}"))

    def with_examples(
        self, examples: Sequence[tuple[str, str]], *, instruction: str = "", end: str = "\n"
    ) -> Prompt:
        r"""A few-shot prompt: the instruction; then of each (document, query) example the document in this prompt, the
        query and `end`; then this prompt. All of it stands before the document, so truncation never cuts it.

        Prompt "J" of the SGPT repository's cross-encoder notebook, with its one example, is

            Prompt.parse("Document:\n{}\nQuery:\n").with_examples(
                [(document, query)],
                instruction="Documents are searched to find matches with the same content.\n",
            )
        """
        shown = "".join(
            f"{self.prefix}{document}{self.suffix}{self.query_start}{query}{end}"
            for document, query in examples
        )
        return dataclasses.replace(self, prefix=instruction + shown + self.prefix)


SEARCH_ENDPOINT_PROMPT = Prompt("<|endoftext|>", "\n\n---\n\nThe above passage is related to:", " ")
"""Context of OpenAI's former search endpoint, as revealed in 2022 (a script of that name is in the SGPT repository). It
goes with `reduction="search-endpoint"` and tokenizers that have `<|endoftext|>`."""


@dataclasses.dataclass(frozen=True)
class TokenPairs:
    """Pairs as token ids, each different context, query and pair once.

    Attributes:
        contexts: token ids of what queries follow; none is empty.
        queries: token ids of the queries; an empty one belongs to no pair.
        pairs: (context, query), as indices into the two.
        indices: int [n]: the index in `pairs` of each input, -1 where the query is empty.
        lengths: int [n]: query tokens of each input.
        documents_cut: bool [n]: the document was too long.
        queries_cut: bool [n]: the query was too long for the room that the prompt leaves.
    """

    contexts: list[list[int]]
    queries: list[list[int]]
    pairs: list[tuple[int, int]]
    indices: np.ndarray
    lengths: np.ndarray
    documents_cut: np.ndarray
    queries_cut: np.ndarray


def query_room(text: TextEncoder, prompt: Prompt) -> int:
    """How many tokens a query may have beside an empty document.

    Raises:
        InputError: when the prompt leaves no room at all.
    """
    fixed = sum(map(len, text.plain_ids([prompt.prefix, prompt.suffix])))
    # One more than the decoder reads: a query's last token is predicted, but not read.
    room = text.max_seq_length + 1 - max(fixed, 1)
    if room < 1:
        raise InputError(f"the prompt takes {fixed} tokens, max_seq_length is {text.max_seq_length}")
    return room


def query_tokens(text: TextEncoder, prompt: Prompt, query: str) -> list[str]:
    """The query (after `prompt.query_start`) cut where its tokens end, one str a token that `tokenise_pairs` gives.

    A character that is several tokens stands at the first of them; the others are empty. A query that is cut for
    `query_room` ends there.
    """
    if not query:
        return []
    whole = prompt.query_start + fix_surrogates(query)
    spans = text.tokenizer.backend_tokenizer.encode(whole, add_special_tokens=False).offsets
    ends = [0, *(end for _, end in spans[:-1]), len(whole)]
    return [whole[start:end] for start, end in itertools.pairwise(ends)][: query_room(text, prompt)]


def tokenise_pairs(
    text: TextEncoder,
    prompt: Prompt,
    queries: Sequence[str],
    documents: Sequence[str],
    *,
    show_progress: bool | None = None,
) -> TokenPairs:
    """Token ids of pairs, as the SGPT repository's `sgptce.py` has them.

    Prefix, document and suffix are tokenised as one text, the query as another, both without special tokens. Where
    context and query exceed `text.max_seq_length` + 1 (the last token is not read), the context loses tokens after
    the first p, p being the number of the prefix's own tokens: the start of the document. A query that exceeds
    `query_room` first loses its end; there, the SGPT repository cuts the prompt. A context without any token, which
    only a prompt without text can give, is the end-of-text token.

    Args:
        text: the tokenizer and the limit.
        prompt: the text around documents.
        queries, documents: [n] each.
        show_progress: None shows a bar on a terminal after a second.

    Raises:
        InputError: when the prompt leaves no room.
    """
    room = query_room(text, prompt)
    (prefix_ids,) = text.plain_ids([prompt.prefix])
    query_indices = {query: index for index, query in enumerate(dict.fromkeys(queries))}
    document_indices = {document: index for index, document in enumerate(dict.fromkeys(documents))}
    asked = [prompt.query_start + query if query else "" for query in query_indices]
    query_ids = text.plain_ids(asked, show_progress=show_progress)
    full = [prompt.prefix + document + prompt.suffix for document in document_indices]
    full_ids = text.plain_ids(full, show_progress=show_progress)

    contexts: list[list[int]] = []
    context_indices: dict[tuple[int, int], int] = {}
    pair_indices: dict[tuple[int, int], int] = {}
    indices, lengths, documents_cut, queries_cut = [], [], [], []
    for query, document in zip(queries, documents, strict=True):
        query_index, document_index = query_indices[query], document_indices[document]
        length = min(len(query_ids[query_index]), room)
        ids = full_ids[document_index]
        surplus = max(0, len(ids) + length - text.max_seq_length - 1)
        if length:
            context = context_indices.setdefault((document_index, surplus), len(contexts))
            if context == len(contexts):
                first = len(prefix_ids)
                contexts.append(ids[:first] + ids[first + surplus :] or [text.eos_id])
            indices.append(pair_indices.setdefault((context, query_index), len(pair_indices)))
        else:
            indices.append(-1)
        lengths.append(length)
        documents_cut.append(bool(surplus and length))
        queries_cut.append(len(query_ids[query_index]) > room)
    return TokenPairs(
        contexts=contexts,
        queries=[ids[:room] for ids in query_ids],
        pairs=list(pair_indices),
        indices=np.array(indices, np.int64),
        lengths=np.array(lengths, np.int64),
        documents_cut=np.array(documents_cut, bool),
        queries_cut=np.array(queries_cut, bool),
    )


def check_pairs(pairs: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Queries and documents, with lone surrogates replaced.

    Raises:
        TypeError: for what is no pair of two str, naming its index.
    """
    queries, documents = [], []
    for index, pair in enumerate(pairs):
        if (
            not isinstance(pair, tuple | list)
            or len(pair) != 2
            or not all(isinstance(text, str) for text in pair)
        ):
            raise TypeError(f"pair {index} must be (query, document), two str, not {pair!r:.80}")
        queries.append(fix_surrogates(pair[0]))
        documents.append(fix_surrogates(pair[1]))
    return queries, documents
