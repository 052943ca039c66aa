"""What people see of work that takes long: a moving bar on a terminal, and a line now and then where there is none."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import Self

from tqdm import tqdm

# Seconds between two lines where standard error is no terminal: a log of an hour has some hundred of them.
LINE_SECONDS = 30.0
# Seconds after which a bar is shown, and between two looks of it while a batch takes longer than that.
BAR_SECONDS = 1.0


class Progress:
    """Work that is under way; make one with `progress`. A context manager.

    Attributes:
        n: what is done, of the total.
        note: what else to show, such as "loss 0.1234, 5,000 tokens/s".
    """

    def __init__(self, what: str, unit: str, total: int | None, initial: int, show: bool | None) -> None:
        self.n, self.note = initial, ""
        self._what, self._unit, self._total, self._initial = what, unit, total, initial
        terminal = sys.stderr.isatty()
        self._bar: tqdm | None = None
        if show or (show is None and terminal):
            self._bar = tqdm(
                desc=what, unit=unit, total=total, initial=initial, delay=BAR_SECONDS, smoothing=0.1
            )
            self._closed = threading.Event()
            self._clock = threading.Thread(target=self._move, args=(self._bar,), daemon=True, name="progress")
            self._clock.start()
        self._lines = show is None and not terminal
        self._begin = self._last = time.monotonic()

    def update(self, n: int = 1) -> None:
        """So many more are done."""
        self.n += n
        if self._bar is not None:
            if self.note:
                self._bar.set_postfix_str(self.note, refresh=False)
            self._bar.update(n)
        elif self._lines and (now := time.monotonic()) - self._last >= LINE_SECONDS:
            self._last = now
            print(self._line(now - self._begin), file=sys.stderr, flush=True)

    def say(self, message: str) -> None:
        """Prints a line on standard output, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(message, file=sys.stdout)
        else:
            print(message)
        sys.stdout.flush()

    def _line(self, seconds: float) -> str:
        units = self._unit if self._unit.isupper() else f"{self._unit}s"  # 3 MB, 3 docs
        rate = (self.n - self._initial) / seconds
        speed = f"{rate:,.1f} {units}/s" if rate >= 1 or not rate else f"{1 / rate:,.1f} s/{self._unit}"
        done = f"{self.n:,}"
        if self._total:
            done += f" of {self._total:,} {units} ({self.n / self._total:.0%})"
        else:
            done += f" {units}"
        parts = [f"{self._what}: {done}", *([self.note] if self.note else []), speed]
        if self._total and rate:
            parts.append(f"{_duration((self._total - self.n) / rate)} left")
        return ", ".join(parts)

    def _move(self, bar: tqdm) -> None:
        """Shows the bar's clock going, until it is closed."""
        while not self._closed.wait(BAR_SECONDS):
            bar.delay = 0  # else closing it would leave the cursor in its line
            bar.refresh()

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._closed.set()
            self._clock.join()
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def progress(
    what: str, unit: str, total: int | None = None, *, initial: int = 0, show: bool | None = None
) -> Progress:
    """What shows how far work is, on standard error; `update(n)` moves it.

    Args:
        what: is being done, such as "embedding".
        unit: what is counted, such as "text".
        total: how many there are, if that is known.
        initial: how many were done before.
        show: None shows a bar on a terminal, after a second, and elsewhere a line every `LINE_SECONDS`; True a bar;
            False nothing.
    """
    return Progress(what, unit, total, initial, show)


# How a part of some work shows how far it is: as `progress` does, or by moving on its caller's.
Show = bool | Progress | None


def shared_progress(
    what: str, unit: str, total: int, show: Show
) -> contextlib.AbstractContextManager[Progress]:
    """A `progress` of its own, or the caller's, which the caller closes."""
    if isinstance(show, Progress):
        return contextlib.nullcontext(show)
    return progress(what, unit, total, show=show)


def beside(show: Show) -> bool | None:
    """What work on the way to another shows: nothing beside a caller's bar."""
    return False if isinstance(show, Progress) else show


def _duration(seconds: float) -> str:
    """A time such as "1:23:45" or "2:05"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
