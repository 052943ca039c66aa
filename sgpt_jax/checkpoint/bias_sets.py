"""Bias sets: the biases that SGPT trains, as a small file of their own beside the frozen base model.

A bias set is a safetensors file of float32 vectors, named by their leaves (`blocks/0/attn/q/bias`), with a
JSON header: the base model's name, the sha256 of its weights, how vectors are pooled, and how the set was
trained.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sgpt_jax.checkpoint.fingerprint import weights_sha256
from sgpt_jax.checkpoint.leaves import with_leaves
from sgpt_jax.decoder.model import Decoder, split
from sgpt_jax.decoder.sharding import leaf_path
from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import atomic_write

# The header is one string among safetensors' metadata.
_HEADER = "sgpt_jax_biases"
# What it may say of how vectors are made. A pooling's name is checked where it is used.
_STATED: dict[str, Callable[[Any], bool]] = {
    "pooling": lambda value: isinstance(value, str),
    "brackets": lambda value: isinstance(value, bool),
    "max_seq_length": lambda value: type(value) is int and value > 0,
}


@dataclasses.dataclass(frozen=True)
class BiasSet:
    """Trained biases and where they belong.

    Attributes:
        values: leaf name -> float32 vector.
        header: `base_model`, `base_sha256`, `weights` (only where they were int8), `pooling`, `brackets`,
            `max_seq_length` and `training` (the record of the run).
    """

    values: Mapping[str, np.ndarray]
    header: Mapping[str, Any]


def is_bias(path: tuple[Any, ...]) -> bool:
    """Tells whether a leaf of a decoder's params is a bias that shapes text vectors.

    That is every leaf named bias, those of norms included (SGPT repository: "bias" in the parameter's name),
    but for the language-model head's, on which no hidden state depends.

    Args:
        path: the leaf's path, as `jax.tree_util.tree_map_with_path` gives it.
    """
    name = leaf_path(path)
    return name.endswith("/bias") and not name.startswith("head/")


def bias_leaves(params: Any) -> dict[str, jax.Array]:
    """The biases among a decoder's params, by leaf name. Leaves that are None are left out."""
    return {
        leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if is_bias(path)
    }


def add_zero_biases(decoder: Decoder) -> Decoder:
    """A decoder whose attention and MLP projections all have a bias; those that had none get zeros.

    It computes exactly what it did before. `decoder` itself is left as it is, and shares its weights.
    """
    config = dataclasses.replace(decoder.config, qkv_bias=True, attn_out_bias=True, mlp_bias=True)
    return with_leaves(decoder, config, decoder.build, {})


def save_bias_set(path: Any, biases: BiasSet) -> None:
    """Writes a bias set; the file appears in one step.

    Raises:
        InputError: the folder is not there or cannot be written.
    """
    values = {name: np.ascontiguousarray(value, np.float32) for name, value in biases.values.items()}
    with atomic_write(path) as stream:
        stream.write(save(values, metadata={_HEADER: json.dumps(dict(biases.header))}))


def load_bias_set(path: Any) -> BiasSet:
    """Reads what `save_bias_set` wrote.

    Raises:
        InputError: no such file, not a bias set, or its header states what cannot be.
    """
    try:
        with safe_open(str(path), "numpy") as opened:
            text = (opened.metadata() or {}).get(_HEADER)
            values = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a dict
    except OSError as error:
        raise InputError(f"{path}: cannot be opened: {error}") from None
    except SafetensorError as error:
        raise InputError(f"{path}: not a bias set: {error}") from None
    try:
        header = json.loads(text or "")
        known = isinstance(header, dict) and isinstance(header.get("base_sha256"), str)
    except ValueError:
        known = False
    if not known or not values:
        raise InputError(f"{path}: not a bias set: a safetensors file, but without the header of one")
    for key, fits in _STATED.items():
        if header.get(key) is not None and not fits(header[key]):
            raise InputError(f"{path}: the header's {key} is {header[key]!r:.60}")
    return BiasSet(values, header)


def apply_bias_set(decoder: Decoder, biases: BiasSet, base_sha256: str | None = None) -> Decoder:
    """A decoder with the biases of a set in place of its own; projections without bias get one where the set
    has one.

    `decoder` itself is left as it is, and shares its other weights. A set that was trained over int8 weights fits these
    best: for others there is a warning.

    Args:
        decoder: the base model.
        biases: the set.
        base_sha256: hash of the weights that the decoder was made from; None where they are its own, and not int8.

    Raises:
        InputError: the set was trained on another base model.
    """
    name = biases.header.get("base_model", "another model")
    actual = base_sha256 or weights_sha256(split(decoder)[1])
    wanted = biases.header["base_sha256"]
    if actual != wanted:
        raise InputError(
            f"these biases belong to {name}, whose weights have sha256 {wanted[:16]}..., "
            f"but this model's have {actual[:16]}...: biases only work with the model they were trained on"
        )
    if biases.header.get("weights") == "int8" and not decoder.build.int8:
        warnings.warn(
            f"these biases were trained over int8 weights of {name}, not over {decoder.dtype.name} ones: load it with "
            "weights int8 for the vectors that they were trained for",
            stacklevel=2,
        )
    endings = {leaf.split("/", 2)[-1] for leaf in biases.values if leaf.startswith("blocks/")}
    config = dataclasses.replace(
        decoder.config,
        qkv_bias=decoder.config.qkv_bias or "attn/q/bias" in endings,
        attn_out_bias=decoder.config.attn_out_bias or "attn/o/bias" in endings,
        mlp_bias=decoder.config.mlp_bias or "mlp/up/bias" in endings,
    )
    return with_leaves(decoder, config, decoder.build, biases.values)
