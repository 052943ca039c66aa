"""One configuration for every decoder family: each difference between families is a field."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp

from sgpt_jax.errors import InputError

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """Rotary position embedding of queries and keys (RoFormer, arXiv 2104.09864)."""

    dim: int
    """How many of a head's dimensions are rotated: the first `dim` of them."""
    base: float = 10_000.0
    interleaved: bool = False
    """True rotates the pairs (0, 1), (2, 3), ... (GPT-J); False the pairs (i, i + dim/2) (GPT-NeoX, Llama)."""
    scaling: Literal["none", "linear", "llama3", "yarn", "longrope"] = "none"
    factor: float = 1.0
    """By how much the trained context was stretched."""
    original_max_positions: int = 8192
    """The trained context, of llama3, yarn and longrope."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    """These two are llama3's."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """These three are yarn's."""
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    """These two are longrope's: what each frequency is divided by in texts up to the original context, and in longer
    ones. The length of a text decides, not that of its batch."""
    attention_factor: float = 1.0
    """Factor on cosines and sines (yarn, longrope)."""


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
    layer_rotary: tuple[RotaryConfig | None, ...] = ()
    """Per layer, where layers differ: None rotates nothing; () means `rotary` everywhere."""
    alibi: Literal["geometric", "rounded", "interleaved"] = "geometric"
    """How ALiBi's slopes are made: BLOOM's; the same in bfloat16, added before the scale of the products (Falcon); or
    for head counts that are no power of two, the odd ones of the next power first (MPT)."""
    embed_norm: bool = False
    embed_scale: float = 1.0
    """Factor on token embeddings, rounded to the compute dtype."""

    # Block
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    norm_scale: Literal["weight", "weight+1", "none"] = "weight"
    """What a normalised vector is multiplied by: its weights, one more than these (Gemma), or nothing (OLMo)."""
    norm_bias: bool = True
    """Layer norms have biases; RMS norms never do."""
    parallel: bool = False
    """Attention and MLP both read the block's input, and both are added to it."""
    shared_norm: bool = False
    """In a parallel block, one norm feeds attention and MLP (GPT-J)."""
    norm_at: Literal["input", "sum", "output", "both"] = "input"
    """Where norms stand: before each sub-layer; after the residual sums (OPT-350m); after each sub-layer, before the
    sum (OLMo 2); or before and after each sub-layer (Gemma 2)."""
    first_norm: bool = True
    """False: the first block has no norm before attention, since the embedding is normed (ModernBERT)."""
    residual_scale: float = 1.0
    """Factor on what each sub-layer adds (Granite)."""
    residual_from_norm: bool = False
    """Residual sums start from the normed input (BLOOM's apply_residual_connection_post_layernorm)."""
    final_norm: bool = True
    activation: Activation = "gelu_tanh"
    gated: bool = False

    # Attention
    bidirectional: bool = False
    """Tokens see those after them too."""
    attn_scale: float = 1.0
    """Factor on the dot products of queries and keys."""
    scale_by_layer: bool = False
    """Divide the dot products of layer i (from 0) by i + 1 as well (a GPT-2 option)."""
    windows: tuple[int | None, ...] = ()
    """Per layer w: a token sees positions less than w away from its own; None sees all; () means None everywhere."""
    attn_softcap: float | None = None
    """Scores s become cap * tanh(s / cap)."""
    clip_qkv: float | None = None
    """Queries, keys and values are clamped to this absolute value."""
    qk_norm: Literal["none", "head", "heads", "width"] = "none"
    """Norm of queries and keys before rotation: over H with one set of weights (Qwen3) or one for each head
    (StableLM, Cohere), or over all heads together (OLMo 2)."""
    qk_norm_bias: bool = False
    query_scaling: tuple[float, int] | None = None
    """(b, P): queries at position p are multiplied by 1 + b ln(1 + floor(p / P)) (Ministral 3)."""

    # Biases of linear layers
    qkv_bias: bool = False
    attn_out_bias: bool = False
    mlp_bias: bool = False

    # Language-model head
    head: Literal["tied", "untied", "none"] = "tied"
    head_bias: bool = False
    head_transform: bool = False
    """A linear layer, GELU and a norm come before the head (ModernBERT)."""
    head_linear_bias: bool = False
    logit_scale: float = 1.0
    """Factor on logits."""
    logit_softcap: float | None = None
    """Logits l become cap * tanh(l / cap), after the scale."""

    # Dropout rates, used in training only
    embed_dropout: float = 0.0
    attn_dropout: float = 0.0
    residual_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} heads cannot be shared by {self.num_kv_heads} key/value heads: not a multiple"
            )
        rotaries = {rotary for rotary in (self.rotary, *self.layer_rotary) if rotary is not None}
        if (self.positions == "rotary") != bool(rotaries):
            raise ValueError("rotary settings and positions='rotary' belong together")
        for rotary in rotaries:
            if rotary.dim % 2 or not 0 < rotary.dim <= self.head_dim:
                raise ValueError(f"rotary dimension {rotary.dim} must be even and at most {self.head_dim}")
            for factors in (rotary.short_factors, rotary.long_factors):
                if rotary.scaling == "longrope" and len(factors) != rotary.dim // 2:
                    raise ValueError(f"{len(factors)} longrope factors for {rotary.dim // 2} frequencies")
        for what, values in (("windows", self.windows), ("rotary settings", self.layer_rotary)):
            if values and len(values) != self.num_layers:
                raise ValueError(f"{len(values)} {what} for {self.num_layers} layers")
        if self.norm_at == "sum" and (self.parallel or self.residual_from_norm):
            raise ValueError("norms after the residual sums need a serial block")
        if self.shared_norm and not self.parallel:
            raise ValueError("a shared norm needs a parallel block")

    @property
    def hidden_dim(self) -> int:
        """Width of the hidden states that the decoder returns, and so of the text vectors."""
        return self.token_dim or self.embed_dim

    def window(self, layer: int) -> int | None:
        """The attention window of a layer, None where it has none."""
        return self.windows[layer] if self.windows else None

    def rotation(self, layer: int) -> RotaryConfig | None:
        """How a layer rotates queries and keys, None where it does not."""
        return self.layer_rotary[layer] if self.layer_rotary else self.rotary

    @property
    def rotation_depends_on_length(self) -> bool:
        """Whether the same token is rotated otherwise in a longer text."""
        limit = self.max_positions or math.inf
        rotaries = {self.rotary, *self.layer_rotary} - {None}
        return any(r.scaling == "longrope" and r.original_max_positions < limit for r in rotaries if r)


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype of weights and matmuls: "float32" or "bfloat16".

    Raises:
        InputError: for any other name. float16 is left out: sums of squares in trained decoders overflow it.
    """
    if name not in ("float32", "bfloat16"):
        raise InputError(f"dtype must be 'float32' or 'bfloat16', not {name!r}")
    return jnp.dtype(name)
