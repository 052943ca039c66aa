"""The decoder and the weight tables against torch, on tiny random decoders of every family."""

import decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import hidden_states, load, relative_error

from sgpt_jax.errors import InputError


def left_padded(ids, mask):
    rows, length = ids.shape
    out_ids, out_mask = np.full_like(ids, 7), np.zeros_like(mask)
    for row in range(rows):
        count = mask[row].sum()
        out_ids[row, length - count :] = ids[row, :count]
        out_mask[row, length - count :] = 1
    return out_ids, out_mask


@pytest.mark.parametrize("variant", decoders.VARIANTS)
def test_hidden_states_and_logits_equal_torch(variant, tmp_path):
    decoder = load(decoders.write_checkpoint(variant, tmp_path))
    expected = decoders.expected(variant)
    ids, mask = expected["input_ids"], expected["attention_mask"]
    valid = mask.astype(bool)
    hidden = hidden_states(decoder, ids, mask)
    assert relative_error(hidden[valid], expected["hidden"][valid]) < 2e-5

    last = hidden[np.arange(len(mask)), mask.sum(axis=1) - 1]
    assert relative_error(np.asarray(decoder.logits(jnp.asarray(last))), expected["logits"]) < 2e-5

    left_ids, left_mask = left_padded(ids, mask)
    left = hidden_states(decoder, left_ids, left_mask)
    assert relative_error(left[left_mask.astype(bool)], expected["hidden"][valid]) < 2e-5


@pytest.mark.parametrize("variant", decoders.VARIANTS)
def test_bfloat16_stays_close(variant, tmp_path):
    expected = decoders.expected(variant)
    valid = expected["attention_mask"].astype(bool)
    decoder = load(decoders.write_checkpoint(variant, tmp_path), "bfloat16")
    ours = hidden_states(decoder, expected["input_ids"], expected["attention_mask"])[valid]
    theirs = expected["hidden"][valid]
    cosines = (ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)
    assert np.mean(cosines) > 0.999


def test_indices_outside_the_model_are_refused(tmp_path):
    """A look-up would clamp them. While a function is traced there is nothing to look at."""
    decoder = load(decoders.write_checkpoint("gpt_neo", tmp_path))
    mask = np.ones((1, 2), np.int32)
    for wrong in (384, -1):
        with pytest.raises(InputError, match=f"token id {wrong} is outside the model's 384 embeddings"):
            decoder(np.array([[3, wrong]]), mask)
    with pytest.raises(InputError, match="position 192 is outside the model's 192 positions"):
        decoder(jnp.array([[3, 4]]), segments=jnp.zeros((1, 2), int), positions=jnp.array([[191, 192]]))
    assert jax.eval_shape(decoder, jnp.array([[3, 4]]), mask).shape == (1, 2, 32)
