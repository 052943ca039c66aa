"""MPT: ALiBi, norms without bias, fused queries, keys and values."""

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.errors import InputError
from sgpt_jax.families.family import Family
from sgpt_jax.families.reading import ConfigReader, head, optional_number, shape
from sgpt_jax.families.tables import QKV, fused, linear, norm, qkv_sizes, rules, side_by_side, table

RULES = rules(
    table("wte", "embed/tokens"),
    norm("blocks.{i}.norm_1", "blocks/{i}/norm1"),
    fused("blocks.{i}.attn.Wqkv", QKV, side_by_side(qkv_sizes)),
    linear("blocks.{i}.attn.out_proj", "blocks/{i}/attn/o"),
    norm("blocks.{i}.norm_2", "blocks/{i}/norm2"),
    linear("blocks.{i}.ffn.up_proj", "blocks/{i}/mlp/up"),
    linear("blocks.{i}.ffn.down_proj", "blocks/{i}/mlp/down"),
    norm("norm_f", "final_norm"),
    linear("lm_head", "head"),
)

_HARMLESS = (
    *("expansion_ratio", "init_device", "norm_type", "learned_pos_emb", "embedding_fraction", "verbose"),
    *("max_seq_len", "init_config", "emb_pdrop", "resid_pdrop", "fc_type", "ffn_config"),
)


def _read(hf: ConfigReader) -> DecoderConfig:
    fields = shape(hf, embed=("d_model",), layers=("n_layers",), heads=("n_heads",))
    attention = hf.section("attn_config")
    for key, needed in (
        ("alibi", True),
        ("prefix_lm", False),
        ("qk_ln", False),
        ("attn_uses_sequence_id", False),
    ):
        if attention.flag(key, needed) is not needed:
            raise InputError(f"{attention.what}: {key} {attention.values[key]} is not supported")
    if not hf.flag("no_bias", True):
        raise InputError(f"{hf.what}: no_bias false is not supported")
    if attention.number("alibi_bias_max", default=8) != 8:
        raise InputError(f"{attention.what}: alibi_bias_max other than 8 is not supported")
    attention.taken |= set(attention.values)
    return DecoderConfig(
        **fields,
        mlp_dim=hf.size("expansion_ratio", default=4) * fields["embed_dim"],
        max_positions=None,
        positions="alibi",
        alibi="interleaved",
        norm_eps=hf.number("layer_norm_epsilon", default=1e-5, above=0),
        norm_bias=False,
        activation="gelu",
        attn_scale=attention.number("softmax_scale", default=fields["head_dim"] ** -0.5),
        clip_qkv=optional_number(attention, "clip_qkv", None),
        head=head(hf, tied_by_default=True),
        attn_dropout=attention.share("attn_pdrop"),
        residual_dropout=attention.share("attn_pdrop"),
    )


FAMILY = Family(
    model_type="mpt",
    read=_read,
    rules=RULES,
    base_prefix="transformer.",
    causal_lm="MptForCausalLM",
    harmless=frozenset(_HARMLESS),
)
