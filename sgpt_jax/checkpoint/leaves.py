"""Decoders with leaves that they had not when they were loaded: biases, adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sgpt_jax.decoder.build import Build
from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.decoder.model import Decoder, abstract_decoder, merge, split
from sgpt_jax.decoder.sharding import leaf_path, param_shardings
from sgpt_jax.errors import InputError


def with_leaves(
    decoder: Decoder, config: DecoderConfig, build: Build, values: Mapping[str, np.ndarray]
) -> Decoder:
    """The decoder under a config and a build with more leaves, on the devices that it lies on.

    Args:
        decoder: is left as it is, and shares its other leaves.
        config, build: of the result.
        values: leaf name -> values in place of the decoder's; new leaves that are not here are zero.

    Raises:
        InputError: the result has no such leaf as one in `values`, or of another shape.
    """
    _, params = split(decoder)
    structure, abstract = abstract_decoder(config, build)
    old = {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    expected = {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    misfits = [
        f"{name} {list(value.shape)}"
        for name, value in values.items()
        if name not in expected or expected[name].shape != value.shape
    ]
    if misfits:
        raise InputError("the model has no place for these leaves: " + ", ".join(sorted(misfits)))
    place = next(iter(old.values())).sharding
    if isinstance(place, NamedSharding):
        assert isinstance(place.mesh, Mesh)
        shardings = param_shardings(abstract, config, place.mesh)
    else:
        shardings = jax.tree.map(lambda _: place, abstract)

    def fill(path: tuple[Any, ...], leaf: Any, sharding: Any) -> jax.Array:
        name = leaf_path(path)
        if name in old and name not in values:
            return old[name]
        value = np.asarray(values.get(name, np.zeros(leaf.shape)), leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: value[index])

    return merge(structure, jax.tree_util.tree_map_with_path(fill, abstract, shardings))
