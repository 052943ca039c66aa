"""Checkpoints with orbax: the newest ones to go on from, and the best ones by the dev metric.

What is saved is small: trainable leaves, optimizer moments, step, random key and the position in the data. The frozen
model is read again from where it came from. Writing happens in the background; a checkpoint is there whole or not at
all. What it says of its leaves includes a sum over their bits, which restoring checks: a checkpoint damaged later is
set aside, and the sound one before it is taken.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax import Array

from sgpt_jax.decoder.sharding import leaf_path
from sgpt_jax.errors import InputError

from .step import TrainState, agree

# What a background thread could not do is raised by the next call as well: nobody needs its stack.
for _logger in ("absl", "asyncio"):
    logging.getLogger(_logger).addFilter(lambda record: not record.exc_info)


def _skip_abandoned(show: Any, unraisable: Any) -> None:
    code = getattr(unraisable.object, "cr_code", None)  # a coroutine's
    if str(unraisable.exc_value) != "Event loop is closed" and (
        code is None or "orbax" not in code.co_filename
    ):
        show(unraisable)


# Nor what orbax's and tensorstore's other coroutines say that were running, or waited, when one of them failed.
sys.unraisablehook = functools.partial(_skip_abandoned, sys.unraisablehook)

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
        _check_metrics(folder / "best")
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
        if step not in self.newest.all_steps():
            self._save(self.newest, step, state, data)

    def save_best(self, step: int, trainable: Any, dev: float) -> None:
        """Saves trainable leaves with their dev metric, in the background, if they are among the best."""
        if step not in self.best.all_steps():
            self._save(self.best, step, trainable, {"dev": dev}, metrics={"dev": dev})

    def drop_best_after(self, step: int) -> None:
        """Removes the best ones of later steps: a run that goes on after `step` makes these steps anew.

        What it makes may differ, as the evaluations may be at other steps; and orbax saves no step before its newest.
        """
        for later in self.best.all_steps():
            if later > step:
                self.best.delete(later)

    def restore(self, state: TrainState) -> tuple[int, TrainState, dict] | None:
        """The newest sound checkpoint: (steps done, state, data position); None when there is none at all.

        Those that are damaged are moved to the folder `checkpoints.damaged`, with a warning.

        Args:
            state: a fresh state, whose shapes and shardings the restored one gets; they need not be those it was
                saved with.

        Raises:
            InputError: the checkpoint is of another model or of other trainable parameters, or all are damaged.
        """
        while (step := self.newest.latest_step()) is not None:
            if (found := self._restore(self.newest, step, state)) is not None:
                return step, *found
        # Now or at a start before: a run does not begin again unasked.
        if (aside := _aside(epath.Path(self.newest.directory))).exists():
            raise InputError(
                f"{self.newest.directory}: no checkpoint is sound; remove {aside.name} beside it to start again with "
                "--resume, or name another folder"
            )
        return None

    def restore_best(self, trainable: Any) -> tuple[int, Any, float] | None:
        """The best sound one by dev metric: (step, trainable leaves, dev metric); None when there is none."""
        self.wait()
        while (step := self.best.best_step()) is not None:
            if (found := self._restore(self.best, step, trainable)) is not None:
                if (dev := found[1]["dev"]) == self.best.metrics(step)["dev"]:
                    return step, found[0], dev
                _set_aside(epath.Path(self.best.directory) / str(step), "its metric has changed")
                self.best.reload()
        return None

    def _save(self, manager: ocp.CheckpointManager, step: int, tree: Any, facts: dict, **more: Any) -> None:
        self.wait()  # one write at a time: the processes number their meeting points in the order of the writes
        leaves = _flatten(_own(tree))
        about = {"facts": facts, "leaves": _describe(leaves)}
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(leaves),
            data=ocp.args.JsonSave(about | {"digest": _digest(about)}),
        )
        with self._writing():
            saved = manager.save(step, args=arguments, **more)
        if not saved:
            raise InputError(
                f"{manager.directory}: orbax did not save step {step}; the newest there is {manager.latest_step()}"
            )

    def _restore(self, manager: ocp.CheckpointManager, step: int, like: Any) -> tuple[Any, dict] | None:
        """A checkpoint's leaves, as those of `like`, and the facts saved with them; None after moving a damaged one.

        Raises:
            InputError: it is of another model or of other trainable parameters.
        """
        reason = ""
        try:
            about = manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]
            if about.pop("digest") != _digest(about):
                raise ValueError("its description has changed")
            if differs := _difference(about["leaves"], _flatten(like)):
                raise InputError(
                    f"{manager.directory}: the checkpoint of step {step} does not fit this model: {differs}"
                )
            arguments = ocp.args.Composite(state=ocp.args.StandardRestore(_abstract(like)))
            leaves = manager.restore(step, args=arguments)["state"]
            if _describe(leaves) != about["leaves"]:
                raise ValueError("its content has changed")
        except InputError:
            raise
        except Exception as error:  # whatever the many layers of orbax say of a file that is not as it was
            reason = str(error).split("\n")[0][:200] or type(error).__name__
        if not agree(bool(reason))[0]:
            return _unflatten(like, leaves), about["facts"]
        _set_aside(epath.Path(manager.directory) / str(step), reason or "by what another process reads")
        manager.reload()
        return None

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


def _check_metrics(best: epath.Path) -> None:
    """Sets aside checkpoints whose metric cannot be read, over which orbax would stumble as soon as it looks."""
    for folder in sorted(best.iterdir()) if best.exists() else []:
        file = folder / "metrics/metrics"
        if folder.name.isdigit() and (folder / "commit_success.txt").exists():
            try:
                float(json.loads(file.read_text())["dev"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                _set_aside(folder, f"metrics: {error}")


def _set_aside(folder: epath.Path, reason: str) -> None:
    """Moves a checkpoint to where it is in nobody's way. All processes must call."""
    aside = _aside(folder.parent)
    warnings.warn(
        f"{folder}: this checkpoint is damaged and was moved to {aside.name} ({reason})", stacklevel=2
    )
    if jax.process_index() == 0:
        aside.mkdir(exist_ok=True)
        if (aside / folder.name).exists():
            (aside / folder.name).rmtree()
        folder.rename(aside / folder.name)
    agree(0)  # all wait until it is gone


def _aside(folder: epath.Path) -> epath.Path:
    """Where damaged checkpoints of a folder go."""
    return folder.with_name(f"{folder.name}.damaged")


def _own(tree: Any) -> Any:
    """Copies on a CPU, where the writer may look at the very memory that the next step overwrites."""
    return jax.tree.map(jnp.copy, tree) if jax.default_backend() == "cpu" else tree


def _flatten(tree: Any) -> dict[str, Any]:
    """Leaves by name: a plain dictionary, whatever containers optax uses."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: tuple[Any, ...]) -> str:
    return leaf_path(path).replace("/", ".")


@jax.jit
def _sums(leaves: dict[str, Array]) -> dict[str, Array]:
    """A sum over the bits of each leaf that knows their positions, the same however the leaf is sharded: uint32."""

    def add_up(leaf: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
        weights = jnp.ones(leaf.shape, jnp.uint32)
        for axis in range(leaf.ndim):
            weights = weights * jnp.uint32(2654435761) + jax.lax.broadcasted_iota(
                jnp.uint32, leaf.shape, axis
            )
        return jnp.sum(bits * (2 * weights + 1), dtype=jnp.uint32)

    return {name: add_up(leaf) for name, leaf in leaves.items()}


def _describe(leaves: dict[str, Array]) -> dict[str, list]:
    """What a checkpoint says of its leaves: shape, dtype and sum of each, as JSON has them."""
    sums = jax.device_get(_sums(leaves))
    return {name: [list(leaf.shape), leaf.dtype.name, int(sums[name])] for name, leaf in leaves.items()}


def _difference(stored: dict[str, list], leaves: dict[str, Array]) -> str:
    """The first difference in names, shapes or dtypes; nothing where there is none."""
    wanted = {name: [list(leaf.shape), leaf.dtype.name] for name, leaf in leaves.items()}
    for name in sorted(stored.keys() | wanted.keys()):
        there, here = stored.get(name), wanted.get(name)
        if there is None or here is None:
            return f"{name} is only in the {'model' if there is None else 'checkpoint'}"
        if there[:2] != here:
            return f"{name} is {there[1]}{there[0]} in the checkpoint and {here[1]}{here[0]} in the model"
    return ""


def _digest(about: dict) -> str:
    return hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=16).hexdigest()


def _abstract(tree: Any) -> dict[str, Any]:
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in _flatten(tree).items()
    }


def _unflatten(like: Any, leaves: dict[str, Any]) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[_name(path)], like)
