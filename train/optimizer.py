"""What trains, and how it is updated: one mask from one rule."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sgpt_jax.checkpoint.bias_sets import bias_leaves, is_bias
from sgpt_jax.checkpoint.lora import is_adapter, make_lora
from sgpt_jax.checkpoint.quantise import scale_name
from sgpt_jax.decoder.build import Lora
from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.decoder.sharding import leaf_path
from sgpt_jax.errors import InputError


def trainable_mask(params: Any, rule: str) -> Any:
    """Says for every leaf whether it trains.

    Args:
        params: the decoder's parameters.
        rule: "bias" (every leaf named bias, those of norms too), "lora" (adapters), "lora,bias" (both), "all", or a
            regular expression that is searched in the leaf's path, such as `norm|blocks/1[01]/`. The language-model
            head never trains: no vector depends on it.

    Returns:
        pytree of bools with the structure of `params`.

    Raises:
        InputError: nothing would train, weights in int8 would, or the rule is not a regular expression, or one for
            adapters.
    """
    kinds = trained_kinds(rule)
    if "lora" in rule and not kinds:
        raise InputError(
            f"--trainable {rule!r} is no regular expression for parameters: adapters are made by lora, and by lora,bias"
        )
    try:
        pattern = re.compile(rule)
    except re.error as error:
        raise InputError(
            f"--trainable {rule!r} is neither bias, lora, all nor a regular expression: {error}"
        ) from None

    def trains(path: Any, _: Any) -> bool:
        name = leaf_path(path)
        if name.startswith("head/"):
            return False
        if kinds:
            return ("bias" in kinds and is_bias(path)) or ("lora" in kinds and is_adapter(path))
        return rule == "all" or pattern.search(name) is not None

    mask = jax.tree_util.tree_map_with_path(trains, params)
    if "bias" in kinds and not bias_leaves(params):
        raise InputError(
            "this model has no bias to train. Give it zero biases with --add-biases "
            "(they change nothing before training), train adapters with --trainable lora, or all parameters with "
            "--trainable all"
        )
    _refuse_int8(params, mask, rule)
    if not any(jax.tree.leaves(mask)):
        raise InputError(
            f"--trainable {rule!r} matches no parameter; try bias, lora, all, or another pattern"
        )
    return mask


def _refuse_int8(params: Any, mask: Any, rule: str) -> None:
    leaves = {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    int8 = {name for name, leaf in leaves.items() if leaf.dtype == jnp.int8}
    trained = {leaf_path(path) for path, trains in jax.tree_util.tree_leaves_with_path(mask) if trains}
    if found := sorted(trained & (int8 | {scale_name(name) for name in int8})):
        raise InputError(
            f"--trainable {rule!r} names {len(found)} leaves that --weights int8 freezes, such as {found[0]}; over "
            "int8 weights train bias, lora, or both"
        )


def trained_kinds(rule: str) -> frozenset[str]:
    """Which of "bias" and "lora" a rule names, one or both with a comma between; none for any other rule."""
    kinds = frozenset(rule.split(","))
    return kinds if kinds <= {"bias", "lora"} else frozenset()


def lora_of(
    config: DecoderConfig,
    rule: str,
    rank: int | None,
    alpha: float | None = None,
    targets: tuple[str, ...] = (),
) -> Lora | None:
    """The adapters that a rule trains, None for a rule without: of rank 8, and alpha twice the rank, by default.

    Raises:
        InputError: see `make_lora`.
    """
    if "lora" not in trained_kinds(rule):
        return None
    rank = 8 if rank is None else rank
    return make_lora(config, rank, 2 * rank if alpha is None else alpha, targets)


def split_params(params: Any, mask: Any) -> tuple[Any, Any]:
    """Splits parameters by a mask into (trainable, frozen), each with None in place of the other's leaves.

    Trainable leaves become float32: they are the master copies that the optimizer updates.
    """
    trainable = jax.tree.map(lambda leaf, trains: leaf.astype(jnp.float32) if trains else None, params, mask)
    frozen = jax.tree.map(lambda leaf, trains: None if trains else leaf, params, mask)
    return trainable, frozen


def join_params(trainable: Any, frozen: Any, dtype: Any) -> Any:
    """The inverse of `split_params`; trainable leaves are cast to `dtype`, the compute dtype."""
    return jax.tree.map(
        lambda ours, theirs: theirs if ours is None else ours.astype(dtype),
        trainable,
        frozen,
        is_leaf=lambda leaf: leaf is None,
    )


def decay_mask(params: Any) -> Any:
    """Weight decay touches neither biases nor norms: True for kernels and embeddings (None stays None)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: leaf_path(path).rsplit("/", 1)[-1] not in ("bias", "scale"), params
    )


def linear_schedule(peak: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Learning rate: linear from 0 to `peak` over the warm-up, then linear to 0 at `total_steps`.

    The steps count from 0, so with a warm-up the first step has rate 0 and changes nothing (transformers'
    linear schedule with warm-up, which the SGPT repository uses).
    """
    rise = optax.linear_schedule(0.0, peak, warmup_steps)
    falling = max(0, total_steps - warmup_steps)
    fall = optax.linear_schedule(peak if falling else 0.0, 0.0, max(1, falling))
    return optax.join_schedules([rise, fall], [warmup_steps])


def make_optimizer(mask: Any, rate: optax.Schedule) -> optax.GradientTransformation:
    """AdamW (0.9, 0.999, 1e-6; decay 0.01) after clipping to global norm 1, for the leaves of `mask` alone.

    Clipping stands inside the mask: the norm is that of trainable gradients. The SGPT repository's values.
    """
    adamw = optax.adamw(rate, b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.01, mask=decay_mask)
    return optax.masked(optax.chain(optax.clip_by_global_norm(1.0), adamw), mask)


def describe_split(trainable: Any, frozen: Any) -> str:
    """One line for people: how many parameters train."""
    ours = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    total = ours + sum(leaf.size for leaf in jax.tree.leaves(frozen))
    tensors = len(jax.tree.leaves(trainable))
    return f"training {ours:,} of {total:,} parameters ({100 * ours / total:.4f} %) in {tensors} tensors"
