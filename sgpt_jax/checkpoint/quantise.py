"""Float matrices to int8 with a scale for each channel, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sgpt_jax.decoder.build import INT8_LIMIT
from sgpt_jax.errors import InputError

# Values that are float32 at a time.
_BLOCK = 1 << 22

# The axis of the channels, by the last part of a leaf's name: of a kernel its outputs, of a table its rows.
CHANNEL_AXES = {"kernel": 1, "embedding": 0}


def scale_name(leaf: str) -> str:
    """The leaf with the scales of an int8 leaf."""
    return f"{leaf.rpartition('/')[0]}/scale"


def channel_axis(leaf: str) -> int:
    """The axis of an int8 leaf along which every channel has its scale."""
    return CHANNEL_AXES[leaf.rpartition("/")[2]]


def quantise(leaf: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The int8 values of a matrix and the float32 scale of each channel: values / scale, rounded to the nearest.

    A scale is the largest absolute value of its channel by 127, so that no value is off by more than half a
    scale. Beside the result it takes a few megabytes, whatever the matrix has.

    Args:
        leaf: the matrix's leaf, which tells the axis of the channels.
        values: [., .] of any floating-point dtype; may be a view of a file.

    Raises:
        InputError: the matrix has NaN or infinite values.
    """
    axis = channel_axis(leaf)
    channels = np.moveaxis(values, axis, 0)
    result, scales = np.empty(channels.shape, np.int8), np.empty(len(channels), np.float32)
    step = max(1, _BLOCK // max(1, channels.shape[1]))
    for start in range(0, len(channels), step):
        block = channels[start : start + step].astype(np.float32)
        scale = np.abs(block).max(axis=1, initial=0) / np.float32(INT8_LIMIT)
        if not np.isfinite(scale).all():
            raise InputError(f"{leaf} cannot be held as int8: it has NaN or infinite values")
        scale[scale == 0] = 1
        block /= scale[:, None]
        result[start : start + step] = np.rint(block, out=block)
        scales[start : start + step] = scale
    return np.moveaxis(result, 0, axis), scales


def dequantised(leaves: Mapping[str, Any], leaf: str) -> np.ndarray:
    """A matrix as float32, from its own leaf and that of its scales; a leaf that is not int8 as it is."""
    values = np.asarray(leaves[leaf])
    if values.dtype != np.int8:
        return values
    scales = np.expand_dims(np.asarray(leaves[scale_name(leaf)]), 1 - channel_axis(leaf))
    return values.astype(np.float32) * scales
