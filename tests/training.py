"""Runs of training and what torch gives for them (fixtures/training/make.py); MS MARCO's files."""

import gzip
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import decoders
import numpy as np

from train.msmarco import COLLECTION, NEGATIVES, QUERIES, SCORES

WORDS = "heron sea bread bridge café glue star salt fish yeast mill coffee hide law".split()  # noqa: SIM905
FOLDER = Path(__file__).parent / "fixtures/training"
ROOT = Path(__file__).parents[1]


def expected(run, file="runs"):
    with np.load(FOLDER / f"{file}.npz") as stored:
        return {name.removeprefix(f"{run}/"): stored[name] for name in stored if name.startswith(f"{run}/")}


def lora_start(name, shape):
    """What an adapter's A starts from, by the name that PEFT saves it under: [rank, in]."""
    values = np.random.RandomState(decoders.seed_from("lora", name)).uniform(-1, 1, shape)
    return (values * shape[1] ** -0.5).astype(np.float32)


def data(negatives):
    return str(FOLDER / f"{('one_negative', 'two_negatives')[negatives - 1]}.jsonl")


def write_model(variant, folder):
    decoders.write_tokenizer(folder)
    return str(decoders.write_checkpoint(variant, folder))


def check_parameters(tensors, before, wanted):
    """Trained tensors as in torch, all others bit by bit as they were."""
    after = {
        name.removeprefix("after/"): value for name, value in wanted.items() if name.startswith("after/")
    }
    matched = 0
    for name, value in tensors.items():
        short = next((key for key in after if name == key or name.endswith(f".{key}")), None)
        if short is None:
            np.testing.assert_array_equal(value, before[name], err_msg=name)
            continue
        matched += 1
        known = ~np.isnan(after[short])
        np.testing.assert_allclose(value[known], after[short][known], atol=1e-5, err_msg=name)
    assert matched == len(after)


def write_msmarco(folder, records, scores, compress=False):
    folder.mkdir(exist_ok=True)
    files = {
        COLLECTION: "".join(f"{i}\tpassage {i}\n" for i in range(40)),
        QUERIES: "\ufeff7\tquery seven\r\n\n3\tquery three\n5\tquery five",
        NEGATIVES: "\n".join(map(json.dumps, records)),
    }
    for name, text in files.items():
        content = text.encode()
        if compress and not name.endswith(".gz"):
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(gzip.compress(content) if compress else content)
    (folder / SCORES).write_bytes(gzip.compress(pickle.dumps(scores)))
    return str(folder)


class Process:
    """A run in a process of its own, with its output in files: a pipe that nobody reads would stop it."""

    def __init__(
        self, folder, arguments, code="from train.__main__ import main; sys.exit(main(sys.argv[1:]))", **more
    ):
        self.files = [tempfile.NamedTemporaryFile("w+", dir=folder, delete=False) for _ in range(2)]  # noqa: SIM115
        command = [sys.executable, "-c", f"import sys; {code}", *arguments]
        output, errors = self.files
        self.popen = subprocess.Popen(command, cwd=ROOT, env=os.environ | more, stdout=output, stderr=errors)

    def wait(self):
        """(exit code, what it printed, what it printed as errors)"""
        code = self.popen.wait(timeout=500)
        return code, *(Path(stream.name).read_text() for stream in self.files)


def wait_for_steps(process, out, count):
    path = Path(out) / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (path.exists() and path.read_bytes().count(b"\n") >= count):
        assert process.popen.poll() is None, process.wait()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def arguments(base, pairs, out, *more):
    options = {"batch-size": 8, "max-seq-length": 40, "lr": 3e-3, "save-every": 10, "seed": 3}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [
        "pairs",
        "--model",
        base,
        "--data",
        pairs,
        "--output",
        str(out),
        *flags,
        "--avoid-duplicates",
        *map(str, more),
    ]


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
