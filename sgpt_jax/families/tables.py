"""Weight tables: which tensors of a Hugging Face checkpoint are which leaves of the decoder, to load and to export.

A family's table is a tuple of rules, made with the builders below; `{i}` in a name is the layer. A rule for a leaf
that the decoder lacks (a bias, a norm, a head) is skipped.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np

from sgpt_jax.decoder.config import DecoderConfig

Arrays = Sequence[np.ndarray]
Sizes = Callable[[DecoderConfig], Sequence[int]]

# Constants that older checkpoints hold as tensors: attention masks and rotary frequencies.
BUFFERS = re.compile(
    r"(h|layers)\.\d+\.(attn|attn\.attention|attention)\.(bias|masked_bias)"
    r"|(.*\.)?rotary_emb\.inv_freq"
)

# The leaves with a row, or a column, for each vocabulary entry: where the head is tied, the first serves as both.
TABLES = ("embed/tokens/embedding", "head/kernel")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one tensor becomes one or several leaves (`load`), and back (`dump`). Loading gives views.

    `load` raises ValueError for a tensor of an impossible shape.
    """

    load: Callable[[np.ndarray, DecoderConfig], Arrays]
    dump: Callable[[Arrays, DecoderConfig], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor name of the family, the leaves it fills, and its layout."""

    tensor: str
    leaves: tuple[str, ...]
    layout: Layout
    when: Callable[[DecoderConfig], bool] = lambda config: True
    """Whether the rule is for this decoder, where a leaf's tensor has several names in a family."""


COPY = Layout(lambda x, _: (x,), lambda xs, _: xs[0])
# torch's Linear stores [out, in]; the decoder's kernels are [in, out].
TRANSPOSE = Layout(lambda x, _: (x.T,), lambda xs, _: xs[0].T)


def side_by_side(sizes: Sizes, *, transposed: bool = True) -> Layout:
    """Several leaves in one tensor, one after the other along the output axis; kernels and biases alike.

    Args:
        sizes: the leaves' output sizes, from the config.
        transposed: the tensor is torch's [out, in]; False for [in, out] (GPT-2's Conv1D).
    """

    def load(x: np.ndarray, config: DecoderConfig) -> Arrays:
        x = x.T if transposed else x
        parts = sizes(config)
        if not x.ndim or x.shape[-1] != sum(parts):
            raise ValueError(f"{x.shape} for parts of {parts}")
        return np.split(x, np.cumsum(parts)[:-1], axis=-1)

    def dump(parts: Arrays, config: DecoderConfig) -> np.ndarray:
        x = np.concatenate(parts, axis=-1)
        return x.T if transposed else x

    return Layout(load, dump)


def qkv_sizes(config: DecoderConfig) -> Sequence[int]:
    """The widths of queries, keys and values: N H, K H and K H."""
    return [n * config.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]


def gate_up_sizes(config: DecoderConfig) -> Sequence[int]:
    """The widths of gate and up: F each."""
    return [config.mlp_dim] * 2


def _split_by_group(x: np.ndarray, config: DecoderConfig) -> Arrays:
    queries = config.num_heads // config.num_kv_heads
    groups = x.reshape(
        config.num_kv_heads, queries + 2, config.head_dim, *x.shape[1:]
    )  # [K, N/K + 2, H, ...]
    parts = (groups[:, :queries], groups[:, queries], groups[:, queries + 1])
    return [part.reshape(-1, *x.shape[1:]).T for part in parts]


def _join_by_group(parts: Arrays, config: DecoderConfig) -> np.ndarray:
    rows = [x.T.reshape(config.num_kv_heads, -1, config.head_dim, *x.shape[:-1]) for x in parts]
    return np.concatenate(rows, axis=1).reshape(-1, *parts[0].shape[:-1])


# Rows ordered by key/value head: its queries, its key, its value (Falcon); with as many key/value heads as query heads
# that is query, key and value of one head after the other (GPT-NeoX, BLOOM). Kernels and biases alike.
BY_GROUP = Layout(_split_by_group, _join_by_group)


def table(name: str, leaf: str) -> list[Rule]:
    """An embedding table."""
    return [Rule(f"{name}.weight", (f"{leaf}/embedding",), COPY)]


def norm(name: str, leaf: str, when: Callable[[DecoderConfig], bool] = lambda config: True) -> list[Rule]:
    """A norm's weight and bias."""
    parts = (("weight", "scale"), ("bias", "bias"))
    return [Rule(f"{name}.{tensor}", (f"{leaf}/{part}",), COPY, when) for tensor, part in parts]


def linear(name: str, leaf: str, layout: Layout = TRANSPOSE) -> list[Rule]:
    """A linear layer's weight and bias; `layout` is the weight's."""
    return [
        Rule(f"{name}.weight", (f"{leaf}/kernel",), layout),
        Rule(f"{name}.bias", (f"{leaf}/bias",), COPY),
    ]


def fused(name: str, leaves: Iterable[str], layout: Layout) -> list[Rule]:
    """Several linear layers in one tensor; the layout is that of weight and bias."""
    leaves = tuple(leaves)
    return [
        Rule(f"{name}.weight", tuple(f"{leaf}/kernel" for leaf in leaves), layout),
        Rule(f"{name}.bias", tuple(f"{leaf}/bias" for leaf in leaves), layout),
    ]


QKV = tuple(f"blocks/{{i}}/attn/{part}" for part in "qkv")
GATE_UP = ("blocks/{i}/mlp/gate", "blocks/{i}/mlp/up")


def rules(*groups: Iterable[Rule]) -> tuple[Rule, ...]:
    """A table from the rules of several builders."""
    return tuple(rule for group in groups for rule in group)


def leaf_name(pattern: str, layer: int) -> str:
    """A name of the tables with its layer filled in."""
    return pattern.replace("{i}", str(layer))


def active_rules(
    config: DecoderConfig, rules: Iterable[Rule], leaves: Collection[str]
) -> dict[str, tuple[Rule, int]]:
    """The rules for the leaves that a decoder has: tensor name without prefix -> (rule, layer)."""
    found = {}
    for rule in (rule for rule in rules if rule.when(config)):
        layers = range(config.num_layers) if "{i}" in rule.tensor else range(1)
        for layer in layers:
            if leaf_name(rule.leaves[0], layer) in leaves:
                found[leaf_name(rule.tensor, layer)] = (rule, layer)
    return found
