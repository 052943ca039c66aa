"""Gemma: Llama with norms that multiply by one more than their weights, and scaled embeddings."""

from typing import Any

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.family import Family, GgufArchitecture, GgufFacts
from sgpt_jax.families.llama import GGUF_PARTS, RULES, llama_shape
from sgpt_jax.families.reading import ConfigReader, activation, head


def gemma_shape(hf: ConfigReader, **more: Any) -> DecoderConfig:
    """The config of a decoder in the shape of Gemma; `more` are fields in which the family differs."""
    act = activation(hf, "hidden_activation", "hidden_act", default="gelu_pytorch_tanh")
    fields: dict[str, Any] = {
        "attention_bias": hf.flag("attention_bias", False),
        "head_dim": 256,
        "norm_scale": "weight+1",
        # The first releases said "gelu" and meant its approximation.
        "activation": "gelu_tanh" if act == "gelu" else act,
        "embed_scale": hf.size("hidden_size") ** 0.5,
        "head": head(hf, tied_by_default=True),
    }
    return llama_shape(hf, **(fields | more))


def _read(hf: ConfigReader) -> DecoderConfig:
    return gemma_shape(hf, max_positions=hf.size("max_position_embeddings", default=8192))


def gguf_settings(facts: GgufFacts) -> dict[str, Any]:
    """What all GGUF files of Gemmas say in the same words."""
    return {
        "head_dim": facts.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
    }


FAMILY = Family(
    model_type="gemma",
    read=_read,
    rules=RULES,
    base_prefix="model.",
    causal_lm="GemmaForCausalLM",
    gguf=GgufArchitecture(GGUF_PARTS, settings=gguf_settings, one_added=True),
)
