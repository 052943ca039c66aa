"""GLM-4-0414: GLM-4 with norms on both sides of every sub-layer."""

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.family import Family
from sgpt_jax.families.glm import GLM_CORE, glm_shape
from sgpt_jax.families.reading import ConfigReader
from sgpt_jax.families.tables import norm, rules

RULES = rules(
    GLM_CORE,
    norm("layers.{i}.post_self_attn_layernorm", "blocks/{i}/out_norm1"),
    norm("layers.{i}.post_mlp_layernorm", "blocks/{i}/out_norm2"),
)


def _read(hf: ConfigReader) -> DecoderConfig:
    return glm_shape(hf, norm_at="both")


FAMILY = Family(model_type="glm4", read=_read, rules=RULES, base_prefix="model.", causal_lm="Glm4ForCausalLM")
