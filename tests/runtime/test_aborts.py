"""Aborts of the coordination client, and what is written to file descriptor 2 meanwhile."""

import os
import subprocess
import sys

import pytest

CODE = """
import ctypes, os, sys
from sgpt_jax.runtime.aborts import aborts_caught

def fatal(said):
    sys.stderr.write(f"caught: {said.count('stack')} stacks\\n")
    sys.stderr.flush()
    os._exit(3)

FATAL = b"F1 client.h:80] Terminating process because the JAX distributed service detected fatal errors. a stack\\n"
with aborts_caught(fatal):
    os.write(2, b"plain\\n")
    print("Python's", file=sys.stderr)
    if sys.argv[1] != "end":
        os.write(2, b"E1 coordination_service_agent.cc:289] Polled an error\\n")
    if sys.argv[1] == "fatal":
        os.write(2, FATAL)
    if sys.argv[1] == "locked":
        os.abort()  # no thread of Python runs meanwhile
    if sys.argv[1] != "end":
        ctypes.CDLL(None).abort()  # without the interpreter lock, as from C++
print("afterwards", file=sys.stderr)
os.write(2, b"directly\\n")
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("what", "code", "lines"),
    [
        ("end", 0, {"plain", "Python's", "afterwards", "directly"}),
        ("fatal", 3, {"plain", "Python's", "caught: 1 stacks"}),
        ("other", -6, {"plain", "Python's", "E1 coordination_service_agent.cc:289] Polled an error"}),
        ("locked", -6, {"plain", "Python's", "E1 coordination_service_agent.cc:289] Polled an error"}),
    ],
)
def test_aborts_are_caught(what, code, lines):
    """The client's gets a better end; another one comes, and loses nothing of what was said before."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, what], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == code, done.stderr
    said = set(done.stderr.splitlines())
    if what == "fatal":  # held back for a second, which on a busy machine may not be enough
        said.discard("E1 coordination_service_agent.cc:289] Polled an error")
    assert said == lines
