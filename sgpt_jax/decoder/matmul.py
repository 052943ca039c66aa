"""Matrix products in the compute dtype, by the instructions that the device has for them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sgpt_jax.decoder.sharding import platform


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a [..., M, K] @ b [..., K, N], both of the compute dtype, to float32 [..., M, N].

    Float32 products stay float32 on TPU and GPU too, where XLA's default rounds their inputs.
    """
    if a.dtype == jnp.float32:
        return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    if platform() == "cpu":
        return _narrow_product(a, b)
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., I] @ kernel [I, O], both of the compute dtype, to [..., O] of that dtype."""
    if x.dtype == jnp.float32 or platform() == "cpu":
        return product(x, kernel).astype(x.dtype)
    return jnp.matmul(x, kernel)


def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """y [..., O] + bias [O], both of the compute dtype."""
    return _add_bias(y, bias) if platform() == "cpu" else y + bias


@jax.custom_vjp
def _add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    return y + bias


def _bias_backward(_: None, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = gradient.reshape(-1, gradient.shape[-1])
    # A product, not a sum: a sum would be fused with what makes the gradient, which XLA's CPU code then makes once
    # more, column by column, at a twentieth of the speed.
    ones = jnp.ones((1, rows.shape[0]), rows.dtype)
    return gradient, product(ones, rows)[0].astype(gradient.dtype)


_add_bias.defvjp(lambda y, bias: (y + bias, None), _bias_backward)


@jax.custom_vjp
def _narrow_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """XLA reaches a CPU's bfloat16 instructions (AMX, AVX-512) by products of bfloat16 to float32 only: a bfloat16
    result, or one float32 factor as in the automatic derivative, makes it compute in float32 at a fifth of the speed.
    """
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _forward(a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _narrow_product(a, b), (a, b)


def _backward(factors: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, b = factors
    narrow = gradient.astype(a.dtype)
    for_a = _narrow_product(narrow, b.mT)
    if b.ndim == 2:  # one kernel for all rows
        for_b = _narrow_product(a.reshape(-1, a.shape[-1]).T, narrow.reshape(-1, narrow.shape[-1]))
    else:
        for_b = _narrow_product(a.mT, narrow)
    return for_a.astype(a.dtype), for_b.astype(b.dtype)


_narrow_product.defvjp(_forward, _backward)
