"""Mistral: Llama with a window in all layers."""

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.family import Family
from sgpt_jax.families.llama import RULES, as_llama, llama_shape
from sgpt_jax.families.reading import MAX_LAYERS, ConfigReader, window


def _read(hf: ConfigReader) -> DecoderConfig:
    size = window(hf)
    layers = hf.size("num_hidden_layers", most=MAX_LAYERS)
    return llama_shape(hf, windows=(size,) * layers if size else ())


FAMILY = Family(
    model_type="mistral",
    read=_read,
    rules=RULES,
    base_prefix="model.",
    causal_lm="MistralForCausalLM",
    exports=as_llama,
)
