"""Rows of several texts: each text once, within the bounds, and with the vector that it has alone."""

import random

import decoders
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sgpt_jax as sgpt
from sgpt_jax.errors import InputError
from sgpt_jax.packing.layout import PlannedBatch, Row, lay_out, round_up
from sgpt_jax.packing.rows import (
    Packing,
    fill_rows,
    length_buckets,
    most_texts,
    plan_texts,
    texts_per_row,
    vector_indices,
)
from sgpt_jax.serve.programs import Embedder, TokenText
from sgpt_jax.text.tokenizer import load_tokenizer


@pytest.mark.parametrize("unit", [1, 6, 16])
def test_numbers_are_rounded_up_to_a_grid(unit):
    grids = {
        steps: sorted({round_up(size, unit, steps) for size in range(1, 16 * unit)}) for steps in (1, 2, 4)
    }
    assert grids == {
        1: [unit * n for n in (1, 2, 4, 8, 16)],
        2: [unit * n for n in (1, 2, 3, 4, 6, 8, 12, 16)],
        4: [unit * n for n in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)],
    }
    for steps, grid in grids.items():
        for size in range(1, 16 * unit):
            assert round_up(size, unit, steps) == min(number for number in grid if number >= size)


def test_length_buckets():
    assert length_buckets(300) == [16, 32, 48, 64, 96, 128, 192, 256, 304]
    assert length_buckets(75) == [16, 32, 48, 64, 80]
    assert length_buckets(2048) == [16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert [length_buckets(n) for n in (1, 16, 17)] == [[8], [16], [16, 24]]
    with pytest.raises(InputError):
        length_buckets(0)


def test_the_longest_that_fits_comes_next():
    rows = fill_rows([30, 5, 50, 20, 20, 10, 4], lambda size: 64 if size > 32 else 32)
    assert rows == [Row((2, 5, 6), 64), Row((0,), 32), Row((3, 1), 32), Row((4,), 32)]
    assert [len(row.texts) for row in fill_rows([1] * 12, lambda _: 32)] == [5, 5, 2]  # 32 // 6 texts


@pytest.mark.parametrize("seed", range(30))
def test_plans_hold_every_text_once_within_the_bounds(seed):
    rng = random.Random(seed)
    limit = rng.choice([1, 20, 75, 300, 1000, 2048])
    lengths = [rng.randint(1, limit) for _ in range(rng.choice([0, 1, 2, 17, 400]))]
    multiple = rng.choice([1, 2, 3, 8])
    tokens = rng.choice([1, 100, 4096, 32768])
    plan = plan_texts(lengths, Packing(tokens, limit, multiple))
    assert plan == plan_texts(lengths, Packing(tokens, limit, multiple))
    assert sorted(index for batch in plan for index in batch.texts) == list(range(len(lengths)))
    assert [batch.length for batch in plan] == sorted((batch.length for batch in plan), reverse=True)
    for batch in plan:
        assert batch.length in length_buckets(limit)
        assert batch.num_rows % multiple == 0 and 0 < len(batch.rows) <= batch.num_rows
        longest = min(bucket for bucket in length_buckets(limit) if bucket >= max(lengths))
        assert batch.padded_tokens <= max(tokens, multiple * longest)
        assert batch.num_rows < 2 * (len(batch.rows) + multiple)
        for row in batch.rows:
            assert 0 < sum(lengths[index] for index in row.texts) <= row.length
            assert row.length == batch.length
            assert len(row.texts) <= min(texts_per_row(batch), most_texts(batch.length))
        assert texts_per_row(batch) in (1, 4, 16, 64)


@pytest.mark.parametrize("limit", [1000, 1024, 2048])
@pytest.mark.parametrize("tokens", [1, 2048, 4096, 16384, 32768, 10**6])
def test_a_thousand_lengths_need_at_most_twelve_shapes(tokens, limit):
    plan = plan_texts(range(1, 1001), Packing(tokens, limit))
    assert len({(batch.num_rows, batch.length, texts_per_row(batch)) for batch in plan}) <= 12


def test_small_requests_share_shapes():
    """A server's: at most 64 queries at a time."""
    rng = random.Random(0)
    shapes = set()
    for _ in range(400):
        plan = plan_texts([rng.randint(4, 30) for _ in range(rng.randint(1, 64))], Packing(4096, 300))
        shapes |= {(batch.num_rows, batch.length, texts_per_row(batch)) for batch in plan}
    assert len(shapes) <= 16


def test_a_text_too_long_for_its_row():
    with pytest.raises(ValueError, match="does not fit"):
        fill_rows([3, 9], lambda _: 8)


def test_joining_saves_a_sixth_of_mixed_texts():
    """Lengths like those of abstracts: computed tokens against buckets alone, one text a row."""
    lengths = np.random.default_rng(0).gamma(8, 32, 2000).astype(int).clip(1, 1024).tolist()
    plan = plan_texts(lengths, Packing(4096, 1024))
    joined = sum(batch.padded_tokens for batch in plan)
    buckets = np.asarray(length_buckets(1024))
    alone = buckets[np.searchsorted(buckets, lengths)].sum()
    assert sum(lengths) <= joined < 1.06 * sum(lengths) < 0.9 * alone


def test_single_queries_use_a_small_batch():
    def plan(lengths, multiple=1):
        return plan_texts(lengths, Packing(16384, 300, multiple))

    assert plan([7]) == [PlannedBatch((Row((0,), 16),), 1, 16)]
    assert plan([7], 8) == [PlannedBatch((Row((0,), 16),), 8, 16)]
    assert plan([7, 90, 8]) == [PlannedBatch((Row((1,), 96), Row((2,), 96), Row((0,), 96)), 4, 96)]


def test_the_texts_are_spread_over_the_devices():
    (batch,) = plan_texts([60] * 8, Packing(16384, 512, 8))
    assert (batch.num_rows, batch.length, len(batch.texts)) == (8, 64, 8)


def test_a_text_over_the_limit_is_refused():
    with pytest.raises(InputError, match="text 1 has 301 tokens"):
        plan_texts([3, 301], Packing(4096, 300))


def test_lay_out():
    plan = PlannedBatch((Row((2, 1), 4), Row((0,), 4)), 3, 4)
    batch = lay_out(plan, [[1, 2, 3], [4], [5, 6]], pad_id=9)
    assert all(values.dtype == np.int32 for values in (batch.input_ids, batch.positions, batch.segments))
    assert batch.input_ids.tolist() == [[5, 6, 4, 9], [1, 2, 3, 9], [9] * 4]
    assert batch.segments.tolist() == [[1, 1, 2, -1], [1, 1, 1, -1], [-1] * 4]
    assert batch.positions.tolist() == [[0, 1, 0, 0], [0, 1, 2, 0], [0] * 4]
    assert plan.texts == [2, 1, 0] and vector_indices(plan, 4).tolist() == [0, 1, 4]


def test_lay_out_behind_a_prefix():
    plan = PlannedBatch((Row((1, 0), 8, prefix=0), Row((2,), 8)), 2, 8)
    batch = lay_out(plan, [[1, 2], [3], [4]], pad_id=9, prefixes=[[7, 8, 7]])
    assert batch.input_ids.tolist() == [[7, 8, 7, 3, 1, 2, 9, 9], [4] + [9] * 7]
    assert batch.segments.tolist() == [[0, 0, 0, 1, 2, 2, -1, -1], [1] + [-1] * 7]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 3, 4, 0, 0], [0] * 8]


@pytest.mark.parametrize("pooling", ["weightedmean", "mean", "lasttoken", "cls"])
@pytest.mark.parametrize("variant", ["gpt2", "gpt_neo", "bloom", "llama"])
def test_a_text_has_the_vector_that_it_has_alone(variant, pooling, tmp_path):
    """Learned positions, windows, ALiBi and rotary positions: none sees its neighbours in the row."""
    folder = decoders.write_tokenizer(decoders.write_checkpoint(variant, tmp_path))
    model = sgpt.BiEncoder.from_pretrained(folder, pooling=pooling)
    texts = ["a heron", "", "the ferry crosses the bay", "night " * 9, "people stay at night", "x"]
    lengths = [len(ids) for ids in model.text.ids(texts)] * 30
    plans = plan_texts(lengths, Packing(4096, model.text.max_seq_length))
    assert sum(len(plan.rows) for plan in plans) < len(lengths) / 2  # fewer texts would have a row each
    together = model.encode(texts * 30, batch_tokens=4096, show_progress=False)
    alone = np.stack([model.encode(text, show_progress=False) for text in texts] * 30)
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5 * np.abs(alone).max())


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A model for which the token ~ is not a number."""
    folder = decoders.write_tokenizer(decoders.write_checkpoint("gptj", tmp_path_factory.mktemp("damaged")))
    weights = load_file(folder / "model.safetensors")
    (token,) = load_tokenizer(folder).encode("~", add_special_tokens=False)
    weights["transformer.wte.weight"][token] = np.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return sgpt.BiEncoder.from_pretrained(folder)


TEXTS = [f"{number} people stay at night and the ferry crosses the bay" for number in range(50)]


def test_a_text_that_is_not_finite_leaves_the_others_theirs(damaged):
    """It is named, in a list and in a stream; its neighbours in the row have their vectors."""
    wanted = damaged.encode(TEXTS, show_progress=False)
    assert np.isfinite(wanted).all()
    texts = [*TEXTS[:7], "~", *TEXTS[7:40], "a ~", *TEXTS[40:]]
    sound = [number for number, text in enumerate(texts) if "~" not in text]
    with pytest.warns(UserWarning, match="2 of 52 texts have vectors that are not finite: number 7, 41,"):
        found = damaged.encode(texts, show_progress=False)
    with pytest.warns(UserWarning, match="1 of 12 texts .*: number 41,"):
        streamed = np.concatenate(list(damaged.encode_chunks([texts[:40], texts[40:]])))
    for vectors in (found, streamed):
        np.testing.assert_allclose(vectors[sound], wanted, rtol=1e-4, atol=1e-5)
        assert np.isnan(vectors[[7, 41]]).any(axis=1).all()


def test_a_text_that_is_not_finite_leaves_other_requests_theirs(damaged):
    lane = Embedder(damaged)
    lane.shapes = lane.shapes[-1:]
    assert len(list(lane.compile())) == 1
    ids = damaged.text.ids([*TEXTS[:3], "~", TEXTS[3]])
    plan = lane.plan([len(row) for row in ids])
    found = dict(zip(plan.texts, lane.start([TokenText(row) for row in ids], plan)(), strict=True))
    assert len(plan.rows) < len(found) == 5 and np.isnan(found[3]).any()
    wanted = damaged.encode(TEXTS[:4], show_progress=False)
    np.testing.assert_allclose([found[n] for n in (0, 1, 2, 4)], wanted, rtol=1e-4, atol=1e-5)
