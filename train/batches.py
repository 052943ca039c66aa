"""From examples to batches: which examples a step gets, and their arrays.

The plan is the same on every process, and each process reads and tokenises only its own part of every batch.
It is a function of the seed alone, so the position in the data is one number: the step.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from sgpt_jax.decoder.batch import Batch
from sgpt_jax.errors import InputError
from sgpt_jax.packing.layout import PlannedBatch, lay_out, round_up
from sgpt_jax.packing.rows import fill_rows, most_texts, vector_indices
from sgpt_jax.runtime.platform import by_platform
from sgpt_jax.text.encoder import TextEncoder, check_ids

from .data import Example, ExampleSource, text_key

# Rows are this long at least, unless the model's limit is lower: shorter ones are not worth compiling a program for.
_SHORTEST_ROW = 512


def row_length(longest: int, max_seq_length: int) -> int:
    """The length of rows where the longest text has `longest` tokens.

    It is the first of 512, 1024, 2048, ... that holds the text, but not more than `max_seq_length` rounded up to a
    multiple of 8, as accelerators and their attention kernels want it; on a CPU of 4.
    """
    unit = by_platform(cpu=4, accelerator=8)
    return min(round_up(longest, _SHORTEST_ROW), -(-max_seq_length // unit) * unit)


def pack(ids: Sequence[Sequence[int]], length: int, pad_id: int) -> tuple[Batch, np.ndarray]:
    """Packs texts into few rows of one length: nearly every step, on every process, then has the same shapes.

    Args:
        ids: the texts' token ids, none longer than `length`.
        length: of a row, T; each has room for S = `most_texts(length)` texts.
        pad_id: a valid token id for padding.

    Returns:
        the rows, and int32 [n]: the index of each text's vector in those of all rows, [R * S, E].
    """
    rows = tuple(fill_rows([len(text) for text in ids], lambda _: length))
    plan = PlannedBatch(rows, len(rows), length)
    indices = np.zeros(len(ids), np.int32)
    indices[plan.texts] = vector_indices(plan, most_texts(length))
    return lay_out(plan, ids, pad_id), indices


class BatchPlan:
    """The examples of every batch, worked out lazily.

    An example of the plan is a number, `epoch * len(source) + index`. Batches cross the ends of epochs: what does not
    fill one at the end of an epoch begins the first batch of the next.

    Args:
        source: the examples.
        batch_size: of the global batch.
        seed: of the shuffles; each epoch has its own.
        shuffle: False keeps the order of the source.
        no_duplicates: an example that shares a text with one of the batch waits for the next batch.

    Raises:
        InputError: fewer examples than a batch has.
    """

    def __init__(
        self, source: ExampleSource, batch_size: int, *, seed: int, shuffle: bool, no_duplicates: bool
    ):
        if len(source) < batch_size:
            raise InputError(f"{len(source)} examples do not fill a batch of {batch_size}")
        self.source, self.batch_size = source, batch_size
        self.seed, self.shuffle, self.no_duplicates = seed, shuffle, no_duplicates
        self._batches: list[np.ndarray] = []
        self._making = self._make()
        self._lock = threading.Lock()

    def __getitem__(self, step: int) -> np.ndarray:
        """The numbers `[batch_size]` of the examples of a step."""
        with self._lock:
            while len(self._batches) <= step:
                self._batches.append(next(self._making))
            return self._batches[step]

    def split(self, number: int) -> tuple[int, int]:
        """(index, epoch) of a number of the plan."""
        epoch, index = divmod(int(number), len(self.source))
        return index, epoch

    def _order(self) -> Iterator[int]:
        count, epoch = len(self.source), 0
        while True:
            order = np.arange(count)
            if self.shuffle:
                order = np.random.default_rng((self.seed, epoch)).permutation(count)
            yield from (epoch * count + order).tolist()
            epoch += 1

    def _make(self) -> Iterator[np.ndarray]:
        fresh = self._order()
        waiting: deque[int] = deque()
        while True:
            batch: list[int] = []
            seen: set[int] = set()
            postponed: list[int] = []
            while len(batch) < self.batch_size:
                number = waiting.popleft() if waiting else next(fresh)
                if self.no_duplicates:
                    keys = self.source.keys(*self.split(number))
                    if not seen.isdisjoint(keys):
                        postponed.append(number)
                        if len(postponed) > 2 * len(self.source):
                            raise InputError(
                                f"the texts repeat too often for batches of {self.batch_size} without duplicates; "
                                "use smaller batches, or allow duplicates (--no-avoid-duplicates)"
                            )
                        continue
                    seen.update(keys)
                batch.append(number)
            waiting.extendleft(reversed(postponed))
            yield np.array(batch, np.int64)


class PackedBatches:
    """The batches of a plan as arrays, this process's part of each: a random-access source for grain.

    Args:
        plan: which examples.
        encoder: how texts become tokens.
        vocab_size: of the model, to refuse a tokenizer that does not belong to it.
        symmetric: texts have no sides (no brackets, no prompts by side), as in NLI data.
        steps: how many batches there are.
        process: (this process's number, number of processes).
        scores: every example must have a teacher's scores.
        include_prompt: whether the tokens of a prompt are pooled.
    """

    def __init__(
        self,
        plan: BatchPlan,
        encoder: TextEncoder,
        *,
        vocab_size: int,
        symmetric: bool,
        steps: int,
        process: tuple[int, int] = (0, 1),
        scores: bool = False,
        include_prompt: bool = True,
    ):
        # A tokenizer of its own: the threads of grain and the evaluation between steps must not share one.
        self.encoder = copy.copy(encoder)
        self.encoder.tokenizer = copy.deepcopy(encoder.tokenizer)
        self.plan, self.steps, self.process, self.scores = plan, steps, process, scores
        self.vocab_size, self.symmetric, self.include_prompt = vocab_size, symmetric, include_prompt

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        """One batch, b being this process's share of it and K the most negatives that any example has.

        Returns:
            `rows`: a `Batch` of packed texts; `skip`: int32 [R, S], how many first tokens of each are left out of the
            pooling; `indices`: of their vectors, see `pack`, int32, queries `[b]`, positives `[b]` and negatives
            `[b, K]`; `ids`: identities of the same texts, int32
            `[..., 2]`; `negative_mask`: bool `[b, K]`; `order`: int32 `[b]`, the places of these examples
            in the global batch; `scores`: float32 `[b, 1 + K]`; `tokens`: how many are encoded;
            `examples`: their numbers, from 0 in the order of the data.
        """
        process, count = self.process
        split = [self.plan.split(number) for number in self.plan[step][process::count]]
        examples = [self.plan.source.get(index, epoch) for index, epoch in split]
        most = self.plan.source.negatives
        queries = [example.query for example in examples]
        positives = [example.positive for example in examples]
        negatives = [text for example in examples for text in example.negatives]
        size = len(examples)
        sides: tuple[Any, Any] = (None, None) if self.symmetric else ("query", "document")
        tokens = self._tokens(queries, sides[0]) + self._tokens(positives + negatives, sides[1])
        skips = [self._skip(sides[0])] * size + [self._skip(sides[1])] * (len(tokens) - size)
        check_ids(tokens, self.vocab_size)
        # Several processes need one length, and none knows the texts of the others: it is that of the limit.
        longest = max(map(len, tokens)) if count == 1 else self.encoder.max_seq_length
        length = row_length(longest, self.encoder.max_seq_length)
        # A text that stands in several lists is encoded once.
        texts = list(zip(map(tuple, tokens), skips, strict=True))
        distinct = dict.fromkeys(texts)
        rows, vectors = pack([ids for ids, _ in distinct], length, self.encoder.pad_id)
        skip = np.zeros((len(rows.segments), most_texts(length)), np.int32)
        skip.flat[vectors] = [skipped for _, skipped in distinct]
        numbers = {text: number for number, text in enumerate(distinct)}
        vectors = vectors[[numbers[text] for text in texts]]
        present = np.array([[k < len(example.negatives) for k in range(most)] for example in examples], bool)
        present = present.reshape(size, most)
        # An example with fewer negatives has index 0 in their place, which the mask keeps out of the loss.
        negative_indices = np.zeros((size, most), np.int32)
        negative_indices[present] = vectors[2 * size :]
        return {
            "rows": rows,
            "skip": skip,
            "indices": (vectors[:size], vectors[size : 2 * size], negative_indices),
            "ids": (_ids(queries), _ids(positives), _scatter(_ids(negatives), present)),
            "negative_mask": present,
            "order": np.arange(process, self.plan.batch_size, count, dtype=np.int32),
            "scores": self._scores(examples, split, most),
            "tokens": sum(len(ids) for ids, _ in distinct),
            "examples": [index for index, _ in split],
        }

    def _tokens(self, texts: list[str], side: Any) -> list[list[int]]:
        """The tokens of texts, each of which is tokenised once however often it stands there."""
        distinct = list(dict.fromkeys(texts))
        ids = dict(zip(distinct, self.encoder.ids(distinct, side), strict=True))
        return [ids[text] for text in texts]

    def _skip(self, side: Any) -> int:
        """How many first tokens of a side's texts are left out of the pooling."""
        return 0 if self.include_prompt else self.encoder.prompt_length(self.encoder.prompt(side), side)

    def _scores(self, examples: list[Example], split: list[tuple[int, int]], most: int) -> np.ndarray:
        values = np.zeros((len(examples), 1 + most), np.float32)
        if self.scores:
            for row, (example, (index, _)) in enumerate(zip(examples, split, strict=True)):
                if example.scores is None:
                    raise InputError(f"example {index} has no `scores`, which distillation needs")
                values[row, : len(example.scores)] = example.scores
        return values


def _ids(texts: list[str]) -> np.ndarray:
    return np.array([text_key(text) for text in texts], np.int64).view(np.int32).reshape(-1, 2)


def _scatter(ids: np.ndarray, present: np.ndarray) -> np.ndarray:
    """ids [n, 2] to [b, K, 2], at the n places that are present."""
    result = np.zeros((*present.shape, 2), np.int32)
    result[present] = ids
    return result


def iterate(batches: PackedBatches) -> grain.DatasetIterator:
    """Iterates over batches, prefetched by a thread; `get_state` and `set_state` are its position."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))
