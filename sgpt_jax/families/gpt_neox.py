"""GPT-NeoX and Pythia: partial rotary positions, attention and MLP in parallel with a norm each."""

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.family import Family
from sgpt_jax.families.reading import ConfigReader, activation, head, shape
from sgpt_jax.families.rotary import rotary
from sgpt_jax.families.tables import BY_GROUP, QKV, fused, linear, norm, rules, table


def _read(hf: ConfigReader) -> DecoderConfig:
    sizes = shape(hf, embed=("hidden_size",), layers=("num_hidden_layers",), heads=("num_attention_heads",))
    attention_bias = hf.flag("attention_bias", True)
    hidden_dropout = hf.share("hidden_dropout")
    return DecoderConfig(
        **sizes,
        mlp_dim=hf.size("intermediate_size"),
        max_positions=hf.size("max_position_embeddings"),
        rotary=rotary(hf, sizes["head_dim"], share=0.25),
        norm_eps=hf.number("layer_norm_eps", default=1e-5, above=0),
        parallel=hf.flag("use_parallel_residual", True),
        activation=activation(hf, "hidden_act", default="gelu"),
        attn_scale=sizes["head_dim"] ** -0.5,
        qkv_bias=attention_bias,
        attn_out_bias=attention_bias,
        mlp_bias=True,
        head=head(hf, tied_by_default=False),
        embed_dropout=hidden_dropout,
        attn_dropout=hf.share("attention_dropout"),
        residual_dropout=hidden_dropout,
    )


FAMILY = Family(
    model_type="gpt_neox",
    read=_read,
    rules=rules(
        table("embed_in", "embed/tokens"),
        norm("layers.{i}.input_layernorm", "blocks/{i}/norm1"),
        fused("layers.{i}.attention.query_key_value", QKV, BY_GROUP),
        linear("layers.{i}.attention.dense", "blocks/{i}/attn/o"),
        norm("layers.{i}.post_attention_layernorm", "blocks/{i}/norm2"),
        linear("layers.{i}.mlp.dense_h_to_4h", "blocks/{i}/mlp/up"),
        linear("layers.{i}.mlp.dense_4h_to_h", "blocks/{i}/mlp/down"),
        norm("final_layer_norm", "final_norm"),
        # The name that hub checkpoints have and that transformers writes to this day.
        linear("embed_out", "head"),
    ),
    base_prefix="gpt_neox.",
    causal_lm="GPTNeoXForCausalLM",
    renames={"lm_head.": "embed_out."},
)
