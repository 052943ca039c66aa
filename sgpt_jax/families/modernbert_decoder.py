"""ModernBERT's decoder (Ettin): gated MLP and windows of ModernBERT, causal, with a head of three parts."""

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.family import Family
from sgpt_jax.families.reading import (
    LAYER_KINDS,
    MAX_LAYERS,
    ConfigReader,
    activation,
    divided,
    head,
    windows_of,
)
from sgpt_jax.families.rotary import rotary_by_kind
from sgpt_jax.families.tables import (
    GATE_UP,
    fused,
    gate_up_sizes,
    linear,
    norm,
    rules,
    side_by_side,
    table,
)

RULES = rules(
    table("embeddings.tok_embeddings", "embed/tokens"),
    norm("embeddings.norm", "embed/norm"),
    norm("layers.{i}.attn_norm", "blocks/{i}/norm1"),
    linear("layers.{i}.attn.q_proj", "blocks/{i}/attn/q"),
    linear("layers.{i}.attn.k_proj", "blocks/{i}/attn/k"),
    linear("layers.{i}.attn.v_proj", "blocks/{i}/attn/v"),
    linear("layers.{i}.attn.Wo", "blocks/{i}/attn/o"),
    norm("layers.{i}.mlp_norm", "blocks/{i}/norm2"),
    fused("layers.{i}.mlp.Wi", GATE_UP, side_by_side(gate_up_sizes)),
    linear("layers.{i}.mlp.Wo", "blocks/{i}/mlp/down"),
    norm("final_norm", "final_norm"),
    linear("lm_head.dense", "head/linear"),
    norm("lm_head.norm", "head/norm"),
    linear("decoder", "head"),
)


def _read(hf: ConfigReader) -> DecoderConfig:
    embed_dim, heads = hf.size("hidden_size"), hf.size("num_attention_heads")
    head_dim, layers = (
        divided(hf, "hidden_size", embed_dim, heads),
        hf.size("num_hidden_layers", most=MAX_LAYERS),
    )
    every = hf.size("global_attn_every_n_layers", default=3)
    listed = hf.kinds("layer_types", LAYER_KINDS, layers)
    kinds = listed or [LAYER_KINDS[i % every != 0] for i in range(layers)]
    rotations = rotary_by_kind(
        hf, head_dim, full=("global_rope_theta", 160_000.0), sliding=("local_rope_theta", 10_000.0)
    )
    window = hf.size("local_attention", default=128, least=2) // 2
    window = hf.size("sliding_window", default=window)
    activation(hf, "classifier_activation", default="gelu")
    return DecoderConfig(
        vocab_size=hf.size("vocab_size"),
        embed_dim=embed_dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        mlp_dim=hf.size("intermediate_size"),
        max_positions=hf.size("max_position_embeddings", default=8192),
        layer_rotary=tuple(rotations[kind] for kind in kinds),
        embed_norm=True,
        norm_eps=hf.number("norm_eps", default=1e-5, above=0),
        norm_bias=hf.flag("norm_bias", False),
        first_norm=False,
        activation=activation(hf, "hidden_activation", default="gelu"),
        gated=True,
        attn_scale=head_dim**-0.5,
        windows=windows_of(kinds, window),
        qkv_bias=hf.flag("attention_bias", False),
        attn_out_bias=hf.flag("attention_bias", False),
        mlp_bias=hf.flag("mlp_bias", False),
        head=head(hf, tied_by_default=True),
        head_bias=hf.flag("decoder_bias", True),
        head_transform=True,
        head_linear_bias=hf.flag("classifier_bias", False),
        embed_dropout=hf.share("embedding_dropout"),
        attn_dropout=hf.share("attention_dropout"),
        residual_dropout=hf.share("mlp_dropout"),
    )


FAMILY = Family(
    model_type="modernbert-decoder",
    read=_read,
    rules=RULES,
    base_prefix="model.",
    causal_lm="ModernBertDecoderForCausalLM",
    harmless=frozenset(("cls_token_id", "initializer_cutoff_factor", "classifier_dropout")),
)
