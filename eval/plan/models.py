"""Configurations of released decoders, as their config.json has them: all that plans and speed need of a model."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from etils import epath

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.errors import InputError
from sgpt_jax.families import read_config


def _gpt_neo(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt_neo", "vocab_size": 50257, "hidden_size": hidden, "num_layers": layers,
        "num_heads": heads, "max_position_embeddings": 2048, "window_size": 256,
        "attention_types": [[["global", "local"], layers // 2]],
    }  # fmt: skip


def _qwen3(hidden: int, layers: int, heads: int, mlp: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": mlp,
        "max_position_embeddings": 40960, "rope_theta": 1000000.0, "tie_word_embeddings": tied,
    }  # fmt: skip


def _gemma3(hidden: int, layers: int, heads: int, mlp: int, positions: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": mlp,
        "max_position_embeddings": positions, "sliding_window": 512, **more,
    }  # fmt: skip


MODELS: dict[str, dict[str, Any]] = {
    "gpt-neo-125m": _gpt_neo(768, 12, 12),
    "gpt-neo-1.3b": _gpt_neo(2048, 24, 16),
    "gpt-neo-2.7b": _gpt_neo(2560, 32, 20),
    "gpt-j-6b": {
        "model_type": "gptj", "vocab_size": 50400, "n_embd": 4096, "n_layer": 28, "n_head": 16,
        "n_positions": 2048, "rotary_dim": 64, "tie_word_embeddings": False,
    },
    "bloom-7b1": {
        "model_type": "bloom", "vocab_size": 250880, "hidden_size": 4096, "n_layer": 30, "n_head": 32,
    },
    "gpt-neox-20b": {
        "model_type": "gpt_neox", "vocab_size": 50432, "hidden_size": 6144, "num_hidden_layers": 44,
        "num_attention_heads": 64, "intermediate_size": 24576, "max_position_embeddings": 2048,
        "rotary_pct": 0.25, "hidden_act": "gelu_fast", "tie_word_embeddings": False,
    },
    "llama-3.1-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12288, tied=False),
    "gemma-3-1b": _gemma3(1152, 26, 4, 6912, 32768),
    "embeddinggemma-300m": _gemma3(768, 24, 3, 1152, 2048, use_bidirectional_attention=True),
}  # fmt: skip


def find_model(name: str) -> DecoderConfig:
    """The config of a released model by its name in `MODELS`, or of a folder with a config.json.

    Raises:
        InputError: neither, or a config that is not supported.
    """
    if name.lower() in MODELS:
        return read_config(MODELS[name.lower()])
    path = epath.Path(name) / "config.json"
    if not path.exists():
        raise InputError(
            f"{name}: neither a folder with a config.json nor one of the models known by name: {', '.join(MODELS)}"
        )
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    return read_config(settings)


def with_biases(config: DecoderConfig) -> tuple[DecoderConfig, bool]:
    """(config, whether anything was added): a decoder without any bias gets zero ones, as `--add-biases` does."""
    if config.norm == "layer" or config.qkv_bias or config.attn_out_bias or config.mlp_bias:
        return config, False
    return dataclasses.replace(config, qkv_bias=True, attn_out_bias=True, mlp_bias=True), True
