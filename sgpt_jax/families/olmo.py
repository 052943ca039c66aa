"""OLMo: Llama with norms that have no weights, and clamped queries, keys and values."""

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.family import Family
from sgpt_jax.families.llama import RULES, llama_shape
from sgpt_jax.families.reading import ConfigReader, optional_number


def _read(hf: ConfigReader) -> DecoderConfig:
    return llama_shape(
        hf,
        attention_bias=hf.flag("attention_bias", False),
        norm="layer",
        norm_scale="none",
        norm_eps=1e-5,
        clip_qkv=optional_number(hf, "clip_qkv", None),
    )


FAMILY = Family(model_type="olmo", read=_read, rules=RULES, base_prefix="model.", causal_lm="OlmoForCausalLM")
