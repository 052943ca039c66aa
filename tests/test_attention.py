"""Attention over blocks of queries: equal to the plain formula at every block size, and its gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgpt_jax import attention
from sgpt_jax.positions import alibi_slopes

BATCH, LENGTH, HEADS, GROUPS, SIZE = 2, 50, 6, 3, 8


def inputs():
    draw = np.random.RandomState(0)
    q, k, v = (
        draw.standard_normal((BATCH, LENGTH, heads, SIZE)).astype(np.float32)
        for heads in (HEADS, GROUPS, GROUPS)
    )
    valid = np.ones((BATCH, LENGTH), np.int32)
    valid[0, :5] = valid[1, -7:] = 0  # padding on either side
    positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
    segments = np.zeros((BATCH, LENGTH), np.int32)
    segments[:, 20:35], segments[:, 35:] = 1, 2
    return q, k, v, valid, positions, segments


def formula(q, k, v, mask, bias):
    """Float64, head by head."""
    out = np.zeros(q.shape)
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        scores = np.einsum("bth,bsh->bts", q[:, :, head].astype(np.float64), k[:, :, group]) * 0.3
        scores = np.where(mask, scores + (0 if bias is None else bias[:, head]), -1e30)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[:, :, head] = np.einsum("bts,bsh->bth", weights, v[:, :, group])
    return out


@pytest.mark.parametrize("block", [1, 16, 49, 50, 256])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("alibi", [False, True])
def test_blocks_equal_the_formula(block, window, alibi, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    q, k, v, valid, positions, segments = inputs()
    mask = attention.attention_mask_matrix(
        jnp.asarray(valid), jnp.asarray(positions), window, jnp.asarray(segments)
    )
    bias = None
    if alibi:
        bias = alibi_slopes(HEADS)[:, None, None] * positions[:, None, None, :].astype(np.float32)
    ours = attention.attend(q, k, v, mask, scale=0.3, bias=bias)
    theirs = formula(q, k, v, np.asarray(mask), bias)
    assert np.isfinite(ours).all()  # also where a query sees no key
    seen = np.asarray(mask).any(axis=-1)
    np.testing.assert_allclose(np.asarray(ours)[seen], theirs[seen], rtol=1e-4, atol=1e-5)


def test_gradients_do_not_depend_on_blocks(monkeypatch):
    q, k, v, valid, positions, segments = inputs()
    mask = attention.attention_mask_matrix(
        jnp.asarray(valid), jnp.asarray(positions), None, jnp.asarray(segments)
    )

    seen = mask.any(axis=-1)[..., None, None]  # what sees no key has no meaning

    def loss(q, k, v):
        return (jnp.where(seen, attention.attend(q, k, v, mask, scale=0.3), 0) ** 2).sum()

    def gradients(block):
        monkeypatch.setattr(attention, "QUERY_BLOCK", block)
        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    for blocked, whole in zip(gradients(16), gradients(1000), strict=True):
        np.testing.assert_allclose(blocked, whole, rtol=1e-4, atol=1e-5)
