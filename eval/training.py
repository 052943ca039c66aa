"""What `plan` and `speed` need of training.

Its package lies beside this one: `train` in a checkout, `sgpt_jax.train` in what pip installs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__ == "eval":
    from train.batches import BatchPlan, PackedBatches
    from train.data import Example, ListExamples
    from train.losses import LossConfig
    from train.optimizer import lora_of, make_optimizer, split_params, trainable_mask, trained_kinds
    from train.recipes import RECIPES
    from train.step import (
        TrainState,
        init_state,
        jit_step,
        make_step,
        new_state,
        place_batch,
        state_shardings,
    )
else:
    from sgpt_jax.train.batches import BatchPlan, PackedBatches
    from sgpt_jax.train.data import Example, ListExamples
    from sgpt_jax.train.losses import LossConfig
    from sgpt_jax.train.optimizer import (
        lora_of,
        make_optimizer,
        split_params,
        trainable_mask,
        trained_kinds,
    )
    from sgpt_jax.train.recipes import RECIPES
    from sgpt_jax.train.step import (
        TrainState,
        init_state,
        jit_step,
        make_step,
        new_state,
        place_batch,
        state_shardings,
    )

__all__ = [
    "RECIPES",
    "BatchPlan",
    "Example",
    "ListExamples",
    "LossConfig",
    "PackedBatches",
    "TrainState",
    "init_state",
    "jit_step",
    "lora_of",
    "make_optimizer",
    "make_step",
    "new_state",
    "place_batch",
    "split_params",
    "state_shardings",
    "trainable_mask",
    "trained_kinds",
]
