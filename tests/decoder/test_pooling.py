"""Pooling by hand-worked numbers, on either padding side."""

import jax.numpy as jnp
import numpy as np
import pytest

from sgpt_jax.decoder.pooling import normalize, pool, pool_texts, similarities

HIDDEN = np.array([[[1.0, 0], [0, 1], [2, 2], [9, 9]], [[4.0, 2], [9, 9], [9, 9], [9, 9]]], np.float32)
MASK = np.array([[1, 1, 1, 0], [1, 0, 0, 0]])
EXPECTED = {
    "weightedmean": [[(1 + 2 * 3) / 6, (2 + 2 * 3) / 6], [4, 2]],
    "mean": [[1, 1], [4, 2]],
    "lasttoken": [[2, 2], [4, 2]],
    "cls": [[1, 0], [4, 2]],
    "max": [[2, 2], [4, 2]],
    "mean_sqrt_len_tokens": [[3 / 3**0.5, 3 / 3**0.5], [4, 2]],
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


@pytest.mark.parametrize("mode", EXPECTED)
def test_a_text_that_its_row_has_not_gives_zeros(mode):
    masks = np.stack([MASK, np.zeros_like(MASK)], axis=1)
    np.testing.assert_array_equal(pool_texts(HIDDEN, masks, mode)[:, 1], np.zeros((2, 2)))


def test_position_weights_are_exact_in_bfloat16():
    # As bfloat16, weights above 256 would lose their last digits.
    length = 2048
    hidden = jnp.zeros((1, length, 1), jnp.bfloat16).at[0, -1].set(1)
    vector = pool(hidden, np.ones((1, length), int))
    assert vector.dtype == jnp.float32
    np.testing.assert_allclose(vector[0, 0], length / (length * (length + 1) / 2), rtol=1e-6)


def test_unknown_modes_are_refused():
    with pytest.raises(ValueError, match="weightedmean, mean, lasttoken, cls"):
        pool(HIDDEN, MASK, "mean+median")


def test_several_modes_stand_side_by_side():
    np.testing.assert_allclose(
        pool(HIDDEN, MASK, "max+lasttoken+mean"),
        np.concatenate([EXPECTED[mode] for mode in ("max", "lasttoken", "mean")], axis=1),
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        ("weightedmean", [[(2 * 0 + 3 * 2) / 5, (2 * 1 + 3 * 2) / 5], [0, 0]]),
        ("mean", [[1, 1.5], [0, 0]]),
        ("cls", [[0, 1], [4, 2]]),
        ("max", [[2, 2], [0, 0]]),
        ("lasttoken", [[2, 2], [0, 0]]),
    ],
)
def test_first_tokens_left_out(mode, wanted):
    """Weights go on counting from the text's first token; nothing is left of the second row, whose first cls takes."""
    np.testing.assert_allclose(pool_texts(HIDDEN, MASK[:, None], mode, 1)[:, 0], wanted, rtol=1e-6)


def test_the_largest_values_of_texts_in_one_row():
    segments = np.array([[1, 1, 2, -1], [2, -1, 1, 1]])
    masks = segments[:, None] == np.arange(1, 4)[:, None]
    hidden = np.where(segments[..., None] < 0, np.nan, -HIDDEN)
    wanted = [[[0, 0], [-2, -2], [0, 0]], [[-9, -9], [-4, -2], [0, 0]]]
    np.testing.assert_array_equal(pool_texts(hidden, masks, "max"), wanted)


def test_similarities():
    a, b = np.array([[3.0, 4], [1, 0]], np.float32), np.array([[0.0, 2], [3, 4], [-1, 0]], np.float32)
    for name, wanted in {
        "cosine": [[0.8, 1, -0.6], [0, 0.6, -1]],
        "dot": [[8, 25, -3], [0, 3, -1]],
        "euclidean": [[-(13**0.5), 0, -(32**0.5)], [-(5**0.5), -(20**0.5), -2]],
        "manhattan": [[-5, 0, -8], [-3, -6, -2]],
    }.items():
        np.testing.assert_allclose(similarities(a, b, name), wanted, atol=1e-6)


def test_normalize():
    np.testing.assert_allclose(normalize(jnp.array([[3.0, 4], [0, 0]])), [[0.6, 0.8], [0, 0]])
