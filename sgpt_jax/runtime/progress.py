"""What people see of work that takes longer than a second."""

from __future__ import annotations

from tqdm import tqdm


def progress(what: str, unit: str, total: int | None = None, *, show: bool | None = None) -> tqdm:
    """A progress bar on standard error, to be used as a context manager; `update(n)` moves it.

    Args:
        what: is being done, such as "embedding".
        unit: what is counted, such as "text".
        total: how many there are, if that is known.
        show: None shows it on a terminal, after a second; True and False decide.
    """
    return tqdm(desc=what, unit=unit, total=total, delay=1, disable=None if show is None else not show)
