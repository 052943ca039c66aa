"""What every command does around its work: caches, processes, notes, errors as one line, exit codes."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable

from sgpt_jax.errors import InputError
from sgpt_jax.runtime import compile_cache, processes


def run_command(
    action: Callable[[], object],
    options: argparse.Namespace,
    *,
    errors: tuple[type[Exception], ...] = (InputError,),
    cache_programs: bool = True,
) -> int:
    """Runs a command's work; returns its exit code: 0, 1 after an error of the input, 130 when interrupted.

    Args:
        action: the work.
        options: the command's, for those of `processes.add_arguments` among them.
        errors: what is shown as one line, without a traceback.
        cache_programs: keep compiled programs on disk.
    """
    if cache_programs:
        compile_cache.enable()
    warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)  # type: ignore[assignment]
    try:
        with processes.session(options):
            action()
    except errors as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
