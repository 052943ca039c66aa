"""Phi-3 is Llama with fused projections: a Llama's fixture, fused by hand, gives what torch gives for the Llama."""

import json

import decoders
import numpy as np
import pytest
from decoders import hidden_states, load, relative_error
from safetensors.numpy import load_file, save_file

from sgpt_jax.checkpoint.export import export_folder
from sgpt_jax.errors import InputError


def fused(folder, **settings):
    """The checkpoint "llama" (its window that of "mistral") with q, k, v and gate, up in one tensor each."""
    variant = "mistral" if settings.get("sliding_window") else "llama"
    tensors = decoders.tensors(variant)
    for layer in range(2):
        for target, parts in (
            ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            rows = [tensors.pop(f"model.layers.{layer}.{part}.weight") for part in parts]
            tensors[f"model.layers.{layer}.{target}.weight"] = np.concatenate(rows)
    config = decoders.config(variant) | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
    for key in ("head_dim", "attention_bias", "mlp_bias", "pretraining_tp"):
        config.pop(key, None)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | settings))
    save_file(tensors, folder / "model.safetensors")
    return variant, config | settings


@pytest.mark.parametrize("window", [None, 4])
def test_hidden_states_and_the_way_back(window, tmp_path):
    variant, config = fused(tmp_path / "in", sliding_window=window)
    decoder = load(tmp_path / "in")
    expected = decoders.expected(variant)
    valid = expected["attention_mask"].astype(bool)
    hidden = hidden_states(decoder, expected["input_ids"], expected["attention_mask"])
    assert relative_error(hidden[valid], expected["hidden"][valid]) < 2e-5
    export_folder(decoder, config, tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert set(after) == set(before)
    assert all(np.array_equal(after[name], before[name]) for name in before)
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["Phi3ForCausalLM"]


def test_longrope_factors_must_fit_and_published_code_is_known(tmp_path):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 4, "rope_theta": 500.0}
    fused(tmp_path / "long", rope_parameters=rope)
    with pytest.raises(InputError, match=r"short_factor is .* expected a list of 4 numbers above 0"):
        load(tmp_path / "long")
    code = {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "x/y--modeling_phi3.Phi3ForCausalLM",
    }
    fused(tmp_path / "code", auto_map=code)
    load(tmp_path / "code")


def test_impossible_fused_shapes_are_named(tmp_path):
    fused(tmp_path / "in", intermediate_size=45)
    with pytest.raises(InputError, match=r"gate_up_proj.weight has the impossible shape \[88, 32\]"):
        load(tmp_path / "in")
