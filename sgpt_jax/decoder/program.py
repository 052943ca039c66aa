"""Programs that run a decoder: how they are traced, and compiled with the options that suit it."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

# XLA for GPUs tries Triton for every matmul, and what follows one is then no part of cuBLASLt's, even where cuBLASLt is
# chosen in the end: of a batch of GPT-Neo 1.3B on an H100, GELU's own kernels take 7 % of the time.
_WITH_GELU_IN_MATMUL: dict[str, str | bool] = {"xla_gpu_enable_triton_gemm": False}

_NO_MESH = Mesh(np.empty((), object), ())

# Whether what is traced will be compiled with that: see `decoder_jit`.
gelu_in_matmul: contextvars.ContextVar[bool] = contextvars.ContextVar("gelu_in_matmul", default=False)


@contextlib.contextmanager
def usual_promotion() -> Iterator[None]:
    """Ranks and dtypes are promoted as JAX does it by itself, whatever a program has set for its own arrays."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@contextlib.contextmanager
def _own_settings() -> Iterator[None]:
    """Outside what a program has set for itself: how arrays are promoted, and which mesh they lie on."""
    with usual_promotion(), jax.set_mesh(_NO_MESH):
        yield


@functools.lru_cache(maxsize=256)
def can_have_gelu_in_matmul(structure: Any, mesh: Mesh | None) -> bool:
    """Whether programs of a decoder are faster with GELU as a part of the matmul before it.

    Args:
        structure: of the decoder, see `model.split`.
        mesh: the devices; None for the default one.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if platform != "gpu":
        return False
    decoder = jax.tree.unflatten(structure, range(structure.num_leaves))
    return decoder.dtype == jnp.bfloat16 and decoder.blocks[0].mlp.has_plain_gelu


def decoder_jit(function: Callable, in_matmul: bool, **options: Any) -> Any:
    """`jax.jit` of a function that runs a decoder.

    Args:
        function: the function.
        in_matmul: let GELU be a part of the matmul before it.
        options: of `jax.jit`.
    """

    @functools.wraps(function)
    def traced(*arguments: Any, **named: Any) -> Any:
        before = gelu_in_matmul.set(in_matmul)
        try:
            return function(*arguments, **named)
        finally:
            gelu_in_matmul.reset(before)

    return jax.jit(traced, compiler_options=_WITH_GELU_IN_MATMUL if in_matmul else None, **options)


class DecoderProgram:
    """`jax.jit` of a function of a decoder's structure, which is static and comes first, and of a `mesh`, static too.

    Args:
        function: the function.
        static_argnames: its other static arguments.
    """

    def __init__(self, function: Callable, static_argnames: tuple[str, ...] = ()):
        functools.update_wrapper(self, function)
        names = ("structure", "mesh", *static_argnames)
        self._jitted = {
            in_matmul: decoder_jit(function, in_matmul, static_argnames=names) for in_matmul in (False, True)
        }

    def of(self, structure: Any, mesh: Mesh | None = None) -> Any:
        """The jitted function for this decoder."""
        return self._jitted[can_have_gelu_in_matmul(structure, mesh)]

    def __call__(self, structure: Any, *arguments: Any, mesh: Mesh | None = None, **options: Any) -> Any:
        with _own_settings():
            return self.of(structure, mesh)(structure, *arguments, mesh=mesh, **options)

    def lower(
        self, structure: Any, *arguments: Any, mesh: Mesh | None = None, **options: Any
    ) -> jax.stages.Lowered:
        """The program for these arguments, as `lower` of what `jax.jit` gives."""
        with _own_settings():
            return self.of(structure, mesh).lower(structure, *arguments, mesh=mesh, **options)
