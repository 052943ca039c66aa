"""From a source to a decoder."""

from __future__ import annotations

from typing import Any

from jax.sharding import Mesh

from sgpt_jax.checkpoint.tensors import open_checkpoint
from sgpt_jax.checkpoint.weights import load_checkpoint
from sgpt_jax.decoder.model import Decoder
from sgpt_jax.folder.source import resolve


def load_decoder(source: Any, dtype: str = "float32", mesh: Mesh | None = None) -> Decoder:
    """The decoder of a checkpoint, in evaluation form.

    Args:
        source: a folder as transformers writes it, a hub id ("org/name" or "org/name@revision"), or a .gguf file.
        dtype: "float32" or "bfloat16", for weights and matrix products.
        mesh: spread the weights over it by the tables of `sharding.py`; None uses the first device.

    Returns:
        `decoder(input_ids, attention_mask)` gives hidden states [B, T, E] after the final norm,
        `decoder.logits(hidden)` float32 logits [B, T, V].

    Raises:
        InputError: when the source is not there, or its config or its tensors do not fit; all misfits are listed.
    """
    return load_checkpoint(open_checkpoint(resolve(source).path), dtype, mesh)
