"""Gemma 2: Gemma with norms on both sides of every sub-layer, soft-capped scores and logits, and windows."""

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.family import Family, GgufArchitecture
from sgpt_jax.families.gemma import gemma_shape
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


FAMILY = Family(
    model_type="gemma2",
    read=_read,
    rules=RULES,
    base_prefix="model.",
    causal_lm="Gemma2ForCausalLM",
    gguf=GgufArchitecture(SANDWICH_PARTS, settings=lambda tensors, head_dim: {"head_dim": head_dim}),
)
