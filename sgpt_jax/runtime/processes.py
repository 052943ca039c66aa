"""Several processes of one command, usually one a host: how they find each other, share work and tell results.

What they tell each other goes through JAX's coordination service, not through the devices: processes may arrive hours
apart, need no device memory for it, and learn of a failure elsewhere. (Training, whose processes run every step
together, communicates through the devices.)
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax

from sgpt_jax.errors import InputError
from sgpt_jax.runtime.aborts import aborts_caught

T = TypeVar("T")

_PIECE = 1 << 24  # bytes a message
_FAILED = "sgpt/failed/"
_CLIENT_METHODS = (
    "key_value_set",
    "key_value_set_bytes",
    "blocking_key_value_get",
    "blocking_key_value_get_bytes",
    "key_value_dir_get",
    "key_value_delete",
)
_ALIVE = "sgpt/alive/"
_ENDED = "ended"
_BEAT_SECONDS = 1.0
_LOST_SECONDS = 15.0  # far less than the 100 s after which JAX aborts the others with a stack of C++
_rounds = itertools.count()


class OtherFailed(InputError):
    """Another process of the command failed; the message has its number and what it said."""


@contextlib.contextmanager
def session(options: argparse.Namespace) -> Iterator[None]:
    """Makes this process one of several, if the options of `sgpt_jax.cli.options.PROCESSES` say so.

    An error that ends the session is told to the others, whose next `gather` or `check` then raises. To be entered
    before anything asks JAX for a device.

    Raises:
        InputError: the options contradict each other, or the others cannot be found.
    """
    found = _found(options)
    if found is None:
        yield
        return
    try:
        jax.distributed.initialize(**found)
        jax.devices()  # the processes show each other their devices: all at the start, or some would wait in vain
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the other processes cannot be found: {error}. "
            "Outside of TPU pods, Slurm and Open MPI give --coordinator, --processes and --process"
        ) from error
    try:
        with aborts_caught(_service_failed), _watch():
            try:
                yield
            except jax.errors.JaxRuntimeError:
                _await_the_cause()
                raise
    except BaseException as error:
        if not isinstance(error, OtherFailed):
            text = str(error) if isinstance(error, InputError) else repr(error)
            text = "it was interrupted" if isinstance(error, KeyboardInterrupt) else text
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                _client().key_value_set(f"{_FAILED}{index()}", text, allow_overwrite=True)
        raise


def _service_failed(said: str) -> None:
    """Ends this process where the coordination client is about to abort it as process 0 cannot be reached."""
    if not first() and "Failed to send RPC to coordination service" in said:
        _end(0)


def _await_the_cause() -> None:
    """Waits until it is known whether another process failed or was lost: then computing together fails here too.

    Raises:
        OtherFailed: another process ended with an error.
    """
    end = time.monotonic() + _LOST_SECONDS + 3 * _BEAT_SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            check()
        time.sleep(_BEAT_SECONDS / 5)


@contextlib.contextmanager
def _watch() -> Iterator[None]:
    """Ends this process, with one line, when another one has stopped without a word, or when it has failed and the main
    thread does not come to see it; tells the others this one is alive.
    """
    client, ended = _client(), threading.Event()

    def beat(text: str) -> None:
        client.key_value_set(f"{_ALIVE}{index()}", text, allow_overwrite=True)

    def watch() -> None:
        heard = dict.fromkeys(range(count()), ("", time.monotonic()))
        failed: float | None = None
        for number in itertools.count():
            try:
                beat(str(number))
                said = {int(key.rpartition("/")[2]): text for key, text in client.key_value_dir_get(_ALIVE)}
                failures = client.key_value_dir_get(_FAILED)
            except jax.errors.JaxRuntimeError:  # process 0 is where all this is kept
                if not ended.is_set():
                    _end(0)
                return
            now = time.monotonic()
            for process, (text, since) in heard.items():
                if said.get(process, "") != text:
                    heard[process] = (said[process], now)
                elif text != _ENDED and now - since > _LOST_SECONDS and not ended.is_set():
                    _end(process)
            if failures:
                failed = failed or now
                # The main thread would say so itself; but it may wait for the other in the middle of a step.
                if now - failed > _LOST_SECONDS and not ended.is_set():
                    key, message = failures[0]
                    _say(f"error: {_failure(key, message)}")
                    try:
                        beat(_ENDED)
                        jax.distributed.shutdown()  # for which the one that failed waits
                    finally:
                        os._exit(1)
            if ended.wait(_BEAT_SECONDS):
                return

    thread = threading.Thread(target=watch, daemon=True, name="watch")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=_BEAT_SECONDS)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            beat(_ENDED)


def _end(process: int) -> None:
    """Ends this process at once: the main thread may be waiting for the lost one in code that cannot be stopped."""
    _say(
        f"error: process {process} was lost: it ended without a word, or its machine did. What is finished is kept: "
        "start all processes again with the same command (training: with --resume)"
    )
    os._exit(1)


def _say(line: str) -> None:
    """To be seen although the process ends without clearing up."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _failure(key: str, message: str) -> str:
    """What to say of a process's entry under `_FAILED`."""
    return f"process {key.rpartition('/')[2]} failed: {message}"


def _found(options: argparse.Namespace) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is to be called with: nothing for what it finds out; None for one process."""
    if not hasattr(options, "distributed"):  # a command that only one process does
        return None
    if options.coordinator is None:
        if (options.processes, options.process) != (None, None):
            raise InputError("--processes and --process need --coordinator HOST:PORT")
        return {} if options.distributed else None
    if None in (options.processes, options.process) or not 0 <= options.process < options.processes:
        raise InputError("--coordinator needs --processes N and --process I, with I from 0 to N-1")
    return {
        "coordinator_address": options.coordinator,
        "num_processes": options.processes,
        "process_id": options.process,
    }


def count() -> int:
    """How many processes share the command's work: 1 where `jax.distributed` was not initialised."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
    """Which of them this is."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def first() -> bool:
    """Whether this is the process that writes what there is one of, and talks to the user."""
    return index() == 0


def mine(number: int) -> bool:
    """Whether piece `number` of some work is this process's: they take turns."""
    return number % count() == index()


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's share of some items: equally many that follow each other, in the processes' order."""
    first, last = (-(-number * len(items) // count()) for number in (index(), index() + 1))
    return items[first:last]


def gather(value: Any) -> list[Any]:
    """What every process gives (anything that JSON holds), in their order, to all; waits for the last.

    Every process must call it as often as the others.

    Raises:
        OtherFailed: another process ended with an error.
    """
    if count() == 1:
        return [value]
    number, client = next(_rounds), _client()
    data = json.dumps(value).encode()
    pieces = [data[start : start + _PIECE] for start in range(0, len(data), _PIECE)]
    for part, piece in enumerate(pieces):
        client.key_value_set_bytes(_key(number, index(), part), piece)
    client.key_value_set(f"sgpt/{number}/{index()}/pieces", str(len(pieces)))
    values = []
    for process in range(count()):
        if process == index():
            values.append(json.loads(data))
            continue
        parts = _wait(f"sgpt/{number}/{process}/pieces")
        got = (
            client.blocking_key_value_get_bytes(_key(number, process, part), 600_000)
            for part in range(int(parts))
        )
        values.append(json.loads(b"".join(got)))
    if number:  # who gave something this time has read all of the last time
        client.key_value_delete(f"sgpt/{number - 1}/{index()}/")
    return values


@contextlib.contextmanager
def first_goes_ahead() -> Iterator[None]:
    """What is inside, process 0 does first: it makes what the others then find there."""
    if not first():
        gather(None)
    yield
    if first():
        gather(None)


def from_first(value: Any) -> Any:
    """What process 0 gives, to all."""
    return gather(value if first() else None)[0]


def check() -> None:
    """Raises `OtherFailed` if another process ended with an error; takes no time worth mentioning."""
    if count() > 1:
        for key, message in _client().key_value_dir_get(_FAILED):
            raise OtherFailed(_failure(key, message))


def check_alike(facts: Mapping[str, Any]) -> None:
    """Looks whether all processes were started alike. All must call.

    Args:
        facts: what decides the result, by the name that a message has for it; anything that JSON holds.

    Raises:
        InputError: on every process, naming the facts in which they differ.
    """
    first, *others = gather(dict(facts))
    names = first.keys() | {name for other in others for name in other}
    different = [name for name in names if any(other.get(name) != first.get(name) for other in others)]
    if different:
        raise InputError(
            f"the processes differ in {', '.join(sorted(different))}: start the same command in all of them, with the "
            "same files"
        )


def add_up(values: Sequence[int]) -> list[int]:
    """The sum of each number over all processes."""
    return [sum(column) for column in zip(*gather(list(values)), strict=True)]


def _client() -> Any:
    """JAX's client of its coordination service, which has no public interface.

    Raises:
        RuntimeError: this version of JAX has it elsewhere, or it has other methods.
    """
    try:
        from jax._src import distributed

        client: Any = distributed.global_state.client
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"jax {jax.__version__} has no jax._src.distributed.global_state.client"
        ) from error
    if missing := [name for name in _CLIENT_METHODS if not hasattr(client, name)]:
        raise RuntimeError(f"the coordination client of jax {jax.__version__} has no {', '.join(missing)}")
    return client


def _key(number: int, process: int, part: int) -> str:
    return f"sgpt/{number}/{process}/{part}"


def _wait(key: str) -> str:
    while True:
        try:
            return _client().blocking_key_value_get(key, 2_000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        check()
