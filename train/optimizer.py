"""What trains, and how it is updated: one mask from one rule."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sgpt_jax.checkpoint.bias_sets import is_bias
from sgpt_jax.decoder.sharding import leaf_path
from sgpt_jax.errors import InputError


def trainable_mask(params: Any, rule: str) -> Any:
    """Says for every leaf whether it trains.

    Args:
        params: the decoder's parameters.
        rule: "bias" (every leaf named bias, those of norms too), "all", or a regular expression that is
            searched in the leaf's path, such as `norm|blocks/1[01]/`. The language-model head never trains:
            no vector depends on it.

    Returns:
        pytree of bools with the structure of `params`.

    Raises:
        InputError: nothing would train, or the rule is not a regular expression.
    """
    try:
        pattern = re.compile(rule)
    except re.error as error:
        raise InputError(
            f"--trainable {rule!r} is neither bias, all nor a regular expression: {error}"
        ) from None

    def trains(path: Any, _: Any) -> bool:
        name = leaf_path(path)
        if name.startswith("head/"):
            return False
        if rule == "bias":
            return is_bias(path)
        return rule == "all" or pattern.search(name) is not None

    mask = jax.tree_util.tree_map_with_path(trains, params)
    if not any(jax.tree.leaves(mask)):
        if rule == "bias":
            raise InputError(
                "this model has no bias to train. Give it zero biases with --add-biases "
                "(they change nothing before training), or train all parameters with --trainable all"
            )
        raise InputError(f"--trainable {rule!r} matches no parameter; try bias, all, or another pattern")
    return mask


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
