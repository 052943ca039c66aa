"""What differs between CPUs and accelerators."""

from __future__ import annotations

from typing import TypeVar

import jax

T = TypeVar("T")


def by_platform(*, cpu: T, accelerator: T) -> T:
    """The value for the default device of this process."""
    return cpu if jax.default_backend() == "cpu" else accelerator
