"""Ministral 3: Mistral with yarn rotation, and queries that grow with their position."""

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.family import Family
from sgpt_jax.families.llama import RULES, llama_shape
from sgpt_jax.families.reading import ConfigReader
from sgpt_jax.families.rotary import rotary

_ROTATION = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def _read(hf: ConfigReader) -> DecoderConfig:
    window, head_dim = hf.optional_size("sliding_window"), hf.size("head_dim", default=128)
    has_rotation = hf.get("rope_parameters", "rope_scaling")[1] is not None
    source = hf if has_rotation else ConfigReader({**hf.values, "rope_parameters": _ROTATION}, hf.what)
    settings = rotary(source, head_dim)
    rope = source.section("rope_parameters")
    rope = rope if rope.values else source.section("rope_scaling")
    beta = rope.number("llama_4_scaling_beta", default=0.0, least=0)
    return llama_shape(
        hf,
        head_dim=128,
        norm_eps=hf.number("rms_norm_eps", default=1e-5, above=0),
        max_positions=hf.size("max_position_embeddings", default=262_144),
        windows=(window,) * hf.size("num_hidden_layers") if window else (),
        rotary=settings,
        query_scaling=(beta, settings.original_max_positions) if beta else None,
    )


FAMILY = Family(
    model_type="ministral3",
    read=_read,
    rules=RULES,
    base_prefix="model.",
    causal_lm="Ministral3ForCausalLM",
)
