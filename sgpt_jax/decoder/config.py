"""One configuration for every decoder family: each difference between families is a field."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """Rotary position embedding of queries and keys (RoFormer, arXiv 2104.09864)."""

    dim: int
    """How many of a head's dimensions are rotated: the first `dim` of them."""
    base: float = 10_000.0
    interleaved: bool = False
    """True rotates the pairs (0, 1), (2, 3), ... (GPT-J); False the pairs (i, i + dim/2) (GPT-NeoX, Llama)."""
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    """By how much the trained context was stretched; used by both scalings."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    """The last three are used by llama3 scaling alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape and features of a decoder. Dimensions: E embed, N heads, K key/value heads, H head, F mlp, V vocab."""

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_positions: int | None
    """Longest input in tokens; None where positions are unlimited (ALiBi)."""

    # Embedding
    token_dim: int | None = None
    """Width of the token embedding where it is not E: projected in and, after the last block, out (OPT-350m)."""
    positions: Literal["learned", "rotary", "alibi"] = "rotary"
    position_offset: int = 0
    """Rows of the learned position table before position 0 (2 for OPT)."""
    rotary: RotaryConfig | None = None
    embed_norm: bool = False

    # Block
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    parallel: bool = False
    """Attention and MLP both read the block's input, and both are added to it."""
    shared_norm: bool = False
    """In a parallel block, one norm feeds attention and MLP (GPT-J)."""
    post_norm: bool = False
    """Norms follow the residual sums instead of leading their sub-layers (OPT-350m)."""
    residual_from_norm: bool = False
    """Residual sums start from the normed input (BLOOM's apply_residual_connection_post_layernorm)."""
    final_norm: bool = True
    activation: Activation = "gelu_tanh"
    gated: bool = False

    # Attention
    attn_scale: float = 1.0
    """Factor on the dot products of queries and keys."""
    scale_by_layer: bool = False
    """Divide the dot products of layer i (from 0) by i + 1 as well (a GPT-2 option)."""
    windows: tuple[int | None, ...] = ()
    """Per layer, how many positions back a token sees, itself included; None sees all; () means None everywhere."""
    qk_norm: bool = False
    """RMS norm over H of every query and key head, before rotation (Qwen3)."""

    # Biases. Norms of kind "layer" always have one.
    qkv_bias: bool = False
    attn_out_bias: bool = False
    mlp_bias: bool = False

    # Language-model head
    head: Literal["tied", "untied", "none"] = "tied"
    head_bias: bool = False

    # Dropout rates, used in training only
    embed_dropout: float = 0.0
    attn_dropout: float = 0.0
    residual_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} heads cannot be shared by {self.num_kv_heads} key/value heads: not a multiple"
            )
        if (self.positions == "rotary") != (self.rotary is not None):
            raise ValueError("rotary settings and positions='rotary' belong together")
        if self.rotary and (self.rotary.dim % 2 or self.rotary.dim > self.head_dim):
            raise ValueError(f"rotary dimension {self.rotary.dim} must be even and at most {self.head_dim}")
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(f"{len(self.windows)} windows for {self.num_layers} layers")
        if self.shared_norm and not self.parallel:
            raise ValueError("a shared norm needs a parallel block")

    @property
    def hidden_dim(self) -> int:
        """Width of the hidden states that the decoder returns, and so of the text vectors."""
        return self.token_dim or self.embed_dim

    def window(self, layer: int) -> int | None:
        """The attention window of a layer, None where it sees everything before it."""
        return self.windows[layer] if self.windows else None


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype of weights and matmuls: "float32" or "bfloat16".

    Raises:
        ValueError: for any other name. float16 is left out: sums of squares in trained decoders overflow it.
    """
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be 'float32' or 'bfloat16', not {name!r}")
    return jnp.dtype(name)
