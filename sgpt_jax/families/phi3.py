"""Phi-3, 3.5, 4: Llama with fused projections."""

from typing import Any

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.family import Family, GgufArchitecture, GgufFacts
from sgpt_jax.families.llama import llama_shape
from sgpt_jax.families.reading import ConfigReader, divided
from sgpt_jax.families.rotary import SCALINGS, rotary
from sgpt_jax.families.tables import (
    GATE_UP,
    QKV,
    fused,
    gate_up_sizes,
    linear,
    norm,
    qkv_sizes,
    rules,
    side_by_side,
    table,
)

RULES = rules(
    table("embed_tokens", "embed/tokens"),
    norm("layers.{i}.input_layernorm", "blocks/{i}/norm1"),
    fused("layers.{i}.self_attn.qkv_proj", QKV, side_by_side(qkv_sizes)),
    linear("layers.{i}.self_attn.o_proj", "blocks/{i}/attn/o"),
    norm("layers.{i}.post_attention_layernorm", "blocks/{i}/norm2"),
    fused("layers.{i}.mlp.gate_up_proj", GATE_UP, side_by_side(gate_up_sizes)),
    linear("layers.{i}.mlp.down_proj", "blocks/{i}/mlp/down"),
    norm("norm", "final_norm"),
    linear("lm_head", "head"),
)

GGUF_PARTS = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}


def _read(hf: ConfigReader) -> DecoderConfig:
    window, heads = hf.optional_size("sliding_window"), hf.size("num_attention_heads")
    head_dim = divided(hf, "hidden_size", hf.size("hidden_size"), heads)
    return llama_shape(
        hf,
        norm_eps=hf.number("rms_norm_eps", default=1e-5, above=0),
        max_positions=hf.size("max_position_embeddings", default=4096),
        windows=(window,) * hf.size("num_hidden_layers") if window else (),
        # The first releases had other names for one scaling.
        rotary=rotary(hf, head_dim, share=1.0, scalings={**SCALINGS, "su": "longrope", "yarn": "longrope"}),
        embed_dropout=hf.share("embd_pdrop"),
        residual_dropout=hf.share("resid_pdrop"),
    )


def _gguf_settings(facts: GgufFacts) -> dict[str, Any]:
    window = facts.metadata.optional_size(facts.field("attention.sliding_window"), least=0)
    rotated = facts.metadata.size(facts.field("rope.dimension_count"), default=facts.head_dim)
    share = {"partial_rotary_factor": rotated / facts.head_dim} if rotated != facts.head_dim else {}
    return {"sliding_window": window or None} | share  # 0 is none


FAMILY = Family(
    model_type="phi3",
    read=_read,
    rules=RULES,
    base_prefix="model.",
    causal_lm="Phi3ForCausalLM",
    harmless=frozenset(("original_max_position_embeddings",)),  # read where a scaling uses it
    own_code=frozenset(("configuration_phi3.Phi3Config", "modeling_phi3.Phi3ForCausalLM")),
    gguf=GgufArchitecture(GGUF_PARTS, settings=_gguf_settings),
)
