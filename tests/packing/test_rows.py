"""Rows of several texts: each text once, within the bounds, and with the vector that it has alone."""

import random

import decoders
import numpy as np
import pytest

import sgpt_jax as sgpt
from sgpt_jax.errors import InputError
from sgpt_jax.packing.rows import (
    RowBatch,
    fill_rows,
    lay_out,
    length_buckets,
    plan_batches,
    texts_per_row,
)


def test_length_buckets():
    assert length_buckets(300) == [16, 32, 64, 96, 128, 192, 256, 304]
    assert length_buckets(75) == [16, 32, 64, 80]
    assert length_buckets(2048) == [16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert [length_buckets(n) for n in (1, 16, 17)] == [[8], [16], [16, 24]]
    with pytest.raises(InputError):
        length_buckets(0)


def test_the_longest_that_fits_comes_next():
    rows = fill_rows([30, 5, 50, 20, 20, 10, 4], lambda size: 64 if size > 32 else 32)
    assert rows == [(64, (2, 5, 6)), (32, (0,)), (32, (3, 1)), (32, (4,))]
    assert [len(row) for _, row in fill_rows([1] * 12, lambda _: 32)] == [5, 5, 2]  # 32 // 6 texts


@pytest.mark.parametrize("seed", range(30))
def test_plans_hold_every_text_once_within_the_bounds(seed):
    rng = random.Random(seed)
    limit = rng.choice([1, 20, 75, 300, 1000, 2048])
    lengths = [rng.randint(1, limit) for _ in range(rng.choice([0, 1, 2, 17, 400]))]
    multiple = rng.choice([1, 2, 3, 8])
    tokens = rng.choice([1, 100, 4096, 32768])
    plan = plan_batches(lengths, batch_tokens=tokens, max_length=limit, row_multiple=multiple)
    assert plan == plan_batches(lengths, batch_tokens=tokens, max_length=limit, row_multiple=multiple)
    assert sorted(index for batch in plan for index in batch.indices) == list(range(len(lengths)))
    assert [batch.length for batch in plan] == sorted((batch.length for batch in plan), reverse=True)
    for batch in plan:
        assert batch.length in length_buckets(limit)
        assert batch.rows % multiple == 0 and 0 < len(batch.texts) <= batch.rows
        longest = min(bucket for bucket in length_buckets(limit) if bucket >= max(lengths))
        assert batch.rows * batch.length <= max(tokens, multiple * longest)
        assert batch.rows < 2 * (len(batch.texts) + multiple)
        for texts in batch.texts:
            assert 0 < sum(lengths[index] for index in texts) <= batch.length
            assert len(texts) <= min(batch.slots, texts_per_row(batch.length))
        assert batch.slots in (1, 4, 16, 64)


@pytest.mark.parametrize("limit", [1000, 1024, 2048])
@pytest.mark.parametrize("tokens", [1, 2048, 4096, 16384, 32768, 10**6])
def test_a_thousand_lengths_need_at_most_twelve_shapes(tokens, limit):
    plan = plan_batches(range(1, 1001), batch_tokens=tokens, max_length=limit)
    assert len({(batch.rows, batch.length, batch.slots) for batch in plan}) <= 12


def test_small_requests_share_shapes():
    """A server's: at most 64 queries at a time."""
    rng = random.Random(0)
    shapes = set()
    for _ in range(400):
        plan = plan_batches(
            [rng.randint(4, 30) for _ in range(rng.randint(1, 64))], batch_tokens=4096, max_length=300
        )
        shapes |= {(batch.rows, batch.length, batch.slots) for batch in plan}
    assert len(shapes) <= 16


def test_a_text_too_long_for_its_row():
    with pytest.raises(ValueError, match="no place"):
        fill_rows([3, 9], lambda _: 8)


def test_joining_saves_a_sixth_of_mixed_texts():
    """Lengths like those of abstracts: computed tokens against buckets alone, one text a row."""
    lengths = np.random.default_rng(0).gamma(8, 32, 2000).astype(int).clip(1, 1024).tolist()
    plan = plan_batches(lengths, batch_tokens=4096, max_length=1024)
    joined = sum(batch.rows * batch.length for batch in plan)
    buckets = np.asarray(length_buckets(1024))
    alone = buckets[np.searchsorted(buckets, lengths)].sum()
    assert sum(lengths) <= joined < 1.06 * sum(lengths) < 0.9 * alone


def test_single_queries_use_a_small_batch():
    def plan(lengths, multiple=1):
        return plan_batches(lengths, batch_tokens=16384, max_length=300, row_multiple=multiple)

    assert plan([7]) == [RowBatch(((0,),), 1, 16, 1)]
    assert plan([7], 8) == [RowBatch(((0,),), 8, 16, 1)]
    assert plan([7, 90, 8]) == [RowBatch(((1,), (2,), (0,)), 4, 96, 1)]


def test_the_texts_are_spread_over_the_devices():
    (batch,) = plan_batches([60] * 8, batch_tokens=16384, max_length=512, row_multiple=8)
    assert (batch.rows, batch.length, len(batch.texts)) == (8, 64, 8)


def test_a_text_over_the_limit_is_refused():
    with pytest.raises(InputError, match="text 1 has 301 tokens"):
        plan_batches([3, 301], batch_tokens=4096, max_length=300)


def test_lay_out():
    rows, places = lay_out([[1, 2, 3], [4], [5, 6]], RowBatch(((2, 1), (0,)), 3, 4, 4), pad_id=9)
    assert all(values.dtype == np.int32 for values in rows.values())
    assert rows["input_ids"].tolist() == [[5, 6, 4, 9], [1, 2, 3, 9], [9] * 4]
    assert rows["segments"].tolist() == [[1, 1, 2, 0], [1, 1, 1, 0], [0] * 4]
    assert rows["positions"].tolist() == [[0, 1, 0, 0], [0, 1, 2, 0], [0] * 4]
    assert places.tolist() == [0, 1, 4]


@pytest.mark.parametrize("pooling", ["weightedmean", "mean", "lasttoken", "cls"])
@pytest.mark.parametrize("variant", ["gpt2", "gpt_neo", "bloom", "llama"])
def test_a_text_has_the_vector_that_it_has_alone(variant, pooling, tmp_path):
    """Learned positions, windows, ALiBi and rotary positions: none sees its neighbours in the row."""
    folder = decoders.write_tokenizer(decoders.write_checkpoint(variant, tmp_path))
    model = sgpt.BiEncoder.from_pretrained(folder, pooling=pooling)
    texts = ["a heron", "", "the ferry crosses the bay", "night " * 9, "people stay at night", "x"] * 3
    together = model.encode(texts, show_progress=False)
    alone = np.stack([model.encode(text, show_progress=False) for text in texts])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5 * np.abs(alone).max())
