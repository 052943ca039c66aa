"""Checkpoints with orbax: the newest ones to go on from, and the best ones by the dev metric.

What is saved is small: trainable leaves, optimizer moments, step, random key and the position in the data. The frozen
model is read again from where it came from. Writing happens in the background; a checkpoint is there whole or not at
all.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from sgpt_jax.decoder.sharding import leaf_path
from sgpt_jax.errors import InputError
from train.step import TrainState

# What a background thread could not do is raised by the next call as well: nobody needs its stack.
for _logger in ("absl", "asyncio"):
    logging.getLogger(_logger).addFilter(lambda record: not record.exc_info)

# Newest checkpoints kept: one to go on from, and one in case the newest is damaged.
_NEWEST = 2


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: of the run; `checkpoints` and `best` are made in it.
        keep_best: how many of the best by dev metric to keep.
    """

    def __init__(self, folder: Any, keep_best: int):
        folder = epath.Path(folder).resolve()
        self.newest = ocp.CheckpointManager(
            folder / "checkpoints",
            options=ocp.CheckpointManagerOptions(max_to_keep=_NEWEST, enable_async_checkpointing=True),
        )
        self.best = ocp.CheckpointManager(
            folder / "best",
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep_best,
                enable_async_checkpointing=True,
                best_fn=lambda metrics: metrics["dev"],
                best_mode="max",
            ),
        )

    def save(self, step: int, state: TrainState, data: dict) -> None:
        """Saves the state after `step` steps and the data iterator's position, in the background."""
        if step in self.newest.all_steps():
            return
        self.wait()  # one write at a time: the processes number their meeting points in the order of the writes
        leaves = ocp.args.StandardSave(_flatten(_own(state)))
        with self._writing():
            self.newest.save(step, args=ocp.args.Composite(state=leaves, data=ocp.args.JsonSave(data)))

    def save_best(self, step: int, trainable: Any, dev: float) -> None:
        """Saves trainable leaves with their dev metric, in the background, if they are among the best."""
        if step not in self.best.all_steps():
            self.wait()
            leaves = ocp.args.StandardSave(_flatten(_own(trainable)))
            with self._writing():
                self.best.save(step, args=leaves, metrics={"dev": dev})

    def restore(self, state: TrainState) -> tuple[int, TrainState, dict] | None:
        """The newest complete checkpoint: (steps done, state, data position); None when there is none.

        Args:
            state: a fresh state, whose shapes and shardings the restored one gets; they need not be those it was
                saved with.

        Raises:
            InputError: the checkpoint is of another model or of other trainable parameters.
        """
        step = self.newest.latest_step()
        if step is None:
            return None
        arguments = ocp.args.Composite(
            state=ocp.args.StandardRestore(_abstract(state)), data=ocp.args.JsonRestore()
        )
        try:
            found = self.newest.restore(step, args=arguments)
        except (ValueError, KeyError) as error:
            raise InputError(
                f"{self.newest.directory}: the checkpoint of step {step} does not fit this model: {error}"
            ) from error
        return step, _unflatten(state, found["state"]), found["data"]

    def restore_best(self, trainable: Any) -> tuple[int, Any, float] | None:
        """The best by dev metric: (step, trainable leaves, dev metric); None when there is none."""
        self.wait()
        step = self.best.best_step()
        if step is None:
            return None
        found = self.best.restore(step, args=ocp.args.StandardRestore(_abstract(trainable)))
        return step, _unflatten(trainable, found), float(self.best.metrics(step)["dev"])

    def wait(self) -> None:
        """Returns when everything is written.

        Raises:
            InputError: it could not be written.
        """
        with self._writing():
            self.newest.wait_until_finished()
            self.best.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the background threads.

        Raises:
            InputError: see `wait`.
        """
        with self._writing():
            self.newest.close()
            self.best.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Names the folder and the reason where orbax, or its background thread before, could not write."""
        try:
            yield
        except (ValueError, OSError) as error:
            found = re.search(
                r"([^:]+) \[os_error_code", str(error)
            )  # what tensorstore's long account ends in
            reason = (
                found[1].strip() if found else getattr(error, "strerror", None) or str(error).split("\n")[0]
            )
            raise InputError(
                f"{self.newest.directory}: a checkpoint could not be written: {reason}"
            ) from error


def _own(tree: Any) -> Any:
    """Copies on a CPU, where the writer may look at the very memory that the next step overwrites."""
    return jax.tree.map(jnp.copy, tree) if jax.default_backend() == "cpu" else tree


def _flatten(tree: Any) -> dict[str, Any]:
    """Leaves by name: a plain dictionary, whatever containers optax uses."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: tuple[Any, ...]) -> str:
    return leaf_path(path).replace("/", ".")


def _abstract(tree: Any) -> dict[str, Any]:
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in _flatten(tree).items()
    }


def _unflatten(like: Any, leaves: dict[str, Any]) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[_name(path)], like)
