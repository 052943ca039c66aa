"""SmolLM3: Llama of which every fourth layer does not rotate."""

from collections.abc import Iterable
from typing import Any

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.family import Family, HfConfig
from sgpt_jax.families.llama import RULES, llama_shape
from sgpt_jax.families.reading import LAYER_KINDS, ConfigReader, divided, windows_of
from sgpt_jax.families.rotary import rotary


def _read(hf: ConfigReader) -> DecoderConfig:
    layers, heads = hf.size("num_hidden_layers"), hf.size("num_attention_heads")
    head_dim = hf.optional_size("head_dim") or divided(hf, "hidden_size", hf.size("hidden_size"), heads)
    interval = hf.size("no_rope_layer_interval", default=4)
    rotates = hf.switches("no_rope_layers", layers) or [
        (layer + 1) % interval != 0 for layer in range(layers)
    ]
    window, slides = hf.optional_size("sliding_window"), hf.flag("use_sliding_window", False)
    kinds = hf.kinds("layer_types", LAYER_KINDS, layers)
    if not kinds:
        # transformers asks for use_sliding_window where it works the kinds out, not where they are stated.
        kinds = [LAYER_KINDS[slides and not rotate] for rotate in rotates]
    settings = rotary(hf, head_dim)
    return llama_shape(
        hf,
        attention_bias=hf.flag("attention_bias", False),
        mlp_bias=hf.flag("mlp_bias", False),
        num_kv_heads=hf.size("num_key_value_heads", default=4),
        max_positions=hf.size("max_position_embeddings", default=32768),
        head="tied" if hf.flag("tie_word_embeddings", True) else "untied",
        windows=windows_of(kinds, window),
        rotary=None,
        layer_rotary=tuple(settings if rotate else None for rotate in rotates),
    )


def _exports(hf: HfConfig, config: DecoderConfig) -> Iterable[dict[str, Any]]:
    yield dict(hf) | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


FAMILY = Family(
    model_type="smollm3",
    read=_read,
    rules=RULES,
    base_prefix="model.",
    causal_lm="SmolLM3ForCausalLM",
    exports=_exports,
)
