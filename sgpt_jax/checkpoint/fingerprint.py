"""Hashes that identify a model: of a decoder's weights alone, and of weights, config and settings together."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.decoder.model import Decoder, split
from sgpt_jax.decoder.modules import Modules
from sgpt_jax.decoder.sharding import leaf_path

# Fields of the config that change no hidden state: dropout rates, the head, and the length limit, which the settings
# have.
_WITHOUT_EFFECT = (
    *("head", "head_bias", "head_transform"),
    *("embed_dropout", "attn_dropout", "residual_dropout", "max_positions"),
)


def model_fingerprint(decoder: Decoder, settings: Mapping[str, Any], *, head: bool = False) -> str:
    """Identifies a model together with its settings: with the same fingerprint come the same vectors (or scores).

    All weights are hashed, biases included, rounded to bfloat16: a decoder has one fingerprint whichever dtype, file
    format or mesh it was loaded with, and another one after any training (a step moves thousands of values, some of
    them across a rounding boundary). With it goes what the config says about the computation.

    SmolLM2-135M takes 0.2 to 0.3 s on two busy cores, one leaf a thread, so it can be computed at every start. When
    several processes hold parts of the weights, every one of them must call this.

    Args:
        decoder: a loaded decoder, with its bias set applied where it has one.
        settings: whatever else decides the result, as JSON values; for vectors pooling, brackets, prompts,
            max_seq_length and normalization. The order of keys does not matter.
        head: whether the language-model head counts: for scores it does, for vectors it does not (then a checkpoint
            saved without its head is the same model).

    Returns:
        40 hexadecimal digits.
    """
    leaves = _leaves(split(decoder)[1])
    if not head:
        leaves = {name: leaf for name, leaf in leaves.items() if not name.startswith("head/")}
    facts = {
        "config": _config_facts(decoder.config),
        "head": decoder.config.head if head else None,
        **({} if decoder.build.lora is None else {"adapter_scale": decoder.build.lora.scale}),
        "settings": settings,
        "weights": _leaf_digests(leaves),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:40]


def module_facts(modules: Modules) -> list[dict[str, str]]:
    """What tells the layers behind the pooling from others, for the settings of `model_fingerprint`."""
    found = []
    for module in modules:
        facts = {"kind": type(module).__name__}
        for field in dataclasses.fields(module):
            value = getattr(module, field.name)
            is_array = hasattr(value, "shape")
            facts[field.name] = hashlib.sha256(_bfloat16_bytes(value)).hexdigest() if is_array else str(value)
        found.append(facts)
    return found


def weights_sha256(params: Any) -> str:
    """The sha256 of a decoder's weights: all but biases, adapters and the language-model head, rounded to bfloat16.

    It names the base model of a bias set (`base_sha256` in its header): the same with and without biases, and
    whichever dtype, file format or mesh the model was loaded with.

    Args:
        params: as `split` gives them. Where they are int8, `weights.checkpoint_sha256` has the hash of the model that
            they were made from.

    Returns:
        64 hexadecimal digits.
    """
    return leaves_sha256(_leaves(params))


def leaves_sha256(leaves: Mapping[str, Any]) -> str:
    """`weights_sha256` of a decoder's leaves by name, arrays of JAX or NumPy."""
    digest = hashlib.sha256()
    for name in sorted(leaves):
        if name.startswith("head/") or name.rpartition("/")[2] in ("bias", "lora_a", "lora_b"):
            continue
        digest.update(f"{name} {leaves[name].shape}\n".encode())
        digest.update(_bfloat16_bytes(leaves[name]))
    return digest.hexdigest()


def to_numpy(leaf: jax.Array) -> np.ndarray:
    """The whole array on this process, even if other processes hold parts of it (then all must call)."""
    if _spans_processes(leaf):
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def _leaves(params: Any) -> dict[str, jax.Array]:
    return {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def _spans_processes(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def _bfloat16_bytes(leaf: jax.Array) -> memoryview:
    """The bytes of a leaf that is rounded to bfloat16."""
    values = np.ascontiguousarray(to_numpy(leaf).astype(ml_dtypes.bfloat16))
    return values.view(np.uint8).reshape(-1).data


def _leaf_digests(leaves: Mapping[str, jax.Array]) -> dict[str, str]:
    def digest(name: str) -> str:
        found = hashlib.sha256(f"{leaves[name].shape}\n".encode())
        found.update(_bfloat16_bytes(leaves[name]))
        return found.hexdigest()

    # One thread where leaves are gathered: all processes must gather them in the same order.
    threads = 1 if any(map(_spans_processes, leaves.values())) else min(8, os.cpu_count() or 1)
    names = sorted(leaves)
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _config_facts(config: DecoderConfig) -> dict[str, Any]:
    """The fields that are not at their default, so that a field added later leaves older fingerprints as they are."""
    return {
        name: value
        for name, value in _not_default(config).items()
        if name not in _WITHOUT_EFFECT and not name.endswith("bias")  # the leaves tell which biases there are
    }


def _not_default(settings: Any) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value == field.default:
            continue
        found[field.name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    """A field's value as JSON has it; of tuples, such as the rotations by layer, each item."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        return _not_default(value)
    return float(np.float32(value)) if isinstance(value, float) else value  # as GGUF files store it
