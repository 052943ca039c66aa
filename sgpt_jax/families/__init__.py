"""Decoder families: how each Hugging Face config reads as a `DecoderConfig`, and where its tensors go.

A family is one file here: its config reader, its weight table, and how it is exported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.errors import InputError
from sgpt_jax.families import (
    bloom,
    cohere,
    cohere2,
    eurobert,
    falcon,
    gemma,
    gemma2,
    gemma3,
    glm,
    glm4,
    gpt2,
    gpt_neo,
    gpt_neox,
    gptj,
    granite,
    llama,
    ministral3,
    mistral,
    modernbert_decoder,
    mpt,
    olmo,
    olmo2,
    olmo3,
    opt,
    phi,
    phi3,
    qwen2,
    qwen3,
    smollm3,
    stablelm,
)
from sgpt_jax.families.family import Family, HfConfig
from sgpt_jax.families.keys import check_untaken
from sgpt_jax.families.reading import ConfigReader, short
from sgpt_jax.families.unsupported import REASONS

_MODULES = (
    gpt2,
    gpt_neo,
    gptj,
    gpt_neox,
    bloom,
    opt,
    llama,
    mistral,
    qwen2,
    qwen3,
    cohere,
    cohere2,
    eurobert,
    falcon,
    gemma,
    gemma2,
    gemma3,
    glm,
    glm4,
    granite,
    ministral3,
    modernbert_decoder,
    mpt,
    olmo,
    olmo2,
    olmo3,
    phi,
    phi3,
    smollm3,
    stablelm,
)
FAMILIES: Mapping[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}

# More than any decoder has: what a config must not ask for, whatever its tensors are.
MAX_PARAMETERS = 2**42


def family_of(hf: HfConfig) -> Family:
    """The family of a Hugging Face config.

    Raises:
        InputError: for a `model_type` that is not supported.
    """
    kind = hf.get("model_type")
    if isinstance(kind, str) and kind in REASONS:
        raise InputError(f"model_type {kind!r} is not supported: {REASONS[kind]}")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise InputError(f"model_type {short(kind)} is not supported; known: {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def read_config(hf: HfConfig) -> DecoderConfig:
    """A Hugging Face config as a `DecoderConfig`.

    Every key is handled, known to change nothing, or named: one warning lists the keys that nobody knows.

    Raises:
        InputError: for a family or a feature that is not supported, and for a missing or impossible value.
    """
    family, reader = family_of(hf), ConfigReader(hf, f"config.json of a {hf.get('model_type')}")
    config = _read(family, reader)
    check_untaken(reader, family.harmless, family.own_code)
    return config


def _read(family: Family, reader: ConfigReader) -> DecoderConfig:
    try:
        config = family.read(reader)
        if family.mask_by_config and not reader.flag("is_causal", True):
            # transformers' windows of both directions hold so many tokens on either side, and the token itself
            windows = tuple(None if w is None else w + 1 for w in config.windows)
            config = dataclasses.replace(config, bidirectional=True, windows=windows)
    except ValueError as problem:  # `DecoderConfig` finds values that do not go together
        raise (
            problem if isinstance(problem, InputError) else InputError(f"{reader.what}: {problem}")
        ) from None
    matrices = (
        config.num_layers * config.embed_dim * (2 * config.num_heads * config.head_dim + config.mlp_dim)
    )
    positions = config.max_positions or 0 if config.positions == "learned" else 0
    tables = config.embed_dim * (config.vocab_size + positions)
    if matrices + tables > MAX_PARAMETERS:
        raise InputError(
            f"{reader.what} describes {matrices + tables:,} parameters, more than any decoder has"
        )
    return config


def export_config(hf: HfConfig, config: DecoderConfig) -> dict[str, Any]:
    """A Hugging Face config that describes the decoder, based on the one it was read from.

    Biases that were added to a bias-free decoder need a config that can say so; a family knows which.

    Raises:
        InputError: when no config of transformers describes the decoder.
    """
    for candidate in family_of(hf).exports(hf, config):
        described = _read(family_of(candidate), ConfigReader(candidate, "the config to be written"))
        if dataclasses.replace(described, head=config.head) == config:
            return candidate
    raise InputError(
        f"transformers has no {hf['model_type']} config with these biases (attention inputs: {config.qkv_bias}, "
        f"attention output: {config.attn_out_bias}, MLP: {config.mlp_bias}), so the model cannot be exported; "
        "the bias set by itself can be saved and applied"
    )
