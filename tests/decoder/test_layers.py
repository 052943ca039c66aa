"""The parts of a block by themselves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from plans import TINY

from sgpt_jax.decoder import layers
from sgpt_jax.decoder.build import Build
from sgpt_jax.decoder.layers import MLP


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_on_a_gpu_nothing_of_an_activation_is_kept_in_float32(activation, gated, monkeypatch):
    config = dataclasses.replace(TINY, activation=activation, gated=gated)
    mlp = MLP(config, Build(jnp.dtype("bfloat16"), rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, config.embed_dim)), jnp.bfloat16)

    def gradients():
        """(result, gradients, the shapes of what is kept for these in float32)."""
        result, backward = jax.vjp(lambda mlp, x: mlp(x), mlp, x)
        kept = [leaf.shape for leaf in jax.tree.leaves(backward) if leaf.dtype == jnp.float32]
        return result, backward(jnp.ones_like(result)), kept

    expected, by_default, kept = gradients()
    wide = (*x.shape[:2], config.mlp_dim)
    assert wide in kept
    monkeypatch.setattr(layers, "platform", lambda: "gpu")
    result, found, kept = gradients()
    assert wide not in kept
    # GELU that could be a part of the matmul is rounded more often where it is not.
    in_matmul = activation == "gelu_tanh" and not gated
    close = functools.partial(np.testing.assert_allclose, rtol=2e-2, atol=5e-3 if in_matmul else 1e-3)
    (close if in_matmul else np.testing.assert_array_equal)(np.float32(result), np.float32(expected))
    jax.tree.map(close, jax.tree.map(np.float32, found), jax.tree.map(np.float32, by_default))
