"""Reading checkpoints one tensor at a time: safetensors, torch .bin and GGUF, under Hugging Face names."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, Protocol

import gguf
import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from sgpt_jax.config import RotaryConfig
from sgpt_jax.io import InputError
from sgpt_jax.positions import rotary_frequencies


class TensorFiles(Protocol):
    """A checkpoint: its config in Hugging Face terms, its tensors one by one."""

    config: dict[str, Any]

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and values of every tensor; each array is the caller's own and read when its turn comes."""
        ...


def open_checkpoint(path: epath.Path) -> TensorFiles:
    """Opens a .gguf file, or a folder with config.json and safetensors or .bin weights.

    Raises:
        InputError: when the path holds no checkpoint, naming what is missing.
    """
    if path.suffix == ".gguf":
        return GgufFile(path)
    config = _read_json(path / "config.json")
    for index, single in (
        ("model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ):
        if (path / index).exists():
            weight_map = _read_json(path / index).get("weight_map") or {}
            files = [path / name for name in sorted(set(weight_map.values()))]
        elif (path / single).exists():
            files = [path / single]
        else:
            continue
        missing = [file.name for file in files if not file.exists()]
        if missing or not files:
            raise InputError(
                f"{path / index}: the index names files that are not there: {', '.join(missing)}"
            )
        return (
            SafetensorsFiles(config, files) if single.endswith("safetensors") else TorchFiles(config, files)
        )
    raise InputError(f"{path}: no model.safetensors, pytorch_model.bin or index of either")


def _read_json(path: epath.Path) -> dict[str, Any]:
    if not path.exists():
        raise InputError(f"{path.parent}: no {path.name}")
    try:
        value = json.loads(path.read_text())
    except ValueError as problem:
        raise InputError(f"{path}: not valid JSON: {problem}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value


class SafetensorsFiles:
    """One safetensors file or the shards of an index."""

    def __init__(self, config: dict[str, Any], files: list[epath.Path]):
        self.config, self.files = config, files

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        for file in self.files:
            try:
                with safe_open(str(file), "numpy") as opened:
                    for name in opened.keys():  # noqa: SIM118  not a dict
                        yield name, opened.get_tensor(name)
            except SafetensorError as problem:
                raise InputError(f"{file}: damaged safetensors file: {problem}") from None


class TorchFiles:
    """torch .bin files, memory-mapped and restricted to tensors."""

    def __init__(self, config: dict[str, Any], files: list[epath.Path]):
        self.config, self.files = config, files

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        try:
            import torch
        except ImportError:
            raise InputError(
                f"{self.files[0]}: reading .bin weights needs torch (pip install 'sgpt-jax[torch]'); "
                "safetensors weights do not"
            ) from None
        for file in self.files:
            try:
                state = torch.load(str(file), map_location="cpu", weights_only=True, mmap=True)
            except Exception as problem:
                raise InputError(f"{file}: not a torch file that holds tensors alone: {problem}") from None
            for name in list(state):
                tensor = state.pop(name)
                if tensor.dtype == torch.bfloat16:
                    yield name, tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
                else:
                    yield name, tensor.numpy()


_GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GgufFile:
    """A GGUF file of llama or qwen2 architecture; quantised tensors are decoded to float32."""

    def __init__(self, path: epath.Path):
        self.path = path
        if not path.exists():
            raise InputError(f"{path}: no such file")
        try:
            self.reader = gguf.GGUFReader(str(path))
        except Exception as problem:
            raise InputError(f"{path}: damaged GGUF file: {problem}") from None
        self.architecture = self._field("general.architecture")
        if self.architecture not in ("llama", "qwen2"):
            raise InputError(
                f"{path}: GGUF architecture {self.architecture!r} is not supported; known: llama, qwen2"
            )
        self.config = self._config()

    def _field(self, name: str, default: Any = None) -> Any:
        field = self.reader.get_field(name)
        return default if field is None else field.contents()

    def _config(self) -> dict[str, Any]:
        def of(name: str, default: Any = None) -> Any:
            value = self._field(f"{self.architecture}.{name}", default)
            if value is None:
                raise InputError(f"{self.path}: GGUF metadata lacks {self.architecture}.{name}")
            return value

        tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        heads, embed_dim = of("attention.head_count"), of("embedding_length")
        head_dim = of("attention.key_length", embed_dim // heads)
        if of("rope.dimension_count", head_dim) != head_dim:
            raise InputError(f"{self.path}: partial rotation is not supported for GGUF files")
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": of("rope.freq_base", 10_000.0)}
        scaling = self._field(f"{self.architecture}.rope.scaling.type", "none")
        if scaling == "linear":
            rope |= {"rope_type": "linear", "factor": of("rope.scaling.factor")}
        elif scaling != "none":
            raise InputError(f"{self.path}: rotary scaling {scaling!r} is not supported for GGUF files")
        if "rope_freqs.weight" in tensors:
            rope |= self._llama3_scaling(np.asarray(tensors["rope_freqs.weight"].data), rope["rope_theta"])
        config = {
            "model_type": self.architecture,
            "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
            "hidden_size": embed_dim,
            "intermediate_size": of("feed_forward_length"),
            "num_hidden_layers": of("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": of("attention.head_count_kv", heads),
            "max_position_embeddings": of("context_length"),
            "rms_norm_eps": of("attention.layer_norm_rms_epsilon"),
            "rope_theta": rope["rope_theta"],
            "rope_parameters": rope,
            "hidden_act": "silu",
            "tie_word_embeddings": "output.weight" not in tensors,
        }
        if self.architecture == "llama":
            config |= {
                "head_dim": head_dim,
                "attention_bias": "blk.0.attn_q.bias" in tensors,
                "mlp_bias": "blk.0.ffn_up.bias" in tensors,
            }
        for key, name in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
            if (value := self._field(f"tokenizer.ggml.{name}_token_id")) is not None:
                config[key] = int(value)
        return config

    def _llama3_scaling(self, divisors: np.ndarray, base: float) -> dict[str, Any]:
        """GGUF stores what each frequency is divided by; the published Llama settings are found again from it."""
        dim = 2 * divisors.size
        plain = rotary_frequencies(RotaryConfig(dim=dim, base=base))
        for factor in (8.0, 32.0):
            settings = RotaryConfig(dim=dim, base=base, scaling="llama3", factor=factor)
            if np.allclose(plain / divisors, rotary_frequencies(settings), rtol=1e-4, atol=0):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": settings.low_freq_factor,
                    "high_freq_factor": settings.high_freq_factor,
                    "original_max_position_embeddings": settings.original_max_positions,
                }
        raise InputError(f"{self.path}: rope_freqs.weight follows none of the published Llama 3 scalings")

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        heads = {"attn_q": self.config["num_attention_heads"], "attn_k": self.config["num_key_value_heads"]}
        for tensor in self.reader.tensors:
            if tensor.name == "rope_freqs.weight":
                continue
            match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", tensor.name)
            if match is None or match[2] not in _GGUF_NAMES:
                yield tensor.name, np.asarray(tensor.data)  # left for the table to report
                continue
            layer, part, leaf = match.groups()
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            values = values.reshape([int(size) for size in reversed(tensor.shape)])
            if self.architecture == "llama" and part in heads:
                values = _unpermute(values, heads[part])
            name = f"{_GGUF_NAMES[part]}.{leaf}"
            yield (f"model.layers.{layer}.{name}" if layer else name), values


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring pairs, so its llama files interleave the halves of every head's rows."""
    half = math.prod(rows.shape[:1]) // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
