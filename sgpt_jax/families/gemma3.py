"""Gemma 3, the text part: Gemma 2 with normed queries and keys, and a rotation for each kind of layer."""

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.family import Family, GgufArchitecture
from sgpt_jax.families.gemma import gemma_shape
from sgpt_jax.families.gemma2 import RULES, SANDWICH_PARTS
from sgpt_jax.families.reading import ConfigReader, optional_number, window_kinds, windows_of
from sgpt_jax.families.rotary import rotary_by_kind


def _read(hf: ConfigReader) -> DecoderConfig:
    pattern = hf.size("sliding_window_pattern", default=6)
    kinds = window_kinds(hf, pattern=pattern)
    bidirectional = hf.flag("use_bidirectional_attention", False)
    window = hf.size("sliding_window", default=4096)
    if bidirectional:
        window = window // 2 + 1  # half of it on either side (transformers' Gemma3TextConfig)
    rotations = rotary_by_kind(
        hf,
        hf.size("head_dim", default=256),
        full=("rope_theta", 1_000_000.0),
        sliding=("rope_local_base_freq", 10_000.0),
    )
    return gemma_shape(
        hf,
        max_positions=hf.size("max_position_embeddings", default=131_072),
        norm_at="both",
        bidirectional=bidirectional,
        attn_scale=hf.number("query_pre_attn_scalar", default=256, above=0) ** -0.5,
        logit_softcap=optional_number(hf, "final_logit_softcapping", None),
        qk_norm="head",
        windows=windows_of(kinds, window),
        rotary=None,
        layer_rotary=tuple(rotations[kind] for kind in kinds),
    )


FAMILY = Family(
    model_type="gemma3_text",
    read=_read,
    rules=RULES,
    base_prefix="model.",
    causal_lm="Gemma3ForCausalLM",
    harmless=frozenset(("_sliding_window_pattern",)),  # transformers writes it and does not read it
    gguf=GgufArchitecture(SANDWICH_PARTS, settings=lambda tensors, head_dim: {"head_dim": head_dim}),
)
