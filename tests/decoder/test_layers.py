"""The parts of a block by themselves."""

import dataclasses

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
    np.testing.assert_array_equal(result, expected)
    assert_close(found, by_default, atol=1e-3)


def assert_close(found, wanted, atol):
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.float32(ours), np.float32(theirs), rtol=2e-2, atol=atol)


def test_gelu_in_a_matmul():
    """The same but for the rounding that it has where it is no part of one; the gradient keeps the matmul's result."""
    mlp = MLP(
        dataclasses.replace(TINY, activation="gelu_tanh"), Build(jnp.dtype("bfloat16"), rngs=nnx.Rngs(0))
    )
    assert mlp.has_plain_gelu
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, TINY.embed_dim)), jnp.bfloat16)
    expected, by_default = jax.vjp(lambda mlp, x: mlp(x), mlp, x)
    result, backward = jax.vjp(lambda mlp, x: mlp(x, gelu_in_matmul=True), mlp, x)
    assert not any(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(backward))
    assert_close((result, backward(result)), (expected, by_default(result)), atol=5e-3)
