"""When process 0 of several is gone, JAX's coordination client aborts the others from C++, with a stack on standard
error. It takes no callback from Python, so what it prints is caught on its way, and the abort put off meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator

# What the coordination service and its client print, by their source files, and what the client prints before an abort.
_SERVICE = re.compile(rb"coordination_service|preemption_sync_manager|client\.h:")
_FATAL = b"Terminating process because the JAX distributed service detected fatal errors"
_HELD_SECONDS = 1.0  # far less than the number of SIGABRT, see below


@contextlib.contextmanager
def aborts_caught(fatal: Callable[[str], object]) -> Iterator[None]:
    """Calls `fatal`, in a thread, before the coordination client aborts this process, with what it has to say.

    `fatal` has about five seconds, in which it may end the process in a better way. What else the coordination service
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
    """Sends file descriptor 2, but not Python's standard error, through a thread that reads along."""
    stream = sys.stderr
    stream.flush()
    direct = os.dup(2)
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    os.close(writing)
    with contextlib.suppress(OSError, io.UnsupportedOperation):  # a stream that is no file
        if stream.fileno() == 2:
            sys.stderr = open(  # noqa: SIM115
                direct, "w", buffering=1, encoding=stream.encoding, errors=stream.errors, closefd=False
            )
    arguments = (reading, direct, fatal)
    thread = threading.Thread(target=_pass_on, args=arguments, daemon=True, name="standard error")
    thread.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stderr = stream
        os.dup2(direct, 2)  # ends the pipe, unless a child has it too
        thread.join(timeout=2 * _HELD_SECONDS)


def _pass_on(reading: int, direct: int, fatal: Callable[[str], object]) -> None:
    held = b""
    while True:
        if held and not select.select([reading], [], [], _HELD_SECONDS)[0]:
            os.write(direct, held)
            held = b""
        data = os.read(reading, 1 << 16)
        if not data:
            break
        held += data
        found = _SERVICE.search(held)
        begin = held.rfind(b"\n", 0, found.start()) + 1 if found else len(held)
        os.write(direct, held[:begin])
        held = held[begin:]
        if _FATAL in held:
            fatal(held.decode(errors="replace"))
    os.write(direct, held)
    os.close(reading)
