"""Phi-3, 3.5 and 4: Llama with fused projections, and a window in all layers or none."""

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.family import Family
from sgpt_jax.families.llama import llama_shape
from sgpt_jax.families.reading import MAX_LAYERS, ConfigReader
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


def _read(hf: ConfigReader) -> DecoderConfig:
    window = hf.optional_size("sliding_window")
    layers = hf.size("num_hidden_layers", most=MAX_LAYERS)
    return llama_shape(
        hf,
        max_positions=hf.size("max_position_embeddings", default=4096),
        norm_eps=hf.number("rms_norm_eps", default=1e-5, above=0),
        windows=(window,) * layers if window else (),
        embed_dropout=hf.share("embd_pdrop"),
        residual_dropout=hf.share("resid_pdrop"),
    )


FAMILY = Family(
    model_type="phi3",
    read=_read,
    rules=rules(
        table("embed_tokens", "embed/tokens"),
        norm("layers.{i}.input_layernorm", "blocks/{i}/norm1"),
        fused("layers.{i}.self_attn.qkv_proj", QKV, side_by_side(qkv_sizes)),
        linear("layers.{i}.self_attn.o_proj", "blocks/{i}/attn/o"),
        norm("layers.{i}.post_attention_layernorm", "blocks/{i}/norm2"),
        fused("layers.{i}.mlp.gate_up_proj", GATE_UP, side_by_side(gate_up_sizes)),
        linear("layers.{i}.mlp.down_proj", "blocks/{i}/mlp/down"),
        norm("norm", "final_norm"),
        linear("lm_head", "head"),
    ),
    base_prefix="model.",
    causal_lm="Phi3ForCausalLM",
    harmless=frozenset(("original_max_position_embeddings",)),  # longrope's, which is refused
    own_code=frozenset(("configuration_phi3.Phi3Config", "modeling_phi3.Phi3ForCausalLM")),
)
