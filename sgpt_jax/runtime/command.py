"""What every command does around its work: caches, processes, notes, errors as one line, exit codes."""

from __future__ import annotations

import argparse
import atexit
import gc
import os
import sys
import unicodedata
import warnings
from collections.abc import Callable

from sgpt_jax.errors import InputError

# New objects between two of Python's searches for cycles, by default 700 in 3.11. Tracing makes many that stay.
OBJECTS_BETWEEN_COLLECTIONS = 50_000

# Zero-width joiner and non-joiner: several scripts are written with them.
_JOINERS = "\u200c\u200d"


def run_command(
    action: Callable[[], object],
    options: argparse.Namespace,
    *,
    cache_programs: bool = True,
) -> int:
    """Runs a command's work; returns its exit code: 0, 1 after an error that it names, 130 when interrupted.

    Errors of the input and of the file system become one line on standard error, warnings a note each.

    Args:
        action: the work. What takes long to import is imported in it.
        options: the command's; those of `sgpt_jax.cli.options.PROCESSES` make it one of several processes, and
            `output`, if it has one, is named where the system does not say which file it could not write.
        cache_programs: keep compiled programs on disk.
    """
    # With the process its memory goes: nothing there is worth a last search for cycles.
    atexit.register(gc.freeze)
    thresholds = gc.get_threshold()
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS, *thresholds[1:])
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: _tell(f"note: {message}")  # type: ignore[assignment]
            from sgpt_jax.runtime import compile_cache, processes

            if cache_programs:
                compile_cache.enable()
            with processes.session(options):
                action()
        sys.stdout.flush()
    except InputError as error:
        _tell(f"error: {error}")
        return 1
    except BrokenPipeError:
        # Who read the output has enough of it. Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        path = error.filename or (error.errno and getattr(options, "output", None))
        reason = error.strerror or str(error)
        _tell(f"error: {path}: {reason}" if path else f"error: {reason}")
        return 1
    except KeyboardInterrupt:
        _tell("interrupted")
        return 130
    finally:
        gc.set_threshold(*thresholds)
    return 0


def printable(text: str, keep: str = "") -> str:
    r"""The text with what a terminal would obey or hide as escapes, such as \x1b or \n; `keep` is left as it is."""
    return "".join(
        char
        if char in keep
        or char in _JOINERS
        or (unicodedata.category(char)[0] not in "C" and char not in "\u2028\u2029")
        else char.encode("unicode_escape").decode()
        for char in text
    )


def _tell(line: str) -> None:
    print(printable(line, keep="\n\t"), file=sys.stderr)
