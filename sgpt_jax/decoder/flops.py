"""How many floating-point operations a decoder needs, counted from its config.

A multiplication and an addition are two operations. Only matmuls count, of real tokens and of the keys that a token may
see. Padding, masked scores, norms and activations are left out: what a program spends on them lowers its share of the
machine's peak.
"""

from __future__ import annotations

from collections.abc import Iterable

from sgpt_jax.decoder.config import DecoderConfig


def layer_weights(config: DecoderConfig) -> int:
    """Elements of one layer's matrices."""
    width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return config.embed_dim * (2 * width + 2 * kv_width + (3 if config.gated else 2) * config.mlp_dim)


def seen_keys(length: int, window: int | None = None, *, bidirectional: bool = False) -> int:
    """Pairs of a token and a key that it sees, over a text: itself and what is before it, at most `window` of them;
    bidirectional, as many after it."""
    reach = length if window is None else min(window, length)
    causal = reach * (reach + 1) // 2 + (length - reach) * reach
    return 2 * causal - length if bidirectional else causal


def forward_flops(config: DecoderConfig, lengths: Iterable[int], *, logits: int = 0) -> tuple[int, int]:
    """Operations of a forward pass.

    Args:
        config: the decoder's.
        lengths: tokens of each text.
        logits: tokens that the language-model head runs at.

    Returns:
        those of matmuls with weights, and those of attention.
    """
    lengths = list(lengths)
    weights = layer_weights(config) * config.num_layers
    if config.token_dim:
        weights += 2 * config.token_dim * config.embed_dim
    keys = sum(
        seen_keys(length, config.window(layer), bidirectional=config.bidirectional)
        for layer in range(config.num_layers)
        for length in lengths
    )
    head = 2 * logits * config.hidden_dim * config.vocab_size
    return 2 * weights * sum(lengths) + head, 4 * keys * config.num_heads * config.head_dim


def training_flops(config: DecoderConfig, lengths: Iterable[int], *, biases_only: bool) -> int:
    """Operations of a training step of a bi-encoder, without those that are repeated to save memory.

    The gradient of a matmul with weights takes one matmul for the inputs, and one more for the weights if they train.
    The gradient of attention takes two for each of its matmuls.

    Args:
        config: the decoder's.
        lengths: tokens of each text.
        biases_only: no weight matrix trains.
    """
    weights, attention = forward_flops(config, lengths)
    return weights * (2 if biases_only else 3) + attention * 3
