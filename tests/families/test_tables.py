"""Layouts of fused tensors, each against plain indexing and there and back."""

import dataclasses

import numpy as np
import pytest

from sgpt_jax.decoder.config import DecoderConfig, RotaryConfig
from sgpt_jax.families.tables import (
    BY_GROUP,
    COPY,
    TRANSPOSE,
    gate_up_sizes,
    qkv_sizes,
    side_by_side,
)

CONFIG = DecoderConfig(
    vocab_size=16,
    embed_dim=10,
    num_layers=1,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=7,
    max_positions=8,
    rotary=RotaryConfig(dim=4),
)
MULTI_QUERY = dataclasses.replace(CONFIG, num_kv_heads=1)
PER_HEAD = dataclasses.replace(CONFIG, num_kv_heads=6)
DRAW = np.random.default_rng(0)


def back(layout, x, config):
    parts = layout.load(x, config)
    np.testing.assert_array_equal(layout.dump(parts, config), x)
    return parts


@pytest.mark.parametrize("shape", [(40, 10), (40,)])
def test_phi3_queries_keys_and_values(shape):
    x = DRAW.normal(size=shape)
    q, k, v = back(side_by_side(qkv_sizes), x, CONFIG)
    for part, rows in ((q, x[:24]), (k, x[24:32]), (v, x[32:])):
        np.testing.assert_array_equal(part, rows.T)


def test_phi3_gate_and_up():
    x = DRAW.normal(size=(14, 10))
    gate, up = back(side_by_side(gate_up_sizes), x, CONFIG)
    np.testing.assert_array_equal(gate, x[:7].T)
    np.testing.assert_array_equal(up, x[7:].T)


@pytest.mark.parametrize("shape", [(10, 72), (72,)])
def test_gpt2_is_not_transposed(shape):
    x = DRAW.normal(size=shape)
    parts = back(side_by_side(qkv_sizes, transposed=False), x, PER_HEAD)
    for number, part in enumerate(parts):
        np.testing.assert_array_equal(part, x[..., 24 * number : 24 * (number + 1)])


@pytest.mark.parametrize("config", [CONFIG, MULTI_QUERY, PER_HEAD])
@pytest.mark.parametrize("tail", [(10,), ()])
def test_falcon_neox_and_bloom_by_group(config, tail):
    heads, groups, width = config.num_heads, config.num_kv_heads, config.head_dim
    x = DRAW.normal(size=((heads + 2 * groups) * width, *tail))
    q, k, v = back(BY_GROUP, x, config)
    rows = iter(x.reshape(-1, width, *tail))
    queries, keys, values = [], [], []
    for _ in range(groups):
        queries += [next(rows) for _ in range(heads // groups)]
        keys.append(next(rows))
        values.append(next(rows))
    for part, expected in ((q, queries), (k, keys), (v, values)):
        np.testing.assert_array_equal(part, np.concatenate(expected).T)


def test_plain_layouts():
    x = DRAW.normal(size=(4, 3))
    np.testing.assert_array_equal(back(COPY, x, CONFIG)[0], x)
    np.testing.assert_array_equal(back(TRANSPOSE, x, CONFIG)[0], x.T)


@pytest.mark.parametrize(
    "layout", [side_by_side(qkv_sizes), side_by_side(gate_up_sizes, transposed=False), BY_GROUP]
)
@pytest.mark.parametrize("shape", [(), (13,), (13, 13)])
def test_impossible_shapes_are_value_errors(layout, shape):
    with pytest.raises(ValueError):
        layout.load(np.zeros(shape), CONFIG)
