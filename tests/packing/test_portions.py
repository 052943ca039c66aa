"""Texts tokenised portion by portion."""

import random
import warnings

import decoders
import numpy as np
import pytest

import sgpt_jax as sgpt
from sgpt_jax import bi_encoder
from sgpt_jax.packing.portions import plan_portions, portions
from sgpt_jax.packing.rows import Packing, plan_texts


@pytest.mark.parametrize("order", ["as drawn", "shortest first", "longest first"])
@pytest.mark.parametrize("seed", range(8))
def test_every_text_runs_once_and_batches_are_as_full(seed, order):
    rng = random.Random(seed)
    packing = Packing(rng.choice([2048, 4096]), 300, rng.choice([1, 8]), rng.choice([None, None, 32]))
    lengths = [rng.choice([rng.randint(1, 30), rng.randint(1, 300)]) for _ in range(400)]
    if order != "as drawn":
        lengths.sort(reverse=order == "longest first")
    ids = [[text] * length for text, length in enumerate(lengths)]
    parts = portions(["a" * 4 * length for length in lengths], rng.choice([5000, 10000]), 300)
    tokenised = ((part, [ids[text] for text in part]) for part in parts)
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
    assert (
        len(parts) > 2
        and padded <= 1.05 * sum(plan.padded_tokens for plan in whole) + 2 * packing.batch_tokens
    )
    assert len(shapes) <= len({(plan.num_rows, plan.length) for plan in whole}) + 4


def test_portions_are_of_about_one_size():
    texts = ["a" * 40, "b" * 4000, "", "c" * 40, "d" * 40]
    assert portions(texts, 54, 20) == [range(5)]
    assert portions(texts, 53, 20) == [range(0, 5, 2), range(1, 5, 2)]
    assert portions(texts, 1, 20) == [range(n, 5, 5) for n in range(5)]
    assert len(portions(texts, 100, 100)) == 2 and len(portions(texts, 100, 100, prompt_length=196)) == 4
    assert portions([], 30, 20) == [range(0)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = decoders.write_tokenizer(decoders.write_checkpoint("gpt_neo", tmp_path_factory.mktemp("model")))
    return sgpt.BiEncoder.from_pretrained(folder, max_seq_length=12)


TEXTS = [f"{number} people stay at night" + " and the ferry crosses" * (number % 4) for number in range(90)]


def of_tokens(size, monkeypatch):
    """Portions of so many tokens."""
    cut = bi_encoder.portions
    monkeypatch.setattr(bi_encoder, "portions", lambda texts, _, *more: cut(texts, size, *more))


def test_portions_are_not_to_be_seen(model, monkeypatch):
    """The same vectors, one warning of all that was cut, and errors that count from the first text."""
    with pytest.warns(UserWarning, match="of 90 texts are longer than 12 tokens") as seen:
        whole = model.encode(TEXTS, show_progress=False)
    of_tokens(100, monkeypatch)
    with pytest.warns(UserWarning, match="were cut") as again:
        apart = model.encode(TEXTS, batch_tokens=128, show_progress=False)
    assert [str(w.message) for w in again] == [str(w.message) for w in seen]
    np.testing.assert_allclose(apart, whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="text 80 is int"):
        model.encode([*TEXTS[:80], 3], show_progress=False)


def test_an_error_in_a_later_portion_ends_the_call(model, monkeypatch):
    of_tokens(100, monkeypatch)
    config = model.decoder.config
    seen = []

    def tokens(texts, *_, on_cut, **__):
        seen.extend(texts)
        on_cut(0)
        return [[config.vocab_size if text == TEXTS[72] else 1] for text in texts]

    monkeypatch.setattr(model.text, "ids", tokens)
    with warnings.catch_warnings(), pytest.raises(sgpt.InputError, match=f"text 72 .* {config.vocab_size},"):
        warnings.simplefilter("error")
        model.encode(TEXTS, show_progress=False)
    assert len(seen) < len(TEXTS)  # nobody goes on tokenising
