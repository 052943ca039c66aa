"""GGUF files as a config and tensors in Hugging Face terms."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import gguf
import numpy as np
from etils import epath

from sgpt_jax.checkpoint.gguf_reader import open_gguf, parts_of
from sgpt_jax.decoder.config import RotaryConfig
from sgpt_jax.decoder.modules import Dense, Modules
from sgpt_jax.decoder.positions import rotary_frequencies
from sgpt_jax.errors import InputError
from sgpt_jax.families import FAMILIES
from sgpt_jax.families.family import GgufFacts
from sgpt_jax.families.reading import ConfigReader

DECODE_ROWS = 512

# Keys below the architecture's name that change nothing that is computed here.
_HARMLESS = frozenset(
    (
        *("vocab_size", "tensor_data_layout", "pooling_type", "embedding_length_out"),
        *("rope.scaling.finetuned", "rope.scaling.original_context_length"),
        *(
            "use_parallel_residual",
            "dense_2_feat_in",
            "dense_2_feat_out",
            "dense_3_feat_in",
            "dense_3_feat_out",
        ),
        "classifier.output_labels",
    )
)
# Keys that change the result, where the family does not take them.
_REFUSED = (
    *("expert_count", "attention.clamp_kqv", "attention.max_alibi_bias", "attention.scale", "logit_scale"),
    *("embedding_scale", "residual_scale", "attn_logit_softcapping", "final_logit_softcapping"),
    *("attention.sliding_window", "attention.temperature_scale", "rope.freq_base_swa"),
)
# Layers behind the pooling (EmbeddingGemma), which are no tensors of the decoder.
_DENSE = ("dense_2.weight", "dense_3.weight")
_POOLING = {1: "mean", 2: "cls", 3: "lasttoken"}


def embedding_facts(path: str | os.PathLike[str]) -> tuple[str | None, Modules]:
    """How a GGUF file says that its vectors are made: the pooling, or None, and the layers behind it.

    Raises:
        InputError: it is not supported.
    """
    file = open_gguf(path)
    name = file.metadata.get("general.architecture")
    kind = file.metadata.get(f"{name}.pooling_type")
    if kind not in (None, 0, *_POOLING):
        what = "rank (a re-ranker, which gives no vectors)" if kind == 4 else repr(kind)
        raise InputError(f"{path}: {name}.pooling_type {what} is not supported")
    dense = {tensor.name: tensor for tensor in file.tensors if tensor.name in _DENSE}
    layers = tuple(Dense(_decode(dense[key]), activation="Identity") for key in _DENSE if key in dense)
    return (None if kind is None else _POOLING.get(kind)), layers


class GgufFile:
    """A GGUF file of an architecture that a family describes; quantised tensors are decoded to float32."""

    def __init__(self, path: epath.Path):
        self.path = path
        self.encoded = [epath.Path(part) for part in parts_of(path)]
        self.file = open_gguf(path)
        self.metadata = ConfigReader(self.file.metadata, f"{path}: GGUF metadata")
        known = {
            name: family
            for family in FAMILIES.values()
            if family.gguf
            for name in family.gguf.names or (family.model_type,)
        }
        self.family = self.metadata.choice("general.architecture", options=known, what="architecture")
        self.name: str = self.file.metadata["general.architecture"]
        self.config = self._config()
        self.most_values = sum(int(tensor.n_elements) for tensor in self.file.tensors)

    def _config(self) -> dict[str, Any]:
        name = self.name
        metadata, tensors = self.metadata, {tensor.name: tensor for tensor in self.file.tensors}
        if "token_embd.weight" not in tensors:
            raise InputError(f"{self.path}: this GGUF file has no token embedding (token_embd.weight)")
        heads, embed_dim = (
            metadata.size(f"{name}.attention.head_count"),
            metadata.size(f"{name}.embedding_length"),
        )
        head_dim = metadata.size(f"{name}.attention.key_length", default=max(1, embed_dim // heads))
        if metadata.size(f"{name}.attention.value_length", default=head_dim) != head_dim:
            raise InputError(f"{self.path}: {name}.attention.value_length differs from key_length")
        theta = metadata.number(f"{name}.rope.freq_base", default=10_000.0, above=0)
        assert self.family.gguf is not None
        config = {
            "model_type": self.family.model_type,
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
        if not metadata.flag(f"{name}.attention.causal", True):
            config["is_causal"] = False
        config |= self.family.gguf.settings(GgufFacts(metadata, name, tensors, head_dim, config))
        rotated = metadata.size(f"{name}.rope.dimension_count", default=head_dim)
        if rotated != head_dim and "partial_rotary_factor" not in config:
            raise InputError(f"{self.path}: partial rotation is not supported for this architecture")
        for key, token in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
            value = metadata.optional_size(f"tokenizer.ggml.{token}_token_id", least=0, most=2**32)
            if value is not None:
                config[key] = value
        self._check_untaken()
        return config

    def _check_untaken(self) -> None:
        """Refuses by name what would give other vectors; one warning names what is not known."""
        start, unknown = f"{self.name}.", []
        for key, value in self.metadata.untaken():
            below = key.removeprefix(start)
            if not key.startswith(start) or below in _HARMLESS or not value:
                continue
            if below in _REFUSED:
                raise InputError(
                    f"{self.path}: {key} is {value!r}, which is not supported for this architecture"
                )
            unknown.append(key)
        if unknown:
            warnings.warn(f"{self.path}: ignored what is not known here: {', '.join(unknown)}", stacklevel=2)

    def _scaling(self, theta: float, tensors: Mapping[str, gguf.ReaderTensor]) -> dict[str, Any]:
        name = f"{self.name}.rope"
        own = next((key for key in ("rope_freqs", "rope_factors_long") if f"{key}.weight" in tensors), None)
        _, kind = self.metadata.get(f"{name}.scaling.type")
        if kind not in (None, "none", "linear") and (kind, own) != ("longrope", "rope_factors_long"):
            raise InputError(f"{self.path}: rotary scaling {kind!r} is not supported for GGUF files")
        # llama.cpp's type is linear where none is stated; scale_linear is the older name.
        factor = self.metadata.number(
            f"{name}.scaling.factor",
            f"{name}.scale_linear",
            default=None if kind == "linear" else 1.0,
            above=0,
        )
        if kind == "none":
            factor = 1.0
        attention = self.metadata.number(f"{name}.scaling.attn_factor", default=1.0, above=0)
        if own is not None and factor != 1:
            raise InputError(
                f"{self.path}: {name}.scaling.factor {factor:g} beside {own}.weight is not supported"
            )
        if own == "rope_factors_long":
            return self._longrope(tensors, attention)
        if attention != 1:
            raise InputError(
                f"{self.path}: {name}.scaling.attn_factor {attention:g} is not supported without rope_factors_long"
            )
        if own == "rope_freqs":
            return self._llama3_scaling(np.asarray(tensors["rope_freqs.weight"].data), theta)
        return {"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor}

    def _longrope(self, tensors: Mapping[str, gguf.ReaderTensor], attention: float) -> dict[str, Any]:
        scaling: dict[str, Any] = {"rope_type": "longrope"}
        for kind in ("short", "long"):
            if (tensor := tensors.get(f"rope_factors_{kind}.weight")) is None:
                raise InputError(f"{self.path}: rope_factors_long.weight without rope_factors_{kind}.weight")
            scaling[f"{kind}_factor"] = [float(value) for value in np.asarray(tensor.data).ravel()]
        original = self.metadata.size(f"{self.name}.rope.scaling.original_context_length")
        return scaling | {"original_max_position_embeddings": original, "attention_factor": attention}

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
            if tensor.name in _DENSE or tensor.name.startswith("rope_f"):  # the config has what they say
                continue
            match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", tensor.name)
            if match is None or match[2] not in facts.parts:
                yield tensor.name, np.asarray(tensor.data)  # left for the table to report
                continue
            layer, part, leaf = match.groups()
            values = _decode(tensor)
            if part in facts.pairs:
                values = _unpair(values, heads[part])
            if facts.one_added and part.endswith("norm"):
                values -= 1
            yield (f"layers.{layer}." if layer else "") + f"{facts.parts[part]}.{leaf}", values


def _decode(tensor: gguf.ReaderTensor) -> np.ndarray:
    """A tensor as float32, decoded some rows at a time: decoding takes several times the memory of its result.

    Raises:
        InputError: the gguf package does not decode its kind (Q8_1 and Q8_K, which are for activations, among them).
    """
    values = np.empty([int(size) for size in reversed(tensor.shape)], np.float32)
    for start in range(0, len(values), DECODE_ROWS):
        part = slice(start, start + DECODE_ROWS)
        try:
            values[part] = gguf.dequantize(tensor.data[part], tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise InputError(f"{tensor.name} is stored as {kind}, which is not supported") from None
    return values


def _unpair(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring pairs, so some of its files interleave the halves of every head's rows."""
    if rows.shape[0] % (2 * heads):
        return rows  # left for the table to report
    half = math.prod(rows.shape[:1]) // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
