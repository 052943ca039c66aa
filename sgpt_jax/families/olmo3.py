"""OLMo 3: OLMo 2 with windows on three of four layers; rotations are stretched on the others alone."""

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.family import Family
from sgpt_jax.families.olmo2 import RULES, olmo2_shape
from sgpt_jax.families.reading import ConfigReader, divided, window, window_kinds, windows_of
from sgpt_jax.families.rotary import rotary_by_kind


def _read(hf: ConfigReader) -> DecoderConfig:
    embed_dim, heads = hf.size("hidden_size"), hf.size("num_attention_heads")
    head_dim = hf.optional_size("head_dim") or divided(hf, "hidden_size", embed_dim, heads)
    base, kinds = 500_000.0, window_kinds(hf, pattern=4)
    rotations = rotary_by_kind(hf, head_dim, full=("rope_theta", base), sliding=(None, base))
    return olmo2_shape(
        hf,
        windows=windows_of(kinds, window(hf)),
        rotary=None,
        layer_rotary=tuple(rotations[kind] for kind in kinds),
    )


FAMILY = Family(
    model_type="olmo3", read=_read, rules=RULES, base_prefix="model.", causal_lm="Olmo3ForCausalLM"
)
