"""Checkpoints as people have them: every way they are stored, what is refused, and the way back to transformers."""

import dataclasses
import json

import decoders
import numpy as np
import pytest
from decoders import hidden_states, load, relative_error
from etils import epath
from safetensors.numpy import load_file, save_file

from sgpt_jax.checkpoint import bias_sets as biases
from sgpt_jax.checkpoint.export import export_folder, export_tensors
from sgpt_jax.checkpoint.fingerprint import weights_sha256
from sgpt_jax.checkpoint.tensors import open_checkpoint
from sgpt_jax.checkpoint.weights import checkpoint_sha256, load_checkpoint
from sgpt_jax.decoder.model import split
from sgpt_jax.errors import InputError
from sgpt_jax.load import load_decoder

SAMPLES = (
    "gpt2",
    "gpt_neo",
    "gptj",
    "gpt_neox",
    "bloom",
    "opt_post_norm",
    "llama_tied",
    "mistral",
    "qwen2",
    "qwen3",
)


def check(folder, variant, tolerance=2e-5):
    expected = decoders.expected(variant)
    valid = expected["attention_mask"].astype(bool)
    hidden = hidden_states(load(folder), expected["input_ids"], expected["attention_mask"])
    assert relative_error(hidden[valid], expected["hidden"][valid]) < tolerance


@pytest.mark.parametrize("variant", SAMPLES)
@pytest.mark.parametrize("layout", ["no prefix", "prefixed base", "two shards", "buffers", "old config"])
def test_layouts(variant, layout, tmp_path):
    options = {
        "no prefix": {"model_class": "base", "prefix": False},
        "prefixed base": {"model_class": "base", "prefix": True},
        "two shards": {"shards": 2},
        "buffers": {"with_buffers": True},
        "old config": {"spelling": "old"},
    }[layout]
    if layout == "old config" and "old_config" not in decoders.SPECS[variant]:
        pytest.skip("this variant has one spelling")
    check(decoders.write_checkpoint(variant, tmp_path, **options), variant)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.02), ("bfloat16", 0.15)])
def test_half_precision_files(dtype, tolerance, tmp_path):
    for variant in ("gpt_neo", "llama"):
        check(decoders.write_checkpoint(variant, tmp_path / variant, dtype=dtype), variant, tolerance)


def test_torch_bin_files(tmp_path):
    pytest.importorskip("torch")
    check(decoders.write_checkpoint("gpt_neo", tmp_path / "one", fmt="bin"), "gpt_neo")
    check(decoders.write_checkpoint("gptj", tmp_path / "two", fmt="bin", shards=2), "gptj")


def test_torch_bin_without_torch_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(decoders.config("gpt_neo")))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(InputError, match=r"pip install 'sgpt-jax\[torch\]'"):
        load(tmp_path)


def test_base_checkpoint_has_no_logits(tmp_path):
    decoder = load(decoders.write_checkpoint("gptj", tmp_path, model_class="base"))
    with pytest.raises(ValueError, match="no language-model head"):
        decoder.logits(np.zeros((1, decoder.config.hidden_dim), np.float32))


def test_all_misfits_are_listed_at_once(tmp_path):
    folder = decoders.write_checkpoint("gpt_neo", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.9.surprise"] = np.zeros(3, np.float32)
    del tensors["transformer.h.1.ln_2.bias"]
    tensors["transformer.ln_f.bias"] = np.zeros(3, np.float32)
    tensors["wpe.weight"] = tensors["transformer.wpe.weight"].copy()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError) as error:
        load(folder)
    message = str(error.value)
    assert "no place for transformer.h.9.surprise" in message
    assert "nothing fills blocks/1/norm2/bias" in message
    assert "ln_f.bias gives final_norm/bias [3]" in message
    assert "wpe.weight and" in message or "and wpe.weight" in message
    assert len(message.splitlines()) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "model_type 't5' is not supported"),
        ({"activation_function": "mish"}, "activation 'mish'"),
        ({"hidden_size": None}, None),
        ({"num_heads": 5}, None),
    ],
)
def test_configs_that_are_refused(change, message, tmp_path):
    folder = decoders.write_checkpoint("gpt_neo", tmp_path)
    config = decoders.config("gpt_neo") | change
    if change.get("hidden_size", 0) is None:
        del config["hidden_size"]
        message = "has no 'hidden_size'"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        load(folder)


def test_unsupported_rotary_scaling_is_refused(tmp_path):
    folder = decoders.write_checkpoint("llama", tmp_path)
    config = decoders.config("llama") | {
        "rope_scaling": {"type": "proportional", "factor": 4.0},
        "rope_parameters": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="rotary scaling 'proportional'"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", None])
def test_damaged_folders(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json"):
        open_checkpoint(epath.Path(tmp_path))


def test_damaged_or_missing_weights(tmp_path):
    folder = decoders.write_checkpoint("gpt2", tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged safetensors"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        load(folder)


def test_a_missing_shard_is_named(tmp_path):
    folder = decoders.write_checkpoint("gpt2", tmp_path, shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="model-00002-of-00002"):
        load(folder)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model._orig_mod."])
@pytest.mark.parametrize("variant", ["gpt2", "llama_tied"])
def test_a_wrappers_prefix_is_named_in_one_line(prefix, variant, tmp_path):
    folder = decoders.write_checkpoint(variant, tmp_path, with_buffers=True)
    tensors = load_file(folder / "model.safetensors")
    save_file({prefix + name: value for name, value in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(InputError, match=rf"the prefix '{prefix}' before the names of") as error:
        load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layers.0.self_attn.q_proj.qweight", "GPTQ or AWQ"),
        ("layers.0.self_attn.q_proj.weight.absmax", "bitsandbytes"),
        ("layers.0.self_attn.q_proj.SCB", "bitsandbytes"),
        ("layers.0.self_attn.q_proj.lora_A.weight", "LoRA"),
    ],
)
def test_quantised_tensors_and_adapters_are_named(name, message, tmp_path):
    folder = decoders.write_checkpoint("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {f"model.{name}": np.zeros(3, np.uint8)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=message):
        load(folder)


def test_an_empty_adapter_folder_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="peft_type is None"):
        load_decoder(tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "model.gguf", "pytorch_model.bin"])
def test_a_git_lfs_pointer_is_named(file, tmp_path):
    folder = decoders.write_checkpoint("gpt2", tmp_path)
    if file == "pytorch_model.bin":
        pytest.importorskip("torch")
        (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(POINTER)
    with pytest.raises(InputError, match=rf"{file}: a git-lfs pointer"):
        load(folder / file if file.endswith("gguf") else folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../model.safetensors"}, "leads out"),
        ({"a": "/etc/passwd"}, "leads out"),
        ({"a": 3}, "not the name of a file"),
        ({"a": ["x"]}, "not the name of a file"),
        (["a"], "no weight_map"),
        ({}, "no weight_map"),
        (None, "no weight_map"),
    ],
)
def test_an_index_names_files_of_its_folder(weight_map, message, tmp_path):
    folder = decoders.write_checkpoint("gpt2", tmp_path, shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=message):
        load(folder)


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 999, "hidden_size": 4096}, {"vocab_size": 2**31 - 1}]
)
def test_a_config_far_beyond_its_files_is_refused_at_once(change, tmp_path):
    folder = decoders.write_checkpoint("llama", tmp_path)
    (folder / "config.json").write_text(json.dumps(decoders.config("llama") | change))
    with pytest.raises(InputError, match=r"describes [\d,]+ parameters, the files can hold"):
        load(folder)


def test_deep_json_is_no_crash(tmp_path):
    (tmp_path / "config.json").write_text('{"a":' + "[" * 200_000)
    with pytest.raises(InputError, match=r"config\.json: not valid JSON"):
        load(tmp_path)


@pytest.mark.parametrize("variant", decoders.VARIANTS)
def test_export_gives_back_every_tensor(variant, tmp_path):
    folder = decoders.write_checkpoint(variant, tmp_path / "in")
    decoder = load(folder)
    export_folder(decoder, decoders.config(variant), tmp_path / "out")
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert set(after) == set(before)
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == decoders.config(variant)["architectures"]
    check(tmp_path / "out", variant)


@pytest.mark.parametrize("variant", ["gpt_neo", "opt", "llama_tied"])
def test_export_of_a_model_without_head(variant, tmp_path):
    folder = decoders.write_checkpoint(variant, tmp_path / "in", model_class="base", prefix=False)
    # A tied head is part of the embedding, so such a decoder still has one.
    decoder = load(folder)
    decoder.config = dataclasses.replace(decoder.config, head="none")
    names = {name for name, _ in export_tensors(decoder, decoders.config(variant))}
    assert names == set(load_file(folder / "model.safetensors"))


def test_sharded_export(tmp_path, monkeypatch):
    decoder = load(decoders.write_checkpoint("gpt2", tmp_path / "in"))
    monkeypatch.setattr("sgpt_jax.checkpoint.export.MAX_SHARD_BYTES", 40_000)
    export_folder(decoder, decoders.config("gpt2"), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert not list((tmp_path / "out").glob("*.tmp"))
    check(tmp_path / "out", "gpt2")


def test_an_export_takes_the_place_of_what_is_there(tmp_path, monkeypatch):
    """In one file and in several, over either; and the one file is read where transformers left an index beside it."""
    first, second = (
        load(decoders.write_checkpoint(name, tmp_path / name)) for name in ("gpt2", "gpt2_unscaled")
    )
    weights = {f"model-{i:05d}-of-00003.safetensors" for i in range(1, 4)} | {"model.safetensors.index.json"}
    out = tmp_path / "out"
    for decoder, variant, size in (
        (first, "gpt2", 40_000),
        (second, "gpt2_unscaled", 10**9),
        (first, "gpt2", 40_000),
        (second, "gpt2_unscaled", 40_000),
        (first, "gpt2", 10**9),
        (first, "gpt2", 10**9),
    ):
        monkeypatch.setattr("sgpt_jax.checkpoint.export.MAX_SHARD_BYTES", size)
        export_folder(decoder, decoders.config(variant), out)
        names = {path.name for path in out.iterdir()}
        assert names == {"config.json"} | (weights if size < 10**9 else {"model.safetensors"})
        check(out, variant)
    decoders.write_checkpoint("gpt2_unscaled", out, shards=3)
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"} | weights
    (out / "config.json").write_text(json.dumps(decoders.config("gpt2")))
    check(out, "gpt2")


def test_no_export_beside_an_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    decoder = load(decoders.write_checkpoint("gpt2", tmp_path / "in"))
    with pytest.raises(InputError, match="has an adapter"):
        export_folder(decoder, decoders.config("gpt2"), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "in"}


@pytest.mark.parametrize("fmt", ["safetensors", "bin"])
def test_a_head_that_is_not_the_embeddings_it_is_tied_to(fmt, tmp_path):
    """transformers 5 does not tie these either."""
    if fmt == "bin":
        pytest.importorskip("torch")
    folder = decoders.write_checkpoint("llama_tied", tmp_path, with_buffers=True, fmt=fmt)
    path = folder / ("model.safetensors" if fmt == "safetensors" else "pytorch_model.bin")
    tied = load(folder)
    assert tied.config.head == "tied"
    tensors = decoders.tensors("llama_tied")
    head = np.random.RandomState(0).standard_normal(tensors["model.embed_tokens.weight"].shape)
    decoders.write_arrays(tensors | {"lm_head.weight": head.astype(np.float32)}, path)
    for _ in range(2):  # from the file, and of .bin from the decoded weights that are kept
        decoder = load(folder)
        assert decoder.config.head == "untied"
        hidden = np.random.RandomState(1).standard_normal((1, 1, head.shape[1])).astype(np.float32)
        np.testing.assert_allclose(np.asarray(decoder.logits(hidden)), hidden @ head.T, rtol=1e-4, atol=1e-4)
    opened = open_checkpoint(epath.Path(folder))
    assert checkpoint_sha256(opened) == weights_sha256(split(load(folder, "bfloat16"))[1])


@pytest.mark.parametrize(
    ("variant", "kind"), [("llama", "llama"), ("mistral_full", "llama"), ("qwen2", "llama")]
)
def test_added_biases_export_as_llama(variant, kind, tmp_path):
    decoder = biases.add_zero_biases(load(decoders.write_checkpoint(variant, tmp_path / "in")))
    export_folder(decoder, decoders.config(variant), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["attention_bias"], config["mlp_bias"]) == (kind, True, True)
    assert config["architectures"] == ["LlamaForCausalLM"]
    check(tmp_path / "out", variant)


@pytest.mark.parametrize("variant", ["mistral", "qwen3", "gptj", "gpt_neo"])
def test_added_biases_without_a_config_are_refused(variant, tmp_path):
    decoder = biases.add_zero_biases(load(decoders.write_checkpoint(variant, tmp_path / "in")))
    with pytest.raises(InputError, match="cannot be exported"):
        export_folder(decoder, decoders.config(variant), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("variant", decoders.VARIANTS)
def test_transformers_loads_what_is_exported(variant, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModel

    decoder = load(decoders.write_checkpoint(variant, tmp_path / "in"))
    export_folder(decoder, decoders.config(variant), tmp_path / "out")
    model = AutoModel.from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype=torch.float32
    ).eval()
    expected = decoders.expected(variant)
    with torch.no_grad():
        hidden = model(
            input_ids=torch.from_numpy(expected["input_ids"]).long(),
            attention_mask=torch.from_numpy(expected["attention_mask"]).long(),
        ).last_hidden_state.numpy()
    valid = expected["attention_mask"].astype(bool)
    assert relative_error(hidden[valid], expected["hidden"][valid]) < 2e-5


def test_loading_spreads_over_a_mesh(tmp_path):
    from sgpt_jax.decoder.sharding import make_mesh

    folder = decoders.write_checkpoint("llama", tmp_path)
    decoder = load_checkpoint(open_checkpoint(epath.Path(folder)), mesh=make_mesh("tensor=-1"))
    assert decoder.blocks[0].attn.q.kernel[...].sharding.mesh.axis_names == ("data", "fsdp", "tensor")
    expected = decoders.expected("llama")
    hidden = hidden_states(decoder, expected["input_ids"], expected["attention_mask"])
    valid = expected["attention_mask"].astype(bool)
    assert relative_error(hidden[valid], expected["hidden"][valid]) < 2e-5


def test_loaded_weights_do_not_follow_the_file(tmp_path):
    folder = decoders.write_checkpoint("llama_tied", tmp_path)
    decoder = load(folder)
    before = np.array(decoder.embed.tokens.embedding[...])
    with open(folder / "model.safetensors", "r+b") as file:
        size = file.seek(0, 2)
        start = 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
        file.seek(start)
        file.write(b"\x01" * (size - start))
    np.testing.assert_array_equal(decoder.embed.tokens.embedding[...], before)
