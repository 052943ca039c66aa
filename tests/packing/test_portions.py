"""Texts tokenised portion by portion."""

import random
import warnings

import decoders
import numpy as np
import pytest

import sgpt_jax as sgpt
from sgpt_jax import bi_encoder
from sgpt_jax.packing.portions import cut_into_portions, plan_portions
from sgpt_jax.packing.rows import Packing, plan_texts


@pytest.mark.parametrize("seed", range(20))
def test_every_text_runs_once_and_batches_are_as_full(seed):
    rng = random.Random(seed)
    packing = Packing(rng.choice([2048, 4096]), 300, rng.choice([1, 8]), rng.choice([None, None, 32]))
    lengths = [rng.choice([rng.randint(1, 30), rng.randint(1, 300)]) for _ in range(400)]
    ids = [[text] * length for text, length in enumerate(lengths)]
    ends = sorted({*rng.sample(range(1, 400), 9), 400})
    tokenised = (ids[start:end] for start, end in zip([0, *ends], ends, strict=False))
    found, padded, shapes = [], 0, set()
    for portion in plan_portions(tokenised, len(ids), packing):
        for plan in portion.plans:
            found += portion.places[plan.texts].tolist()
            assert [portion.ids[text] for text in plan.texts] == [
                ids[text] for text in found[-len(plan.texts) :]
            ]
            padded += plan.padded_tokens
            shapes.add((plan.num_rows, plan.length))
    assert sorted(found) == list(range(400))
    whole = plan_texts(lengths, packing)
    assert padded <= 1.15 * sum(plan.padded_tokens for plan in whole) + 2 * packing.batch_tokens
    assert len(shapes) <= len({(plan.num_rows, plan.length) for plan in whole}) + 2


def test_portions_are_of_about_one_size():
    texts = ["a" * 40, "b" * 4000, "", "c" * 40, "d" * 40]
    assert list(cut_into_portions(texts, 30, 20)) == [slice(0, 2), slice(2, 5)]
    assert list(cut_into_portions(texts, 1, 20)) == [slice(n, n + 1) for n in range(5)]
    assert list(cut_into_portions([], 30, 20)) == []


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = decoders.write_tokenizer(decoders.write_checkpoint("gpt_neo", tmp_path_factory.mktemp("model")))
    return sgpt.BiEncoder.from_pretrained(folder, max_seq_length=12)


TEXTS = [f"{number} people stay at night" + " and the ferry crosses" * (number % 4) for number in range(90)]


def test_portions_are_not_to_be_seen(model, monkeypatch):
    """The same vectors, one warning of all that was cut, and errors that count from the first text."""
    with pytest.warns(UserWarning, match="of 90 texts are longer than 12 tokens") as seen:
        whole = model.encode(TEXTS, show_progress=False)
    monkeypatch.setattr(bi_encoder, "CPU_PORTION", 100)
    with pytest.warns(UserWarning, match="were cut") as again:
        apart = model.encode(TEXTS, batch_tokens=128, show_progress=False)
    assert [str(w.message) for w in again] == [str(w.message) for w in seen]
    np.testing.assert_allclose(apart, whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="text 80 is int"):
        model.encode([*TEXTS[:80], 3], show_progress=False)


def test_an_error_in_a_later_portion_ends_the_call(model, monkeypatch):
    monkeypatch.setattr(bi_encoder, "CPU_PORTION", 100)
    config = model.decoder.config
    ids = [[config.vocab_size - 1]] * 70 + [[config.vocab_size]] + [[1]] * 19
    start = 0

    def tokens(texts, *_, on_cut, **__):
        nonlocal start
        start += len(texts)
        on_cut(0)
        return ids[start - len(texts) : start]

    monkeypatch.setattr(model.text, "ids", tokens)
    with warnings.catch_warnings(), pytest.raises(sgpt.InputError, match=f"text 70 .* {config.vocab_size},"):
        warnings.simplefilter("error")
        model.encode(TEXTS, show_progress=False)
    assert start < len(ids)  # nobody goes on tokenising
