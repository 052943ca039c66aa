"""GGUF files as a config and tensors in Hugging Face terms."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import gguf
import numpy as np
from etils import epath

from sgpt_jax.checkpoint.untrusted import check_content
from sgpt_jax.decoder.config import RotaryConfig
from sgpt_jax.decoder.positions import rotary_frequencies
from sgpt_jax.errors import InputError
from sgpt_jax.families import FAMILIES
from sgpt_jax.families.reading import ConfigReader

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
    check_content(path)
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


class GgufFile:
    """A GGUF file of an architecture that a family describes; quantised tensors are decoded to float32."""

    def __init__(self, path: epath.Path):
        self.path = path
        self.encoded = [path]
        self.file = open_gguf(path)
        self.metadata = ConfigReader(self.file.metadata, f"{path}: GGUF metadata")
        known = {name: family for name, family in FAMILIES.items() if family.gguf}
        self.family = self.metadata.choice("general.architecture", options=known, what="architecture")
        self.config = self._config()
        self.most_values = sum(int(tensor.n_elements) for tensor in self.file.tensors)

    def _config(self) -> dict[str, Any]:
        name = self.family.model_type
        metadata, tensors = self.metadata, {tensor.name: tensor for tensor in self.file.tensors}
        self._refuse(name)
        if "token_embd.weight" not in tensors:
            raise InputError(f"{self.path}: this GGUF file has no token embedding (token_embd.weight)")
        heads, embed_dim = (
            metadata.size(f"{name}.attention.head_count"),
            metadata.size(f"{name}.embedding_length"),
        )
        head_dim = metadata.size(f"{name}.attention.key_length", default=max(1, embed_dim // heads))
        if metadata.size(f"{name}.rope.dimension_count", default=head_dim) != head_dim:
            raise InputError(f"{self.path}: partial rotation is not supported for GGUF files")
        theta = metadata.number(f"{name}.rope.freq_base", default=10_000.0, above=0)
        assert self.family.gguf is not None
        config = {
            "model_type": name,
            "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
            "hidden_size": embed_dim,
            "intermediate_size": metadata.size(f"{name}.feed_forward_length"),
            "num_hidden_layers": metadata.size(f"{name}.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": metadata.size(f"{name}.attention.head_count_kv", default=heads),
            "max_position_embeddings": metadata.size(f"{name}.context_length"),
            "rms_norm_eps": metadata.number(f"{name}.attention.layer_norm_rms_epsilon", above=0),
            "rope_theta": theta,
            "rope_parameters": {"rope_theta": theta} | self._scaling(theta, tensors),
            "hidden_act": "silu",
            "tie_word_embeddings": "output.weight" not in tensors,
        }
        config |= self.family.gguf.settings(tensors, head_dim)
        for key, token in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
            value = metadata.optional_size(f"tokenizer.ggml.{token}_token_id", least=0, most=2**32)
            if value is not None:
                config[key] = value
        return config

    def _refuse(self, name: str) -> None:
        """Refuses by name what would give other vectors."""
        if self.metadata.size("split.count", default=1, least=0) > 1:
            raise InputError(
                f"{self.path}: one part of a split GGUF file: join the parts (llama-gguf-split --merge)"
            )
        if not self.metadata.flag(f"{name}.attention.causal", True):
            raise InputError(
                f"{self.path}: {name}.attention.causal is false: bidirectional attention is not supported"
            )

    def _scaling(self, theta: float, tensors: Mapping[str, gguf.ReaderTensor]) -> dict[str, Any]:
        name = self.family.model_type
        _, kind = self.metadata.get(f"{name}.rope.scaling.type")
        if "rope_freqs.weight" in tensors:
            return self._llama3_scaling(np.asarray(tensors["rope_freqs.weight"].data), theta)
        if kind in (None, "none"):
            return {"rope_type": "default"}
        if kind == "linear":
            return {
                "rope_type": "linear",
                "factor": self.metadata.number(f"{name}.rope.scaling.factor", above=0),
            }
        raise InputError(f"{self.path}: rotary scaling {kind!r} is not supported for GGUF files")

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
        facts = self.family.gguf
        assert facts is not None
        heads = {"attn_q": self.config["num_attention_heads"], "attn_k": self.config["num_key_value_heads"]}
        for tensor in self.file.tensors:
            if tensor.name == "rope_freqs.weight":
                continue
            match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", tensor.name)
            if match is None or match[2] not in facts.parts:
                yield tensor.name, np.asarray(tensor.data)  # left for the table to report
                continue
            layer, part, leaf = match.groups()
            values = _decode(tensor)
            if part in facts.pairs:
                values = _unpair(values, heads[part])
            yield (f"layers.{layer}." if layer else "") + f"{facts.parts[part]}.{leaf}", values


def _decode(tensor: gguf.ReaderTensor) -> np.ndarray:
    """A tensor as float32, decoded some rows at a time: decoding takes several times the memory of its result."""
    values = np.empty([int(size) for size in reversed(tensor.shape)], np.float32)
    for start in range(0, len(values), DECODE_ROWS):
        part = slice(start, start + DECODE_ROWS)
        values[part] = gguf.dequantize(tensor.data[part], tensor.tensor_type)
    return values


def _unpair(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring pairs, so some of its files interleave the halves of every head's rows."""
    if rows.shape[0] % (2 * heads):
        return rows  # left for the table to report
    half = math.prod(rows.shape[:1]) // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
