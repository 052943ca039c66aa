"""GELU as a part of the matmul before it, and the compiler's options for that; both are for GPUs alone."""

import decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sgpt_jax as sgpt
from sgpt_jax.decoder import layers, program
from sgpt_jax.decoder.model import split


@pytest.fixture
def on_gpu(monkeypatch):
    """What is traced takes this for a GPU."""
    program.compiler_options.cache_clear()
    monkeypatch.setattr(layers, "platform", lambda: "gpu")
    monkeypatch.setattr(program.jax, "default_backend", lambda: "gpu")
    yield
    monkeypatch.undo()
    program.compiler_options.cache_clear()


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
def test_options_where_gelu_follows_a_matmul(variant, options, wanted, tmp_path, on_gpu):
    structure = structure_of(variant, decoders.write_checkpoint(variant, tmp_path), **options)
    assert program.compiler_options(structure, None) == (
        {"xla_gpu_enable_triton_gemm": False} if wanted else None
    )


def test_no_options_on_a_cpu(tmp_path):
    structure = structure_of("gpt_neo", decoders.write_checkpoint("gpt_neo", tmp_path), dtype="bfloat16")
    assert program.compiler_options(structure, None) is None


def test_the_gradient_is_that_of_float32():
    x = jnp.asarray(3 * np.random.RandomState(0).randn(1000), jnp.bfloat16)
    weights = jnp.asarray(np.random.RandomState(1).randn(1000), jnp.bfloat16)
    value, pull = jax.vjp(layers._gelu_in_matmul, x)
    exact, pull_exact = jax.vjp(jax.nn.gelu, x.astype(jnp.float32))
    np.testing.assert_allclose(value.astype(jnp.float32), exact, rtol=0.02, atol=0.02)
    np.testing.assert_allclose(
        pull(weights)[0].astype(jnp.float32), pull_exact(weights.astype(jnp.float32))[0], rtol=0.01, atol=0.01
    )


def test_a_decoder_with_it_gives_the_same_vectors(tmp_path, monkeypatch):
    folder = decoders.write_tokenizer(decoders.write_checkpoint("gpt_neo", tmp_path))
    texts = ["a heron", "people stay at night and the ferry crosses the bay"]
    wanted = sgpt.BiEncoder.from_pretrained(folder, dtype="bfloat16").encode(texts, normalize=True)
    used = []
    inner = layers._gelu_in_matmul
    monkeypatch.setattr(layers, "platform", lambda: "gpu")
    monkeypatch.setattr(layers, "_gelu_in_matmul", lambda up: used.append(up.shape) or inner(up))
    jax.clear_caches()
    found = sgpt.BiEncoder.from_pretrained(folder, dtype="bfloat16").encode(texts, normalize=True)
    jax.clear_caches()
    assert used
    np.testing.assert_allclose(found, wanted, atol=0.02)


@pytest.mark.parametrize(("variant", "weights"), [("gpt_neo", None), ("llama", "int8"), ("bloom", None)])
def test_a_program_that_promotes_strictly(variant, weights, tmp_path):
    """What it has set is for its own arrays."""
    folder = decoders.write_tokenizer(decoders.write_checkpoint(variant, tmp_path))
    model = sgpt.BiEncoder.from_pretrained(folder, weights=weights)
    scorer = sgpt.CrossEncoder.from_pretrained(folder, weights=weights)
    ids, texts = jnp.ones((2, 8), jnp.int32), ["a heron", "people stay at night"]

    def loss(factor):
        return sgpt.pool(model.decoder(ids, ids) * factor, ids).sum()

    def everything():
        factor = jnp.ones((1, 1, 1), jnp.float32)
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
