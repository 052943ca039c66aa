"""What follows the pooling in a model: linear layers on text vectors, and scaling them to length 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sgpt_jax.decoder.pooling import normalize
from sgpt_jax.errors import InputError

# Activations by the name of their torch class, as sentence-transformers writes it; those without parameters.
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "Identity": lambda x: x,
    "Tanh": jnp.tanh,
    "ReLU": jax.nn.relu,
    "GELU": lambda x: jax.nn.gelu(x, approximate=False),
    "SiLU": jax.nn.silu,
    "Sigmoid": jax.nn.sigmoid,
    "LeakyReLU": jax.nn.leaky_relu,
    "ELU": jax.nn.elu,
    "SELU": jax.nn.selu,
    "Softplus": jax.nn.softplus,
    "Softsign": jax.nn.soft_sign,
    "Mish": jax.nn.mish,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """A linear layer on vectors [..., I], with an activation: [..., O].

    Attributes:
        weight: float32 [O, I].
        bias: float32 [O], or None.
        residual_weight: float32 [O, I], or None.
        residual: add the input to the result, or its product with `residual_weight` where there is one.
        activation: one of `ACTIVATIONS`.
    """

    weight: Any
    bias: Any = None
    residual_weight: Any = None
    residual: bool = dataclasses.field(default=False, metadata={"static": True})
    activation: str = dataclasses.field(default="Tanh", metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Normalize:
    """Scales vectors to length 1; zeros stay zeros."""


Modules = tuple[Dense | Normalize, ...]


def apply_modules(vectors: jax.Array, modules: Iterable[Dense | Normalize]) -> jax.Array:
    """What the modules make of vectors, one after the other.

    Args:
        vectors: float32 [..., E].
        modules: in their order.

    Returns:
        float32 [..., O].
    """
    for module in modules:
        vectors = normalize(vectors) if isinstance(module, Normalize) else _dense(vectors, module)
    return vectors


def _dense(vectors: jax.Array, layer: Dense) -> jax.Array:
    result = _product(vectors, layer.weight)
    if layer.bias is not None:
        result = result + layer.bias
    result = ACTIVATIONS[layer.activation](result)
    if layer.residual:
        other = vectors if layer.residual_weight is None else _product(vectors, layer.residual_weight)
        result = result + other
    return result


def _product(vectors: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.matmul(vectors, jnp.asarray(weight).T, precision=jax.lax.Precision.HIGHEST)


def output_dimension(dimension: int, modules: Iterable[Dense | Normalize]) -> int:
    """Length of the vectors that leave the modules, from that of those that enter.

    Raises:
        InputError: a layer takes vectors of another length than it gets.
    """
    for module in modules:
        if isinstance(module, Dense):
            outside, inside = module.weight.shape
            if inside != dimension:
                raise InputError(f"a Dense module takes vectors of {inside} dimensions, but gets {dimension}")
            dimension = int(outside)
    return dimension
