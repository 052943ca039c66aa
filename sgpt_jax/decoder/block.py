"""One layer of a decoder: attention and MLP, with their norms and residual sums."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from sgpt_jax.decoder.attention import attend, attention_mask_matrix
from sgpt_jax.decoder.build import Build
from sgpt_jax.decoder.cache import GrowingCache
from sgpt_jax.decoder.config import DecoderConfig, RotaryConfig
from sgpt_jax.decoder.layers import MLP, Dropout, Linear, Norm
from sgpt_jax.decoder.positions import alibi_slopes, rotary_angles, rotate
from sgpt_jax.decoder.program import gelu_in_matmul

# Takes a layer's new keys and values, and returns all that it has.
Keep: TypeAlias = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """What one layer gets beside the hidden states; layers of one kind get the same.

    Attributes:
        mask: bool [B, T, S], where S is T, or the slots of the cache.
        angles: cosines and signed sines of its rotation; None for none.
        alibi: float32 [B, N, 1, S].
        query_factors: float32 [B, T, 1, 1], of `query_scaling`.
        dropout: the layer's; None for none.
        gelu_in_matmul: see `MLP`.
    """

    mask: jax.Array
    angles: tuple[jax.Array, jax.Array] | None
    alibi: jax.Array | None
    query_factors: jax.Array | None
    dropout: Dropout | None
    gelu_in_matmul: bool = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Context:
    """What the layers of one forward pass share.

    Attributes:
        config: the decoder's.
        masks: window -> `View.mask`.
        angles: rotation -> `View.angles`.
        alibi, query_factors: see `View`.
        dropout: None for none.
        cache: what was read before these tokens, and takes their keys and values; None for none.
    """

    config: DecoderConfig
    masks: dict[int | None, jax.Array]
    angles: dict[RotaryConfig | None, tuple[jax.Array, jax.Array] | None]
    alibi: jax.Array | None
    query_factors: jax.Array | None
    dropout: Dropout | None
    cache: GrowingCache | None = None

    def at(self, layer: int) -> View:
        """What a layer sees of it."""
        return View(
            self.masks[self.config.window(layer)],
            self.angles[self.config.rotation(layer)],
            self.alibi,
            self.query_factors,
            None if self.dropout is None else self.dropout.at(layer),
            gelu_in_matmul.get(),
        )


def make_context(
    config: DecoderConfig,
    segments: jax.Array,
    positions: jax.Array,
    dropout: Dropout | None,
    cache: GrowingCache | None = None,
) -> Context:
    """Masks, angles and factors for all layers, from segments and positions, int [B, T] (see `Batch`).

    With a cache, each row goes on with the text that the cache has in it.
    """
    layers = range(config.num_layers)
    windows, rotations = {config.window(i) for i in layers}, {config.rotation(i) for i in layers}
    alibi = factors = None
    if config.positions == "alibi":
        alibi = _alibi(config, positions if cache is None else cache.positions)
    if config.query_scaling is not None:
        beta, period = config.query_scaling
        factors = 1 + beta * jnp.log1p(jnp.floor(positions.astype(jnp.float32) / period))[..., None, None]
    return Context(
        config,
        masks={
            w: attention_mask_matrix(segments, positions, w, bidirectional=config.bidirectional)
            if cache is None
            else cache.seen(positions, w)
            for w in windows
        },
        angles={r: None if r is None else rotary_angles(r, positions, segments) for r in rotations},
        alibi=alibi,
        query_factors=factors,
        dropout=dropout,
        cache=cache,
    )


def _alibi(config: DecoderConfig, positions: jax.Array) -> jax.Array:
    """What is added to the scaled scores, float32 [B, N, 1, T]."""
    slopes = jnp.asarray(alibi_slopes(config.num_heads, config.alibi))[:, None, None]
    distances = positions[:, None, None, :].astype(jnp.float32)
    if config.alibi != "rounded":
        return slopes * distances
    # Falcon computes it in bfloat16, distances included, and scales it with the scores.
    rounded = functools.partial(jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=7)
    return rounded(slopes * rounded(distances)) * config.attn_scale


class Attention(nnx.Module):
    """Self-attention of one layer."""

    def __init__(self, config: DecoderConfig, layer: int, build: Build):
        self.config, self.rotation = config, config.rotation(layer)
        self.scale = config.attn_scale / (layer + 1 if config.scale_by_layer else 1)
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        make = functools.partial(Linear, build=build)
        self.q = make(config.embed_dim, width, bias=config.qkv_bias, name="q")
        self.k = make(config.embed_dim, kv_width, bias=config.qkv_bias, name="k")
        self.v = make(config.embed_dim, kv_width, bias=config.qkv_bias, name="v")
        self.o = make(width, config.embed_dim, bias=config.attn_out_bias, name="o")
        self.q_norm, self.k_norm = (
            self._head_norm(heads, build.dtype) for heads in (config.num_heads, config.num_kv_heads)
        )

    def _head_norm(self, heads: int, dtype: jnp.dtype) -> Norm | None:
        head_dim, over = self.config.head_dim, self.config.qk_norm
        if over == "none":
            return None
        shape = {"head": (head_dim,), "heads": (heads, head_dim), "width": (heads * head_dim,)}[over]
        return Norm(shape, self.config, dtype=dtype, bias=self.config.qk_norm_bias)

    def __call__(self, x: jax.Array, view: View, keep: Keep | None) -> jax.Array:
        config = self.config
        q, k, v = self.q(x), self.k(x), self.v(x)
        if config.clip_qkv is not None:
            q, k, v = (jnp.clip(part, -config.clip_qkv, config.clip_qkv) for part in (q, k, v))
        if config.qk_norm == "width":
            q, k = self._normed(q, k)
        q, k, v = (part.reshape(*x.shape[:2], -1, config.head_dim) for part in (q, k, v))
        if config.qk_norm in ("head", "heads"):
            q, k = self._normed(q, k)
        if self.rotation is not None and view.angles is not None:
            q, k = (rotate(part, view.angles, self.rotation) for part in (q, k))
        if view.query_factors is not None:
            q = (q * view.query_factors).astype(q.dtype)
        if keep is not None:
            k, v = keep(k, v)
        drop = None
        if view.dropout is not None and config.attn_dropout:
            drop = functools.partial(_drop_at, view.dropout, config.attn_dropout, 1)
        out = attend(
            q,
            k,
            v,
            view.mask,
            scale=self.scale,
            bias=view.alibi,
            cap=config.attn_softcap,
            causal=not config.bidirectional and keep is None,
            drop=drop,
        )  # [B, T, N, H]
        return self.o(out.reshape(*x.shape[:2], -1))

    def _normed(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        assert self.q_norm is not None and self.k_norm is not None
        return self.q_norm(q), self.k_norm(k)


def _drop_at(dropout: Dropout, rate: float, site: int, x: jax.Array) -> jax.Array:
    return dropout(x, rate, site)


class Block(nnx.Module):
    """Attention and MLP with their norms and residual sums."""

    def __init__(self, config: DecoderConfig, layer: int, build: Build):
        self.config = config

        def norm(there: bool) -> Norm | None:
            return Norm((config.embed_dim,), config, dtype=build.dtype) if there else None

        leads, follows = config.norm_at != "output", config.norm_at in ("output", "both")
        self.norm1 = norm(leads and (config.first_norm or layer > 0))
        self.attn = Attention(config, layer, build)
        self.out_norm1 = norm(follows)
        self.norm2 = norm(leads and not config.shared_norm)
        self.mlp = MLP(config, build)
        self.out_norm2 = norm(follows)

    def __call__(self, x: jax.Array, view: View, keep: Keep | None = None) -> jax.Array:
        """The hidden states [B, T, E] behind the layer; `keep` takes its keys and values, and returns all there are."""
        config = self.config
        if config.parallel:
            normed = _maybe(self.norm1, x)
            for_mlp = normed if config.shared_norm else _maybe(self.norm2, x)
            return x + self._attend(normed, view, keep) + self._transform(for_mlp, view)
        if config.norm_at == "sum":
            x = _maybe(self.norm1, x + self._attend(x, view, keep))
            return _maybe(self.norm2, x + self._transform(x, view))
        normed = _maybe(self.norm1, x)
        x = (normed if config.residual_from_norm else x) + self._attend(normed, view, keep)
        normed = _maybe(self.norm2, x)
        return (normed if config.residual_from_norm else x) + self._transform(normed, view)

    def _attend(self, x: jax.Array, view: View, keep: Keep | None) -> jax.Array:
        return self._branch(self.attn(x, view, keep), self.out_norm1, view, 2)

    def _transform(self, x: jax.Array, view: View) -> jax.Array:
        return self._branch(self.mlp(x, view.gelu_in_matmul), self.out_norm2, view, 3)

    def _branch(self, x: jax.Array, norm: Norm | None, view: View, site: int) -> jax.Array:
        """What a sub-layer adds to the residual sum."""
        x = _maybe(norm, x)
        if self.config.residual_scale != 1:
            x = x * jnp.asarray(self.config.residual_scale, x.dtype)
        if view.dropout is None:
            return x
        return view.dropout(x, self.config.residual_dropout, site)


def _maybe(norm: Norm | None, x: Any) -> Any:
    return x if norm is None else norm(x)
