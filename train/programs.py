"""The compiled programs of the training step, one for each shape of a batch, and what they say of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from sgpt_jax.runtime.malloc import give_back_freed_memory
from sgpt_jax.runtime.memory import free_memory
from sgpt_jax.runtime.platform import by_platform

from .step import TrainState

_GIB = 2**30
_SHARE = 0.9  # of what is free, for a suggestion: a program's memory grows a little faster than its rows
_MORE = 0.5  # of what is free, that a step of another shape may take beside what is kept for those before


class StepPrograms:
    """A jitted step that is compiled before it runs, and says then what memory that takes against what is free.

    It says so of the first shape, and of a later one that needs more than is free: what would run out of memory is
    ended by the system without a word.

    Args:
        step: from `train.step.jit_step`.
        chunk_rows: rows encoded at a time, 0 for the whole batch.
        shards: devices that rows are split over, of which a chunk is a multiple.
        say: takes a note for the user.
    """

    def __init__(self, step: jax.stages.Wrapped, chunk_rows: int, shards: int, say: Callable[[str], None]):
        self._step, self._chunk_rows, self._shards, self._say = step, chunk_rows, shards, say
        self._programs: dict[tuple, tuple[jax.stages.Compiled, int]] = {}
        self._last: tuple | None = None
        self._free = 0

    def __call__(self, state: TrainState, frozen: Any, batch: dict) -> tuple[TrainState, Array, Array]:
        """(new state, loss, gradient norm), see `train.step.make_step`."""
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if shapes not in self._programs:
            program = self._step.lower(state, frozen, batch).compile()
            self._programs[shapes] = program, self._describe(program, len(batch["rows"].segments))
        program, needed = self._programs[shapes]
        if self._last not in (None, shapes):
            _make_room(needed)
        self._last = shapes
        return program(state, frozen, batch)

    def _describe(self, program: jax.stages.Compiled, rows: int) -> int:
        """Says what memory a step takes, and returns it, in bytes; 0 where XLA does not know."""
        memory = program.memory_analysis()
        if memory is None:
            return 0
        needed = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        needed *= by_platform(cpu=jax.local_device_count(), accelerator=1)  # CPU devices share one memory
        if first := not self._programs:
            self._free = free_memory(jax.local_devices()[0])
        takes = f"a step takes {needed / _GIB:.1f} GiB beside the model"
        free = f"{self._free / _GIB:.1f} GiB are free"
        if needed <= self._free:
            if first:
                self._say(f"{takes}; {free}")
            return needed
        at_a_time = min(rows, self._chunk_rows or rows)
        fits = int(_SHARE * at_a_time * self._free / needed) // self._shards * self._shards
        advice = (
            f"--chunk-size {fits} should fit" if fits else f"not even {self._shards} at a time should fit"
        )
        self._say(
            f"{takes}, but only {free}: it may be ended for want of memory. It encodes {at_a_time} rows at a time; "
            f"{advice}"
        )
        return needed


def _make_room(needed: int) -> None:
    """Hands the memory of a step of another shape back to the system, where this one's `needed` bytes are scarce."""
    on_cpu = by_platform(cpu=True, accelerator=False)  # an accelerator's memory is not malloc's
    if on_cpu and needed > _MORE * free_memory(jax.local_devices()[0]):
        give_back_freed_memory()
