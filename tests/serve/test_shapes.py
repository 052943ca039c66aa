"""Which shapes a server compiles, and which of them a batch takes."""

import numpy as np
import pytest

from sgpt_jax.packing.layout import Row
from sgpt_jax.packing.rows import fill_rows, most_texts
from sgpt_jax.serve.shapes import Shape, choose, row_lengths, shapes


def fill(sizes):
    def rows(items, length):
        found = fill_rows([sizes[item] for item in items], lambda _: length)
        return [Row(tuple(items[text] for text in row.texts), length) for row in found]

    return rows


def test_few_shapes_up_to_the_limit():
    assert row_lengths(40) == [32, 40]
    assert row_lengths(300) == [32, 64, 128, 256, 304]
    assert row_lengths(8) == [8]
    found = shapes(row_lengths(8192), 32768, 1, (128, 512, 2048, 8192))
    assert len(found) < 24
    assert {shape.length for shape in found} == set(row_lengths(8192))
    assert all(shape.rows * shape.length <= 32768 for shape in found)
    # Rows divide over devices, and one row each is always possible.
    found = shapes(row_lengths(512), 1024, 8, (128, 512))
    assert all(shape.rows % 8 == 0 for shape in found)
    assert Shape(8, 512) in found


@pytest.mark.parametrize("seed", range(20))
def test_a_batch_holds_whole_texts_once_and_the_first_always(seed):
    random = np.random.RandomState(seed)
    found = shapes(row_lengths(256), 1024, 1, (128, 256))
    sizes = random.randint(1, 257, random.randint(1, 80)).tolist()
    plan = choose(sizes, found, 1024, fill(sizes))
    assert Shape.of(plan) in found
    assert 0 in plan.texts
    assert len(set(plan.texts)) == len(plan.texts)
    assert len(plan.rows) <= plan.num_rows
    for row in plan.rows:
        assert sum(sizes[item] for item in row.texts) <= plan.length
        assert len(row.texts) <= most_texts(plan.length)


def test_all_texts_run_in_the_end():
    found = shapes(row_lengths(256), 1024, 1, (128, 256))
    waiting = np.random.RandomState(0).randint(1, 257, 300).tolist()
    padded, tokens = 0, sum(waiting)
    while waiting:
        plan = choose(waiting, found, 1024, fill(waiting))
        padded += plan.padded_tokens
        taken = set(plan.texts)
        waiting = [size for item, size in enumerate(waiting) if item not in taken]
    assert tokens / padded > 0.85


def test_one_short_text_takes_the_smallest_shape_and_many_a_full_one():
    found = shapes(row_lengths(512), 4096, 1, (128, 512))
    assert choose([9], found, 4096, fill([9])).padded_tokens == 32
    many = [20] * 300
    plan = choose(many, found, 4096, fill(many))
    assert Shape.of(plan) == Shape(32, 128)
    assert len(plan.texts) == 192  # six in each row
