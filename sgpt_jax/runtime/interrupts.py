"""Interrupts from the keyboard that Python would lose.

Python raises KeyboardInterrupt in whichever Python code runs next. While the main thread waits for the device, that is
often a callback of the garbage collector, which JAX has one of: what is raised there is printed and forgotten, and the
work goes on. Such an interrupt is sent again.
"""

from __future__ import annotations

import _thread
import sys
import time
from collections.abc import Callable
from typing import Any

_SECONDS = 0.01  # until the callback has returned


def resend_lost_interrupts() -> None:
    """From now on a KeyboardInterrupt that cannot be raised where it arrived is raised a moment later."""
    before: Callable[[Any], object] = sys.unraisablehook

    def hook(lost: Any) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            _thread.start_new_thread(_interrupt, ())
        else:
            before(lost)

    sys.unraisablehook = hook


def _interrupt() -> None:
    time.sleep(_SECONDS)
    _thread.interrupt_main()
