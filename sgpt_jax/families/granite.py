"""Granite 3: Llama with factors on embeddings, scores, residual branches and logits."""

from collections.abc import Iterable
from typing import Any

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.family import Family, HfConfig
from sgpt_jax.families.llama import RULES, llama_shape
from sgpt_jax.families.reading import ConfigReader


def _read(hf: ConfigReader) -> DecoderConfig:
    return llama_shape(
        hf,
        attention_bias=hf.flag("attention_bias", False),
        mlp_bias=hf.flag("mlp_bias", False),
        embed_scale=hf.number("embedding_multiplier", default=1.0),
        attn_scale=hf.number("attention_multiplier", default=1.0),
        residual_scale=hf.number("residual_multiplier", default=1.0),
        logit_scale=1 / hf.number("logits_scaling", default=1.0, above=0),
    )


def _exports(hf: HfConfig, config: DecoderConfig) -> Iterable[dict[str, Any]]:
    yield dict(hf) | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


FAMILY = Family(
    model_type="granite",
    read=_read,
    rules=RULES,
    base_prefix="model.",
    causal_lm="GraniteForCausalLM",
    exports=_exports,
)
