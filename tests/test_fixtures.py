"""The committed fixtures of `decoders.py`, `adapters.py` and `folders.py` belong to what these modules write."""

import json

import adapters
import decoders
import folders
import numpy as np
import pytest
from tokenizers import Tokenizer


@pytest.mark.parametrize("variant", decoders.NEW_VARIANTS)
def test_expected_outputs_of_a_variant_are_whole(variant):
    expected, config = decoders.expected(variant), decoders.config(variant)
    rows, length = expected["input_ids"].shape
    width = config.get("hidden_size") or config["d_model"]
    assert expected["hidden"].shape == (rows, length, width)
    assert expected["logits"].shape == (rows, decoders.VOCAB_SIZE)
    assert expected["long_ids"].shape[1] > 256
    assert expected["long_hidden"].shape == (2, width)
    assert all(np.isfinite(value).all() for value in expected.values())
    assert not expected["hidden"][expected["attention_mask"] == 0].any()
    assert "rope_parameters" not in decoders.config(variant, "old")
    assert decoders.tensors(variant)


@pytest.mark.parametrize("name", folders.FOLDERS)
def test_a_folder_has_the_tokenizer_of_its_expected_vectors(name, tmp_path):
    folder = folders.write_folder(name, tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [tokenizer.token_to_id(word) for word in ("yes", "no", "Yes", "No")] == [374, 375, 376, 377]
    if name in folders.EMBEDDERS:
        ids = folders.expected(name)["ids"].tolist()
        appended = [folders.FIRST_SPECIAL] if name == "gte_qwen2" else []  # by its own tokenizer class
        assert tokenizer.encode(folders.QUERIES[0]).ids + appended == ids
    for module in (
        json.loads((folder / "modules.json").read_text("utf-8")) if folders.FOLDERS[name].layout else ()
    ):
        assert (folder / module["path"]).is_dir()


@pytest.mark.parametrize("name", adapters.ADAPTERS)
def test_an_adapter_fits_its_decoder(name, tmp_path):
    folder = adapters.write_adapter(name, tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    wrapped = adapters.wrapped_tensors(name)
    parts = adapters.adapter_tensors(name, config)
    for key, value in parts.items():
        module = key.removeprefix("base_model.model.")
        if module.endswith(".lora_A.weight"):
            base = wrapped[module.removesuffix(".lora_A.weight") + ".weight"]
            pair = parts[key.replace("lora_A", "lora_B")]
            shape = (pair.shape[0], value.shape[1])
            assert shape == (base.shape[::-1] if config["fan_in_fan_out"] else base.shape)
    assert any("lora_A" in key or "lora_embedding_A" in key for key in parts)
