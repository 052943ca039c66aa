"""Attention over blocks of queries: equal to the plain formula at every block size, and its gradients too. By cuDNN:
the same numbers, and why not where it cannot."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgpt_jax.decoder import attention
from sgpt_jax.decoder.positions import alibi_slopes

BATCH, LENGTH, HEADS, GROUPS, SIZE = 2, 64, 6, 3, 8


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
    return q, k, v, positions, np.where(valid, segments, -1)


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


@pytest.mark.parametrize("block", [5, 16, 63, 64, 256])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("alibi", [False, True])
def test_blocks_equal_the_formula(block, window, alibi, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    q, k, v, positions, segments = inputs()
    mask = attention.attention_mask_matrix(jnp.asarray(segments), jnp.asarray(positions), window)
    bias = None
    if alibi:
        bias = alibi_slopes(HEADS)[:, None, None] * positions[:, None, None, :].astype(np.float32)
    ours = attention.attend(q, k, v, mask, scale=0.3, bias=bias)
    theirs = formula(q, k, v, np.asarray(mask), bias)
    assert np.isfinite(ours).all()  # also where a query sees no key
    seen = np.asarray(mask).any(axis=-1)
    np.testing.assert_allclose(np.asarray(ours)[seen], theirs[seen], rtol=1e-4, atol=1e-5)


def test_gradients_do_not_depend_on_blocks(monkeypatch):
    q, k, v, positions, segments = inputs()
    mask = attention.attention_mask_matrix(jnp.asarray(segments), jnp.asarray(positions), None)

    seen = mask.any(axis=-1)[..., None, None]  # what sees no key has no meaning

    def loss(q, k, v):
        return (jnp.where(seen, attention.attend(q, k, v, mask, scale=0.3), 0) ** 2).sum()

    def gradients(block):
        monkeypatch.setattr(attention, "QUERY_BLOCK", block)
        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    for blocked, whole in zip(gradients(16), gradients(1000), strict=True):
        np.testing.assert_allclose(blocked, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("major", "head_dim", "why", "reason"),
    [
        (8, 64, (), None),
        (8, 128, (), None),
        (9, 256, (), None),
        (10, 128, (), None),
        (7, 64, (), "compute capability 7.x"),
        (8, 256, (), "heads of 256.* up to 128"),
        (10, 256, (), "heads of 256.* up to 128"),
        (9, 264, (), "heads of 264.* up to 256"),
        (9, 20, (), "heads of 20, .*multiples of 8"),
        (9, 64, ("alibi",), "ALiBi"),
        (9, 64, ("dropout",), "dropout"),
        (9, 64, ("capped",), "soft-capped"),
    ],
)
def test_why_not_cudnn(major, head_dim, why, reason):
    asked = dict.fromkeys(("alibi", "capped", "dropout"), False) | dict.fromkeys(why, True)
    found = attention.why_not_cudnn(major, head_dim, **asked)
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(reason, found)


@pytest.mark.parametrize(
    ("major", "length", "given"),
    [(8, 64, 64), (8, 63, 64), (9, 96, 96), (9, 63, 128), (9, 64, 128), (9, 192, 256), (10, 192, 192)],
)
def test_length_given_to_cudnn(major, length, given):
    assert attention.cudnn_length(major, length) == given


def half_inputs(window, segmented, length=50):
    """q, k and v in bfloat16, a mask with padding on either side and a row of padding alone, and what sees a key."""
    q, k, v, positions, segments = inputs()
    q, k, v, positions, segments = (np.concatenate([x, x[:1]]) for x in (q, k, v, positions, segments))
    segments[1, length - 7 :], segments[2] = -1, -1
    if not segmented:
        segments = np.minimum(segments, 0)
    mask = attention.attention_mask_matrix(jnp.asarray(segments), jnp.asarray(positions), window)
    mask = mask[:, :length, :length]
    arrays = (jnp.asarray(x[:, :length], jnp.bfloat16) for x in (q, k, v))
    return *arrays, mask, mask.any(axis=-1)[..., None, None]


def attended(q, k, v, mask, seen):
    """What `attend` gives where a key is seen, and its gradients there."""

    def loss(q, k, v):
        out = attention.attend(q, k, v, mask, scale=0.3)
        assert out.dtype == jnp.bfloat16
        return (jnp.where(seen, out, 0).astype(jnp.float32) ** 2).sum(), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    assert np.isfinite(out).all()  # also where a query sees no key
    return [np.asarray(x, np.float32) for x in (jnp.where(seen, out, 0), *gradients)]


def assert_same(theirs, ours):
    for found, expected in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.02 * np.abs(expected).max())


CASES = pytest.mark.parametrize(
    ("window", "segmented", "length"),
    [(None, False, 50), (6, False, 50), (None, True, 50), (6, True, 50), (None, True, 63), (None, True, 64)],
)


@CASES
def test_call_of_cudnn_means_the_same(window, segmented, length, monkeypatch):
    """As on a GPU, but what is asked of cuDNN is computed by JAX's own plain implementation."""
    q, k, v, mask, seen = half_inputs(window, segmented, length)
    ours = attended(q, k, v, mask, seen)
    asked = []
    real = jax.nn.dot_product_attention

    def plain(*arrays, implementation, **options):
        asked.append((implementation, options["is_causal"]))
        return real(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    monkeypatch.setattr(attention, "_gpu_major", lambda: 9)
    assert_same(attended(q, k, v, mask, seen), ours)
    assert asked == [("cudnn", True)]
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    attention.attend(q, k, v, mask, scale=0.3)
    assert len(asked) == 1  # float32 is XLA's


@CASES
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
def test_cudnn_equals_xla(window, segmented, length, monkeypatch, caplog):
    attention._say_why_not.cache_clear()  # every case is to be told of a refusal
    arguments = half_inputs(window, segmented, length)
    theirs = attended(*arguments)
    assert not caplog.records
    monkeypatch.setattr(attention, "_gpu_major", lambda: None)
    assert_same(theirs, attended(*arguments))


def test_why_not_is_said_once(monkeypatch, caplog):
    attention._say_why_not.cache_clear()
    q, k, v, mask, seen = half_inputs(None, False)
    attend = functools.partial(attention.attend, scale=0.3)
    alibi = jnp.zeros((3, HEADS, 1, 50))
    with caplog.at_level(logging.WARNING):
        expected = attend(q, k, v, mask, bias=alibi)
        assert not caplog.records  # no GPU, no word
        monkeypatch.setattr(attention, "_gpu_major", lambda: 9)
        found = [attend(q, k, v, mask, bias=alibi) for _ in range(2)]
        attend(q, k, v, mask, drop=lambda weights: weights)
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        attend(q, k, v, mask, drop=lambda weights: weights)
    assert [record.getMessage() for record in caplog.records] == [
        "attention by XLA, not by cuDNN: ALiBi",
        "attention by XLA, not by cuDNN: dropout of attention weights",
    ]
    np.testing.assert_array_equal(jnp.where(seen, expected, 0), jnp.where(seen, found[1], 0))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="for machines without cuDNN")
def test_without_cudnn(monkeypatch, caplog):
    """JAX's own refusal is a reason too."""
    q, k, v, mask, _ = half_inputs(None, False)
    expected = attention.attend(q, k, v, mask, scale=0.3)
    monkeypatch.setattr(attention, "_gpu_major", lambda: 9)
    np.testing.assert_array_equal(attention.attend(q, k, v, mask, scale=0.3), expected)
    assert re.search(
        "attention by XLA, not by cuDNN: .*(not detected|not found for platform|cuDNN not found)", caplog.text
    )


def test_platform_is_that_of_the_mesh(monkeypatch):
    """A plan for TPUs, or a mesh of CPU devices, on a machine with a GPU."""

    class Device:
        compute_capability = "9.0"

    monkeypatch.setattr(jax, "local_devices", lambda backend: [Device])
    assert attention._gpu_major() is None or jax.default_backend() == "gpu"
    device = jax.sharding.AbstractDevice(device_kind="any", num_cores=1, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1, 1, 1), ("data", "fsdp", "tensor"), abstract_device=device)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with jax.sharding.use_abstract_mesh(mesh):  # a plan for GPUs that are not here
        assert attention._gpu_major() is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert attention._gpu_major() == 9
    for platform, major in (("tpu", None), ("cpu", None), ("gpu", 9)):
        device = jax.sharding.AbstractDevice(device_kind="any", num_cores=1, platform=platform)
        mesh = jax.sharding.AbstractMesh((1, 1, 1), ("data", "fsdp", "tensor"), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            assert attention._gpu_major() == major
    Device.compute_capability = "gfx942"
    assert attention._gpu_major() is None
