"""Counted operations against what XLA counts."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from sgpt_jax.decoder.build import Build
from sgpt_jax.decoder.config import DecoderConfig, RotaryConfig
from sgpt_jax.decoder.flops import forward_flops, seen_keys, training_flops
from sgpt_jax.decoder.model import abstract_decoder, merge

CONFIG = DecoderConfig(
    vocab_size=300,
    embed_dim=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    mlp_dim=768,
    max_positions=64,
    rotary=RotaryConfig(dim=64),
    gated=True,
)


def counted(function, config, rows, length):
    structure, params = abstract_decoder(config, Build(jnp.dtype("float32")))
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    lowered = jax.jit(lambda params, ids: function(merge(structure, params), params, ids)).lower(params, ids)
    return lowered.cost_analysis()["flops"]


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, token_dim=96, gated=False)])
def test_forward(config):
    rows, length = 3, 32
    found = counted(lambda decoder, _, ids: decoder(ids, jnp.ones_like(ids)), config, rows, length)
    weights, attention = forward_flops(config, [length] * rows)
    square = attention * length**2 / seen_keys(length)  # XLA counts the masked products too
    assert found == pytest.approx(weights + square, rel=0.04)
    assert found > weights + square


def test_head():
    def logits(decoder, _, ids):
        return decoder.logits(jnp.zeros((*ids.shape, CONFIG.hidden_dim)))

    body = sum(forward_flops(CONFIG, [16]))
    with_head = sum(forward_flops(CONFIG, [16], logits=7))
    assert counted(logits, CONFIG, 1, 7) == pytest.approx(with_head - body, rel=0.01)


@pytest.mark.parametrize("biases_only", [True, False])
def test_training(biases_only):
    config = dataclasses.replace(CONFIG, mlp_bias=True, qkv_bias=True, attn_out_bias=True)
    structure, abstract = abstract_decoder(config, Build(jnp.dtype("float32")))
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    trained = [not biases_only or "bias" in str(path[-1]) for path, _ in leaves]

    def gradient(_, params, ids):
        values = jax.tree.leaves(params)
        chosen = [value for value, train in zip(values, trained, strict=True) if train]

        def loss(chosen):
            new = iter(chosen)
            full = [next(new) if train else value for value, train in zip(values, trained, strict=True)]
            decoder = merge(structure, jax.tree_util.tree_unflatten(jax.tree.structure(params), full))
            return jnp.sum(decoder(ids, jnp.ones_like(ids)) ** 2)

        return jax.grad(loss)(chosen)

    rows, length = 3, 32
    found = counted(gradient, config, rows, length)
    lengths = [length] * rows
    _, attention = forward_flops(config, lengths)
    masked = 3 * attention * (length**2 / seen_keys(length) - 1)
    assert found == pytest.approx(training_flops(config, lengths, biases_only=biases_only) + masked, rel=0.08)


def test_windows():
    assert seen_keys(5) == 15
    assert seen_keys(5, 2) == sum(min(2, place + 1) for place in range(5))
    assert seen_keys(5, 9) == 15
    windowed = dataclasses.replace(CONFIG, windows=(None, 4))
    whole, local = forward_flops(CONFIG, [20])[1], forward_flops(windowed, [20])[1]
    assert local == whole * (seen_keys(20) + seen_keys(20, 4)) / (2 * seen_keys(20))
