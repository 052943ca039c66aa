"""BLOOM: ALiBi positions, a norm behind the embedding."""

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.family import Family
from sgpt_jax.families.reading import ConfigReader, head, shape
from sgpt_jax.families.tables import BY_GROUP, QKV, fused, linear, norm, rules, table


def _read(hf: ConfigReader) -> DecoderConfig:
    sizes = shape(
        hf,
        embed=("hidden_size", "n_embed"),
        layers=("n_layer", "num_hidden_layers"),
        heads=("n_head", "num_attention_heads"),
    )
    return DecoderConfig(
        **sizes,
        mlp_dim=4 * sizes["embed_dim"],
        max_positions=None,
        positions="alibi",
        embed_norm=True,
        norm_eps=hf.number("layer_norm_epsilon", default=1e-5, above=0),
        residual_from_norm=hf.flag("apply_residual_connection_post_layernorm", False),
        activation="gelu_tanh",
        attn_scale=sizes["head_dim"] ** -0.5,
        qkv_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
        head=head(hf, tied_by_default=True),
        attn_dropout=hf.share("attention_dropout"),
        residual_dropout=hf.share("hidden_dropout"),
    )


FAMILY = Family(
    model_type="bloom",
    read=_read,
    rules=rules(
        table("word_embeddings", "embed/tokens"),
        norm("word_embeddings_layernorm", "embed/norm"),
        norm("h.{i}.input_layernorm", "blocks/{i}/norm1"),
        fused("h.{i}.self_attention.query_key_value", QKV, BY_GROUP),
        linear("h.{i}.self_attention.dense", "blocks/{i}/attn/o"),
        norm("h.{i}.post_attention_layernorm", "blocks/{i}/norm2"),
        linear("h.{i}.mlp.dense_h_to_4h", "blocks/{i}/mlp/up"),
        linear("h.{i}.mlp.dense_4h_to_h", "blocks/{i}/mlp/down"),
        norm("ln_f", "final_norm"),
        linear("lm_head", "head"),
    ),
    base_prefix="transformer.",
    causal_lm="BloomForCausalLM",
    # Left by Megatron; transformers reads none of them, or computes the same either way.
    harmless=frozenset(
        (
            *("slow_but_exact", "attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion"),
            *("offset_alibi", "seq_length", "skip_bias_add", "skip_bias_add_qkv"),
        )
    ),
)
