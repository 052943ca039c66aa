"""Phi-1, 1.5 and 2: attention and MLP side by side behind one norm, biases everywhere."""

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.family import Family
from sgpt_jax.families.llama import llama_shape
from sgpt_jax.families.reading import ConfigReader, activation
from sgpt_jax.families.rotary import rotary
from sgpt_jax.families.tables import linear, norm, rules, table

RULES = rules(
    table("embed_tokens", "embed/tokens"),
    norm("layers.{i}.input_layernorm", "blocks/{i}/norm1"),
    linear("layers.{i}.self_attn.q_proj", "blocks/{i}/attn/q"),
    linear("layers.{i}.self_attn.k_proj", "blocks/{i}/attn/k"),
    linear("layers.{i}.self_attn.v_proj", "blocks/{i}/attn/v"),
    linear("layers.{i}.self_attn.dense", "blocks/{i}/attn/o"),
    norm("layers.{i}.self_attn.q_layernorm", "blocks/{i}/attn/q_norm"),
    norm("layers.{i}.self_attn.k_layernorm", "blocks/{i}/attn/k_norm"),
    linear("layers.{i}.mlp.fc1", "blocks/{i}/mlp/up"),
    linear("layers.{i}.mlp.fc2", "blocks/{i}/mlp/down"),
    norm("final_layernorm", "final_norm"),
    linear("lm_head", "head"),
)


def _read(hf: ConfigReader) -> DecoderConfig:
    heads = hf.size("num_attention_heads")
    return llama_shape(
        hf,
        attention_bias=True,
        mlp_bias=True,
        rotary=rotary(hf, hf.size("hidden_size") // heads, share=0.5),
        norm="layer",
        norm_eps=hf.number("layer_norm_eps", default=1e-5, above=0),
        parallel=True,
        shared_norm=True,
        gated=False,
        activation=activation(hf, "hidden_act", default="gelu_new"),
        qk_norm="head" if hf.flag("qk_layernorm", False) else "none",
        qk_norm_bias=True,
        head_bias=True,
        embed_dropout=hf.share("embd_pdrop"),
        residual_dropout=hf.share("resid_pdrop"),
    )


FAMILY = Family(model_type="phi", read=_read, rules=RULES, base_prefix="model.", causal_lm="PhiForCausalLM")
