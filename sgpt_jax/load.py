"""From a source to a decoder, and what else the encoders need of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from sgpt_jax.checkpoint.tensors import open_checkpoint
from sgpt_jax.checkpoint.weights import load_checkpoint
from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.decoder.model import Decoder
from sgpt_jax.errors import InputError
from sgpt_jax.folder.source import Source, resolve
from sgpt_jax.runtime.forks import check_fork
from sgpt_jax.text.tokenizer import load_tokenizer

if TYPE_CHECKING:  # transformers takes most of a second to import
    from transformers import PreTrainedTokenizerFast

# Tokens that are read where positions are unlimited: what the released ALiBi decoders were trained on.
UNLIMITED_DEFAULT = 2048


def load_decoder(source: Any, dtype: str = "float32", mesh: Mesh | None = None) -> Decoder:
    """The decoder of a checkpoint, in evaluation form.

    Args:
        source: a folder as transformers writes it, a hub id ("org/name" or "org/name@revision"), or a .gguf file.
        dtype: "float32" or "bfloat16", for weights and matmuls.
        mesh: spread the weights over it by the tables of `sharding.py`; None uses the first device.

    Returns:
        `decoder(input_ids, attention_mask)` gives hidden states [B, T, E] after the final norm,
        `decoder.logits(hidden)` float32 logits [B, T, V].

    Raises:
        InputError: when the source is not there, or its config or its tensors do not fit; all misfits are listed.
    """
    check_fork()
    return load_checkpoint(open_checkpoint(resolve(source).path), dtype, mesh)


@dataclass(frozen=True)
class Parts:
    """What an encoder is made of.

    Attributes:
        decoder: the decoder.
        tokenizer: its tokenizer.
        hf_config: the Hugging Face config that it was read from.
    """

    decoder: Decoder
    tokenizer: PreTrainedTokenizerFast
    hf_config: Mapping[str, Any]


def load_parts(source: Source, dtype: str, mesh: Mesh | None) -> Parts:
    """The decoder and the tokenizer of a source, see `load_decoder`."""
    check_fork()
    files = open_checkpoint(source.path)
    return Parts(load_checkpoint(files, dtype, mesh), load_tokenizer(source.path), files.config)


def token_limit(config: DecoderConfig, asked: int | None, stated: int | None = None) -> int:
    """How many tokens of an input are read.

    Args:
        config: the decoder's.
        asked: what the user asks for, or None.
        stated: what the model folder states, or None; the decoder's own limit bounds it.

    Raises:
        InputError: when more is asked for than the decoder has positions.
    """
    limit = config.max_positions
    if asked is not None:
        if limit is not None and asked > limit:
            raise InputError(f"max_seq_length {asked}, but the model has {limit} positions")
        return asked
    if stated is not None:
        return stated if limit is None else min(stated, limit)
    return UNLIMITED_DEFAULT if limit is None else limit
