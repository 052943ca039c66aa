"""Fetching results one step late, so that the host's work on one overlaps the device's work on the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from sgpt_jax.runtime.forks import check_fork

Started = TypeVar("Started")
Result = TypeVar("Result")


def one_behind(started: Iterable[Started], fetch: Callable[[Started], Result]) -> Iterator[Result]:
    """The result of every started computation, in order, each fetched after the next one was started.

    Args:
        started: starts a computation on the device whenever it is asked for the next item, and does not wait for it.
        fetch: waits for what was started, and makes the result of it.
    """
    check_fork()
    waiting: list[Started] = []
    for item in started:
        waiting.append(item)
        if len(waiting) > 1:
            yield fetch(waiting.pop(0))
    for item in waiting:
        yield fetch(item)
