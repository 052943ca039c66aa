"""Matmuls: float32 stays exact, bfloat16 accumulates in float32, forwards and backwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgpt_jax.decoder.matmul import add_bias, matmul, project


def _numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)


SHAPES = {
    "a kernel for all rows": ((2, 5, 96), (96, 7)),
    "a matrix each": ((2, 3, 5, 96), (2, 3, 96, 7)),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_bfloat16_matmul_is_the_float32_matmul_of_its_factors(shapes):
    a, b = (jnp.asarray(_numbers(*shape), jnp.bfloat16) for shape in shapes)
    found = matmul(a, b)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.asarray(a, np.float32) @ np.asarray(b, np.float32), atol=1e-4)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_the_automatic_ones_in_float32_rounded(dtype, shapes):
    wide = [_numbers(*shape) for shape in shapes]
    # Factors that bfloat16 holds exactly, so that the gradients differ by the rounding of results alone.
    wide = [np.asarray(jnp.asarray(values, jnp.bfloat16), np.float32) for values in wide]
    weights = np.asarray(jnp.asarray(_numbers(*shapes[0][:-1], 7), jnp.bfloat16), np.float32)

    def gradients(product, *factors):
        return jax.grad(lambda a, b: (product(a, b) * weights).sum(), argnums=(0, 1))(*factors)

    expected = gradients(lambda a, b: jnp.matmul(a, b, precision="highest"), *wide)
    found = gradients(matmul, *(jnp.asarray(values, dtype) for values in wide))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        rtol = 2**-8 if dtype == "bfloat16" else 1e-5
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, rtol=rtol, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_projection_keeps_the_dtype(dtype):
    x, kernel = jnp.asarray(_numbers(2, 5, 96), dtype), jnp.asarray(_numbers(96, 7), dtype)
    found = project(x, kernel)
    assert found.dtype == dtype
    expected = np.asarray(x, np.float32) @ np.asarray(kernel, np.float32)
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_of_a_bias_is_the_sum_over_all_rows(dtype):
    y, bias = jnp.asarray(_numbers(2, 5, 7), dtype), jnp.asarray(_numbers(7), dtype)
    weights = jnp.asarray(_numbers(2, 5, 7) + 1, dtype)
    found, (for_y, for_bias) = jax.value_and_grad(
        lambda y, bias: (add_bias(y, bias) * weights).astype(jnp.float32).sum(), argnums=(0, 1)
    )(y, bias)
    np.testing.assert_allclose(found, ((y + bias) * weights).astype(jnp.float32).sum(), rtol=1e-6)
    assert for_y.dtype == for_bias.dtype == dtype
    np.testing.assert_array_equal(for_y, weights)
    expected = np.asarray(weights, np.float32).sum((0, 1))
    np.testing.assert_allclose(np.asarray(for_bias, np.float32), expected, rtol=2**-8, atol=1e-6)
