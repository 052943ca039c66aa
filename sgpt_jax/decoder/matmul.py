"""Matmuls in the compute dtype, by the instructions that the device has for them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sgpt_jax.decoder.program import usual_promotion
from sgpt_jax.decoder.sharding import platform


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """a [..., M, K] @ b [..., K, N], both of the compute dtype, to float32 [..., M, N].

    Float32 factors are not rounded, as XLA does by default on TPU and GPU.
    """
    return _cpu_matmul(a, b) if platform() == "cpu" else _matmul(a, b)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)


def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., I] @ kernel [I, O], both of the compute dtype, to [..., O] of that dtype."""
    if x.dtype == jnp.float32 or platform() == "cpu":
        return matmul(x, kernel).astype(x.dtype)
    return jnp.matmul(x, kernel)


@jax.custom_vjp
def project_int8(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """x [..., I] @ kernel [I, O] of int8, times scale [O] of float32: [..., O] of x's dtype.

    An int8 value is exact in either compute dtype, so this is the matmul with the dequantised kernel, but that its
    columns are scaled afterwards, in float32. The gradient is that of x alone.
    """
    return (_int8_matmul(x, kernel, transposed=False) * scale).astype(x.dtype)


def _int8_matmul(x: jax.Array, kernel: jax.Array, *, transposed: bool) -> jax.Array:
    kernel = _tied_to(kernel, x).astype(x.dtype)
    return matmul(x, kernel.T if transposed else kernel)


def _tied_to(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """The int8 kernel, as if it depended on x.

    Otherwise XLA converts the kernels of all layers as early as it can, before a loop over chunks or the first layer,
    and all of these copies, of twice the size or more, are there at once.
    """
    first = x[(0,) * x.ndim]
    if platform() == "cpu":  # where XLA drops the barrier too early
        return kernel + (first * 0).astype(jnp.int8)
    return jax.lax.optimization_barrier((kernel, first))[0]


@usual_promotion()
def _int8_backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, None, None]:
    kernel, scale = kept
    scaled = (gradient.astype(jnp.float32) * scale).astype(gradient.dtype)
    return _int8_matmul(scaled, kernel, transposed=True).astype(gradient.dtype), None, None


project_int8.defvjp(
    lambda x, kernel, scale: (project_int8(x, kernel, scale), (kernel, scale)), _int8_backward
)


def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """y [..., O] + bias [O], both of the compute dtype."""
    return _cpu_add_bias(y, bias) if platform() == "cpu" else y + bias


# CPU: from here on.


@jax.custom_vjp
def _cpu_add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    return y + bias


def _bias_backward(_: None, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = gradient.reshape(-1, gradient.shape[-1])
    # A matmul with ones instead of a sum: XLA would fuse the sum with what makes the gradient, and so make the gradient
    # a second time, column by column, at a twentieth of the speed.
    ones = jnp.ones((1, rows.shape[0]), rows.dtype)
    return gradient, matmul(ones, rows)[0].astype(gradient.dtype)


_cpu_add_bias.defvjp(lambda y, bias: (y + bias, None), _bias_backward)


@jax.custom_vjp
def _cpu_matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """`matmul`, with derivatives that are matmuls of the same kind.

    Only for bfloat16 factors and a float32 result does XLA use a CPU's bfloat16 instructions (AMX, AVX-512). With a
    bfloat16 result, or with one float32 factor as in the automatic derivative, it computes in float32, at a fifth of
    the speed. In float32, the automatic derivative of a kernel transposes what stands before it, element by element,
    which takes longer than the matmul.
    """
    return _matmul(a, b)


def _forward(a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _cpu_matmul(a, b), (a, b)


def _backward(factors: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, b = factors
    narrow = gradient.astype(a.dtype)
    for_a = _cpu_matmul(narrow, b.mT)
    if b.ndim == 2:  # one kernel for all rows
        for_b = _cpu_matmul(a.reshape(-1, a.shape[-1]).T, narrow.reshape(-1, narrow.shape[-1]))
    else:
        for_b = _cpu_matmul(a.mT, narrow)
    return for_a.astype(a.dtype), for_b.astype(b.dtype)


_cpu_matmul.defvjp(_forward, _backward)
