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


def rotary_frequencies(config: RotaryConfig, *, long: bool = False) -> np.ndarray:
    """Angle per position of each rotated pair, float32 [dim / 2].

    `linear` divides every frequency by the factor; `llama3` only those whose wavelength exceeds the original context
    over `low_freq_factor`, with a linear blend down to `high_freq_factor` (Llama 3.1 release); `yarn` those that turn
    less than `beta_slow` times in the original context, with a linear blend up to `beta_fast` turns (arXiv 2309.00071);
    `longrope` divides each by a factor of its own (arXiv 2402.13753).

    Args:
        config: what to compute.
        long: for longrope, the factors of texts beyond the original context.
    """
    exponents = np.arange(0, config.dim, 2, dtype=np.float32) / np.float32(config.dim)
    # Over 2 pi. Rounded once: a last bit that differs from torch's, which rounds so too, turns far tokens visibly.
    wavelengths = np.power(config.base, exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / wavelengths
    if config.scaling == "linear":
        return frequencies / np.float32(config.factor)
    if config.scaling == "llama3":
        low, high = config.low_freq_factor, config.high_freq_factor
        share_kept = (config.original_max_positions / (2 * np.pi / frequencies) - low) / (high - low)
        share_kept = np.clip(share_kept, 0.0, 1.0)
        scaled = (1 - share_kept) * frequencies / config.factor + share_kept * frequencies
        return scaled.astype(np.float32)
    if config.scaling == "yarn":
        low, high = (_pair_that_turns(config, turns) for turns in (config.beta_fast, config.beta_slow))
        if config.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, config.dim - 1)
        high += 0.001 if low == high else 0
        ramp = (np.arange(config.dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
        share_kept = 1 - np.clip(ramp, 0, 1)
        stretched = np.float32(1) / (np.float32(config.factor) * wavelengths)
        return stretched * (1 - share_kept) + frequencies * share_kept
    if config.scaling == "longrope":
        factors = config.long_factors if long else config.short_factors
        return np.float32(1) / (np.array(factors, np.float32) * wavelengths)
    return frequencies


def _pair_that_turns(config: RotaryConfig, turns: float) -> float:
    """The index, fractional, of the pair of dimensions that turns so many times in the original context."""
    wavelength = config.original_max_positions / (turns * 2 * math.pi)
    return config.dim * math.log(wavelength) / (2 * math.log(config.base))


def rotary_angles(
    config: RotaryConfig, positions: jax.Array, segments: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cosines and signed sines for `rotate`.

    Args:
        config: how to rotate.
        positions: int [B, T].
        segments: int [B, T]: longrope chooses its factors by the length of a text, its prefix included.

    Returns:
        float32 [B, T, 1, dim] each.
    """
    position = positions[..., None, None].astype(jnp.float32)
    angles = position * rotary_frequencies(config)
    if config.scaling == "longrope":
        beyond = positions >= config.original_max_positions
        own, other = segments[:, :, None], segments[:, None, :]
        same_text = (other >= 0) & ((own == other) | (own == 0) | (other == 0))
        is_long = (same_text & beyond[:, None, :]).any(axis=-1)
        long_angles = position * rotary_frequencies(config, long=True)
        angles = jnp.where(is_long[..., None, None], long_angles, angles)
    cos, sin = jnp.cos(angles) * config.attention_factor, jnp.sin(angles) * config.attention_factor
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


def alibi_slopes(num_heads: int, kind: str = "geometric") -> np.ndarray:
    """How much each head favours near keys, float32 [N] (ALiBi, arXiv 2108.12409).

    A power of two n gives the geometric series from 2^(-8/n). Any other count takes the series of the power of two
    below it, then every second slope of the series of twice that; or, "interleaved" (MPT), every second slope of the
    next power of two's series and then those between. "rounded" slopes are bfloat16 (Falcon).
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    if num_heads > power:
        doubled = [2 ** (-4 * (i + 1) / power) for i in range(2 * power)]
        slopes = doubled[1::2] + doubled[::2] if kind == "interleaved" else slopes + doubled[::2]
    dtype = jnp.bfloat16 if kind == "rounded" else np.float32
    return np.array(slopes[:num_heads], dtype).astype(np.float32)
