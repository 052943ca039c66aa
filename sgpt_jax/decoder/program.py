"""Programs that run a decoder, compiled with the options that suit it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

# XLA for GPUs tries Triton for every matmul, and what follows one is then no part of cuBLASLt's, even where cuBLASLt is
# chosen in the end: of a batch of GPT-Neo 1.3B on an H100, GELU's own kernels take 7 % of the time.
_GELU_IN_MATMUL: dict[str, str | bool] = {"xla_gpu_enable_triton_gemm": False}


@contextlib.contextmanager
def usual_promotion() -> Iterator[None]:
    """Ranks and dtypes are promoted as JAX does it by itself, whatever a program has set for its own arrays."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@functools.lru_cache(maxsize=256)
def compiler_options(structure: Any, mesh: Mesh | None) -> dict[str, str | bool] | None:
    """XLA's options for programs of a decoder, given its structure (see `model.split`) and the devices."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if platform != "gpu":
        return None
    decoder = jax.tree.unflatten(structure, range(structure.num_leaves))
    return _GELU_IN_MATMUL if decoder.dtype == jnp.bfloat16 and decoder.blocks[0].mlp.has_plain_gelu else None


class DecoderProgram:
    """`jax.jit` of a function of a decoder's structure, which is static and comes first, and of a `mesh`, static too.

    Args:
        function: the function.
        static_argnames: its other static arguments.
    """

    def __init__(self, function: Callable, static_argnames: tuple[str, ...] = ()):
        functools.update_wrapper(self, function)
        names = ("structure", "mesh", *static_argnames)
        self._plain, self._gelu_in_matmul = (
            jax.jit(function, static_argnames=names, compiler_options=options)
            for options in (None, _GELU_IN_MATMUL)
        )

    def of(self, structure: Any, mesh: Mesh | None) -> Any:
        """The jitted function for this decoder."""
        return self._plain if compiler_options(structure, mesh) is None else self._gelu_in_matmul

    def __call__(self, structure: Any, *arguments: Any, mesh: Mesh | None, **options: Any) -> Any:
        with usual_promotion():
            return self.of(structure, mesh)(structure, *arguments, mesh=mesh, **options)

    def lower(self, structure: Any, *arguments: Any, mesh: Mesh | None, **options: Any) -> jax.stages.Lowered:
        """The program for these arguments, as `lower` of what `jax.jit` gives."""
        with usual_promotion():
            return self.of(structure, mesh).lower(structure, *arguments, mesh=mesh, **options)
