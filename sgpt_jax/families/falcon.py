"""Falcon: the first models (multi-query attention), later ones (grouped), and the RefinedWeb models (ALiBi)."""

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.errors import InputError
from sgpt_jax.families.family import Family
from sgpt_jax.families.reading import ConfigReader, activation, head, shape
from sgpt_jax.families.rotary import rotary
from sgpt_jax.families.tables import BY_GROUP, QKV, fused, linear, norm, rules, table


def _two_norms(config: DecoderConfig) -> bool:
    """Whether a parallel block has one norm for attention and one for the MLP: their tensors have other names."""
    return config.parallel and not config.shared_norm


RULES = rules(
    table("word_embeddings", "embed/tokens"),
    norm("h.{i}.input_layernorm", "blocks/{i}/norm1", when=lambda config: not _two_norms(config)),
    norm("h.{i}.ln_attn", "blocks/{i}/norm1", when=_two_norms),
    norm("h.{i}.ln_mlp", "blocks/{i}/norm2", when=_two_norms),
    fused("h.{i}.self_attention.query_key_value", QKV, BY_GROUP),
    linear("h.{i}.self_attention.dense", "blocks/{i}/attn/o"),
    norm("h.{i}.post_attention_layernorm", "blocks/{i}/norm2", when=lambda config: not config.parallel),
    linear("h.{i}.mlp.dense_h_to_4h", "blocks/{i}/mlp/up"),
    linear("h.{i}.mlp.dense_4h_to_h", "blocks/{i}/mlp/down"),
    norm("ln_f", "final_norm"),
    linear("lm_head", "head"),
)


# The rotary settings are those that models with ALiBi have and do not use.
_HARMLESS = (
    *("apply_residual_connection_post_layernorm", "rope_theta", "rope_scaling", "rope_parameters"),
    *("max_position_embeddings", "num_kv_heads", "n_head_kv", "multi_query"),
)


def _read(hf: ConfigReader) -> DecoderConfig:
    fields = shape(
        hf, embed=("hidden_size", "n_embed"), layers=("num_hidden_layers", "n_layer"),
        heads=("num_attention_heads", "n_head"),
    )  # fmt: skip
    new, alibi, bias = (hf.flag(key, False) for key in ("new_decoder_architecture", "alibi", "bias"))
    parallel = hf.flag("parallel_attn", True) or new
    norms = hf.size("num_ln_in_parallel_attn", default=2 if new else 1, most=2)
    if not new and parallel and norms == 2:
        raise InputError(
            f"{hf.what}: num_ln_in_parallel_attn 2 without new_decoder_architecture is not supported"
        )
    kv_heads = hf.size("num_kv_heads", "n_head_kv", default=fields["num_heads"])
    if new:
        fields["num_kv_heads"] = kv_heads
    elif hf.flag("multi_query", True):
        fields["num_kv_heads"] = 1
    embed_dim, head_dim = fields["embed_dim"], fields["head_dim"]
    return DecoderConfig(
        **fields,
        mlp_dim=hf.size("ffn_hidden_size", default=4 * embed_dim),
        max_positions=None if alibi else hf.size("max_position_embeddings", default=2048),
        positions="alibi" if alibi else "rotary",
        alibi="rounded",
        rotary=None if alibi else rotary(hf, head_dim),
        norm_eps=hf.number("layer_norm_epsilon", default=1e-5, above=0),
        parallel=parallel,
        shared_norm=parallel and norms == 1,
        activation=activation(hf, "activation", default="gelu"),
        attn_scale=head_dim**-0.5,
        qkv_bias=bias,
        attn_out_bias=bias,
        mlp_bias=bias,
        head=head(hf, tied_by_default=True),
        attn_dropout=hf.share("attention_dropout"),
        residual_dropout=hf.share("hidden_dropout"),
    )


FAMILY = Family(
    model_type="falcon",
    read=_read,
    rules=RULES,
    base_prefix="transformer.",
    causal_lm="FalconForCausalLM",
    harmless=frozenset(_HARMLESS),
)
