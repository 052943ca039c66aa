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
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # the coordination service has no public interface

from sgpt_jax.errors import InputError

OPTIONS = ("distributed", "coordinator", "processes", "process")

_PIECE = 1 << 24  # bytes a message
_FAILED = "sgpt/failed/"
_rounds = itertools.count()
_active = False


class OtherFailed(InputError):
    """Another process of the command failed; the message has its number and what it said."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that make a command one of several processes, the same for every command."""
    group = parser.add_argument_group(
        "several processes", "start the same command once for each, on file systems that all of them see"
    )
    group.add_argument("--distributed", action="store_true",
                       help="one of several, found out from the TPU pod, Slurm or Open MPI that runs it")  # fmt: skip
    group.add_argument("--coordinator", metavar="HOST:PORT", help="one of several: where process 0 listens")
    group.add_argument("--processes", type=int, metavar="N", help="with --coordinator: how many there are")
    group.add_argument("--process", type=int, metavar="I", help="with --coordinator: which this is, from 0")


@contextlib.contextmanager
def session(options: argparse.Namespace) -> Iterator[None]:
    """Makes this process one of several for as long as it lasts, if `add_arguments`'s options say so.

    An error that ends it is told to the others, whose next `gather` or `check` then raises. To be entered before
    anything asks JAX for a device.

    Raises:
        InputError: the options contradict each other, or the others cannot be found.
    """
    global _active
    if not hasattr(options, "distributed"):  # a command that one process does
        yield
        return
    numbers = (options.processes, options.process)
    if options.coordinator is None and numbers != (None, None):
        raise InputError("--processes and --process need --coordinator HOST:PORT")
    if options.coordinator is not None:
        if None in numbers or not 0 <= options.process < options.processes:
            raise InputError("--coordinator needs --processes N and --process I, with I from 0 to N-1")
        found: dict[str, Any] = {
            "coordinator_address": options.coordinator,
            "num_processes": options.processes,
            "process_id": options.process,
        }
    elif options.distributed:
        found = {}
    else:
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
    _active = True
    try:
        yield
    except BaseException as error:
        if not isinstance(error, OtherFailed):
            text = str(error) if isinstance(error, InputError) else repr(error)
            _client().key_value_set(f"{_FAILED}{index()}", text, allow_overwrite=True)
        raise
    finally:
        _active = False


def count() -> int:
    """How many processes share the command's work: 1 outside of a `session`."""
    return jax.process_count() if _active else 1


def index() -> int:
    """Which of them this is."""
    return jax.process_index() if _active else 0


def first() -> bool:
    """Whether this is the process that writes what there is one of, and talks to the user."""
    return index() == 0


def mine(number: int) -> bool:
    """Whether piece `number` of some work is this process's: they take turns."""
    return number % count() == index()


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
    for place, piece in enumerate(pieces):
        client.key_value_set_bytes(_key(number, index(), place), piece)
    client.key_value_set(f"sgpt/{number}/{index()}/pieces", str(len(pieces)))
    values = []
    for process in range(count()):
        if process == index():
            values.append(json.loads(data))
            continue
        there = _wait(f"sgpt/{number}/{process}/pieces")
        got = (
            client.blocking_key_value_get_bytes(_key(number, process, place), 600_000)
            for place in range(int(there))
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
            raise OtherFailed(f"process {key.rpartition('/')[2]} failed: {message}")


def add_up(values: Sequence[int]) -> list[int]:
    """The sum of each number over all processes."""
    return [sum(column) for column in zip(*gather(list(values)), strict=True)]


def _client() -> Any:
    return jax_distributed.global_state.client


def _key(number: int, process: int, place: int) -> str:
    return f"sgpt/{number}/{process}/{place}"


def _wait(key: str) -> str:
    while True:
        try:
            return _client().blocking_key_value_get(key, 2_000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        check()
