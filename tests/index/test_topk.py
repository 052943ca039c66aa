"""The exact top-k of blocks that pass by once: equal to a full sort, however many scores are equal."""

import numpy as np
import pytest

from sgpt_jax.errors import InputError
from sgpt_jax.index.topk import Block, exact_top_k

ROWS = 97


def blocks(vectors, size):
    """Blocks of one shape; the last one is padded with rows that would win."""
    for start in range(0, len(vectors), size):
        part = vectors[start : start + size]
        padded = np.pad(part, ((0, size - len(part)), (0, 0)), constant_values=100.0)
        yield Block(padded.astype(np.float32), None, start, 0, len(part))


@pytest.mark.parametrize("levels", [1, 2, 3, 8, 1000])
@pytest.mark.parametrize("size", [1, 3, 16, 200])
def test_equal_to_a_full_sort(levels, size, monkeypatch):
    monkeypatch.setattr("sgpt_jax.index.topk.MAX_QUERIES", 4)
    draw = np.random.default_rng(levels)
    # Integers, so that equal scores are equal to the last bit; zeros of both signs among them.
    vectors = draw.integers(-levels, levels + 1, (ROWS, 1)) * np.array([[1.0, 0.0]])
    queries = np.array([[1, 0], [-1, 0], [0, 1], [2, 5], [-3, 1]], np.float32)
    ids = [f"{number:03d}" for number in draw.permutation(ROWS)]
    expected = queries @ vectors.T.astype(np.float32) + np.float32(0)
    for k in (1, 2, 5, 40, ROWS, 300):
        scores, rows = exact_top_k(
            queries,
            np.zeros(5, np.float32),
            blocks(vectors, size),
            k,
            lambda rows: [ids[row] for row in rows],
        )
        for query in range(5):
            order = sorted(range(ROWS), key=lambda row: (expected[query, row], ids[row]), reverse=True)[:k]
            assert rows[query].tolist() == order
            assert scores[query].tolist() == expected[query, order].tolist()


def test_rows_that_make_way_for_higher_ones_are_remembered():
    """Of three equal rows two go when higher ones come, and the one that stays is the one with the highest id."""
    vectors = np.array([[1], [1], [1], [0], [2], [2]], np.float32)
    ids = ["a", "b", "c", "d", "e", "f"]
    for size in (1, 2, 3):
        _, rows = exact_top_k(
            np.ones((1, 1), np.float32), np.zeros(1, np.float32), blocks(vectors, size), 3,
            lambda rows: [ids[row] for row in rows],
        )  # fmt: skip
        assert [ids[row] for row in rows[0]] == ["f", "e", "c"]


def test_no_block_gives_no_row_and_infinite_scores_are_refused():
    queries, offsets = np.ones((2, 1), np.float32), np.zeros(2, np.float32)
    scores, rows = exact_top_k(queries, offsets, iter([]), 3, lambda rows: [])
    assert scores.shape == rows.shape == (2, 0)
    for value in (np.inf, np.nan, -np.inf):
        with pytest.raises(InputError, match="a score is NaN or infinite"):
            exact_top_k(queries, offsets, blocks(np.full((2, 1), value), 2), 3, lambda rows: ["a", "b"])
