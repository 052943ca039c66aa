"""GPT-J: interleaved rotary positions, attention and MLP in parallel behind one norm."""

from sgpt_jax.decoder.config import DecoderConfig, RotaryConfig
from sgpt_jax.errors import InputError
from sgpt_jax.families.family import Family
from sgpt_jax.families.reading import ConfigReader, activation, head, shape
from sgpt_jax.families.tables import linear, norm, rules, table


def _read(hf: ConfigReader) -> DecoderConfig:
    sizes = shape(hf, embed=("n_embd",), layers=("n_layer",), heads=("n_head",))
    if head(hf, tied_by_default=False) == "tied":
        raise InputError("a GPT-J whose head is tied to its embedding is not supported: its head has a bias")
    return DecoderConfig(
        **sizes,
        mlp_dim=hf.size("n_inner", default=4 * sizes["embed_dim"]),
        max_positions=hf.size("n_positions"),
        rotary=RotaryConfig(
            dim=hf.size("rotary_dim", default=sizes["head_dim"], least=2, most=sizes["head_dim"]),
            interleaved=True,
        ),
        norm_eps=hf.number("layer_norm_epsilon", default=1e-5, above=0),
        parallel=True,
        shared_norm=True,
        activation=activation(hf, "activation_function", default="gelu_new"),
        attn_scale=sizes["head_dim"] ** -0.5,
        mlp_bias=True,
        head="untied",
        head_bias=True,
        embed_dropout=hf.share("embd_pdrop"),
        attn_dropout=hf.share("attn_pdrop"),
        residual_dropout=hf.share("resid_pdrop"),
    )


FAMILY = Family(
    model_type="gptj",
    read=_read,
    rules=rules(
        table("wte", "embed/tokens"),
        norm("h.{i}.ln_1", "blocks/{i}/norm1"),
        linear("h.{i}.attn.q_proj", "blocks/{i}/attn/q"),
        linear("h.{i}.attn.k_proj", "blocks/{i}/attn/k"),
        linear("h.{i}.attn.v_proj", "blocks/{i}/attn/v"),
        linear("h.{i}.attn.out_proj", "blocks/{i}/attn/o"),
        linear("h.{i}.mlp.fc_in", "blocks/{i}/mlp/up"),
        linear("h.{i}.mlp.fc_out", "blocks/{i}/mlp/down"),
        norm("ln_f", "final_norm"),
        linear("lm_head", "head"),
    ),
    base_prefix="transformer.",
    causal_lm="GPTJForCausalLM",
    # GPT-J-6B's folder has the first two; transformers reads none of them.
    harmless=frozenset(("rotary", "scale_attn_weights", "n_ctx")),
)
