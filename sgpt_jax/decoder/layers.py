"""The parts that every block is made of: linear layers, norms, tables, MLPs, dropout."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.decoder.matmul import add_bias, project

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def random_weights(rngs: nnx.Rngs | None, shape: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    """Normal with standard deviation 0.02, or zeros without `rngs`."""
    return jnp.zeros(shape, dtype) if rngs is None else 0.02 * jax.random.normal(rngs.params(), shape, dtype)


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Noise for training: one key a row, so that a row's noise does not depend on the rows beside it."""

    keys: jax.Array  # typed keys [B]

    def __call__(self, x: jax.Array, rate: float, *site: int) -> jax.Array:
        """Zeroes a share `rate` of x [B, ...] and scales up the rest; `site` names the point in the network."""
        if not rate:
            return x
        keys = self.keys
        for number in site:
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
        return jnp.where(keep, x / (1 - rate), 0)


class Linear(nnx.Module):
    """x @ kernel + bias, in the compute dtype."""

    def __init__(self, size_in: int, size_out: int, *, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        self.dtype = dtype
        self.kernel = nnx.Param(random_weights(rngs, (size_in, size_out), dtype))
        self.bias = nnx.Param(jnp.zeros((size_out,), dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = project(x, self.kernel[...].astype(self.dtype))
        return y if self.bias is None else add_bias(y, self.bias[...].astype(self.dtype))


class Norm(nnx.Module):
    """Layer norm or RMS norm over the last axis, computed in float32.

    Args:
        shape: of the weights: (E,), or (N, H) for weights of each head's own.
        config: kind, epsilon, and what the normed vector is multiplied by.
        dtype: of weights and result.
        bias: overrides the config's `norm_bias`.
    """

    def __init__(
        self, shape: tuple[int, ...], config: DecoderConfig, *, dtype: jnp.dtype, bias: bool | None = None
    ):
        self.dtype, self.eps = dtype, config.norm_eps
        self.centred, self.offset = config.norm == "layer", float(config.norm_scale == "weight+1")
        has_bias = self.centred and (config.norm_bias if bias is None else bias)
        has_scale = config.norm_scale != "none"
        self.scale = nnx.Param(jnp.full(shape, 1 - self.offset, dtype)) if has_scale else None
        self.bias = nnx.Param(jnp.zeros(shape, dtype)) if has_bias and has_scale else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        if self.centred:
            x = x - x.mean(axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        if self.scale is not None:
            x = x * (self.scale[...].astype(jnp.float32) + self.offset)
        if self.bias is not None:
            x = x + self.bias[...].astype(jnp.float32)
        return x.astype(self.dtype)


class TokenTable(nnx.Module):
    """A table of vectors, looked up by row."""

    def __init__(self, rows: int, size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        self.dtype = dtype
        self.embedding = nnx.Param(random_weights(rngs, (rows, size), dtype))

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embedding[...][ids].astype(self.dtype)


class MLP(nnx.Module):
    """Two linear layers with an activation, or three with a gate."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        self.activation = config.activation
        make = functools.partial(Linear, bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.gate = make(config.embed_dim, config.mlp_dim) if config.gated else None
        self.up = make(config.embed_dim, config.mlp_dim)
        self.down = make(config.mlp_dim, config.embed_dim)

    def __call__(self, x: jax.Array) -> jax.Array:
        activate = ACTIVATIONS[self.activation]
        # In float32 whatever the dtype: a CPU would round after every step of a bfloat16 activation.
        up = self.up(x).astype(jnp.float32)  # [B, T, F]
        out = activate(up) if self.gate is None else activate(self.gate(x).astype(jnp.float32)) * up
        return self.down(out.astype(x.dtype))


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap), float32; x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)
