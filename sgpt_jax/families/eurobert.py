"""EuroBERT: Llama whose tokens see each other in both directions."""

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.family import Family
from sgpt_jax.families.llama import RULES, llama_shape
from sgpt_jax.families.reading import ConfigReader


def _read(hf: ConfigReader) -> DecoderConfig:
    return llama_shape(
        hf,
        attention_bias=hf.flag("attention_bias", False),
        mlp_bias=hf.flag("mlp_bias", False),
        norm_eps=hf.number("rms_norm_eps", default=1e-5, above=0),
        max_positions=hf.size("max_position_embeddings", default=8192),
        bidirectional=True,
    )


FAMILY = Family(
    model_type="eurobert",
    read=_read,
    rules=RULES,
    base_prefix="model.",
    causal_lm="EuroBertForMaskedLM",
    harmless=frozenset(("mask_token_id", "classifier_pooling")),
)
