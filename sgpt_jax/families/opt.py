"""OPT: learned positions from row 2 on; OPT-350m with norms after the sums and projected embeddings."""

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.errors import InputError
from sgpt_jax.families.family import Family
from sgpt_jax.families.reading import ConfigReader, activation, head, shape
from sgpt_jax.families.tables import linear, norm, rules, table


def _read(hf: ConfigReader) -> DecoderConfig:
    sizes = shape(hf, embed=("hidden_size",), layers=("num_hidden_layers",), heads=("num_attention_heads",))
    if not hf.flag("layer_norm_elementwise_affine", True):
        raise InputError("an OPT whose norms have no weights is not supported")
    token_dim = hf.size("word_embed_proj_dim", default=sizes["embed_dim"])
    pre_norm = hf.flag("do_layer_norm_before", True)
    bias = hf.flag("enable_bias", True)
    return DecoderConfig(
        **sizes,
        token_dim=token_dim if token_dim != sizes["embed_dim"] else None,
        mlp_dim=hf.size("ffn_dim"),
        max_positions=hf.size("max_position_embeddings"),
        positions="learned",
        position_offset=2,
        norm_at="input" if pre_norm else "sum",
        final_norm=not hf.flag("_remove_final_layer_norm", False) and pre_norm,
        activation=activation(hf, "activation_function", default="relu"),
        attn_scale=sizes["head_dim"] ** -0.5,
        qkv_bias=bias,
        attn_out_bias=bias,
        mlp_bias=bias,
        head=head(hf, tied_by_default=True),
        attn_dropout=hf.share("attention_dropout"),
        residual_dropout=hf.share("dropout", 0.1),
    )


FAMILY = Family(
    model_type="opt",
    read=_read,
    rules=rules(
        table("embed_tokens", "embed/tokens"),
        table("embed_positions", "embed/positions"),
        linear("project_in", "embed/project_in"),
        norm("layers.{i}.self_attn_layer_norm", "blocks/{i}/norm1"),
        linear("layers.{i}.self_attn.q_proj", "blocks/{i}/attn/q"),
        linear("layers.{i}.self_attn.k_proj", "blocks/{i}/attn/k"),
        linear("layers.{i}.self_attn.v_proj", "blocks/{i}/attn/v"),
        linear("layers.{i}.self_attn.out_proj", "blocks/{i}/attn/o"),
        norm("layers.{i}.final_layer_norm", "blocks/{i}/norm2"),
        linear("layers.{i}.fc1", "blocks/{i}/mlp/up"),
        linear("layers.{i}.fc2", "blocks/{i}/mlp/down"),
        norm("final_layer_norm", "final_norm"),
        linear("project_out", "project_out"),
        linear("lm_head", "head"),
    ),
    base_prefix="model.decoder.",
    causal_lm="OPTForCausalLM",
    other_prefixes=("decoder.",),
    harmless=frozenset(
        ("layerdrop", "activation_dropout", "attention_probs_dropout_prob")
    ),  # training's noise
)
