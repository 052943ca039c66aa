"""The parts that every block is made of: linear layers, norms, tables, MLPs, dropout."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from sgpt_jax.decoder.build import INT8_LIMIT, Build
from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.decoder.matmul import add_bias, project, project_int8
from sgpt_jax.decoder.sharding import platform

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


# Of random weights.
_STANDARD_DEVIATION = 0.02


def _matrix(
    shape: tuple[int, int], build: Build, channel_axis: int | None = None
) -> tuple[nnx.Param, nnx.Param | None]:
    """(weights, scale) of a matrix, random or, without `build.rngs`, zeros.

    In the build's dtype without a scale (None); of a build in int8, with the float32 scale of each channel along
    `channel_axis`. None for that is a matrix that stays in the dtype.
    """
    if not build.int8 or channel_axis is None:
        if build.rngs is None:
            return nnx.Param(jnp.zeros(shape, build.dtype)), None
        drawn = jax.random.normal(build.rngs.params(), shape, build.dtype)
        return nnx.Param(_STANDARD_DEVIATION * drawn), None
    # Uniform, of the same deviation.
    scale = jnp.full(shape[channel_axis], _STANDARD_DEVIATION * 3**0.5 / INT8_LIMIT, jnp.float32)
    if build.rngs is None:
        return nnx.Param(jnp.zeros(shape, jnp.int8)), nnx.Param(scale)
    drawn = jax.random.randint(build.rngs.params(), shape, -INT8_LIMIT, INT8_LIMIT + 1, jnp.int8)
    return nnx.Param(drawn), nnx.Param(scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Noise for training: one key a row, so that a row's noise does not depend on the rows beside it."""

    keys: jax.Array  # typed keys [B]

    def at(self, layer: int) -> Dropout:
        """The noise of a layer, apart from that of all others."""
        return Dropout(_fold_in(self.keys, layer))

    def __call__(self, x: jax.Array, rate: float, site: int) -> jax.Array:
        """Zeroes a share `rate` of x [B, ...] and scales up the rest; `site` names the point in the layer."""
        if not rate:
            return x
        keys = _fold_in(self.keys, site)
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
        return jnp.where(keep, x / (1 - rate), 0)


def _fold_in(keys: jax.Array, number: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


class Linear(nnx.Module):
    """x @ kernel + bias, in the compute dtype; with an adapter, + x @ lora_a @ lora_b * alpha / rank.

    In int8 the kernel has one float32 `scale` for each output channel: (x @ kernel) * scale. No gradient reaches the
    kernel and its scale.
    """

    def __init__(self, size_in: int, size_out: int, *, bias: bool, build: Build, name: str = ""):
        self.dtype = build.dtype
        self.kernel, self.scale = _matrix((size_in, size_out), build, channel_axis=1)
        self.bias = nnx.Param(jnp.zeros((size_out,), build.dtype)) if bias else None
        adapted = build.lora is not None and name in build.lora.targets
        self.adapter_scale = build.lora.scale if build.lora is not None and adapted else 0.0
        rank = build.lora.rank if build.lora is not None else 0
        # Float32, whatever the dtype: they are there to be trained.
        self.lora_a = nnx.Param(jnp.zeros((size_in, rank), jnp.float32)) if adapted else None
        self.lora_b = nnx.Param(jnp.zeros((rank, size_out), jnp.float32)) if adapted else None

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.scale is None:
            y = project(x, self.kernel[...].astype(self.dtype))
        else:
            y = project_int8(x, self.kernel[...], self.scale[...])
        if self.lora_a is not None and self.lora_b is not None:
            low = project(x, self.lora_a[...].astype(self.dtype))
            y = y + project(low, self.lora_b[...].astype(self.dtype)) * jnp.asarray(
                self.adapter_scale, y.dtype
            )
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
    """A table of vectors, looked up by row; in int8 with a float32 `scale` for each row, if it is `quantised`."""

    def __init__(self, rows: int, size: int, *, build: Build, quantised: bool = True):
        self.dtype = build.dtype
        self.embedding, self.scale = _matrix((rows, size), build, channel_axis=0 if quantised else None)

    def __call__(self, ids: jax.Array) -> jax.Array:
        found = self.embedding[...][ids]
        if self.scale is not None:
            found = found.astype(jnp.float32) * self.scale[...][ids][..., None]
        return found.astype(self.dtype)


class MLP(nnx.Module):
    """Two linear layers with an activation, or three with a gate."""

    def __init__(self, config: DecoderConfig, build: Build):
        self.activation = config.activation
        make = functools.partial(Linear, bias=config.mlp_bias, build=build)
        self.gate = make(config.embed_dim, config.mlp_dim, name="gate") if config.gated else None
        self.up = make(config.embed_dim, config.mlp_dim, name="up")
        self.down = make(config.mlp_dim, config.embed_dim, name="down")

    @property
    def has_plain_gelu(self) -> bool:
        """Whether GELU, in the form with tanh, follows one matmul alone, with or without a bias."""
        plain = self.gate is None and self.up.scale is None and self.up.lora_a is None
        return plain and self.activation == "gelu_tanh"

    def __call__(self, x: jax.Array, gelu_in_matmul: bool = False) -> jax.Array:
        """[B, T, E] to [B, T, E]; `gelu_in_matmul` traces GELU so that XLA makes it a part of the matmul before it."""
        up = self.up(x)  # [B, T, F]
        if gelu_in_matmul:
            return self.down(_gelu_in_matmul(up))
        gate = None if self.gate is None else self.gate(x)
        # XLA keeps float32 parts of an activation for the gradient on a GPU; on a TPU it computes them again by itself.
        activate = jax.checkpoint(_activate, static_argnums=2) if platform() == "gpu" else _activate
        return self.down(activate(up, gate, self.activation))


@jax.custom_vjp
def _gelu_in_matmul(up: jax.Array) -> jax.Array:
    """GELU in the form that XLA makes a part of the matmul before it, where it is computed in float32.

    A program that lacks the options for that (see `program.decoder_jit`) would round it a few times more.
    """
    return jax.nn.gelu(up, approximate=True)


def _gelu_backward(up: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    _, pull = jax.vjp(lambda x: _activate(x, None, "gelu_tanh"), up)
    return pull(gradient)


_gelu_in_matmul.defvjp(lambda up: (_gelu_in_matmul(up), up), _gelu_backward)


def _activate(up: jax.Array, gate: jax.Array | None, activation: str) -> jax.Array:
    """What stands between the linear layers of an MLP."""
    function = ACTIVATIONS[activation]
    # In float32 whatever the dtype: a CPU would round after every step of a bfloat16 activation.
    wide = up.astype(jnp.float32)
    out = function(wide) if gate is None else function(gate.astype(jnp.float32)) * wide
    return out.astype(up.dtype)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap), float32; x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)
