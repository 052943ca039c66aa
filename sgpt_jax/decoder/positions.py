"""Positions of tokens: from the mask, as rotary angles, as ALiBi slopes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from sgpt_jax.decoder.config import RotaryConfig


def positions_from_mask(attention_mask: jax.Array) -> jax.Array:
    """Positions 0, 1, 2, ... of the valid tokens, whichever side is padded.

    Args:
        attention_mask: int or bool [B, T], non-zero at valid tokens.

    Returns:
        int32 [B, T]; padding gets the position of the valid token before it, or 0.
    """
    return jnp.maximum(jnp.cumsum(attention_mask.astype(jnp.int32), axis=-1) - 1, 0)


def rotary_frequencies(config: RotaryConfig) -> np.ndarray:
    """Angle per position of each rotated pair, float32 [dim / 2].

    `linear` divides every frequency by the factor; `llama3` only those whose wavelength exceeds the original
    context over `low_freq_factor`, with a linear blend down to `high_freq_factor` (Llama 3.1 release).
    """
    exponents = np.arange(0, config.dim, 2, dtype=np.float32) / np.float32(config.dim)
    frequencies = (1.0 / np.power(np.float32(config.base), exponents)).astype(np.float32)
    if config.scaling == "linear":
        return frequencies / np.float32(config.factor)
    if config.scaling == "llama3":
        wavelengths = 2 * np.pi / frequencies
        low, high = config.low_freq_factor, config.high_freq_factor
        share_kept = (config.original_max_positions / wavelengths - low) / (high - low)
        share_kept = np.clip(share_kept, 0.0, 1.0)
        scaled = (1 - share_kept) * frequencies / config.factor + share_kept * frequencies
        return scaled.astype(np.float32)
    return frequencies


def rotary_angles(config: RotaryConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and signed sines for `rotate`: float32 [B, T, 1, dim] each, from int positions [B, T]."""
    angles = positions[..., None, None].astype(jnp.float32) * rotary_frequencies(config)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    join = jnp.stack if config.interleaved else jnp.concatenate
    shape = (*positions.shape, 1, config.dim)
    return join([cos, cos], axis=-1).reshape(shape), join([-sin, sin], axis=-1).reshape(shape)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array], config: RotaryConfig) -> jax.Array:
    """Turns the first `config.dim` dimensions of every head by its position's angles, in float32.

    Args:
        x: queries or keys [B, T, N, H].
        angles: from `rotary_angles`.

    Returns:
        [B, T, N, H] in the dtype of x.
    """
    cos, signed_sin = angles
    turned, rest = x[..., : config.dim].astype(jnp.float32), x[..., config.dim :]
    # The two of a pair are swapped by a reversal, which XLA fuses into the multiplication. CPU: slices that are
    # concatenated in the other order take twice as long.
    axis = -1 if config.interleaved else -2
    pairs = turned.reshape(*turned.shape[:-1], *((-1, 2) if config.interleaved else (2, -1)))
    turned = turned * cos + jnp.flip(pairs, axis).reshape(turned.shape) * signed_sin
    turned = turned.astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def alibi_slopes(num_heads: int) -> np.ndarray:
    """How much each head favours near keys, float32 [N] (ALiBi, arXiv 2108.12409).

    A power of two n gives the geometric series from 2^(-8/n). Any other count takes the series of the power of two
    below it, then every second slope of the series of twice that.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return np.array(slopes, np.float32)
