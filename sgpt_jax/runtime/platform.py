"""What differs between CPUs and accelerators."""

from __future__ import annotations

from typing import TypeVar

import jax

from sgpt_jax.runtime.forks import check_fork
from sgpt_jax.runtime.interrupts import resend_lost_interrupts

resend_lost_interrupts()

T = TypeVar("T")


def by_platform(*, cpu: T, accelerator: T) -> T:
    """The value for the default device of this process."""
    check_fork()
    return cpu if jax.default_backend() == "cpu" else accelerator
