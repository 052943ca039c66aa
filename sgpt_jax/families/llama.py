"""Llama, and what the families built like it (Mistral, Qwen2, Qwen3 and others) take from it."""

from collections.abc import Iterable
from typing import Any

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.family import Family, GgufArchitecture, GgufFacts, HfConfig
from sgpt_jax.families.reading import MAX_LAYERS, ConfigReader, activation, divided, head
from sgpt_jax.families.rotary import rotary
from sgpt_jax.families.tables import linear, norm, rules, table


def llama_shape(
    hf: ConfigReader,
    *,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    head_dim: int | None = None,
    **more: Any,
) -> DecoderConfig:
    """The config of a decoder in the shape of Llama.

    Args:
        hf: the Hugging Face config.
        attention_bias: whether all four projections of attention have biases.
        mlp_bias: whether the MLP's have.
        head_dim: H where the config says nothing; None for E / N.
        more: fields of the `DecoderConfig` in which the family differs from Llama.
    """
    embed_dim, heads = hf.size("hidden_size"), hf.size("num_attention_heads")
    head_dim = hf.optional_size("head_dim") or head_dim or divided(hf, "hidden_size", embed_dim, heads)
    fields: dict[str, Any] = {
        "vocab_size": hf.size("vocab_size"),
        "embed_dim": embed_dim,
        "num_layers": hf.size("num_hidden_layers", most=MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": hf.size("num_key_value_heads", default=heads),
        "head_dim": head_dim,
        "mlp_dim": hf.size("intermediate_size"),
        "max_positions": hf.size("max_position_embeddings", default=2048),
        "norm": "rms",
        "norm_eps": hf.number("rms_norm_eps", default=1e-6, above=0),
        "activation": activation(hf, "hidden_act", default="silu"),
        "gated": True,
        "attn_scale": head_dim**-0.5,
        "qkv_bias": attention_bias,
        "attn_out_bias": attention_bias,
        "mlp_bias": mlp_bias,
        "head": head(hf, tied_by_default=False),
        "attn_dropout": hf.share("attention_dropout"),
    }
    if "rotary" not in more:
        more["rotary"] = rotary(hf, head_dim)
    return DecoderConfig(**(fields | more))


def _read(hf: ConfigReader) -> DecoderConfig:
    return llama_shape(
        hf, attention_bias=hf.flag("attention_bias", False), mlp_bias=hf.flag("mlp_bias", False)
    )


def as_llama(hf: HfConfig, config: DecoderConfig) -> Iterable[dict[str, Any]]:
    """Export candidates: the config as it is, then as a Llama's, the same decoder where no layer has a window."""
    yield dict(hf)
    windows = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
    yield {key: value for key, value in hf.items() if key not in windows} | {
        "model_type": "llama",
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }


def _exports(hf: HfConfig, config: DecoderConfig) -> Iterable[dict[str, Any]]:
    yield dict(hf) | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def _gguf_settings(facts: GgufFacts) -> dict[str, Any]:
    return {
        "head_dim": facts.head_dim,
        "attention_bias": "blk.0.attn_q.bias" in facts.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in facts.tensors,
    }


LLAMA_ATTENTION = rules(
    linear("layers.{i}.self_attn.q_proj", "blocks/{i}/attn/q"),
    linear("layers.{i}.self_attn.k_proj", "blocks/{i}/attn/k"),
    linear("layers.{i}.self_attn.v_proj", "blocks/{i}/attn/v"),
    linear("layers.{i}.self_attn.o_proj", "blocks/{i}/attn/o"),
    norm("layers.{i}.self_attn.q_norm", "blocks/{i}/attn/q_norm"),
    norm("layers.{i}.self_attn.k_norm", "blocks/{i}/attn/k_norm"),
)

# What Llama and the families built like it share: all but the second norm, whose place or name differs.
LLAMA_CORE = rules(
    table("embed_tokens", "embed/tokens"),
    norm("layers.{i}.input_layernorm", "blocks/{i}/norm1"),
    LLAMA_ATTENTION,
    linear("layers.{i}.mlp.gate_proj", "blocks/{i}/mlp/gate"),
    linear("layers.{i}.mlp.up_proj", "blocks/{i}/mlp/up"),
    linear("layers.{i}.mlp.down_proj", "blocks/{i}/mlp/down"),
    norm("norm", "final_norm"),
    linear("lm_head", "head"),
)

RULES = rules(LLAMA_CORE, norm("layers.{i}.post_attention_layernorm", "blocks/{i}/norm2"))

GGUF_PARTS = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

FAMILY = Family(
    model_type="llama",
    read=_read,
    rules=RULES,
    base_prefix="model.",
    causal_lm="LlamaForCausalLM",
    exports=_exports,
    gguf=GgufArchitecture(GGUF_PARTS, pairs=("attn_q", "attn_k"), settings=_gguf_settings),
)
