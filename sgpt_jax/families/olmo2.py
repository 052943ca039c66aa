"""OLMo 2: Llama with norms behind its sub-layers, and queries and keys normed over all heads together."""

from typing import Any

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.family import Family
from sgpt_jax.families.llama import LLAMA_CORE, llama_shape
from sgpt_jax.families.reading import ConfigReader
from sgpt_jax.families.tables import norm, rules

RULES = rules(
    LLAMA_CORE,
    norm("layers.{i}.post_attention_layernorm", "blocks/{i}/out_norm1"),
    norm("layers.{i}.post_feedforward_layernorm", "blocks/{i}/out_norm2"),
)


def olmo2_shape(hf: ConfigReader, **more: Any) -> DecoderConfig:
    """The config of a decoder in the shape of OLMo 2; `more` are fields in which the family differs."""
    return llama_shape(
        hf,
        attention_bias=hf.flag("attention_bias", False),
        norm_at="output",
        norm_eps=hf.number("rms_norm_eps", default=1e-5, above=0),
        qk_norm="width",
        **more,
    )


FAMILY = Family(
    model_type="olmo2", read=olmo2_shape, rules=RULES, base_prefix="model.", causal_lm="Olmo2ForCausalLM"
)
