"""Bias sets: adding zeros changes nothing, files round trip, and the wrong base is refused."""

import decoders
import jax
import numpy as np
import pytest
from decoders import hidden_states, load
from etils import epath
from safetensors.numpy import load_file, save_file

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.checkpoint.bias_sets import (
    BiasSet,
    add_zero_biases,
    apply_bias_set,
    bias_leaves,
    load_bias_set,
    save_bias_set,
)
from sgpt_jax.checkpoint.fingerprint import weights_sha256
from sgpt_jax.checkpoint.tensors import open_checkpoint
from sgpt_jax.checkpoint.weights import load_checkpoint
from sgpt_jax.decoder.model import split
from sgpt_jax.decoder.sharding import make_mesh
from sgpt_jax.errors import InputError

IDS = np.random.default_rng(0).integers(0, 300, (2, 9))
MASK = np.array([[1] * 9, [1] * 6 + [0] * 3])


def random_set(decoder, **header):
    _, params = split(decoder)
    draw = np.random.default_rng(1)
    values = {
        name: draw.normal(size=leaf.shape).astype(np.float32) for name, leaf in bias_leaves(params).items()
    }
    return BiasSet(values, {"base_model": "tiny", "base_sha256": weights_sha256(params), **header})


@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2", "qwen3", "gptj", "gpt_neo"])
def test_zero_biases_change_nothing(variant, tmp_path):
    decoder = load(decoders.write_checkpoint(variant, tmp_path))
    wider = add_zero_biases(decoder)
    np.testing.assert_array_equal(hidden_states(wider, IDS, MASK), hidden_states(decoder, IDS, MASK))
    before, after = (bias_leaves(split(d)[1]) for d in (decoder, wider))
    added = after.keys() - before.keys()
    assert added
    assert all(not np.any(after[name]) for name in added)
    assert all(after[name] is before[name] for name in before)  # shared, not copied
    block = {name.removeprefix("blocks/0/") for name in after if name.startswith("blocks/0/")}
    assert block >= {
        "attn/q/bias",
        "attn/k/bias",
        "attn/v/bias",
        "attn/o/bias",
        "mlp/up/bias",
        "mlp/down/bias",
    }


@pytest.mark.parametrize(("variant", "added"), [("gpt_neo", False), ("llama", True), ("qwen2", True)])
def test_round_trip(variant, added, tmp_path):
    base = load(decoders.write_checkpoint(variant, tmp_path))
    trained = add_zero_biases(base) if added else base
    biases = random_set(trained, pooling="mean", brackets=True, training={"steps": 3, "lr": 0.01})
    path = tmp_path / "set.safetensors"
    save_bias_set(path, biases)
    again = load_bias_set(path)
    assert again.header == biases.header
    applied = apply_bias_set(base, again)
    leaves = bias_leaves(split(applied)[1])
    assert leaves.keys() == biases.values.keys()
    for name, value in biases.values.items():
        np.testing.assert_array_equal(leaves[name], value)
    assert np.abs(hidden_states(applied, IDS, MASK) - hidden_states(base, IDS, MASK)).max() > 0.01
    # a second set replaces the first
    twice = apply_bias_set(applied, again)
    np.testing.assert_array_equal(hidden_states(twice, IDS, MASK), hidden_states(applied, IDS, MASK))


def test_the_limit_goes_with_the_set(tmp_path):
    """Base and set read as many tokens of a text as the run did, unless the user asks for others."""
    decoders.write_tokenizer(decoders.write_checkpoint("gpt_neo", tmp_path))
    biases = random_set(load(tmp_path), max_seq_length=12)
    save_bias_set(tmp_path / "set.safetensors", biases)
    for asked, found in ((None, 12), (20, 20)):
        model = BiEncoder.from_pretrained(tmp_path, biases=tmp_path / "set.safetensors", max_seq_length=asked)
        assert model.text.max_seq_length == found
    save_bias_set(
        tmp_path / "bad.safetensors", BiasSet(biases.values, biases.header | {"max_seq_length": "x"})
    )
    with pytest.raises(InputError, match="max_seq_length is 'x'"):
        load_bias_set(tmp_path / "bad.safetensors")


def test_wrong_base(tmp_path):
    biases = random_set(load(decoders.write_checkpoint("gpt_neo", tmp_path / "a")))
    folder = decoders.write_checkpoint("gpt_neo", tmp_path / "b")
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.weight"][3, 4] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="belong to tiny"):
        apply_bias_set(load(folder), biases)
    with pytest.raises(InputError, match="belong to tiny"):
        apply_bias_set(load(decoders.write_checkpoint("gptj", tmp_path / "c")), biases)


def test_misfits_are_named(tmp_path):
    decoder = load(decoders.write_checkpoint("gpt_neo", tmp_path))
    biases = random_set(decoder)
    values = {
        **biases.values,
        "final_norm/bias": np.zeros(3, np.float32),
        "blocks/9/norm1/bias": np.zeros(32),
    }
    with pytest.raises(InputError, match=r"blocks/9/norm1/bias \[32\], final_norm/bias \[3\]"):
        apply_bias_set(decoder, BiasSet(values, biases.header))


def test_the_hash_is_that_of_the_weights_alone(tmp_path):
    """Not of the dtype, the file, the biases, the head or the mesh."""
    folder = decoders.write_checkpoint("gptj", tmp_path / "a")
    decoder = load(folder)
    expected = weights_sha256(split(decoder)[1])
    headless = decoders.write_checkpoint("gptj", tmp_path / "b", model_class="base", shards=2)
    mesh = make_mesh("data=1", jax.devices()[:1])
    others = {
        "bfloat16": load(folder, "bfloat16"),
        "no head": load(headless),
        "more biases": add_zero_biases(decoder),
        "mesh": load_checkpoint(open_checkpoint(epath.Path(folder)), mesh=mesh),
    }
    assert {name: weights_sha256(split(other)[1]) for name, other in others.items()} == dict.fromkeys(
        others, expected
    )


def test_added_biases_lie_on_the_mesh(tmp_path):
    mesh = make_mesh("data=1", jax.devices()[:1])
    files = open_checkpoint(epath.Path(decoders.write_checkpoint("llama", tmp_path)))
    wider = add_zero_biases(load_checkpoint(files, mesh=mesh))
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(split(wider)[1])} == {mesh}


def test_not_a_bias_set(tmp_path):
    save_file({"a": np.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("no tensors here")
    for name, message in (
        ("missing", "cannot be opened"),
        ("text", "not a bias set"),
        ("other.safetensors", "header"),
    ):
        with pytest.raises(InputError, match=message):
            load_bias_set(tmp_path / name)
