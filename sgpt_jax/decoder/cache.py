"""Keys and values of tokens that were read already, so that a text goes on without being read again."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sgpt_jax.decoder.config import DecoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What attention needs of the tokens of B rows, one text a row, in S slots each.

    The slots of a text are in its order, with padding anywhere between them: a token's position is not its slot.

    Attributes:
        keys, values: for each layer [B, K, H, S] and [B, K, S, H], in the compute dtype; keys are rotated. CPU: these
            are the layouts of attention's matmuls; from any other, XLA would copy all slots for every token.
        positions: int32 [B, S], of the tokens in their texts.
        valid: bool [B, S], whether a slot holds a token.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    positions: Any
    valid: Any

    @classmethod
    def empty(cls, config: DecoderConfig, rows: int, slots: int, dtype: jnp.dtype) -> Cache:
        """A cache without any token."""
        heads, head_dim = config.num_kv_heads, config.head_dim
        keys, values = (
            tuple(jnp.zeros((rows, heads, *shape), dtype) for _ in range(config.num_layers))
            for shape in ((head_dim, slots), (slots, head_dim))
        )
        return cls(keys, values, jnp.zeros((rows, slots), jnp.int32), jnp.zeros((rows, slots), bool))

    @staticmethod
    def token_bytes(config: DecoderConfig, dtype: jnp.dtype) -> int:
        """Memory of one slot."""
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize

    def repeated(self, rows: int, more: int) -> Cache:
        """Of a cache of one row: that row `rows` times, each with `more` empty slots behind it."""

        def repeat(leaf: jax.Array, slot_axis: int) -> jax.Array:
            wide = jnp.broadcast_to(leaf, (rows, *leaf.shape[1:]))
            return jnp.pad(wide, [(0, more if axis == slot_axis else 0) for axis in range(leaf.ndim)])

        return Cache(
            tuple(repeat(leaf, 3) for leaf in self.keys),
            tuple(repeat(leaf, 2) for leaf in self.values),
            repeat(self.positions, 1),
            repeat(self.valid, 1),
        )


class GrowingCache:
    """A cache during one pass over T new tokens a row, to which the layers add, one after the other.

    Args:
        cache: before the pass.
        start: the slot of the first new token; may be traced.
        positions: int32 [B, T], of the new tokens.
        valid: bool [B, T]; False is padding.
    """

    def __init__(self, cache: Cache, start: jax.Array | int, positions: jax.Array, valid: jax.Array):
        self.start = start
        self.positions = _put(cache.positions, positions, start, 1)
        self.valid = _put(cache.valid, valid, start, 1)
        self._keys, self._values = list(cache.keys), list(cache.values)

    def add(self, layer: int, keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Stores a layer's new keys and values, [B, T, K, H], and returns all that it has, [B, S, K, H]."""
        self._keys[layer] = _put(self._keys[layer], keys.transpose(0, 2, 3, 1), self.start, 3)
        self._values[layer] = _put(self._values[layer], values.transpose(0, 2, 1, 3), self.start, 2)
        return self._keys[layer].transpose(0, 3, 1, 2), self._values[layer].transpose(0, 2, 1, 3)

    def seen(self, positions: jax.Array, window: int | None) -> jax.Array:
        """Which slots each new token sees: those up to its own that hold a token, within the window.

        Args:
            positions: int32 [B, T], of the new tokens.
            window: as in `attention.attention_mask_matrix`.

        Returns:
            bool [B, T, S].
        """
        slots = jnp.arange(self.valid.shape[1])
        own = self.start + jnp.arange(positions.shape[1])
        seen = self.valid[:, None, :] & (slots[None, :] <= own[:, None])[None]
        if window is not None:
            seen &= positions[:, :, None] - self.positions[:, None, :] < window
        return seen

    def cache(self) -> Cache:
        """The cache after the pass."""
        return Cache(tuple(self._keys), tuple(self._values), self.positions, self.valid)


def _put(whole: jax.Array, part: jax.Array, start: jax.Array | int, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), start, axis)
