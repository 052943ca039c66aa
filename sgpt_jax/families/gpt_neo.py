"""GPT-Neo: learned positions, every second layer with a window, unscaled attention."""

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.family import Family
from sgpt_jax.families.reading import ConfigReader, activation, head, shape
from sgpt_jax.families.tables import linear, norm, rules, table


def _read(hf: ConfigReader) -> DecoderConfig:
    sizes = shape(hf, embed=("hidden_size",), layers=("num_layers",), heads=("num_heads",))
    window = hf.size("window_size", default=256)
    return DecoderConfig(
        **sizes,
        mlp_dim=hf.size("intermediate_size", default=4 * sizes["embed_dim"]),
        max_positions=hf.size("max_position_embeddings"),
        positions="learned",
        norm_eps=hf.number("layer_norm_epsilon", default=1e-5, above=0),
        activation=activation(hf, "activation_function", default="gelu_new"),
        attn_scale=1.0,
        windows=tuple(window if kind == "local" else None for kind in _kinds(hf, sizes["num_layers"])),
        attn_out_bias=True,
        mlp_bias=True,
        head=head(hf, tied_by_default=True),
        embed_dropout=hf.share("embed_dropout"),
        attn_dropout=hf.share("attention_dropout"),
        residual_dropout=hf.share("resid_dropout"),
    )


def _kinds(hf: ConfigReader, layers: int) -> list[str]:
    """ "global" or "local" for each layer: a list, or groups of kinds with how often they are repeated."""
    _, groups = hf.get("attention_types")
    kinds = hf.kinds("attention_layers", ("global", "local"), layers)
    if kinds is not None:
        return kinds
    expected = f"a list of [kinds, times], {layers} layers in all"
    if not isinstance(groups, list):
        raise hf.wrong("attention_types", groups, expected)
    kinds = []
    for group in groups:
        match group:
            case [list() as names, int() as times] if 0 < times * len(names) <= layers - len(kinds):
                kinds += names * times
            case _:
                raise hf.wrong("attention_types", groups, expected)
    if len(kinds) != layers or any(kind not in ("global", "local") for kind in kinds):
        raise hf.wrong("attention_types", groups, expected)
    return kinds


FAMILY = Family(
    model_type="gpt_neo",
    read=_read,
    rules=rules(
        table("wte", "embed/tokens"),
        table("wpe", "embed/positions"),
        norm("h.{i}.ln_1", "blocks/{i}/norm1"),
        linear("h.{i}.attn.attention.q_proj", "blocks/{i}/attn/q"),
        linear("h.{i}.attn.attention.k_proj", "blocks/{i}/attn/k"),
        linear("h.{i}.attn.attention.v_proj", "blocks/{i}/attn/v"),
        linear("h.{i}.attn.attention.out_proj", "blocks/{i}/attn/o"),
        norm("h.{i}.ln_2", "blocks/{i}/norm2"),
        linear("h.{i}.mlp.c_fc", "blocks/{i}/mlp/up"),
        linear("h.{i}.mlp.c_proj", "blocks/{i}/mlp/down"),
        norm("ln_f", "final_norm"),
        linear("lm_head", "head"),
    ),
    base_prefix="transformer.",
    causal_lm="GPTNeoForCausalLM",
    mask_by_config=False,
)
