"""The command `sgpt serve`: signals, exit codes, addresses, keys, and what it writes."""

import argparse
import concurrent.futures
import os
import shutil
import signal
import socket
import subprocess
import sys

import decoders
import httpx
import numpy as np
import pytest
import serving
from indexes import streamed
from safetensors.numpy import load_file, save_file
from serving import DOCUMENTS

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.cli.parser import main, make_parser
from sgpt_jax.corpus_index import index_corpus
from sgpt_jax.errors import InputError
from sgpt_jax.index.build import build_index
from sgpt_jax.index.hits import title_and_snippet
from sgpt_jax.serve.server import load_models, read_key


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = decoders.write_checkpoint("gpt2", tmp_path_factory.mktemp("server") / "tiny")
    return str(decoders.write_tokenizer(folder))


class Running:
    """A server in a process of its own, ready."""

    def __init__(self, model, log, port=0, **environment):
        self.log = log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sgpt_jax.cli", "serve", "--model", model, "--max-seq-length", "32",
                 "--port", str(port)],
                stdout=stream, stderr=subprocess.STDOUT, env=os.environ | environment,
            )  # fmt: skip
        try:
            self.until(lambda: "ready after" in log.read_text())
        except BaseException:
            self.process.kill()
            raise
        self.address = log.read_text().split()[0].rstrip("/")

    def until(self, condition):
        def met():
            assert self.process.poll() is None, self.log.read_text()
            return condition()

        serving.until(met, seconds=120)

    @property
    def port(self):
        return int(self.address.rpartition(":")[2])

    def end(self, number):
        self.process.send_signal(number)
        return self.process.wait(30)


def ask(address, texts):
    return httpx.post(f"{address}/embed", json={"inputs": texts}, timeout=60)


def test_sigterm_answers_what_it_has_begun_and_a_killed_one_starts_again_at_once(model, tmp_path):
    log = tmp_path / "log"
    cache = {"SGPT_COMPILATION_CACHE": str(tmp_path / "compiled")}
    server = Running(model, log, **cache)
    texts = [f"a secret of mine {number}" for number in range(600)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, server.address, texts) for _ in range(8)]

        def queued():
            lines = httpx.get(f"{server.address}/metrics").text.splitlines()
            return any(line.startswith("sgpt_queue_tokens ") and float(line.split()[1]) > 0 for line in lines)

        server.until(queued)
        assert server.end(signal.SIGTERM) == 0
        replies = [answer for answer in map(outcome, asked) if answer is not None]
    # Those that had come in were answered in full; those that had not found the door closed.
    assert replies
    wanted = BiEncoder.from_pretrained(model, max_seq_length=32).encode_document(texts, normalize=True)
    for reply in replies:
        assert reply.status_code == 200
        np.testing.assert_allclose(np.array(reply.json(), np.float32), wanted, rtol=0, atol=1e-6)
    assert log.read_text().splitlines()[-1] == "stopped"
    assert "secret" not in log.read_text()

    server = Running(model, log, server.port, **cache)
    ask(server.address, ["a"])
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    server = Running(model, log, server.port, SGPT_API_KEY="a key", **cache)
    assert ask(server.address, ["a"]).status_code == 401
    assert httpx.post(
        f"{server.address}/embed", json={"inputs": "a"}, headers={"authorization": "Bearer a key"}
    ).is_success
    assert server.end(signal.SIGINT) == 0
    assert "a key" not in log.read_text()


def outcome(asked):
    try:
        return asked.result(60)
    except httpx.TransportError:
        return None


def test_what_cannot_be_served_is_one_line(model, tmp_path, capsys):
    def error(*arguments):
        assert main(["serve", *arguments]) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port}" in error("--model", model, "--port", port)
    assert "port 99999" in error("--model", model, "--port", "99999")
    for option in (["--distributed"], ["--coordinator", "host:1", "--processes", "2", "--process", "0"]):
        assert "runs on one host" in error("--model", model, *option)
    for origin in ("https://a.example/", "a.example", "https://a.example/page", "https://A.example"):
        assert "no page has this origin" in error(
            "--model", model, "--port", "99999", "--cors-origin", origin
        )
    assert "API key" in error("--model", model, "--api-key-file", str(tmp_path / "none"))
    assert "none" in error("--model", str(tmp_path / "none"), "--port", "0")
    assert "index" in error("--index", str(tmp_path / "none"), "--port", "0")


def test_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("SGPT_API_KEY", raising=False)
    assert read_key(None) is None
    file = tmp_path / "key"
    file.write_text("from a file\n")
    assert read_key(str(file)) == "from a file"
    monkeypatch.setenv("SGPT_API_KEY", "from the environment")
    assert read_key(None) == "from the environment"
    assert read_key(str(file)) == "from a file"
    file.write_text(" \n")
    with pytest.raises(InputError, match="empty"):
        read_key(str(file))


def options(*arguments) -> argparse.Namespace:
    return make_parser().parse_args(["serve", *arguments])


def test_the_index_says_with_which_model_it_was_built(model, tmp_path):
    encoder = BiEncoder.from_pretrained(model, pooling="mean", brackets=True, max_seq_length=24)
    metadata = {"model": model, "pooling": "mean", "brackets": True, "max_seq_length": 24, "dtype": "float32"}
    build_index(tmp_path / "index", DOCUMENTS, streamed(encoder.encode_document), metadata=metadata)
    models = load_models(options("--index", str(tmp_path / "index"), "--cross-encoder", model))
    assert (models.encoder.pooling, models.encoder.text.brackets) == ("mean", True)
    assert models.encoder.text.max_seq_length == 24
    assert models.cross_encoder is not None and len(models.index) == 3
    build_index(
        tmp_path / "other", DOCUMENTS, streamed(lambda texts: np.ones((len(texts), 7))), metadata=metadata
    )
    with pytest.raises(InputError, match="another model"):
        load_models(options("--index", str(tmp_path / "other")))


def test_an_index_is_served_with_its_own_model_alone(model, tmp_path):
    index = str(tmp_path / "index")
    index_corpus(index, DOCUMENTS, BiEncoder.from_pretrained(model, max_seq_length=24))
    # The prompt of queries may change with the task.
    assert load_models(options("--index", index, "--query-prompt", "query: ")).index is not None
    other = tmp_path / "other"
    shutil.copytree(model, other)
    tensors = load_file(other / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, other / "model.safetensors")
    for arguments in (["--pooling", "mean"], ["--document-prompt", "text: "], ["--model", str(other)]):
        with pytest.raises(InputError, match="was made with another model"):
            load_models(options("--index", index, *arguments))


def test_the_demonstration_refuses_what_it_cannot_obey(monkeypatch):
    demo = object()
    monkeypatch.setattr("sgpt_jax.serve.server.demo_models", lambda options: demo)
    assert load_models(options("--dtype", "bfloat16", "--weights", "int8", "--mesh", "data=1")) is demo
    for arguments, named in (
        (
            ["--cross-encoder", "M", "--pooling", "mean"],
            "--cross-encoder, --pooling: not for the demonstration",
        ),
        (["--no-brackets"], "--brackets: "),
        (["--adapter", "A"], "--adapter: "),
        (["--query-prompt", ""], "--query-prompt: "),
        (["--dtype", "float32", "--max-seq-length", "9"], "--max-seq-length: "),
        (["--resident", "int8"], "--resident is for an --index"),
    ):
        with pytest.raises(InputError) as error:
            load_models(options(*arguments))
        assert str(error.value).startswith(named)


@pytest.mark.parametrize(
    ("text", "title", "shown"),
    [
        ("A title. And a text.", None, ("A title.", "And a text.")),
        ("A title And a text.", "A title", ("A title", "And a text.")),
        (" A title\t And a text. ", " A title\t", ("A title", "And a text.")),
        ("short", None, ("short", "")),
        ("  ", None, ("", "")),
        ("first line\nsecond", None, ("first line", "second")),
        ("word " * 100, None, ("word " * 28 + "...", "word " * 64 + "...")),
        ("x" * 400, None, ("x" * 140 + " ...", "x" * 260)),
    ],
)
def test_title_and_snippet(text, title, shown):
    assert title_and_snippet(text, title) == shown
