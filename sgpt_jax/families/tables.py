"""Weight names: per family, one table between Hugging Face tensors and the decoder's leaves, usable both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from sgpt_jax.decoder.config import DecoderConfig

Arrays = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one tensor becomes one or several leaves (`load`), and back (`dump`)."""

    load: Callable[[np.ndarray, DecoderConfig], Arrays]
    dump: Callable[[Arrays, DecoderConfig], np.ndarray]


def _split_per_head(x: np.ndarray, config: DecoderConfig) -> Arrays:
    parts = x.reshape(config.num_heads, 3, config.head_dim, *x.shape[1:])  # [N, 3, H, ...]
    return tuple(parts[:, i].reshape(-1, *x.shape[1:]).T for i in range(3))


def _join_per_head(parts: Arrays, config: DecoderConfig) -> np.ndarray:
    heads = [x.T.reshape(config.num_heads, 1, config.head_dim, *x.shape[:-1]) for x in parts]
    return np.concatenate(heads, axis=1).reshape(-1, *parts[0].shape[:-1])


COPY = Layout(lambda x, _: (x,), lambda xs, _: xs[0])
# torch's Linear stores [out, in]; the decoder's kernels are [in, out].
TRANSPOSE = Layout(lambda x, _: (x.T,), lambda xs, _: xs[0].T)
# Queries, keys and values side by side in the last axis (GPT-2's Conv1D is [in, out] already).
CONCAT = Layout(lambda x, _: tuple(np.split(x, 3, axis=-1)), lambda xs, _: np.concatenate(xs, axis=-1))
# Rows ordered head by head, and within a head query, key, value (GPT-NeoX, BLOOM); kernels and biases alike.
PER_HEAD = Layout(_split_per_head, _join_per_head)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor name of the family, the leaves it fills ({i} is the layer), and its layout."""

    tensor: str
    leaves: tuple[str, ...]
    layout: Layout


def _table(name: str, leaf: str) -> list[Rule]:
    return [Rule(f"{name}.weight", (f"{leaf}/embedding",), COPY)]


def _norm(name: str, leaf: str) -> list[Rule]:
    return [Rule(f"{name}.weight", (f"{leaf}/scale",), COPY), Rule(f"{name}.bias", (f"{leaf}/bias",), COPY)]


def _linear(name: str, leaf: str, layout: Layout = TRANSPOSE) -> list[Rule]:
    return [
        Rule(f"{name}.weight", (f"{leaf}/kernel",), layout),
        Rule(f"{name}.bias", (f"{leaf}/bias",), COPY),
    ]


def _fused(name: str, kernels: Layout, biases: Layout) -> list[Rule]:
    parts = [f"blocks/{{i}}/attn/{part}" for part in "qkv"]
    return [
        Rule(f"{name}.weight", tuple(f"{part}/kernel" for part in parts), kernels),
        Rule(f"{name}.bias", tuple(f"{part}/bias" for part in parts), biases),
    ]


def _rules(*groups: Iterable[Rule]) -> tuple[Rule, ...]:
    return tuple(rule for group in groups for rule in group)


_HEAD = _linear("lm_head", "head")

GPT2 = _rules(
    _table("wte", "embed/tokens"),
    _table("wpe", "embed/positions"),
    _norm("h.{i}.ln_1", "blocks/{i}/norm1"),
    _fused("h.{i}.attn.c_attn", CONCAT, CONCAT),
    _linear("h.{i}.attn.c_proj", "blocks/{i}/attn/o", COPY),
    _norm("h.{i}.ln_2", "blocks/{i}/norm2"),
    _linear("h.{i}.mlp.c_fc", "blocks/{i}/mlp/up", COPY),
    _linear("h.{i}.mlp.c_proj", "blocks/{i}/mlp/down", COPY),
    _norm("ln_f", "final_norm"),
    _HEAD,
)

GPT_NEO = _rules(
    _table("wte", "embed/tokens"),
    _table("wpe", "embed/positions"),
    _norm("h.{i}.ln_1", "blocks/{i}/norm1"),
    _linear("h.{i}.attn.attention.q_proj", "blocks/{i}/attn/q"),
    _linear("h.{i}.attn.attention.k_proj", "blocks/{i}/attn/k"),
    _linear("h.{i}.attn.attention.v_proj", "blocks/{i}/attn/v"),
    _linear("h.{i}.attn.attention.out_proj", "blocks/{i}/attn/o"),
    _norm("h.{i}.ln_2", "blocks/{i}/norm2"),
    _linear("h.{i}.mlp.c_fc", "blocks/{i}/mlp/up"),
    _linear("h.{i}.mlp.c_proj", "blocks/{i}/mlp/down"),
    _norm("ln_f", "final_norm"),
    _HEAD,
)

GPTJ = _rules(
    _table("wte", "embed/tokens"),
    _norm("h.{i}.ln_1", "blocks/{i}/norm1"),
    _linear("h.{i}.attn.q_proj", "blocks/{i}/attn/q"),
    _linear("h.{i}.attn.k_proj", "blocks/{i}/attn/k"),
    _linear("h.{i}.attn.v_proj", "blocks/{i}/attn/v"),
    _linear("h.{i}.attn.out_proj", "blocks/{i}/attn/o"),
    _linear("h.{i}.mlp.fc_in", "blocks/{i}/mlp/up"),
    _linear("h.{i}.mlp.fc_out", "blocks/{i}/mlp/down"),
    _norm("ln_f", "final_norm"),
    _HEAD,
)

GPT_NEOX = _rules(
    _table("embed_in", "embed/tokens"),
    _norm("layers.{i}.input_layernorm", "blocks/{i}/norm1"),
    _fused("layers.{i}.attention.query_key_value", PER_HEAD, PER_HEAD),
    _linear("layers.{i}.attention.dense", "blocks/{i}/attn/o"),
    _norm("layers.{i}.post_attention_layernorm", "blocks/{i}/norm2"),
    _linear("layers.{i}.mlp.dense_h_to_4h", "blocks/{i}/mlp/up"),
    _linear("layers.{i}.mlp.dense_4h_to_h", "blocks/{i}/mlp/down"),
    _norm("final_layer_norm", "final_norm"),
    # The name that hub checkpoints have and that transformers writes to this day.
    _linear("embed_out", "head"),
)

BLOOM = _rules(
    _table("word_embeddings", "embed/tokens"),
    _norm("word_embeddings_layernorm", "embed/norm"),
    _norm("h.{i}.input_layernorm", "blocks/{i}/norm1"),
    _fused("h.{i}.self_attention.query_key_value", PER_HEAD, PER_HEAD),
    _linear("h.{i}.self_attention.dense", "blocks/{i}/attn/o"),
    _norm("h.{i}.post_attention_layernorm", "blocks/{i}/norm2"),
    _linear("h.{i}.mlp.dense_h_to_4h", "blocks/{i}/mlp/up"),
    _linear("h.{i}.mlp.dense_4h_to_h", "blocks/{i}/mlp/down"),
    _norm("ln_f", "final_norm"),
    _HEAD,
)

OPT = _rules(
    _table("embed_tokens", "embed/tokens"),
    _table("embed_positions", "embed/positions"),
    _linear("project_in", "embed/project_in"),
    _norm("layers.{i}.self_attn_layer_norm", "blocks/{i}/norm1"),
    _linear("layers.{i}.self_attn.q_proj", "blocks/{i}/attn/q"),
    _linear("layers.{i}.self_attn.k_proj", "blocks/{i}/attn/k"),
    _linear("layers.{i}.self_attn.v_proj", "blocks/{i}/attn/v"),
    _linear("layers.{i}.self_attn.out_proj", "blocks/{i}/attn/o"),
    _norm("layers.{i}.final_layer_norm", "blocks/{i}/norm2"),
    _linear("layers.{i}.fc1", "blocks/{i}/mlp/up"),
    _linear("layers.{i}.fc2", "blocks/{i}/mlp/down"),
    _norm("final_layer_norm", "final_norm"),
    _linear("project_out", "project_out"),
    _HEAD,
)

# Llama's names serve Mistral, Qwen2 and Qwen3: what one of them lacks is a leaf that its decoder does not have.
LLAMA = _rules(
    _table("embed_tokens", "embed/tokens"),
    _norm("layers.{i}.input_layernorm", "blocks/{i}/norm1"),
    _linear("layers.{i}.self_attn.q_proj", "blocks/{i}/attn/q"),
    _linear("layers.{i}.self_attn.k_proj", "blocks/{i}/attn/k"),
    _linear("layers.{i}.self_attn.v_proj", "blocks/{i}/attn/v"),
    _linear("layers.{i}.self_attn.o_proj", "blocks/{i}/attn/o"),
    _norm("layers.{i}.self_attn.q_norm", "blocks/{i}/attn/q_norm"),
    _norm("layers.{i}.self_attn.k_norm", "blocks/{i}/attn/k_norm"),
    _norm("layers.{i}.post_attention_layernorm", "blocks/{i}/norm2"),
    _linear("layers.{i}.mlp.gate_proj", "blocks/{i}/mlp/gate"),
    _linear("layers.{i}.mlp.up_proj", "blocks/{i}/mlp/up"),
    _linear("layers.{i}.mlp.down_proj", "blocks/{i}/mlp/down"),
    _norm("norm", "final_norm"),
    _HEAD,
)
