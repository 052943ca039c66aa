"""Command R7B and A: Command R with windows on three of four layers; the others do not rotate."""

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.cohere import cohere_shape
from sgpt_jax.families.family import Family
from sgpt_jax.families.llama import RULES
from sgpt_jax.families.reading import ConfigReader, window, window_kinds, windows_of


def _read(hf: ConfigReader) -> DecoderConfig:
    pattern = hf.size("sliding_window_pattern", default=4)
    plain = cohere_shape(hf)
    kinds = window_kinds(hf, pattern=pattern)
    return cohere_shape(
        hf,
        windows=windows_of(window_kinds(hf, pattern=pattern), window(hf)),
        rotary=None,
        layer_rotary=tuple(plain.rotary if kind == "sliding_attention" else None for kind in kinds),
    )


FAMILY = Family(
    model_type="cohere2",
    read=_read,
    rules=RULES,
    base_prefix="model.",
    causal_lm="Cohere2ForCausalLM",
    harmless=frozenset(("head_dim", "_sliding_window_pattern")),
)
