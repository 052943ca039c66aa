"""The edge of every command: exit codes, and one line for whatever ends it."""

import argparse
import errno
import gc
import os
import subprocess
import sys
import warnings

import pytest

from sgpt_jax.cli import options
from sgpt_jax.decoder.pooling import POOLING_MODES
from sgpt_jax.errors import InputError
from sgpt_jax.runtime.command import printable, run_command
from sgpt_jax.runtime.memory import peak_memory, resident_memory


def raising(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("no such thing"), 1, "error: no such thing"),
        (InputError("id \x1b[31m"), 1, r"error: id \x1b[31m"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 1, "error: out.npy: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "there"), 1, "error: there: Permission denied"),
        (OSError("the network is gone"), 1, "error: the network is gone"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_ends_a_command_is_one_line(error, code, line, capsys):
    assert run_command(raising(error), argparse.Namespace(output="out.npy")) == code
    assert capsys.readouterr().err == line + "\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(raising(ZeroDivisionError()), argparse.Namespace())


def test_warnings_are_notes_without_source_lines(capsys):
    def action():
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("2 texts were cut", stacklevel=1)

    assert run_command(action, argparse.Namespace()) == 0
    assert capsys.readouterr().err == "note: 2 texts were cut\n"


def test_cycles_are_searched_for_less_often_while_a_command_runs():
    before, during = gc.get_threshold(), []
    run_command(lambda: during.append(gc.get_threshold()), argparse.Namespace())
    run_command(raising(InputError("no such thing")), argparse.Namespace())
    assert during[0][0] > 10 * before[0]
    assert gc.get_threshold() == before


def test_a_reader_that_has_enough_ends_a_command_in_silence():
    code = """
import argparse, sys
from sgpt_jax.runtime.command import run_command
sys.exit(run_command(lambda: [print("line " * 100) for _ in range(10_000)], argparse.Namespace()))
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=120) == 1
        assert process.stderr.read() == b""


def test_what_terminals_obey_is_escaped():
    assert printable("a\x1b[2J\x00\n\u202e\u2028b") == r"a\x1b[2J\x00\n\u202e\u2028b"
    for text in ("naïve 東京\u3000都 क्\u200dष 👍", "tab and space \u00a0"):
        assert printable(text) == text
    assert printable("two\nlines\x07", keep="\n") == "two\nlines\\x07"


def test_options_know_every_pooling():
    assert options.POOLING == POOLING_MODES


def test_memory_of_this_process():
    found = resident_memory()
    if found is None:
        pytest.skip("no /proc")
    block = bytearray(os.urandom(1 << 20) * 256)  # beside which what other threads take meanwhile is little
    more = resident_memory()
    assert 0.9 * len(block) < more[0] - found[0] < 1.5 * len(block)
    assert peak_memory() >= 0.99 * sum(more)


@pytest.mark.parametrize("module", ["sgpt_jax.cli", "train", "eval"])
def test_help_and_version_do_not_import_jax(module):
    code = f"""
import runpy, sys
try:
    runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
finally:
    assert "jax" not in sys.modules
"""
    for flag, text in (("--help", "usage: "), ("--version", "sgpt-jax 0.")):
        done = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(text)


def test_the_public_names_are_there_when_they_are_used():
    code = """
import sys
import sgpt_jax
assert "jax" not in sys.modules and set(sgpt_jax.__all__) <= set(dir(sgpt_jax))
for name in sgpt_jax.__all__:
    assert getattr(sgpt_jax, name) is not None
try:
    sgpt_jax.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise SystemExit(1)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
