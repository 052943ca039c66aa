"""GLM-4: Llama with a fused MLP, of which neighbouring dimensions of half of every head rotate."""

import dataclasses
from typing import Any

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.family import Family
from sgpt_jax.families.llama import LLAMA_ATTENTION, llama_shape
from sgpt_jax.families.reading import ConfigReader
from sgpt_jax.families.rotary import rotary
from sgpt_jax.families.tables import GATE_UP, fused, gate_up_sizes, linear, norm, rules, side_by_side, table

GLM_CORE = rules(
    table("embed_tokens", "embed/tokens"),
    norm("layers.{i}.input_layernorm", "blocks/{i}/norm1"),
    LLAMA_ATTENTION,
    norm("layers.{i}.post_attention_layernorm", "blocks/{i}/norm2"),
    fused("layers.{i}.mlp.gate_up_proj", GATE_UP, side_by_side(gate_up_sizes)),
    linear("layers.{i}.mlp.down_proj", "blocks/{i}/mlp/down"),
    norm("norm", "final_norm"),
    linear("lm_head", "head"),
)


def glm_shape(hf: ConfigReader, **more: Any) -> DecoderConfig:
    """The config of a decoder in the shape of GLM-4; `more` are fields in which the family differs."""
    head_dim = hf.size("head_dim", default=128)
    return llama_shape(
        hf,
        head_dim=128,
        num_kv_heads=hf.size("num_key_value_heads", default=2),
        qkv_bias=hf.flag("attention_bias", True),
        rotary=dataclasses.replace(rotary(hf, head_dim, share=0.5), interleaved=True),
        norm_eps=hf.number("rms_norm_eps", default=1.5625e-7, above=0),
        max_positions=hf.size("max_position_embeddings", default=131_072),
        **more,
    )


FAMILY = Family(
    model_type="glm", read=glm_shape, rules=GLM_CORE, base_prefix="model.", causal_lm="GlmForCausalLM"
)
