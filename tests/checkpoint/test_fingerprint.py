"""The fingerprint of a model: the same for the same vectors, another after any change of weights or settings."""

import dataclasses

import decoders
import jax
import numpy as np
import pytest
from decoders import load
from gguf_files import write_gguf

from sgpt_jax import load_decoder, make_mesh
from sgpt_jax.checkpoint.bias_sets import BiasSet, apply_bias_set, bias_leaves
from sgpt_jax.checkpoint.fingerprint import model_fingerprint, weights_sha256
from sgpt_jax.decoder.model import merge, split

SETTINGS = {"pooling": "mean", "brackets": False, "max_seq_length": 75}


def changed(decoder, name, change):
    """The decoder with another value at one place of one leaf."""
    structure, params = split(decoder)

    def replace(path, leaf):
        found = "/".join(str(getattr(entry, "key", entry)) for entry in path)
        return leaf.at[(0,) * leaf.ndim].add(change) if found == name else leaf

    return merge(structure, jax.tree_util.tree_map_with_path(replace, params))


def test_dtype_file_format_mesh_and_prefix_do_not_matter(tmp_path):
    folder = decoders.write_checkpoint("llama", tmp_path / "a")
    gguf = write_gguf("llama", tmp_path / "a.gguf")
    found = {
        model_fingerprint(decoder, SETTINGS)
        for decoder in (
            load(folder),
            load(folder, "bfloat16"),
            load(decoders.write_checkpoint("llama", tmp_path / "b", spelling="old", shards=2)),
            load(decoders.write_checkpoint("llama", tmp_path / "c", model_class="base")),
            load_decoder(gguf),
            load_decoder(folder, mesh=make_mesh("data=1", jax.devices()[:1])),
        )
    }
    assert len(found) == 1


@pytest.mark.parametrize(
    "leaf",
    ["embed/tokens/embedding", "blocks/1/attn/k/bias", "blocks/0/norm1/bias", "final_norm/scale"],
)
def test_any_leaf_matters(leaf, tmp_path):
    decoder = load(decoders.write_checkpoint("gpt2", tmp_path))
    before = model_fingerprint(decoder, SETTINGS)
    assert model_fingerprint(changed(decoder, leaf, 0.0), SETTINGS) == before
    assert model_fingerprint(changed(decoder, leaf, 0.01), SETTINGS) != before


def test_a_small_step_of_the_biases_shows(tmp_path):
    """Rounding to bfloat16 hides a change of one value, never that of a training step, which moves all."""
    decoder = load(decoders.write_checkpoint("gpt_neo", tmp_path))
    _, params = split(decoder)
    header = {"base_sha256": weights_sha256(params)}
    draw = np.random.default_rng(0)
    stepped = {
        name: np.asarray(leaf) + 1e-5 * draw.choice([-1, 1], leaf.shape).astype(np.float32)
        for name, leaf in bias_leaves(params).items()
    }
    trained = apply_bias_set(decoder, BiasSet(stepped, header))
    assert model_fingerprint(trained, SETTINGS) != model_fingerprint(decoder, SETTINGS)


def test_the_head_counts_for_scores_alone(tmp_path):
    decoder = load(decoders.write_checkpoint("gptj", tmp_path / "a"))
    other = changed(decoder, "head/kernel", 1.0)
    headless = load(decoders.write_checkpoint("gptj", tmp_path / "b", model_class="base"))
    vectors = {model_fingerprint(d, SETTINGS) for d in (decoder, other, headless)}
    scores = {model_fingerprint(d, SETTINGS, head=True) for d in (decoder, other, headless)}
    assert (len(vectors), len(scores)) == (1, 3)


def test_settings_and_config_matter(tmp_path):
    decoder = load(decoders.write_checkpoint("mistral", tmp_path))
    before = model_fingerprint(decoder, SETTINGS)
    assert model_fingerprint(decoder, dict(reversed(SETTINGS.items()))) == before
    assert model_fingerprint(decoder, SETTINGS | {"pooling": "cls"}) != before
    config = decoder.config
    for change in ({"windows": ()}, {"norm_eps": 1e-3}, {"attn_scale": 1.0}):
        decoder.config = dataclasses.replace(config, **change)
        assert model_fingerprint(decoder, SETTINGS) != before, change
    decoder.config = dataclasses.replace(config, attn_dropout=0.5, max_positions=77)
    assert model_fingerprint(decoder, SETTINGS) == before
