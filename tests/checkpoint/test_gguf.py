"""GGUF files whose metadata is not what it should be: one clear line each, before anything of that size is made."""

import random
import time

import decoders
import pytest
from etils import epath

from sgpt_jax.checkpoint import gguf, gguf_reader
from sgpt_jax.checkpoint.weights import load_checkpoint
from sgpt_jax.decoder.model import Decoder
from sgpt_jax.errors import InputError

DAMAGE = [None, True, 0, -1, 10**9, 2**40, 0.5, float("nan"), "", "x", [], [1, 2], {}]


@pytest.fixture
def opened(tmp_path):
    path = epath.Path(decoders.write_gguf("llama", tmp_path / "model.gguf"))
    return path, gguf_reader.open_gguf(path)


def load(monkeypatch, path, metadata, tensors):
    monkeypatch.setattr(gguf, "open_gguf", lambda _: gguf_reader.Gguf(metadata, tensors))
    return load_checkpoint(gguf.GgufFile(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"general.architecture": "mamba"},
            "architecture 'mamba' is not supported; known: llama, qwen2, qwen3, gemma, gemma2, gemma3",
        ),
        ({"general.architecture": None}, "has no 'general.architecture'"),
        ({"llama.block_count": 10**9}, "num_hidden_layers is 1000000000"),
        ({"llama.block_count": 999}, "parameters, the files can hold"),
        ({"llama.attention.head_count": 0}, "head_count is 0"),
        ({"llama.attention.head_count": 5}, "partial rotation"),
        ({"llama.feed_forward_length": 2**30}, "parameters, the files can hold"),
        ({"llama.rope.freq_base": -1.0}, "freq_base is -1.0"),
        ({"llama.rope.scaling.type": "yarn"}, "rotary scaling 'yarn'"),
        ({"llama.rope.scaling.type": "linear"}, r"no 'llama.rope.scaling.factor'"),
        ({"llama.attention.value_length": 4}, "value_length differs from key_length"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8, which is not supported"),
        ({"llama.attention.sliding_window": 4}, "llama.attention.sliding_window is 4"),
    ],
)
def test_impossible_metadata_is_named(change, message, opened, monkeypatch):
    path, file = opened
    with pytest.raises(InputError, match=message):
        load(monkeypatch, path, file.metadata | change, file.tensors)


def test_a_file_without_token_embedding(opened, monkeypatch):
    path, file = opened
    tensors = [tensor for tensor in file.tensors if tensor.name != "token_embd.weight"]
    with pytest.raises(InputError, match="no token embedding"):
        load(monkeypatch, path, file.metadata, tensors)


def test_damaged_metadata_is_refused_or_read(opened, monkeypatch):
    path, file = opened
    draw = random.Random(0)
    keys = [key for key in file.metadata if key.startswith(("llama.", "general.arch", "split."))]
    refused = 0
    for _ in range(60):
        change = {key: draw.choice(DAMAGE) for key in draw.sample(keys, draw.randint(1, 2))}
        start = time.perf_counter()
        try:
            assert isinstance(load(monkeypatch, path, file.metadata | change, file.tensors), Decoder)
        except InputError:
            refused += 1
        assert time.perf_counter() - start < 20, change
    assert refused > 30
