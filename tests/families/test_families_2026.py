"""The decoders of 2026 against torch: hidden states, logits, both spellings of a config, padding, packing, export."""

import json
import warnings

import decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import hidden_states, load, relative_error
from safetensors.numpy import load_file

from sgpt_jax.checkpoint.export import export_folder
from sgpt_jax.checkpoint.tensors import open_checkpoint
from sgpt_jax.checkpoint.weights import load_checkpoint
from sgpt_jax.decoder.model import merge, split
from sgpt_jax.errors import InputError
from sgpt_jax.families import read_config

VARIANTS = decoders.SUPPORTED_NEW_VARIANTS


@pytest.fixture(autouse=True)
def no_warnings():
    """Every key of these configs is handled, or known to change nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def left_padded(ids, mask):
    shift = mask.shape[1] - mask.sum(axis=1)
    places = (np.arange(mask.shape[1]) - shift[:, None]) % mask.shape[1]
    return np.take_along_axis(ids, places, 1), np.take_along_axis(mask, places, 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_and_logits_equal_torch(variant, tmp_path):
    decoder = load(decoders.write_checkpoint(variant, tmp_path))
    expected = decoders.expected(variant)
    ids, mask = expected["input_ids"], expected["attention_mask"]
    valid = mask.astype(bool)
    hidden = hidden_states(decoder, ids, mask)
    assert relative_error(hidden[valid], expected["hidden"][valid]) < 2e-5
    last = hidden[np.arange(len(mask)), mask.sum(axis=1) - 1]
    assert relative_error(np.asarray(decoder.logits(jnp.asarray(last))), expected["logits"]) < 2e-5

    left_ids, left_mask = left_padded(ids, mask)
    left = hidden_states(decoder, left_ids, left_mask)
    assert relative_error(left[left_mask.astype(bool)], expected["hidden"][valid]) < 2e-5

    long_ids = expected["long_ids"]
    long = hidden_states(decoder, long_ids, np.ones_like(long_ids))[0, -2:]
    assert relative_error(long, expected["long_hidden"]) < 2e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_older_spelling_is_the_same_decoder(variant, tmp_path):
    folder = decoders.write_checkpoint(variant, tmp_path)
    new = load(folder).config
    (tmp_path / "config.json").write_text(json.dumps(decoders.config(variant, "old")))
    assert load(folder).config == new


@pytest.mark.parametrize("variant", VARIANTS)
def test_several_texts_in_a_row_do_not_see_each_other(variant, tmp_path):
    decoder = load(decoders.write_checkpoint(variant, tmp_path))
    expected = decoders.expected(variant)
    ids, mask = expected["input_ids"], expected["attention_mask"]
    lengths = mask.sum(axis=1)
    row = np.concatenate([text[:length] for text, length in zip(ids, lengths, strict=True)])
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    positions = np.concatenate([np.arange(length) for length in lengths])
    structure, params = split(decoder)

    @jax.jit
    def run(params):
        return merge(structure, params)(row[None], positions=positions[None], segments=segments[None])

    assert relative_error(np.asarray(run(params))[0], expected["hidden"][mask.astype(bool)]) < 2e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_export_gives_the_same_tensors_and_config(variant, tmp_path):
    folder = decoders.write_checkpoint(variant, tmp_path / "in")
    files = open_checkpoint(folder)
    decoder = load_checkpoint(files)
    export_folder(decoder, files.config, tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert set(after) == set(before)
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values, err_msg=name)
    assert load(tmp_path / "out").config == decoder.config


@pytest.mark.parametrize("layout", ["inner", "outer"])
@pytest.mark.parametrize("variant", ["gemma3", "ministral3"])
def test_the_text_part_of_a_folder_that_reads_pictures(variant, layout, tmp_path):
    decoder = load(decoders.write_multimodal(variant, tmp_path, layout=layout))
    expected = decoders.expected(variant)
    ids, mask = expected["input_ids"], expected["attention_mask"]
    hidden = hidden_states(decoder, ids, mask)[mask.astype(bool)]
    assert relative_error(hidden, expected["hidden"][mask.astype(bool)]) < 2e-5


def change_config(folder, change, part=None):
    """Adds keys to config.json, or to an object in it; a key that is None goes."""
    config = json.loads((folder / "config.json").read_text())
    inside = config[part] if part else config
    inside |= change
    for key in [key for key, value in inside.items() if value is None]:
        del inside[key]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "paligemma"},
            "a paligemma with a text_config is not supported: only gemma3, mistral3",
        ),
        ({"is_causal": False}, "is_causal .False. has no effect beside text_config"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention .True. has no effect"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "are quantised .gptq."),
    ],
)
def test_what_the_outer_config_says_is_not_passed_over(change, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load(change_config(decoders.write_multimodal("gemma3", tmp_path), change))


def test_known_code_that_the_outer_config_names_changes_the_mask_of_the_text_part(tmp_path):
    folder = decoders.write_multimodal("ministral3", tmp_path)
    change_config(folder, {"auto_map": {"AutoModel": "modeling_mistral_gritlm.MistralModel"}})
    with pytest.warns(UserWarning, match="known as GritLM"):
        assert load(folder).config.bidirectional


def test_what_a_gemma_3_leaves_out_is_what_transformers_takes():
    """As the text_config of the 4B model: without heads and vocabulary."""
    sizes = {
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    }
    scaling = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    config = read_config({"model_type": "gemma3_text", **sizes, **scaling})
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262_208)
    assert config.max_positions == 131_072 and config.head == "tied"


@pytest.mark.parametrize("variant", ["gemma3", "olmo2", "cohere", "smollm3"])
@pytest.mark.parametrize("key", ["partial_rotary_factor", "rope_parameters"])
def test_heads_that_rotate_in_part_are_refused_where_transformers_rotates_them_whole(variant, key):
    config = decoders.config(variant, "old")
    value = 0.5 if key == "partial_rotary_factor" else {"partial_rotary_factor": 0.5}
    with pytest.raises(InputError, match=r"partial_rotary_factor is 0\.5"):
        read_config(config | {key: value})


@pytest.mark.parametrize("variant", decoders.REFUSED_VARIANTS)
def test_refused(variant, tmp_path):
    with pytest.raises(InputError, match="qk_layernorm"):
        load(decoders.write_checkpoint(variant, tmp_path))


@pytest.mark.parametrize("spelling", ["new", "old"])
def test_smollm3_asks_for_its_switch_where_no_layer_types_are_stated(spelling):
    config = decoders.config("smollm3_window", spelling)
    assert read_config(config).windows == (None, 5, None)
    stated = (None, 5, None) if spelling == "new" else ()
    assert read_config(config | {"use_sliding_window": False}).windows == stated


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("gemma", {"use_bidirectional_attention": True}, "say is_causal false"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("mpt", {"no_bias": False}, "no_bias"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("phi3_longrope_long", {"max_position_embeddings": "many"}, "max_position_embeddings"),
    ],
)
def test_what_a_family_cannot_do_is_named(variant, change, message, tmp_path):
    folder = decoders.write_checkpoint(variant, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(decoders.config(variant) | change))
    with pytest.raises(InputError, match=message):
        load(folder)
