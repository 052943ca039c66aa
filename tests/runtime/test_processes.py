"""Commands of several real processes, on this machine: the bits of one process, also after one was killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import decoders
import eval_cases
import numpy as np
import pytest
from devices import cpus

from sgpt_jax.cli.parser import main
from sgpt_jax.index.files import Manifest
from sgpt_jax.index.search import Index

ROOT = Path(__file__).parents[2]
DOCUMENTS = 90  # 12 shards of 8 documents, the last with a chunk that is not full

PRELUDE = """
import sys, time
from sgpt_jax.index import build as index_build
from sgpt_jax.runtime import processes
index_build.SHARD_ROWS = 8
"""
INDEX = """
from sgpt_jax.cli.parser import main
sys.exit(main(sys.argv[1:]))
"""
SLOW = """
from sgpt_jax.index.writing import Writer
write = Writer._write
def slow(*arguments):
    time.sleep(0.1)
    write(*arguments)
Writer._write = slow
"""
EVAL = """
import sgpt_jax.rerank
from sgpt_jax.index import streaming
streaming.CHUNK, sgpt_jax.rerank.part_pairs = 4, lambda: 7
from eval.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
ALONE = """
import argparse
from sgpt_jax.errors import InputError
names = dict(distributed=False, coordinator=sys.argv[2], processes=int(sys.argv[4]), process=int(sys.argv[6]))
with processes.session(argparse.Namespace(**names)):
    assert (processes.count(), processes.index()) == (2, names["process"])
    big = "x" * (1 << 25)  # more than one message
    assert [len(text) for text in processes.gather(big[processes.index() :])] == [1 << 25, (1 << 25) - 1]
    assert processes.from_first(names["process"] + 7) == 7
    assert processes.add_up([1, processes.index()]) == [2, 1]
    assert [processes.mine(number) for number in range(3)].count(True) == 2 - processes.index()
    with processes.first_goes_ahead():
        time.sleep(1 - processes.index())
        processes.check()
    processes.check_alike({"--seed": [1], "--output": {}})
    try:
        processes.check_alike({"--seed": 1, "--lr": processes.index(), "--model": "m"})
    except InputError as error:
        print(error)
    if not processes.first():
        raise InputError("the disk is full")
    try:
        processes.gather(None)
    except processes.OtherFailed as error:
        print(error)
"""

# Process 0 waits where it cannot be told, as in the middle of a step.
STUCK = """
import argparse
from sgpt_jax.errors import InputError
processes._LOST_SECONDS = 2
names = dict(distributed=False, coordinator=sys.argv[2], processes=int(sys.argv[4]), process=int(sys.argv[6]))
with processes.session(argparse.Namespace(**names)):
    if not processes.first():
        raise InputError("the disk is full")
    time.sleep(500)
"""


class Job:
    """Several processes with the same command; or one, whose programs are compiled in the same way."""

    def __init__(self, count, scratch, code, arguments):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        environment = os.environ | {
            **cpus(1),
            "SGPT_COMPILATION_CACHE": str(scratch / "compiled"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        }
        self.outputs = [
            (scratch / f"{port}-{number}").with_suffix(end)
            for number in range(count)
            for end in (".out", ".err")
        ]
        self.processes = []
        for number in range(count):
            place = ["--coordinator", f"localhost:{port}", "--processes", count, "--process", number]
            place = list(map(str, place)) if count > 1 else []
            with self.outputs[2 * number].open("w") as out, self.outputs[2 * number + 1].open("w") as err:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", PRELUDE + code, *map(str, arguments), *place],
                        env=environment,
                        stdout=out,
                        stderr=err,
                    )
                )

    def wait(self):
        """Exit codes and outputs."""
        codes = [process.wait(timeout=600) for process in self.processes]
        return codes, [path.read_text() for path in self.outputs]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = decoders.write_checkpoint("llama", tmp_path_factory.mktemp("model") / "tiny")
    return str(decoders.write_tokenizer(folder))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    draw = np.random.RandomState(1)
    words = "heron ferry market bay water night shallow day people stay twice crosses waits three on".split()  # noqa: SIM905
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    lines = [
        json.dumps({"_id": f"d{number}", "text": " ".join(draw.choice(words, draw.randint(1, 12)))}) + "\n"
        for number in range(DOCUMENTS)
    ]
    path.write_text("".join(lines) + lines[3])  # a repeated record
    return str(path)


def options(model, corpus, folder, store):
    return ["index", corpus, "-o", str(folder), "--model", model, "--chunk-size", "4", "--store", store]


@pytest.fixture(scope="module")
def one(model, corpus, tmp_path_factory):
    """The indexes of one process, by dtype."""
    root = tmp_path_factory.mktemp("one")
    for store in ("float32", "int8"):
        codes, outputs = Job(1, root, INDEX, options(model, corpus, root / store, store)).wait()
        assert codes == [0], outputs
    return {store: files(root / store) for store in ("float32", "int8")}


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_two_processes_write_the_index_of_one(model, corpus, one, tmp_path):
    job = Job(2, tmp_path, INDEX, options(model, corpus, tmp_path / "two", "float32"))
    codes, outputs = job.wait()
    assert codes == [0, 0], outputs
    assert files(tmp_path / "two") == one["float32"]
    assert len([name for name in one["float32"] if name.endswith(".vectors")]) == 12
    assert "90 documents" in outputs[0] and "90 encoded in" in outputs[0] and "2 processes" in outputs[0]
    assert outputs[2] == ""  # the second process has nothing to say


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_is_named_by_the_other(killed, model, corpus, tmp_path):
    """Within seconds, in one line, and without a stack, also where it is the one that all are connected to."""
    slower = SLOW.replace("0.1", "3") + INDEX
    job = Job(2, tmp_path, slower, options(model, corpus, tmp_path / "index", "float32"))
    deadline = time.monotonic() + 300
    while not (tmp_path / "index/manifest.json").exists():
        assert time.monotonic() < deadline and job.processes[1].poll() is None, job.outputs
        time.sleep(0.05)
    time.sleep(2)
    job.processes[killed].kill()
    begin = time.monotonic()
    codes, outputs = job.wait()
    assert codes == ([-signal.SIGKILL, 1] if killed == 0 else [1, -signal.SIGKILL]), outputs
    assert time.monotonic() - begin < 40
    said = outputs[2 * (1 - killed) + 1]
    assert said.count("\n") == 1, said
    assert said.startswith(f"error: process {killed} was lost") and "start all processes again" in said


def test_two_killed_processes_and_three_that_go_on(model, corpus, one, tmp_path):
    folder = tmp_path / "index"
    job = Job(2, tmp_path, SLOW + INDEX, options(model, corpus, folder, "int8"))

    def rows():
        """Of the shards of each process, how many rows are safe."""
        if not (folder / "manifest.json").exists():
            return [0, 0]
        found = [0, 0]
        for shard in Manifest.load(folder).shards:
            found[shard.start // 48] += shard.rows
        return found

    def wait_until(condition):
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline and job.processes[0].poll() is None, job.outputs[1].read_text()
            time.sleep(0.01)

    wait_until(lambda: rows()[1] >= 4)
    job.processes[1].send_signal(signal.SIGKILL)
    job.processes[1].wait()
    assert rows()[1] < 40
    wait_until(lambda: rows()[0] == 48)  # the other one finishes its share, and waits
    job.processes[0].send_signal(signal.SIGKILL)
    job.processes[0].wait()
    there = sum(rows())
    assert 52 <= there < DOCUMENTS

    codes, outputs = Job(3, tmp_path, INDEX, options(model, corpus, folder, "int8")).wait()
    assert codes == [0] * 3, outputs
    assert files(folder) == one["int8"]
    assert f"{DOCUMENTS - there} encoded in" in outputs[0]
    assert len(Index.open(folder)) == DOCUMENTS


def test_two_processes_evaluate_as_one(model, tmp_path):
    pytest.importorskip("pytrec_eval", reason="the eval extra is not installed")

    data = eval_cases.small_beir(tmp_path / "small")
    arguments = ["beir", data, "--model", model, "--cross-encoder", model, "--rerank-depth", "6", "--output"]
    codes, outputs = Job(2, tmp_path, EVAL, [*arguments, tmp_path / "two"]).wait()
    assert codes == [0, 0], outputs
    codes, alone = Job(1, tmp_path, EVAL, [*arguments, tmp_path / "one"]).wait()
    assert codes == [0], alone
    ours, theirs = (json.loads((tmp_path / name / "small.json").read_text()) for name in ("two", "one"))
    for part in ("metrics", "first_stage", "counts", "queries", "per_query", "settings", "model", "work"):
        assert ours[part] == theirs[part], part
    assert ours["work"]["pairs"] == 18
    runs = [(tmp_path / name / "small.trec").read_bytes() for name in ("two", "one")]
    assert runs[0] == runs[1]
    assert outputs[2] == ""


def test_what_processes_tell_each_other(tmp_path):
    codes, outputs = Job(2, tmp_path, ALONE, []).wait()
    assert codes == [0, 1], outputs
    assert outputs[0].count("the processes differ in --lr: start") == 1
    assert outputs[0].endswith("process 1 failed: the disk is full\n")
    assert outputs[2].count("the processes differ in --lr: start") == 1


def test_a_process_that_cannot_be_told_of_a_failure_ends_all_the_same(tmp_path):
    begin = time.monotonic()
    codes, outputs = Job(2, tmp_path, STUCK, []).wait()
    assert codes == [1, 1] and outputs[1] == "error: process 1 failed: the disk is full\n", outputs
    assert "InputError: the disk is full" in outputs[3]
    assert time.monotonic() - begin < 300


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--processes 2", "need --coordinator"),
        ("--coordinator localhost:1 --processes 2", "--process I"),
        ("--coordinator localhost:1 --processes 2 --process 2", "--process I"),
    ],
)
def test_options_that_contradict_each_other(more, message, model, corpus, tmp_path, capsys):
    assert main([*options(model, corpus, tmp_path / "i", "float32"), *more.split()]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "i").exists()
