"""GPT-2."""

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.family import Family
from sgpt_jax.families.reading import ConfigReader, activation, head, shape
from sgpt_jax.families.tables import COPY, QKV, fused, linear, norm, qkv_sizes, rules, side_by_side, table


def _read(hf: ConfigReader) -> DecoderConfig:
    sizes = shape(hf, embed=("n_embd",), layers=("n_layer",), heads=("n_head",))
    return DecoderConfig(
        **sizes,
        mlp_dim=hf.size("n_inner", default=4 * sizes["embed_dim"]),
        max_positions=hf.size("n_positions"),
        positions="learned",
        norm_eps=hf.number("layer_norm_epsilon", default=1e-5, above=0),
        activation=activation(hf, "activation_function", default="gelu_new"),
        attn_scale=sizes["head_dim"] ** -0.5 if hf.flag("scale_attn_weights", True) else 1.0,
        scale_by_layer=hf.flag("scale_attn_by_inverse_layer_idx", False),
        qkv_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
        head=head(hf, tied_by_default=True),
        embed_dropout=hf.share("embd_pdrop", 0.1),
        attn_dropout=hf.share("attn_pdrop", 0.1),
        residual_dropout=hf.share("resid_pdrop", 0.1),
    )


FAMILY = Family(
    model_type="gpt2",
    read=_read,
    rules=rules(
        table("wte", "embed/tokens"),
        table("wpe", "embed/positions"),
        norm("h.{i}.ln_1", "blocks/{i}/norm1"),
        fused("h.{i}.attn.c_attn", QKV, side_by_side(qkv_sizes, transposed=False)),
        linear("h.{i}.attn.c_proj", "blocks/{i}/attn/o", COPY),
        norm("h.{i}.ln_2", "blocks/{i}/norm2"),
        linear("h.{i}.mlp.c_fc", "blocks/{i}/mlp/up", COPY),
        linear("h.{i}.mlp.c_proj", "blocks/{i}/mlp/down", COPY),
        norm("ln_f", "final_norm"),
        linear("lm_head", "head"),
    ),
    base_prefix="transformer.",
    causal_lm="GPT2LMHeadModel",
    harmless=frozenset(("n_ctx", "reorder_and_upcast_attn")),
)
