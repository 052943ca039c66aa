"""Decoder families: how each Hugging Face config reads as a `DecoderConfig`, and which weight table it uses."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from sgpt_jax.decoder.config import Activation, DecoderConfig, RotaryConfig
from sgpt_jax.errors import InputError
from sgpt_jax.families import tables

HfConfig = Mapping[str, Any]

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """What the project knows of one `model_type`."""

    read: Callable[[HfConfig], DecoderConfig]
    rules: tuple[tables.Rule, ...]
    base_prefix: str
    """What stands before the tensor names where a language-model head is saved as well."""
    causal_lm: str
    """The transformers class with a language-model head; without one the class ends in Model."""
    other_prefixes: tuple[str, ...] = ()
    """Further prefixes that published checkpoints have."""
    renames: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Other spellings of a tensor name."""


# Attention masks and rotary frequencies that older checkpoints hold as tensors although they are constants.
BUFFERS = re.compile(
    r"(h|layers)\.\d+\.(attn|attn\.attention|attention)\.(bias|masked_bias)"
    r"|(.*\.)?rotary_emb\.inv_freq"
)


def _activation(name: str) -> Activation:
    if name not in _ACTIVATIONS:
        raise InputError(f"activation {name!r} is not supported; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _head(hf: HfConfig, *, tied_by_default: bool) -> Literal["tied", "untied"]:
    tied = hf.get("tie_word_embeddings")
    return "tied" if (tied_by_default if tied is None else tied) else "untied"


def _rotary(hf: HfConfig, head_dim: int) -> RotaryConfig:
    """Reads both spellings: `rope_parameters` of transformers 5, and the separate keys before it."""
    rope = dict(hf.get("rope_scaling") or {}) | dict(hf.get("rope_parameters") or {})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    share = next(
        (
            value
            for value in (
                rope.get("partial_rotary_factor"),
                hf.get("partial_rotary_factor"),
                hf.get("rotary_pct"),
            )
            if value is not None
        ),
        1.0,
    )
    base = rope.get("rope_theta") or hf.get("rope_theta") or hf.get("rotary_emb_base") or 10_000.0
    plain = RotaryConfig(dim=int(head_dim * share), base=float(base))
    if kind == "default":
        return plain
    if kind == "linear":
        return dataclasses.replace(plain, scaling="linear", factor=float(rope["factor"]))
    if kind == "llama3":
        return dataclasses.replace(
            plain,
            scaling="llama3",
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_positions=int(rope["original_max_position_embeddings"]),
        )
    raise InputError(f"rotary scaling {kind!r} is not supported; known: default, linear, llama3")


def _gpt2(hf: HfConfig) -> DecoderConfig:
    embed_dim, heads = hf["n_embd"], hf["n_head"]
    if hf.get("add_cross_attention"):
        raise InputError("a GPT-2 with cross-attention is half of an encoder-decoder, not a text embedder")
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        embed_dim=embed_dim,
        num_layers=hf["n_layer"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=embed_dim // heads,
        mlp_dim=hf.get("n_inner") or 4 * embed_dim,
        max_positions=hf["n_positions"],
        positions="learned",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        activation=_activation(hf.get("activation_function", "gelu_new")),
        attn_scale=(embed_dim // heads) ** -0.5 if hf.get("scale_attn_weights", True) else 1.0,
        scale_by_layer=bool(hf.get("scale_attn_by_inverse_layer_idx", False)),
        qkv_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
        head=_head(hf, tied_by_default=True),
        embed_dropout=hf.get("embd_pdrop", 0.1),
        attn_dropout=hf.get("attn_pdrop", 0.1),
        residual_dropout=hf.get("resid_pdrop", 0.1),
    )


def _gpt_neo(hf: HfConfig) -> DecoderConfig:
    embed_dim, heads = hf["hidden_size"], hf["num_heads"]
    kinds = hf.get("attention_layers")
    if not kinds:
        kinds = [kind for group, times in hf["attention_types"] for _ in range(times) for kind in group]
    window = hf.get("window_size", 256)
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        embed_dim=embed_dim,
        num_layers=hf["num_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=embed_dim // heads,
        mlp_dim=hf.get("intermediate_size") or 4 * embed_dim,
        max_positions=hf["max_position_embeddings"],
        positions="learned",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        activation=_activation(hf.get("activation_function", "gelu_new")),
        attn_scale=1.0,
        windows=tuple(window if kind == "local" else None for kind in kinds),
        attn_out_bias=True,
        mlp_bias=True,
        head=_head(hf, tied_by_default=True),
        embed_dropout=hf.get("embed_dropout", 0.0),
        attn_dropout=hf.get("attention_dropout", 0.0),
        residual_dropout=hf.get("resid_dropout", 0.0),
    )


def _gptj(hf: HfConfig) -> DecoderConfig:
    embed_dim, heads = hf["n_embd"], hf["n_head"]
    head_dim = embed_dim // heads
    head = _head(hf, tied_by_default=False)
    if head == "tied":
        raise InputError("a GPT-J whose head is tied to its embedding is not supported: its head has a bias")
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        embed_dim=embed_dim,
        num_layers=hf["n_layer"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        mlp_dim=hf.get("n_inner") or 4 * embed_dim,
        max_positions=hf["n_positions"],
        rotary=RotaryConfig(dim=hf.get("rotary_dim") or head_dim, interleaved=True),
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        parallel=True,
        shared_norm=True,
        activation=_activation(hf.get("activation_function", "gelu_new")),
        attn_scale=head_dim**-0.5,
        mlp_bias=True,
        head=head,
        head_bias=True,
        embed_dropout=hf.get("embd_pdrop", 0.0),
        attn_dropout=hf.get("attn_pdrop", 0.0),
        residual_dropout=hf.get("resid_pdrop", 0.0),
    )


def _gpt_neox(hf: HfConfig) -> DecoderConfig:
    embed_dim, heads = hf["hidden_size"], hf["num_attention_heads"]
    head_dim = embed_dim // heads
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        embed_dim=embed_dim,
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        mlp_dim=hf["intermediate_size"],
        max_positions=hf["max_position_embeddings"],
        rotary=_rotary({"rotary_pct": 0.25} | dict(hf), head_dim),
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        parallel=hf.get("use_parallel_residual", True),
        activation=_activation(hf.get("hidden_act", "gelu")),
        attn_scale=head_dim**-0.5,
        qkv_bias=hf.get("attention_bias", True),
        attn_out_bias=hf.get("attention_bias", True),
        mlp_bias=True,
        head=_head(hf, tied_by_default=False),
        embed_dropout=hf.get("hidden_dropout", 0.0),
        attn_dropout=hf.get("attention_dropout", 0.0),
        residual_dropout=hf.get("hidden_dropout", 0.0),
    )


def _bloom(hf: HfConfig) -> DecoderConfig:
    embed_dim = hf.get("hidden_size") or hf["n_embed"]
    heads = hf.get("n_head") or hf["num_attention_heads"]
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        embed_dim=embed_dim,
        num_layers=hf.get("n_layer") or hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=embed_dim // heads,
        mlp_dim=4 * embed_dim,
        max_positions=None,
        positions="alibi",
        embed_norm=True,
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        residual_from_norm=bool(hf.get("apply_residual_connection_post_layernorm", False)),
        activation="gelu_tanh",
        attn_scale=(embed_dim // heads) ** -0.5,
        qkv_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
        head=_head(hf, tied_by_default=True),
        attn_dropout=hf.get("attention_dropout", 0.0),
        residual_dropout=hf.get("hidden_dropout", 0.0),
    )


def _opt(hf: HfConfig) -> DecoderConfig:
    embed_dim, heads = hf["hidden_size"], hf["num_attention_heads"]
    if not hf.get("layer_norm_elementwise_affine", True):
        raise InputError("an OPT whose norms have no weights is not supported")
    token_dim = hf.get("word_embed_proj_dim") or embed_dim
    pre_norm = hf.get("do_layer_norm_before", True)
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        embed_dim=embed_dim,
        token_dim=token_dim if token_dim != embed_dim else None,
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=embed_dim // heads,
        mlp_dim=hf["ffn_dim"],
        max_positions=hf["max_position_embeddings"],
        positions="learned",
        position_offset=2,
        post_norm=not pre_norm,
        final_norm=pre_norm and not hf.get("_remove_final_layer_norm", False),
        activation=_activation(hf.get("activation_function", "relu")),
        attn_scale=(embed_dim // heads) ** -0.5,
        qkv_bias=hf.get("enable_bias", True),
        attn_out_bias=hf.get("enable_bias", True),
        mlp_bias=hf.get("enable_bias", True),
        head=_head(hf, tied_by_default=True),
        attn_dropout=hf.get("attention_dropout", 0.0),
        residual_dropout=hf.get("dropout", 0.1),
    )


def _llama(hf: HfConfig) -> DecoderConfig:
    """Llama, and the shape that Mistral, Qwen2 and Qwen3 vary."""
    embed_dim, heads = hf["hidden_size"], hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or embed_dim // heads
    attention_bias = bool(hf.get("attention_bias", False))
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        embed_dim=embed_dim,
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        mlp_dim=hf["intermediate_size"],
        max_positions=hf.get("max_position_embeddings", 2048),
        rotary=_rotary(hf, head_dim),
        norm="rms",
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        activation=_activation(hf.get("hidden_act", "silu")),
        gated=True,
        attn_scale=head_dim**-0.5,
        qkv_bias=attention_bias,
        attn_out_bias=attention_bias,
        mlp_bias=bool(hf.get("mlp_bias", False)),
        head=_head(hf, tied_by_default=False),
        attn_dropout=hf.get("attention_dropout", 0.0),
    )


def _mistral(hf: HfConfig) -> DecoderConfig:
    window = hf.get("sliding_window", 4096)
    config = _llama({**hf, "attention_bias": False, "mlp_bias": False})
    return dataclasses.replace(config, windows=(window,) * config.num_layers if window else ())


def _qwen_windows(hf: HfConfig, layers: int) -> tuple[int | None, ...]:
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window", False) else None
    if window is None:
        return ()
    kinds = hf.get("layer_types")
    if not kinds:
        first = hf.get("max_window_layers", 28)
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()


def _qwen2(hf: HfConfig) -> DecoderConfig:
    config = _llama({**hf, "attention_bias": False, "mlp_bias": False})
    return dataclasses.replace(config, qkv_bias=True, windows=_qwen_windows(hf, config.num_layers))


def _qwen3(hf: HfConfig) -> DecoderConfig:
    config = _llama({**hf, "head_dim": hf.get("head_dim", 128), "mlp_bias": False})
    return dataclasses.replace(config, qk_norm=True, windows=_qwen_windows(hf, config.num_layers))


FAMILIES: dict[str, Family] = {
    "gpt2": Family(_gpt2, tables.GPT2, "transformer.", "GPT2LMHeadModel"),
    "gpt_neo": Family(_gpt_neo, tables.GPT_NEO, "transformer.", "GPTNeoForCausalLM"),
    "gptj": Family(_gptj, tables.GPTJ, "transformer.", "GPTJForCausalLM"),
    "gpt_neox": Family(
        _gpt_neox, tables.GPT_NEOX, "gpt_neox.", "GPTNeoXForCausalLM", renames={"lm_head.": "embed_out."}
    ),
    "bloom": Family(_bloom, tables.BLOOM, "transformer.", "BloomForCausalLM"),
    "opt": Family(_opt, tables.OPT, "model.decoder.", "OPTForCausalLM", other_prefixes=("decoder.",)),
    "llama": Family(_llama, tables.LLAMA, "model.", "LlamaForCausalLM"),
    "mistral": Family(_mistral, tables.LLAMA, "model.", "MistralForCausalLM"),
    "qwen2": Family(_qwen2, tables.LLAMA, "model.", "Qwen2ForCausalLM"),
    "qwen3": Family(_qwen3, tables.LLAMA, "model.", "Qwen3ForCausalLM"),
}


def family_of(hf: HfConfig) -> Family:
    """The family of a Hugging Face config.

    Raises:
        InputError: for a `model_type` that is not supported.
    """
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        raise InputError(f"model_type {kind!r} is not supported; known: {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def read_config(hf: HfConfig) -> DecoderConfig:
    """A Hugging Face config as a `DecoderConfig`.

    Raises:
        InputError: for a family or a feature that is not supported, and for a missing or impossible value.
    """
    try:
        return family_of(hf).read(hf)
    except KeyError as missing:
        raise InputError(f"config.json of a {hf.get('model_type')} has no {missing}") from None
    except InputError:
        raise
    except ValueError as problem:
        raise InputError(f"config.json of a {hf.get('model_type')}: {problem}") from None


def export_config(hf: HfConfig, config: DecoderConfig) -> dict[str, Any]:
    """A Hugging Face config that describes the decoder, based on the one it was read from.

    Biases that were added to a bias-free decoder need a config that can say so: Llama's `attention_bias` and
    `mlp_bias`. A Mistral without a window or a Qwen2 is a Llama in all but name, and is exported as one.

    Raises:
        InputError: when no config of transformers describes the decoder.
    """
    same = dict(hf)
    if hf["model_type"] in ("llama", "qwen3"):
        same["attention_bias"] = config.qkv_bias
    if hf["model_type"] == "llama":
        same["mlp_bias"] = config.mlp_bias
    as_llama = {
        key: value for key, value in hf.items() if key not in ("sliding_window", "use_sliding_window")
    }
    as_llama |= {"model_type": "llama", "attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    as_llama.pop("max_window_layers", None)
    as_llama.pop("layer_types", None)
    candidates = [same] + ([as_llama] if hf["model_type"] in ("mistral", "qwen2") else [])
    for candidate in candidates:
        described = read_config(candidate)
        if dataclasses.replace(described, head=config.head) == config:
            return candidate
    raise InputError(
        f"transformers has no {hf['model_type']} config with these biases (attention inputs: {config.qkv_bias}, "
        f"attention output: {config.attn_out_bias}, MLP: {config.mlp_bias}), so the model cannot be exported; "
        "the bias set by itself can be saved and applied"
    )
