"""Families of transformers that people may have and that are no `DecoderConfig`, each with what stands in the way."""

from __future__ import annotations

from collections.abc import Mapping

_EXPERTS = "it is a mixture of experts"
_RECURRENT = "most of its layers have a state that goes from left to right, in place of attention"
_ENCODER = "it is an encoder, and not a decoder"
_BOTH = "an encoder-decoder is no text decoder"
_DELTA = (
    "three of four layers are gated delta nets: a convolution and a state that goes from left to right, which is no "
    "softmax attention and which texts that share a row would see of each other"
)
_STREAMS = (
    "each layer gets an input of its own from the embedding (per-layer inputs), and layers differ in the width of "
    "their heads or share keys and values"
)

REASONS: Mapping[str, str] = {
    **dict.fromkeys(("qwen3_5_text", "qwen3_next"), _DELTA),
    "embedding_gemma2_text": (
        "each layer gets an input of its own from the embedding (per-layer inputs), every sixth has heads of another "
        "width and number, values are normed, and every layer's result is scaled: no other embedder needs any of these"
    ),
    **dict.fromkeys(("gemma3n_text", "gemma4_text", "gemma4_unified_text"), _STREAMS),
    **dict.fromkeys(("lfm2", "lfm3"), "most of its layers are short convolutions, in place of attention"),
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_5_moe_text", "olmoe", "flex_olmo"), _EXPERTS
    ),
    **dict.fromkeys(("granitemoe", "granitemoeshared", "phimoe", "gpt_oss", "llama4_text", "dbrx"), _EXPERTS),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "lfm2_moe", "glm4_moe", "minimax"), _EXPERTS),
    "granitemoehybrid": "its layers may be Mamba's, which have a state that goes from left to right",
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "falcon_h1", "jamba", "bamba", "rwkv"), _RECURRENT),
    **dict.fromkeys(("recurrent_gemma", "nemotron_h", "zamba", "zamba2", "xlstm", "olmo_hybrid"), _RECURRENT),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "modernbert", "mpnet", "distilbert"), _ENCODER),
    **dict.fromkeys(("electra", "deberta", "deberta-v2", "nomic_bert", "camembert", "albert"), _ENCODER),
    **dict.fromkeys(("t5", "mt5", "umt5", "bart", "t5gemma", "t5gemma2", "t5gemma2_text"), _BOTH),
}
