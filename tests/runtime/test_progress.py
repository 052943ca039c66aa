"""What long work says, on a terminal and in a log."""

import io
import sys
import time

import pytest

from sgpt_jax.runtime import progress as module
from sgpt_jax.runtime.progress import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now)
    return Clock


def test_lines_where_there_is_no_terminal(clock, capsys):
    with progress("training", "step", 100, initial=10) as bar:
        for step in range(40):
            bar.note = f"loss {step / 10:.4f}"
            clock.now += 4
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 160 // 32
    assert lines[0] == "training: 18 of 100 steps (18%), loss 0.7000, 4.0 s/step, 5:28 left"
    assert lines[-1].startswith("training: 50 of 100 steps (50%), loss 3.9000")


def test_lines_of_work_without_an_end(clock, capsys):
    with progress("indexing", "doc") as bar:
        clock.now += 29
        bar.update(5000)
        assert capsys.readouterr().err == ""  # short work says nothing
        clock.now += 21
        bar.update(5000)
        bar.say("half of it")
    found = capsys.readouterr()
    assert found.err == "indexing: 10,000 docs, 200.0 docs/s\n" and found.out == "half of it\n"
    with progress("downloading x.zip", "MB", 90) as bar:
        clock.now += 30
        bar.update(45)
    assert capsys.readouterr().err == "downloading x.zip: 45 of 90 MB (50%), 1.5 MB/s, 0:30 left\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_moves_while_a_batch_takes_long(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(module, "BAR_SECONDS", 0.01)
    end = time.monotonic() + 10
    with progress("indexing", "doc", 8):
        while sys.stderr.getvalue().count("indexing:   0%") < 3 and time.monotonic() < end:
            time.sleep(0.01)
    shown = sys.stderr.getvalue()
    assert shown.count("indexing:   0%") >= 3 and shown.endswith("\n")


def test_a_bar_on_a_terminal_and_nothing_when_told(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress("scoring", "pair", 8, show=False) as bar:
        clock.now += 100
        bar.update(8)
    assert sys.stderr.getvalue() == "" and bar.n == 8
    with progress("scoring", "pair", 8) as bar:
        bar.note = "loss 1"
        bar._bar.delay = 0
        bar.update(8)
        bar._bar.refresh()
    assert "scoring: 100%" in sys.stderr.getvalue() and "loss 1" in sys.stderr.getvalue()
