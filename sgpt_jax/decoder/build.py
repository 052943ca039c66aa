"""How the layers of a decoder are made, whatever its shape is: dtype, int8 weights, adapters."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx

# int8 weights are -127 to 127, so that they are symmetric.
INT8_LIMIT = 127

# The linear layers of a block, by name: those that can have an adapter.
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters beside linear layers (LoRA, arXiv 2106.09685): y + x A B * alpha / rank.

    Attributes:
        rank: width between A [in, rank] and B [rank, out].
        alpha: see above.
        targets: which linear layers of every block have one, of `PROJECTIONS`.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """The factor on x A B."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Build:
    """What every layer of a decoder is made by.

    Attributes:
        dtype: compute dtype, in which weights, biases and norms are held too.
        int8: the matrices are frozen, and held as int8 with a float32 scale for each output channel (token table and
            head: for each row of V). Tables of learned positions stay in the dtype.
        lora: adapters beside linear layers, or None.
        rngs: makes weights random; with None they are zeros, for whoever wants the structure only.
    """

    dtype: jnp.dtype
    int8: bool = False
    lora: Lora | None = None
    rngs: nnx.Rngs | None = dataclasses.field(default=None, compare=False)
