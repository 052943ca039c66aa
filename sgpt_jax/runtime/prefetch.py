"""Work that runs in a thread ahead of whoever needs it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def ahead(items: Iterable[T], depth: int, on_wait: Callable[[float], None] | None = None) -> Generator[T]:
    """The items themselves, made in a thread of their own up to `depth` items before they are asked for.

    An error of theirs is raised here after the items before it. Closing the iterator ends the thread at its next item.

    Args:
        items: are iterated in the thread.
        depth: how many finished items may wait; one more can be in the making.
        on_wait: called with the seconds that each item was waited for.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    closed = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not closed.is_set():
            try:
                ready.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=work, daemon=True, name="ahead")
    thread.start()
    try:
        while True:
            start = time.perf_counter()
            kind, value = ready.get()
            if on_wait is not None:
                on_wait(time.perf_counter() - start)
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        closed.set()
        thread.join(timeout=5)  # it may be reading from a pipe that nobody writes to
