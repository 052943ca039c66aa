"""Qwen 1.5, 2 and 2.5: Llama with biases on queries, keys and values, and windows in some layers if at all."""

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.family import Family, GgufArchitecture
from sgpt_jax.families.llama import GGUF_PARTS, RULES, as_llama, llama_shape
from sgpt_jax.families.reading import MAX_LAYERS, ConfigReader, windows_by_kind


def qwen_windows(hf: ConfigReader) -> tuple[int | None, ...]:
    """The windows of Qwen2 and Qwen3: from a layer on, and only where they are turned on."""
    layers = hf.size("num_hidden_layers", most=MAX_LAYERS)
    first = hf.size("max_window_layers", default=28, least=0)
    return windows_by_kind(hf, layers, first=first if hf.flag("use_sliding_window", False) else None)


def _read(hf: ConfigReader) -> DecoderConfig:
    return llama_shape(hf, qkv_bias=True, windows=qwen_windows(hf))


FAMILY = Family(
    model_type="qwen2",
    read=_read,
    rules=RULES,
    base_prefix="model.",
    causal_lm="Qwen2ForCausalLM",
    exports=as_llama,
    gguf=GgufArchitecture(GGUF_PARTS),
)
