"""When process 0 of several is gone, JAX's coordination client aborts the others from C++, with a stack on standard
error. It takes no callback from Python, so what it prints is caught on its way, and the abort put off meanwhile.

Run as a program, this file is the reader of standard error: a process of its own, so that nothing is lost where the
first one dies in a moment in which none of its Python threads can run.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

# What the coordination service and its client print, by their source files, and what the client prints before an abort.
_SERVICE = re.compile(rb"coordination_service|preemption_sync_manager|client\.h:")
_FATAL = b"Terminating process because the JAX distributed service detected fatal errors"
_HELD_SECONDS = 1.0
_TOLD_SECONDS = 4.0  # less than the number of SIGABRT, see below


@contextlib.contextmanager
def aborts_caught(fatal: Callable[[str], object]) -> Iterator[None]:
    """Calls `fatal`, in a thread, before the coordination client aborts this process, with what it has to say.

    `fatal` has about four seconds, in which it may end the process in a better way. What else the coordination service
    prints comes a second late, everything else that is written to file descriptor 2 at once, and an abort for any other
    reason six seconds late.
    """
    if os.name != "posix":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    # A handler is called with the number of its signal, 6: this one is sleep(6), after which abort() goes on. It runs
    # in the thread that aborts, without Python, whose other threads go on.
    before = libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
    try:
        with _standard_error_read(fatal):
            yield
    finally:
        libc.signal(signal.SIGABRT, before)


@contextlib.contextmanager
def _standard_error_read(fatal: Callable[[str], object]) -> Iterator[None]:
    """Sends file descriptor 2, but not Python's standard error, through a process that reads along."""
    stream = sys.stderr
    stream.flush()
    direct = os.dup(2)
    told, telling = os.pipe()
    command = [sys.executable, "-S", __file__, str(telling)]
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=direct, pass_fds=[telling])
    os.close(telling)
    assert reader.stdin is not None
    os.dup2(reader.stdin.fileno(), 2)
    reader.stdin.close()
    with contextlib.suppress(OSError, io.UnsupportedOperation):  # a stream that is no file
        if stream.fileno() == 2:
            sys.stderr = open(  # noqa: SIM115
                direct, "w", buffering=1, encoding=stream.encoding, errors=stream.errors, closefd=False
            )

    def listen() -> None:
        with open(told, "rb") as said:
            if text := said.read():
                fatal(text.decode(errors="replace"))

    threading.Thread(target=listen, daemon=True, name="standard error").start()
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stderr = stream
        os.dup2(direct, 2)  # the reader's end, unless a child of this process writes to it too
        with contextlib.suppress(subprocess.TimeoutExpired):
            reader.wait(timeout=2 * _HELD_SECONDS)


def _read(source: int, direct: int, telling: int) -> None:
    """Passes on what comes, and tells of an abort that is coming; says all itself where nobody ends the process."""
    held, seconds = b"", _HELD_SECONDS
    while True:
        if held and not select.select([source], [], [], seconds)[0]:
            os.write(direct, held)
            held = b""
        data = os.read(source, 1 << 16)
        if not data:
            break
        held += data
        if _FATAL in held and seconds == _HELD_SECONDS:
            seconds = _TOLD_SECONDS
            with open(telling, "wb") as told:
                told.write(held)
        match = _SERVICE.search(held)
        start = held.rfind(b"\n", 0, match.start()) + 1 if match else len(held)
        os.write(direct, held[:start])
        held = held[start:]
    if seconds == _HELD_SECONDS:
        os.write(direct, held)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the process that is read
        signal.signal(number, signal.SIG_IGN)
    _read(0, 2, int(sys.argv[1]))
