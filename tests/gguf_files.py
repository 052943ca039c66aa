"""Tiny random decoders as GGUF files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from decoders import BOS, BOS_ID, EOS, EOS_ID, VOCAB_SIZE, bpe, config, tensors
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFWriter,
    RopeScalingType,
    TokenType,
    get_tensor_name_map,
    quantize,
)


def write_gguf(
    variant: str,
    path: str | Path,
    *,
    dtype: str = "float32",
    bos: bool = False,
    fields: Mapping[str, Any] | None = None,
    more: Mapping[str, np.ndarray] | None = None,
    split: int = 0,
) -> Path:
    """Writes a variant with its tokenizer as a GGUF file, as llama.cpp's converter does.

    Rows of q and k are permuted for llama and mistral alone, llama3 frequencies become the tensor rope_freqs, norms and
    biases stay float32, Gemma's norms get the one that is added, a tied head is left out. Gemma's scale of the dot
    products is not in GGUF files, so that what differs from the width of a head goes into the queries.

    Args:
        variant: of llama, mistral (without a window), qwen2, qwen3, gemma, gemma2, gemma3 or phi3.
        path: the file; of a split one the first.
        dtype: of the matrices: float32, float16, or a quantisation of the gguf package.
        bos: `tokenizer.ggml.add_bos_token`.
        fields: further fields, whole names.
        more: further tensors.
        split: tensors in a part at the most; 0 writes one file.
    """
    settings = config(variant)
    kind = settings["model_type"]
    family = {"mistral": "llama", "gemma3_text": "gemma3"}.get(kind, kind)
    if family == "gemma3" and settings.get("use_bidirectional_attention"):
        family = "gemma-embedding"
    if settings.get("use_sliding_window") or (kind == "mistral" and settings["sliding_window"]):
        raise ValueError(f"no GGUF architecture for {variant}")
    heads, kv_heads = settings["num_attention_heads"], settings["num_key_value_heads"]
    head_dim = settings.get("head_dim") or settings["hidden_size"] // heads
    rope = settings["rope_parameters"]
    local = rope.get("sliding_attention")
    rope = rope.get("full_attention", rope)

    writer = GGUFWriter(path, family, split_max_tensors=split)
    writer.add_name(variant)
    writer.add_file_type(1 if dtype == "float16" else 0)
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if family == "llama":
        writer.add_vocab_size(VOCAB_SIZE)
        writer.add_rope_dimension_count(head_dim)
    if local is not None:
        writer.add_float32(f"{family}.rope.freq_base_swa", local["rope_theta"])
        writer.add_uint32(f"{family}.attention.sliding_window_pattern", settings["num_hidden_layers"])
    if settings.get("sliding_window"):
        writer.add_sliding_window(settings["sliding_window"])
    if settings.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(settings["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(settings["final_logit_softcapping"])
    if rope.get("partial_rotary_factor", 1) != 1:
        writer.add_rope_dimension_count(int(head_dim * rope["partial_rotary_factor"]))
    for key, value in (fields or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(key, value)
    if head_dim * heads != settings["hidden_size"]:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])

    tokens = [*bpe()[0], EOS, BOS, "[PAD382]", "[PAD383]"]
    kinds = [TokenType.NORMAL] * EOS_ID + [TokenType.CONTROL] * 2 + [TokenType.UNUSED] * 2
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in bpe()[1]])
    writer.add_bos_token_id(BOS_ID if bos else EOS_ID)
    writer.add_eos_token_id(EOS_ID)
    writer.add_unk_token_id(EOS_ID)
    writer.add_add_bos_token(bos)

    names = get_tensor_name_map(MODEL_ARCH[family.upper().replace("-", "_")], 99)
    narrower = (head_dim / settings.get("query_pre_attn_scalar", head_dim)) ** 0.5
    queries = "q_norm" if family in ("gemma3", "gemma-embedding") else "q_proj"
    for name, value in tensors(variant).items():
        if family.startswith("gemma") and "norm" in name:
            value = value + 1
        if family.startswith("gemma") and queries in name:
            value = value * np.float32(narrower)
        if family == "llama" and ".self_attn.q_proj." in name:
            value = _permuted(value, heads)
        if family == "llama" and ".self_attn.k_proj." in name:
            value = _permuted(value, kv_heads)
        gguf_name = names.get_name(name, (".weight", ".bias"))
        assert gguf_name, name
        if value.ndim != 2 or dtype in ("float32", "float16"):
            writer.add_tensor(
                gguf_name, value.astype(np.float16) if dtype == "float16" and value.ndim == 2 else value
            )
        else:
            quantisation = GGMLQuantizationType[dtype]
            kind_of = (
                GGMLQuantizationType.F32
                if value.shape[1] % GGML_QUANT_SIZES[quantisation][0]
                else quantisation
            )
            writer.add_tensor(gguf_name, quantize(value, kind_of), raw_dtype=kind_of)
    for name, value in (more or {}).items():
        writer.add_tensor(name, value)
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(rope, head_dim))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first = Path(path).with_name(f"{Path(path).stem}-00001-of-{len(writer.tensors):05d}.gguf")
    return first if split else Path(path)


def _permuted(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from halves to pairs: llama.cpp rotates neighbouring rows for the architecture llama."""
    pairs = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(value.shape))


def _llama3_factors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """What llama.cpp divides each rotary frequency by (float32 [head_dim / 2])."""
    lengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((rope["original_max_position_embeddings"] / lengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)
