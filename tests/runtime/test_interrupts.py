"""Interrupts while the device works, and forks of a process that has used it."""

import os
import signal
import subprocess
import sys
import threading
import time

import decoders
import pytest

from sgpt_jax.bi_encoder import BiEncoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    decoders.write_checkpoint("llama", folder)
    return decoders.write_tokenizer(folder)


def python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


LOST = """
import gc, os, signal, sys, time
import sgpt_jax.runtime.platform

def callback(phase, info):  # as JAX's: what is raised in here goes nowhere
    if phase == "start" and armed:
        armed.clear()
        os.kill(os.getpid(), signal.SIGINT)

armed = [True]
gc.callbacks.append(callback)
try:
    gc.collect()
    for _ in range(100):
        time.sleep(0.1)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_in_the_garbage_collector_arrives():
    done = python(LOST)
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted\n", "", 0)


def test_other_errors_that_cannot_be_raised_are_shown_as_ever():
    done = python(
        "import gc, sgpt_jax.runtime.platform\n"
        "gc.callbacks.append(lambda phase, info: 1 / 0)\n"
        "gc.collect()\ngc.callbacks.clear()"
    )
    assert "ZeroDivisionError" in done.stderr and done.returncode == 0


def test_an_encode_is_interrupted_soon(folder):
    model = BiEncoder.from_pretrained(folder)
    texts = ["some words of a text " * (number % 20 + 1) for number in range(300)] * 10
    with pytest.warns(UserWarning, match="were cut"):
        model.encode(texts[:300])  # compiles
    for share in (0.2, 0.5, 0.8, 1.1, 1.4, 1.7):
        sent = []

        def send(seconds=share, sent=sent):
            time.sleep(seconds)
            sent.append(time.perf_counter())
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=send)
        with pytest.raises(KeyboardInterrupt):
            thread.start()
            while True:
                model.encode(texts)
        assert time.perf_counter() - sent[0] < 3
        thread.join()


FORK = """
import os, sys, warnings
warnings.simplefilter("ignore")
import numpy as np
from sgpt_jax import BiEncoder, CrossEncoder, index_corpus, load_decoder, pool
if sys.argv[2] == "used":
    model = BiEncoder.from_pretrained(sys.argv[1])
    score = CrossEncoder.from_pretrained(sys.argv[1])
    vector, ids = model.encode("a"), np.ones((1, 2), int)
    hidden, index = model.decoder(ids, ids), index_corpus(sys.argv[1] + "-index", ["a"], model)
if os.fork() == 0:
    if sys.argv[2] == "used":
        for use in (lambda: model.encode("a"), lambda: model.encode(["a"], batch_tokens=64),
                    lambda: score.predict([("a", "b")]), lambda: load_decoder(sys.argv[1]),
                    lambda: model.similarity(vector, vector), lambda: model.decoder(ids, ids),
                    lambda: pool(hidden, ids), lambda: index.search(vector[None], 1)):
            try:
                use()
            except RuntimeError as error:
                print(error, flush=True)
    else:
        print(BiEncoder.from_pretrained(sys.argv[1]).encode("a").shape, flush=True)
    os._exit(0)
os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_after_use_says_so_at_once(folder):
    done = python(FORK, folder, "used")
    lines = done.stdout.splitlines()
    assert len(lines) == 8 and all("was forked from one that had used" in line for line in lines), done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_before_use_works(folder):
    done = python(FORK, folder, "unused")
    assert done.stdout.startswith("("), done.stderr
