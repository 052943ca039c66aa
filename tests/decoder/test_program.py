"""GELU as a part of the matmul before it, and the compiler's options for that; both are for GPUs alone."""

import decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sgpt_jax as sgpt
from sgpt_jax.decoder import layers, program
from sgpt_jax.decoder.model import merge, split


@pytest.fixture
def backend(monkeypatch):
    """What is asked for takes the machine for one with this backend."""

    def put(name):
        monkeypatch.setattr(program.jax, "default_backend", lambda: name)

    program.can_have_gelu_in_matmul.cache_clear()
    yield put
    monkeypatch.undo()
    program.can_have_gelu_in_matmul.cache_clear()


def structure_of(variant, folder, **options):
    return split(sgpt.BiEncoder.from_pretrained(decoders.write_tokenizer(folder), **options).decoder)[0]


@pytest.mark.parametrize(
    ("variant", "options", "wanted"),
    [
        ("gpt_neo", {"dtype": "bfloat16"}, True),
        ("bloom", {"dtype": "bfloat16"}, True),
        ("gpt_neo", {}, False),  # float32
        ("gpt_neo", {"dtype": "bfloat16", "weights": "int8"}, False),  # scaled in between
        ("llama", {"dtype": "bfloat16"}, False),  # gated
        ("gpt_neox", {"dtype": "bfloat16"}, False),  # GELU by the error function
    ],
)
def test_where_gelu_follows_a_matmul(variant, options, wanted, tmp_path, backend):
    structure = structure_of(variant, decoders.write_checkpoint(variant, tmp_path), **options)
    backend("gpu")
    assert program.can_have_gelu_in_matmul(structure, None) == wanted
    program.can_have_gelu_in_matmul.cache_clear()
    backend("tpu")
    assert not program.can_have_gelu_in_matmul(structure, None)


def test_the_gradient_is_that_of_float32():
    x = jnp.asarray(3 * np.random.RandomState(0).randn(1000), jnp.bfloat16)
    weights = jnp.asarray(np.random.RandomState(1).randn(1000), jnp.bfloat16)
    value, pull = jax.vjp(layers._gelu_in_matmul, x)
    exact, pull_exact = jax.vjp(jax.nn.gelu, x.astype(jnp.float32))
    np.testing.assert_allclose(value.astype(jnp.float32), exact, rtol=0.02, atol=0.02)
    np.testing.assert_allclose(
        pull(weights)[0].astype(jnp.float32), pull_exact(weights.astype(jnp.float32))[0], rtol=0.01, atol=0.01
    )


def test_only_programs_with_the_options_are_traced_so(tmp_path, monkeypatch):
    """The same vectors, also where the decoder is used by itself before and afterwards."""
    folder = decoders.write_tokenizer(decoders.write_checkpoint("gpt_neo", tmp_path))
    model = sgpt.BiEncoder.from_pretrained(folder, dtype="bfloat16")
    texts = ["a heron", "people stay at night and the ferry crosses the bay"]
    inner, used = layers._gelu_in_matmul, []
    monkeypatch.setattr(layers, "_gelu_in_matmul", lambda up: used.append(up.shape) or inner(up))
    wanted = model.encode(texts, normalize=True)
    hidden = model.decoder(jnp.ones((2, 16), jnp.int32), jnp.ones((2, 16)))
    assert not used
    monkeypatch.setattr(program, "can_have_gelu_in_matmul", lambda *_: True)
    found = model.encode(texts, normalize=True)
    assert len(used) == 1  # layers that are alike are traced once
    np.testing.assert_allclose(found, wanted, atol=0.02)
    again = jax.jit(lambda ids: model.decoder(ids, ids))(jnp.ones((2, 16), jnp.int32))
    assert len(used) == 1
    np.testing.assert_allclose(np.float32(again), np.float32(hidden), atol=0.1)


@pytest.mark.parametrize(("variant", "weights"), [("gpt_neo", None), ("llama", "int8"), ("bloom", None)])
def test_a_program_that_promotes_strictly(variant, weights, tmp_path):
    """What it has set is for its own arrays."""
    folder = decoders.write_tokenizer(decoders.write_checkpoint(variant, tmp_path))
    model = sgpt.BiEncoder.from_pretrained(folder, weights=weights)
    scorer = sgpt.CrossEncoder.from_pretrained(folder, weights=weights)
    ids, texts = jnp.ones((2, 8), jnp.int32), ["a heron", "people stay at night"]

    structure, params = split(model.decoder)

    def loss(scale):
        """Of a norm before everything else."""
        blocks = {
            **params["blocks"],
            0: {**params["blocks"][0], "norm1": {**params["blocks"][0]["norm1"], "scale": scale}},
        }
        return sgpt.pool(merge(structure, {**params, "blocks": blocks})(ids, ids), ids).sum()

    def everything():
        factor = params["blocks"][0]["norm1"]["scale"]
        scores = scorer.predict([("a ferry", texts[1])])
        return (
            model.encode(texts),
            scores,
            model.decoder.logits(model.decoder(ids, ids)),
            jax.grad(loss)(factor),
        )

    wanted = everything()
    jax.clear_caches()
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        found = everything()
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
