"""Cohere's Command R: attention and MLP side by side, norms without bias, neighbouring dimensions rotate."""

import dataclasses
from typing import Any

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.family import Family
from sgpt_jax.families.llama import RULES, llama_shape
from sgpt_jax.families.reading import ConfigReader, divided, head
from sgpt_jax.families.rotary import rotary


def cohere_shape(hf: ConfigReader, **more: Any) -> DecoderConfig:
    """The config of a decoder in the shape of Command R; `more` are fields in which the family differs."""
    head_dim = divided(hf, "hidden_size", hf.size("hidden_size"), hf.size("num_attention_heads"))
    fields: dict[str, Any] = {
        "attention_bias": hf.flag("attention_bias", False),
        "rotary": dataclasses.replace(rotary(hf, head_dim), interleaved=True),
        "max_positions": hf.size("max_position_embeddings", default=8192),
        "norm": "layer",
        "norm_bias": False,
        "norm_eps": hf.number("layer_norm_eps", default=1e-5, above=0),
        "parallel": True,
        "shared_norm": True,
        "head": head(hf, tied_by_default=True),
        "logit_scale": hf.number("logit_scale", default=0.0625),
    }
    return llama_shape(hf, **(fields | more))


def _read(hf: ConfigReader) -> DecoderConfig:
    return cohere_shape(hf, qk_norm="heads" if hf.flag("use_qk_norm", False) else "none")


FAMILY = Family(
    model_type="cohere", read=_read, rules=RULES, base_prefix="model.", causal_lm="CohereForCausalLM"
)
