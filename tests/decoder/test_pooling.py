"""Pooling by hand-worked numbers, on either padding side."""

import jax.numpy as jnp
import numpy as np
import pytest

from sgpt_jax.decoder.pooling import normalize, pool

HIDDEN = np.array([[[1.0, 0], [0, 1], [2, 2], [9, 9]], [[4.0, 2], [9, 9], [9, 9], [9, 9]]], np.float32)
MASK = np.array([[1, 1, 1, 0], [1, 0, 0, 0]])
EXPECTED = {
    "weightedmean": [[(1 + 2 * 3) / 6, (2 + 2 * 3) / 6], [4, 2]],
    "mean": [[1, 1], [4, 2]],
    "lasttoken": [[2, 2], [4, 2]],
    "cls": [[1, 0], [4, 2]],
}


@pytest.mark.parametrize("mode", EXPECTED)
def test_values(mode):
    np.testing.assert_allclose(pool(HIDDEN, MASK, mode), EXPECTED[mode], rtol=1e-6)


@pytest.mark.parametrize("mode", EXPECTED)
def test_padding_side_and_amount_do_not_matter(mode):
    left, mask = np.full((2, 7, 2), np.inf, np.float32), np.zeros((2, 7), int)
    for row, count in enumerate(MASK.sum(axis=1)):
        left[row, 7 - count :] = HIDDEN[row, :count]
        mask[row, 7 - count :] = 1
    np.testing.assert_allclose(pool(left, mask, mode), EXPECTED[mode], rtol=1e-6)


@pytest.mark.parametrize("mode", EXPECTED)
def test_a_row_without_tokens_gives_zeros(mode):
    np.testing.assert_array_equal(pool(HIDDEN, np.zeros((2, 4), int), mode), np.zeros((2, 2)))


def test_position_weights_are_exact_in_bfloat16():
    # As bfloat16, weights above 256 would lose their last digits.
    length = 2048
    hidden = jnp.zeros((1, length, 1), jnp.bfloat16).at[0, -1].set(1)
    vector = pool(hidden, np.ones((1, length), int))
    assert vector.dtype == jnp.float32
    np.testing.assert_allclose(vector[0, 0], length / (length * (length + 1) / 2), rtol=1e-6)


def test_unknown_modes_are_refused():
    with pytest.raises(ValueError, match="weightedmean, mean, lasttoken, cls"):
        pool(HIDDEN, MASK, "max")


def test_normalize():
    np.testing.assert_allclose(normalize(jnp.array([[3.0, 4], [0, 0]])), [[0.6, 0.8], [0, 0]])
