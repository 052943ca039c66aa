"""Qwen3: Llama with normed queries and keys, whose heads are 128 wide unless the config says otherwise."""

from collections.abc import Iterable
from typing import Any

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.family import Family, GgufArchitecture, HfConfig
from sgpt_jax.families.llama import GGUF_PARTS, RULES, llama_shape
from sgpt_jax.families.qwen2 import qwen_windows
from sgpt_jax.families.reading import ConfigReader


def _read(hf: ConfigReader) -> DecoderConfig:
    return llama_shape(
        hf,
        attention_bias=hf.flag("attention_bias", False),
        head_dim=128,
        qk_norm="head",
        windows=qwen_windows(hf),
    )


def _exports(hf: HfConfig, config: DecoderConfig) -> Iterable[dict[str, Any]]:
    yield dict(hf) | {"attention_bias": config.qkv_bias}


FAMILY = Family(
    model_type="qwen3",
    read=_read,
    rules=RULES,
    base_prefix="model.",
    causal_lm="Qwen3ForCausalLM",
    exports=_exports,
    gguf=GgufArchitecture(GGUF_PARTS, settings=lambda facts: {"head_dim": facts.head_dim}),
)
