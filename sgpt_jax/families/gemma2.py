"""Gemma 2: Gemma with norms on both sides of every sub-layer, soft-capped scores and logits, and windows."""

from typing import Any

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.family import Family, GgufArchitecture, GgufFacts
from sgpt_jax.families.gemma import gemma_shape, gguf_settings
from sgpt_jax.families.llama import GGUF_PARTS, LLAMA_CORE
from sgpt_jax.families.reading import ConfigReader, optional_number, window, window_kinds, windows_of
from sgpt_jax.families.tables import norm, rules

RULES = rules(
    LLAMA_CORE,
    norm("layers.{i}.post_attention_layernorm", "blocks/{i}/out_norm1"),
    norm("layers.{i}.pre_feedforward_layernorm", "blocks/{i}/norm2"),
    norm("layers.{i}.post_feedforward_layernorm", "blocks/{i}/out_norm2"),
)

SANDWICH_PARTS = GGUF_PARTS | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _read(hf: ConfigReader) -> DecoderConfig:
    return gemma_shape(
        hf,
        max_positions=hf.size("max_position_embeddings", default=8192),
        norm_at="both",
        attn_scale=hf.number("query_pre_attn_scalar", default=256, above=0) ** -0.5,
        attn_softcap=optional_number(hf, "attn_logit_softcapping", 50.0),
        logit_softcap=optional_number(hf, "final_logit_softcapping", 30.0),
        windows=windows_of(window_kinds(hf, pattern=2), window(hf)),
    )


def attention_scalar(facts: GgufFacts, layers_of_27b: int) -> int:
    """query_pre_attn_scalar, which GGUF files do not have: the width of a head, or E / N in the model with 27B."""
    shape = facts.config
    if shape["num_hidden_layers"] == layers_of_27b:
        return int(shape["hidden_size"] // shape["num_attention_heads"])
    return facts.head_dim


def _gguf_settings(facts: GgufFacts) -> dict[str, Any]:
    caps = {
        key: facts.metadata.number(facts.field(key), default=cap, above=0)
        for key, cap in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0))
    }
    window = facts.metadata.size(facts.field("attention.sliding_window"), default=4096)
    scalar = attention_scalar(facts, layers_of_27b=46)
    return gguf_settings(facts) | caps | {"sliding_window": window, "query_pre_attn_scalar": scalar}


FAMILY = Family(
    model_type="gemma2",
    read=_read,
    rules=RULES,
    base_prefix="model.",
    causal_lm="Gemma2ForCausalLM",
    gguf=GgufArchitecture(SANDWICH_PARTS, settings=_gguf_settings, one_added=True),
)
