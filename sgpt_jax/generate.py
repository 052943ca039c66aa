"""Generation: what a decoder writes after a prompt with a document, one line for each, such as a query."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from sgpt_jax.decoder.cache import Cache
from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.decoder.generation import GREEDY, Sampling, generate_tokens, read_prefix
from sgpt_jax.decoder.model import Decoder, split
from sgpt_jax.decoder.sharding import batch_sharding, num_shards
from sgpt_jax.errors import InputError
from sgpt_jax.packing.layout import LENGTH_UNIT, Row, plan_batches, round_up
from sgpt_jax.runtime.one_behind import one_behind
from sgpt_jax.runtime.platform import by_platform
from sgpt_jax.runtime.progress import progress
from sgpt_jax.text.encoder import TextEncoder, check_ids
from sgpt_jax.text.pairs import Prompt
from sgpt_jax.text.tokenizer import special_ids

if TYPE_CHECKING:  # transformers takes most of a second to import
    from transformers import PreTrainedTokenizerFast

# What stands for the document, to see what a chat template makes of it.
_DOCUMENT = "(the document)"
# Memory for the caches of a batch. CPU: some dozen rows of a small decoder, so that reading its weights, once a token
# for the whole batch, is not most of the work.
_CPU_CACHE_BYTES, _CACHE_BYTES = 1 << 30, 4 << 30
# Rows of a batch at the most: their logits take memory, too.
_MOST_ROWS = 512


@dataclasses.dataclass(frozen=True)
class Generated:
    """What a decoder wrote.

    Attributes:
        text: its first line, without white space around it.
        log_prob: mean log-probability of its tokens, in nats; with what ended it.
        finished: it ended by itself, with the line or the text, before the limit.
    """

    text: str
    log_prob: float
    finished: bool


def generate(
    decoder: Decoder,
    text: TextEncoder,
    prompt: Prompt,
    documents: Sequence[str],
    *,
    sampling: Sampling = GREEDY,
    max_new_tokens: int = 32,
    max_document_tokens: int | None = None,
    seeds: Sequence[int] | None = None,
    mesh: Mesh | None = None,
    show_progress: bool | None = None,
) -> list[Generated]:
    """Continues the prompt of each document, to the end of the line or of the text.

    What all prompts begin with is read once. What is drawn for a document depends on its seed alone, not on what else
    is in the call.

    Args:
        decoder: causal, with a language-model head.
        text: its tokenizer; `max_seq_length` bounds prompt and new tokens together.
        prompt: the text around a document (few-shot: see `query_prompt` or `Prompt.with_examples`).
        documents: any number.
        sampling: how tokens are chosen; the default is the most probable one.
        max_new_tokens: tokens that are written at the most.
        max_document_tokens: tokens of a document that are read; None for as many as there is room for.
        seeds: one for each document, from 0 to 2^32 - 1; None for 0, 1, 2, ...
        mesh: what the decoder lies on, or None.
        show_progress: None shows a bar on a terminal after a second.

    Raises:
        InputError: the decoder cannot write, or the prompt leaves no room for a document.
        TypeError: for a document that is no str, naming its index.
    """
    check_writer(decoder.config)
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    seeds = range(len(documents)) if seeds is None else seeds
    limit = min(text.max_seq_length, _longest(decoder.config)) - max_new_tokens
    prefix, rows = _tokenise(text, prompt, documents, limit, max_document_tokens, show_progress)
    check_ids([prefix, *rows], decoder.config.vocab_size)
    structure, params = split(decoder)
    shared = read_prefix(structure, params, np.array([prefix], np.int32), mesh=mesh) if prefix else None
    stops = _stops(text.tokenizer, decoder.config.vocab_size)
    sharding = jax.local_devices()[0] if mesh is None else batch_sharding(mesh)
    options: dict[str, Any] = {"steps": max_new_tokens, "sampling": sampling, "mesh": mesh}

    def start() -> Iterator[tuple[list[int], tuple[jax.Array, jax.Array]]]:
        for members, *arrays in _batches(decoder, text.pad_id, shared, rows, seeds, max_new_tokens, mesh):
            laid = jax.device_put(tuple(arrays), sharding)
            yield members, generate_tokens(structure, params, shared, *laid, stops, **options)

    found: dict[int, Generated] = {}
    with progress("writing", "text", len(rows), show=show_progress) as bar:
        for members, (tokens, log_probs) in one_behind(
            start(), lambda batch: (batch[0], jax.device_get(batch[1]))
        ):
            for row, member in enumerate(members):
                found[member] = _read(text.tokenizer, tokens[row], log_probs[row], stops)
            bar.update(len(members))
    return [found[number] for number in range(len(rows))]


def check_writer(config: DecoderConfig) -> None:
    """Refuses a decoder that cannot continue a text.

    Raises:
        InputError: saying why.
    """
    if config.head == "none":
        raise InputError("a checkpoint without a language-model head cannot write")
    if config.bidirectional:
        raise InputError("a bidirectional decoder cannot write: each of its tokens sees those after it")


def query_prompt(
    tokenizer: PreTrainedTokenizerFast, examples: Sequence[tuple[str, str]], instruction: str
) -> Prompt:
    """The prompt that asks for a query of a document, after examples.

    With a chat template, each example is a question of the user, the instruction and the document, and its answer.
    Any other tokenizer gets plain text for a base model, as InPars has it (arXiv 2202.05144), without the instruction.

    Args:
        tokenizer: tells whether there is a chat template.
        examples: (document, query).
        instruction: what a model that follows instructions is asked for.

    Raises:
        InputError: the chat template does not show the document once, and as it is.
    """
    if not tokenizer.chat_template:
        return Prompt("Document: ", "\nRelevant query:", " ").with_examples(examples, end="\n\n")
    turns = []
    for document, query in (*examples, (_DOCUMENT, None)):
        turns.append({"role": "user", "content": f"{instruction}\n\n{document}"})
        if query is not None:
            turns.append({"role": "assistant", "content": query})
    # Qwen3 and others otherwise think before they answer.
    rendered = str(
        tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    )
    if rendered.count(_DOCUMENT) != 1:
        raise InputError("the tokenizer's chat template does not show the document once, and as it is")
    return Prompt(*rendered.split(_DOCUMENT))


def _longest(config: DecoderConfig) -> float:
    """Up to which length a text's tokens are rotated as they were when it was shorter: what is cached must stay."""
    rotations = (config.rotation(layer) for layer in range(config.num_layers))
    return min((r.original_max_positions for r in rotations if r and r.scaling == "longrope"), default=np.inf)


def _tokenise(
    text: TextEncoder,
    prompt: Prompt,
    documents: Sequence[str],
    limit: float,
    most: int | None,
    show_progress: bool | None,
) -> tuple[list[int], list[list[int]]]:
    """Token ids of what all prompts begin with, and of the rest of each, which is never empty.

    Prefix, document and suffix are tokenised as one text; where that is too long, the document loses its end.
    """
    opening, _ = special_ids(text.tokenizer)
    prefix, suffix = text.plain_ids([prompt.prefix, prompt.suffix])
    if prefix[: len(opening)] == opening:  # as chat templates have it
        opening = []
    room = limit - len(opening) - len(prefix) - len(suffix)
    if room < 1:
        raise InputError(
            f"a prompt of {len(prefix) + len(suffix)} tokens leaves no room for a document: prompt and document have "
            f"{max(0, limit):.0f}"
        )
    room = int(room if most is None else min(room, most))
    whole = [prompt.prefix + document.strip() + prompt.suffix for document in _texts(documents)]
    rows, shared = [], len(prefix)
    for ids in text.plain_ids(whole, show_progress=show_progress):
        end = len(ids) - len(suffix)
        row = ids[: min(end, len(prefix) + room)] + ids[end:]
        rows.append(row)
        # A token can reach from the prefix into the document. One is always left for the row itself.
        same = next(
            (i for i, pair in enumerate(zip(prefix, row, strict=False)) if pair[0] != pair[1]), len(prefix)
        )
        shared = min(shared, same, len(row) - 1)
    if not rows or shared < 0:  # a prompt without text, and an empty document
        return opening, [row or [text.eos_id] for row in rows]
    return opening + prefix[:shared], [row[shared:] for row in rows]


def _texts(documents: Sequence[str]) -> Sequence[str]:
    for index, document in enumerate(documents):
        if not isinstance(document, str):
            raise TypeError(f"document {index} is {type(document).__name__}, not str")
    return documents


def _batches(
    decoder: Decoder,
    pad_id: int,
    shared: Cache | None,
    rows: Sequence[Sequence[int]],
    seeds: Sequence[int],
    steps: int,
    mesh: Mesh | None,
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray, np.ndarray]]:
    """Of each batch the rows in it, and what `generate_tokens` takes of them: ids, lengths and seeds."""
    # Slots of a row that are not the prompt's own.
    beside = steps + (0 if shared is None else shared.valid.shape[1])
    memory = by_platform(cpu=_CPU_CACHE_BYTES, accelerator=_CACHE_BYTES)
    plans = plan_batches(
        [
            Row((number,), beside + round_up(len(row), LENGTH_UNIT, steps=4))
            for number, row in enumerate(rows)
        ],
        batch_tokens=memory // Cache.token_bytes(decoder.config, decoder.dtype),
        row_multiple=num_shards(mesh),
        batch_texts=_MOST_ROWS,
    )
    for plan in plans:
        members, width = plan.texts, plan.length - beside
        ids = np.full((plan.num_rows, width), pad_id, np.int32)
        lengths, drawn = np.zeros(plan.num_rows, np.int32), np.zeros(plan.num_rows, np.uint32)
        for row, member in enumerate(members):
            lengths[row] = len(rows[member])
            drawn[row] = seeds[member]
            ids[row, width - lengths[row] :] = rows[member]
        yield members, ids, lengths, drawn


def _stops(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> np.ndarray:
    """bool [V]: special tokens, and those with a line's end in them. Rows beyond the tokenizer's are no tokens."""
    stops = np.ones(vocab_size, bool)
    known = min(len(tokenizer), vocab_size)
    decoded = tokenizer.backend_tokenizer.decode_batch(
        [[token] for token in range(known)], skip_special_tokens=False
    )
    stops[:known] = ["\n" in piece for piece in decoded]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    stops[[token for token in special.union(tokenizer.all_special_ids) if token < vocab_size]] = True
    return stops


def _read(
    tokenizer: PreTrainedTokenizerFast, tokens: np.ndarray, log_probs: np.ndarray, stops: np.ndarray
) -> Generated:
    """What the tokens of one row, [S], say."""
    written = tokens[tokens >= 0]
    line = tokenizer.backend_tokenizer.decode(written.tolist(), skip_special_tokens=True).split("\n")[0]
    return Generated(line.strip(), float(log_probs[: len(written)].mean()), bool(stops[written[-1]]))
