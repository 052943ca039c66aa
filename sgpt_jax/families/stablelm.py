"""StableLM 2: Llama with layer norms, of which a part of every head rotates."""

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.errors import InputError
from sgpt_jax.families.family import Family
from sgpt_jax.families.llama import RULES, llama_shape
from sgpt_jax.families.reading import ConfigReader
from sgpt_jax.families.rotary import rotary


def _read(hf: ConfigReader) -> DecoderConfig:
    if hf.flag("qk_layernorm", False):
        raise InputError(f"{hf.what}: qk_layernorm (a norm of its own for every head) is not supported")
    parallel, bias = hf.flag("use_parallel_residual", False), hf.flag("use_qkv_bias", False)
    return llama_shape(
        hf,
        qkv_bias=bias,
        rotary=rotary(hf, hf.size("hidden_size") // hf.size("num_attention_heads"), share=0.25),
        max_positions=hf.size("max_position_embeddings", default=4096),
        norm="layer",
        norm_eps=hf.number("layer_norm_eps", default=1e-5, above=0),
        parallel=parallel,
        shared_norm=parallel,
        residual_dropout=hf.share("hidden_dropout"),
    )


FAMILY = Family(
    model_type="stablelm", read=_read, rules=RULES, base_prefix="model.", causal_lm="StableLmForCausalLM"
)
