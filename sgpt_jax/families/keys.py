"""The keys of a config.json that no family reads: which change nothing, and which are refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from sgpt_jax.errors import InputError
from sgpt_jax.families.reading import ConfigReader, short

# Keys that transformers and others write into any config, and that no hidden state depends on.
HARMLESS = frozenset(
    (
        *("model_type", "architectures", "transformers_version", "_name_or_path", "name_or_path", "license"),
        *("dtype", "torch_dtype", "use_bfloat16", "tokenizer_class", "processor_class", "torchscript"),
        *("use_cache", "output_hidden_states", "output_attentions", "return_dict", "_commit_hash"),
        *(
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "sep_token_id",
            "unk_token_id",
            "decoder_start_token_id",
        ),
        *("initializer_range", "init_std", "initializer_factor", "pretraining_tp", "gradient_checkpointing"),
        *(
            "_attn_implementation",
            "attn_implementation",
            "_attn_implementation_autoset",
            "_flash_attn_2_enabled",
        ),
        *(
            "use_flash_attn",
            "use_flash_attention_2",
            "attn_config_flash",
            "tf_legacy_loss",
            "chunk_size_feed_forward",
        ),
        # heads on top of the decoder, whose own readers take what they need
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "classifier_dropout"),
        *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
        *("summary_first_dropout", "sentence_transformers", "sbert_ce_default_activation_function"),
        # text generation
        *("task_specific_params", "prefix", "max_length", "min_length", "do_sample", "early_stopping"),
        *("num_beams", "num_beam_groups", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty"),
        *("length_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "diversity_penalty"),
        *("num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id"),
        *("forced_eos_token_id", "remove_invalid_values", "begin_suppress_tokens", "cache_implementation"),
        *("exponential_decay_length_penalty", "encoder_no_repeat_ngram_size"),
        # others
        *("is_decoder", "pruned_heads", "tie_encoder_decoder", "cross_attention_hidden_size"),
        *("unsloth_version", "unsloth_fixed"),
        "run",  # the configuration of a training run, which `python -m train` adds
    )
)

# Keys that change the result and are not supported -> (values that are harmless all the same, message for any other).
REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "is_causal": ((True,), "bidirectional attention is not supported in this family"),
    "use_bidirectional_attention": (
        (False,),
        "transformers gives this no effect in this family; say is_causal false for bidirectional attention",
    ),
    "bidirectional": (
        (False,),
        "this spelling is not known; say is_causal false for bidirectional attention",
    ),
    "is_encoder_decoder": ((False,), "an encoder-decoder is no text decoder"),
    "add_cross_attention": ((False,), "a decoder with cross-attention is half of an encoder-decoder"),
    "attn_logit_softcapping": ((), "soft-capped attention scores are not supported in this family"),
    "final_logit_softcapping": ((), "soft-capped logits are not supported in this family"),
    "clip_qkv": ((), "clipped queries, keys and values are not supported in this family"),
    "use_qk_norm": ((False,), "normed queries and keys are not supported in this family"),
    "qk_layernorm": ((False,), "normed queries and keys are not supported in this family"),
    "embedding_multiplier": ((1,), "scaled embeddings are not supported in this family"),
    "residual_multiplier": ((1,), "scaled residual branches are not supported in this family"),
    "attention_multiplier": ((), "an attention scale of its own is not supported in this family"),
    "query_pre_attn_scalar": ((), "an attention scale of its own is not supported in this family"),
    "logits_scaling": ((1,), "scaled logits are not supported in this family"),
    "logit_scale": ((1,), "scaled logits are not supported in this family"),
    "no_rope_layers": ((), "layers without rotary positions are not supported in this family"),
    "rope_local_base_freq": ((), "rotary settings by layer are not supported in this family"),
    "use_mrope": ((False,), "multimodal rotary positions are not supported"),
    "alibi": ((False,), "ALiBi is not supported in this family"),
    "num_experts": ((0, 1), "mixtures of experts are not supported"),
    "num_local_experts": ((0, 1), "mixtures of experts are not supported"),
    "n_routed_experts": ((0,), "mixtures of experts are not supported"),
    "text_config": (({},), "a multimodal model is not supported"),
    "vision_config": (({},), "a multimodal model is not supported"),
}


def check_untaken(hf: ConfigReader, harmless: Collection[str], own_code: Collection[str]) -> None:
    """Checks the keys that a family did not read, and warns of those that nobody knows (one line for all).

    Args:
        hf: the config after it was read.
        harmless: further keys that change nothing, in this family.
        own_code: values of `auto_map` whose classes compute what transformers' own do.

    Raises:
        InputError: a key changes the result and is not supported.
    """
    unknown = []
    for key, value in hf.untaken():
        if key == "auto_map":
            _check_code(hf, value, own_code)
        elif key == "quantization_config":
            _check_quantization(hf, value)
        elif key in REFUSED:
            neutral, reason = REFUSED[key]
            if value is not None and value not in neutral:
                raise InputError(f"{hf.what}: {key} is {short(value)}: {reason}")
        elif key not in HARMLESS and key not in harmless and value:
            unknown.append(f"{key} ({short(value)})")
    if unknown:
        warnings.warn(f"{hf.what}: ignored what is not known here: {', '.join(unknown)}", stacklevel=3)


def _check_code(hf: ConfigReader, value: Any, known: Collection[str]) -> None:
    if not value:
        return
    classes = value.values() if isinstance(value, dict) else [value]
    # A class of another repository is named repository--class.
    others = [str(name) for name in classes if str(name).rpartition("--")[2] not in known]
    if others:
        raise InputError(
            f"{hf.what}: auto_map names code of its own ({short(', '.join(others))}), which is never run; it may "
            "compute something else than the decoder of this name (gte-Qwen2's and GritLM's attention is "
            "bidirectional). If the mask is all that it may change, say which: --bidirectional or --no-bidirectional"
        )


def _check_quantization(hf: ConfigReader, value: Any) -> None:
    if not value:
        return
    method = value.get("quant_method") if isinstance(value, dict) else None
    if (
        method is None
        and isinstance(value, dict)
        and (value.get("load_in_8bit") or value.get("load_in_4bit"))
    ):
        method = "bitsandbytes"
    raise InputError(
        f"{hf.what}: the weights are quantised ({method or short(value)}), which is not supported; "
        "take the float16 or bfloat16 weights, or a GGUF file"
    )
