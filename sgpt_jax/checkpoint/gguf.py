"""GGUF files of llama and qwen2 architecture, as a config and tensors in Hugging Face terms."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import struct
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
from etils import epath

from sgpt_jax.decoder.config import RotaryConfig
from sgpt_jax.decoder.positions import rotary_frequencies
from sgpt_jax.errors import InputError

DECODE_ROWS = 512


@dataclasses.dataclass(frozen=True)
class Gguf:
    """An opened GGUF file.

    Attributes:
        metadata: all its fields, by name.
        tensors: its tensors, memory-mapped and as they are stored.
    """

    metadata: dict[str, Any]
    tensors: list[gguf.ReaderTensor]


def open_gguf(path: str | os.PathLike[str]) -> Gguf:
    """Opens a GGUF file; parsing its metadata takes a second, so the last one opened is kept.

    Raises:
        InputError: no such file, or it is damaged.
    """
    try:
        facts = os.stat(path)
        return _open_gguf(os.fspath(path), facts.st_mtime_ns, facts.st_size)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as problem:
        raise InputError(f"{path}: damaged GGUF file: {problem}") from None


@functools.lru_cache(maxsize=1)
def _open_gguf(path: str, modified: int, size: int) -> Gguf:
    reader = _Reader(path)
    return Gguf({name: _contents(field) for name, field in reader.fields.items()}, reader.tensors)


class _Reader(gguf.GGUFReader):
    """Reads lists at once: gguf keeps an array or two for every entry of a vocabulary, up to 1.5 kB together."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind = gguf.GGUFValueType(self._get(orig_offs, np.uint32)[0])
        count, start = int(self._get(orig_offs + 4, np.uint64)[0]), orig_offs + 12
        if kind in self.gguf_scalar_to_np:
            values = self._get(start, self.gguf_scalar_to_np[kind], count)
            return 12 + values.nbytes, [values.tolist()], [], [raw_type, kind]
        if kind != gguf.GGUFValueType.STRING:
            return super()._get_field_parts(orig_offs, raw_type)
        length = struct.Struct("=Q" if self.byte_order == "I" else ">Q")
        data = self.data.data
        strings = []
        for _ in range(count):
            end = start + 8 + length.unpack_from(data, start)[0]
            strings.append(str(data[start + 8 : end], "utf-8"))
            start = end
        return start - orig_offs, [strings], [], [raw_type, kind]


def _contents(field: gguf.ReaderField) -> Any:
    last: Any = field.parts[-1]
    return last if isinstance(last, list) else field.contents()


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
        self.encoded = [path]
        self.file = open_gguf(path)
        self.architecture = self.file.metadata.get("general.architecture")
        if self.architecture not in ("llama", "qwen2"):
            raise InputError(
                f"{path}: GGUF architecture {self.architecture!r} is not supported; known: llama, qwen2"
            )
        self.config = self._config()

    def _config(self) -> dict[str, Any]:
        def of(name: str, default: Any = None) -> Any:
            value = self.file.metadata.get(f"{self.architecture}.{name}", default)
            if value is None:
                raise InputError(f"{self.path}: GGUF metadata lacks {self.architecture}.{name}")
            return value

        tensors = {tensor.name: tensor for tensor in self.file.tensors}
        heads, embed_dim = of("attention.head_count"), of("embedding_length")
        head_dim = of("attention.key_length", embed_dim // heads)
        if of("rope.dimension_count", head_dim) != head_dim:
            raise InputError(f"{self.path}: partial rotation is not supported for GGUF files")
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": of("rope.freq_base", 10_000.0)}
        scaling = self.file.metadata.get(f"{self.architecture}.rope.scaling.type", "none")
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
            if (value := self.file.metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None:
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
        for tensor in self.file.tensors:
            if tensor.name == "rope_freqs.weight":
                continue
            match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", tensor.name)
            if match is None or match[2] not in _GGUF_NAMES:
                yield tensor.name, np.asarray(tensor.data)  # left for the table to report
                continue
            layer, part, leaf = match.groups()
            values = _decode(tensor)
            if self.architecture == "llama" and part in heads:
                values = _unpermute(values, heads[part])
            name = f"{_GGUF_NAMES[part]}.{leaf}"
            yield (f"model.layers.{layer}.{name}" if layer else name), values


def _decode(tensor: gguf.ReaderTensor) -> np.ndarray:
    """A tensor as float32, decoded some rows at a time: decoding takes several times the memory of its result."""
    values = np.empty([int(size) for size in reversed(tensor.shape)], np.float32)
    for start in range(0, len(values), DECODE_ROWS):
        part = slice(start, start + DECODE_ROWS)
        values[part] = gguf.dequantize(tensor.data[part], tensor.tensor_type)
    return values


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring pairs, so its llama files interleave the halves of every head's rows."""
    half = math.prod(rows.shape[:1]) // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
