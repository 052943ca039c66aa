"""Forks: a child has none of the threads that JAX's devices need, and would wait for them forever."""

from __future__ import annotations

import os

from jax._src import xla_bridge

_in_use = False  # by this process or, at the time of a fork, its parent
_forked = False


def _before_fork() -> None:
    global _in_use
    _in_use = bool(getattr(xla_bridge, "_backends", True))


def _in_child() -> None:
    global _forked
    _forked = _forked or _in_use


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_in_child)


def check_fork() -> None:
    """To be called before the devices are used.

    Raises:
        RuntimeError: this process was forked from one that had used them.
    """
    if _forked:
        raise RuntimeError(
            "this process was forked from one that had used JAX's devices, whose threads it does not have: it would "
            'wait forever. Start it with the method "spawn" (multiprocessing.get_context("spawn")), or fork before '
            "anything is loaded"
        )
