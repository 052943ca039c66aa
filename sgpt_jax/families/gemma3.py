"""Gemma 3, the text part: Gemma 2 with normed queries and keys, and rotary settings by kind of layer."""

from typing import Any

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.family import Family, GgufArchitecture, GgufFacts
from sgpt_jax.families.gemma import gemma_shape, gguf_settings
from sgpt_jax.families.gemma2 import RULES, SANDWICH_PARTS, attention_scalar
from sgpt_jax.families.reading import ConfigReader, optional_number, window_kinds, windows_of
from sgpt_jax.families.rotary import rotary_by_kind

# What transformers' Gemma3TextConfig has where a config says nothing, as those of the 4B, 12B and 27B models do not.
_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def _read(hf: ConfigReader) -> DecoderConfig:
    hf.values = _DEFAULTS | {key: value for key, value in hf.values.items() if value is not None}
    pattern = hf.size("sliding_window_pattern", default=6)
    kinds = window_kinds(hf, pattern=pattern)
    bidirectional = hf.flag("use_bidirectional_attention", False)
    window = hf.size("sliding_window", default=4096)
    if bidirectional:
        window = window // 2 + 1  # half of it to each side, as in transformers' Gemma3TextConfig
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


def _gguf_settings(facts: GgufFacts) -> dict[str, Any]:
    """GGUF files scale the rotation of full attention alone, and have the window that config.json states."""
    metadata = facts.metadata
    local = metadata.number(facts.field("rope.freq_base_swa"), default=10_000.0, above=0)
    pattern = metadata.size(facts.field("attention.sliding_window_pattern"), default=6)
    layers = range(1, facts.config["num_hidden_layers"] + 1)
    found = gguf_settings(facts) | {
        "sliding_window": metadata.size(facts.field("attention.sliding_window"), default=1024),
        "layer_types": ["sliding_attention" if layer % pattern else "full_attention" for layer in layers],
        "query_pre_attn_scalar": attention_scalar(facts, layers_of_27b=62),
        "rope_parameters": {
            "full_attention": facts.config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }
    cap = facts.field("final_logit_softcapping")
    if metadata.get(cap)[1] is not None:
        found["final_logit_softcapping"] = metadata.number(cap, above=0)
    return found | ({"use_bidirectional_attention": True} if facts.name == "gemma-embedding" else {})


FAMILY = Family(
    model_type="gemma3_text",
    read=_read,
    rules=RULES,
    base_prefix="model.",
    causal_lm="Gemma3ForCausalLM",
    harmless=frozenset(("_sliding_window_pattern",)),  # transformers writes it and does not read it
    gguf=GgufArchitecture(
        SANDWICH_PARTS, settings=_gguf_settings, names=("gemma3", "gemma-embedding"), one_added=True
    ),
)
