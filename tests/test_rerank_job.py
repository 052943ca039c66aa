"""The re-ranking job: what it writes, and that an interruption at any moment changes nothing."""

import os
import signal
import subprocess
import sys
import warnings

import decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgpt_jax import rerank_job as module
from sgpt_jax.cross_encoder import CrossEncoder
from sgpt_jax.decoder.model import merge, split
from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document
from sgpt_jax.files.runs import read_run
from sgpt_jax.load import load_decoder
from sgpt_jax.rerank_job import rerank_job
from sgpt_jax.text.encoder import TextEncoder
from sgpt_jax.text.pairs import Prompt
from sgpt_jax.text.tokenizer import load_tokenizer

DOCUMENTS = [
    Document("h", "A heron waits in the shallow water. It folds its neck and stands."),
    Document("b", "Boats."),
    Document("f", "The ferry crosses the bay twice a day."),
    Document("unused", "Nobody asks for this."),
    Document("i", "In winter the ice stops it for weeks; then the mail comes over the pass."),
]
QUERIES = {"1": "wading birds", "2": "ferry times", "b": "what boats", "9": "not in the run"}
RUN = {
    "1": {"h": 3.0, "b": 2.0, "f": 2.0, "i": 1.0},
    "2": {"f": 5.0, "b": 4.0, "h": 0.5},
    "b": {"b": 9.0, "f": 8.0, "i": 7.0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    decoders.write_checkpoint("llama", folder)
    return decoders.write_tokenizer(folder)


@pytest.fixture(scope="module")
def model(folder):
    return CrossEncoder.from_pretrained(folder, prompt="Text: {} Query: ")


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(module, "part_pairs", lambda: 2)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_scores_and_order(model, tmp_path):
    report = rerank_job(model, RUN, QUERIES, iter(DOCUMENTS), tmp_path / "out.trec", depth=3)
    assert sorted(files(tmp_path)) == ["out.json", "out.trec"]
    run = read_run(tmp_path / "out.trec")
    assert run == read_run(tmp_path / "out.json")
    assert {query: set(hits) for query, hits in run.items()} == {"1": {*"hfb"}, "2": {*"fbh"}, "b": {*"bfi"}}
    texts = {document.id: document.text for document in DOCUMENTS}
    pairs = [(QUERIES[query], texts[document]) for query, hits in run.items() for document in hits]
    ours = [score for hits in run.values() for score in hits.values()]
    np.testing.assert_allclose(ours, model.predict(pairs), rtol=1e-4)
    assert all(list(hits.values()) == sorted(hits.values(), reverse=True) for hits in run.values())
    assert (report.queries, report.pairs, report.resumed) == (3, 9, 0)
    assert report.scores.pairs == 9 and report.scores.tokens_saved > 0
    assert report.pairs_per_second == pytest.approx(9 / report.seconds)


def test_depth_and_identical_ids(model, tmp_path):
    report = rerank_job(model, RUN, QUERIES, DOCUMENTS, tmp_path / "out", depth=1, ignore_identical_ids=True)
    assert {query: list(hits) for query, hits in read_run(tmp_path / "out.json").items()} == {
        "1": ["h"], "2": ["f"], "b": ["f"],
    }  # fmt: skip
    assert report.identical_ids_dropped == 1
    with pytest.raises(InputError, match="no document"):
        rerank_job(model, {"b": {"b": 1.0}}, QUERIES, DOCUMENTS, tmp_path / "none", ignore_identical_ids=True)
    rerank_job(model, RUN, QUERIES, DOCUMENTS, tmp_path / "out", depth=2)
    assert set(read_run(tmp_path / "out.json")["1"]) == {"h", "f"}  # "f" and "b" tie: the greater id is first
    with pytest.raises(InputError, match="depth"):
        rerank_job(model, RUN, QUERIES, DOCUMENTS, tmp_path / "none", depth=0)
    assert sorted(files(tmp_path)) == ["out.json", "out.trec"]


def interrupt(monkeypatch, place, name, call):
    """The call-th call of a function, from 0, does nothing but stop everything."""
    original, calls = getattr(place, name), []

    def stop(*args, **kwargs):
        calls.append(args)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(place, name, stop)
    return calls


@pytest.mark.parametrize(
    ("place", "name", "call"),
    [
        (CrossEncoder, "predict", 0),
        (CrossEncoder, "predict", 2),
        (module, "write_json", 0),
        (module, "_write_part", 1),
        (module, "write_run", 0),
        (module, "write_json_run", 0),
    ],
)
def test_an_interrupted_job_goes_on(place, name, call, model, tmp_path, monkeypatch, small_parts):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    for folder in (unbroken, broken):
        folder.mkdir()
    whole = rerank_job(model, RUN, QUERIES, DOCUMENTS, unbroken / "out")
    with monkeypatch.context() as patch:
        interrupt(patch, place, name, call)
        with pytest.raises(KeyboardInterrupt):
            rerank_job(model, RUN, QUERIES, DOCUMENTS, broken / "out")
    assert not (broken / "out.json").exists()
    done = len(list((broken / "out.partial").glob("*.npz")))
    with monkeypatch.context() as patch:
        calls = interrupt(patch, CrossEncoder, "predict", -1)
        report = rerank_job(model, RUN, QUERIES, reversed(DOCUMENTS), broken / "out")
    assert files(broken) == files(unbroken)
    assert report.resumed == whole.pairs - sum(len(pairs) for _, pairs in calls)
    assert done == {"predict": call, "write_json": 0, "_write_part": 1}.get(name, 4)
    assert (report.resumed > 0) == (done > 0)
    assert report.scores == whole.scores


KILLED = """
import os, signal, sys
import test_rerank_job as cases
from sgpt_jax import rerank_job
from sgpt_jax.cross_encoder import CrossEncoder

rerank_job.part_pairs = lambda: 2
write = rerank_job._write_part

def kill_in_third(file, *found):
    if file.name.startswith("000002"):
        os.kill(os.getpid(), signal.SIGKILL)
    write(file, *found)

rerank_job._write_part = kill_in_third
model = CrossEncoder.from_pretrained(sys.argv[1], prompt="Text: {} Query: ")
rerank_job.rerank_job(model, cases.RUN, cases.QUERIES, cases.DOCUMENTS, sys.argv[2])
"""


def test_a_killed_process_goes_on_in_another(folder, model, tmp_path, small_parts):
    environment = os.environ | {"PYTHONPATH": str(decoders.FIXTURES.parent), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "out")]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert sorted(files(tmp_path / "out.partial")) == ["000000.npz", "000001.npz", "job.json"]
    (tmp_path / "out.partial" / "000002.npz.tmp").write_bytes(b"PK half a file")
    report = rerank_job(model, RUN, QUERIES, DOCUMENTS, tmp_path / "out")
    assert 4 <= report.resumed < report.pairs
    assert sorted(files(tmp_path)) == ["out.json", "out.trec"]


def damaged_copies(content, draw):
    """Cut, zeroed and flipped at random."""
    yield b""
    for _ in range(4):
        start = int(draw.integers(len(content)))
        yield content[:start]
        yield content[:start] + bytes(len(content[start : start + 16])) + content[start + 16 :]
        yield content[:start] + bytes([content[start] ^ 1 << int(draw.integers(8))]) + content[start + 1 :]


def test_damaged_parts_are_scored_again_and_a_damaged_job_is_named(model, tmp_path, monkeypatch, small_parts):
    whole = tmp_path / "whole"
    whole.mkdir()
    rerank_job(model, RUN, QUERIES, DOCUMENTS, whole / "out")
    with monkeypatch.context() as patch:
        interrupt(patch, module, "write_run", 0)
        with pytest.raises(KeyboardInterrupt):
            rerank_job(model, RUN, QUERIES, DOCUMENTS, tmp_path / "out")
    stored = files(tmp_path / "out.partial")
    draw = np.random.default_rng(0)
    found = []
    for name, content in stored.items():
        for number, damaged in enumerate(damaged_copies(content, draw)):
            folder = tmp_path / f"{name}-{number}"
            (folder / "out.partial").mkdir(parents=True)
            for other, kept in stored.items():
                (folder / "out.partial" / other).write_bytes(damaged if other == name else kept)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    report = rerank_job(model, RUN, QUERIES, DOCUMENTS, folder / "out")
                except InputError as error:
                    assert name == "job.json" and str(folder / "out.partial") in str(error)
                    found.append("refused")
                    continue
            assert files(folder) == files(whole), (name, number)
            again = report.resumed < report.pairs
            assert again == any(f"{name}: damaged" in str(warning.message) for warning in caught)
            found.append("again" if again else "harmless")
    assert found.count("refused") > 8 and found.count("again") > 30, found


def test_another_job_is_refused(folder, model, tmp_path, monkeypatch, small_parts):
    with monkeypatch.context() as patch:
        interrupt(patch, CrossEncoder, "predict", 1)
        with pytest.raises(KeyboardInterrupt):
            rerank_job(model, RUN, QUERIES, DOCUMENTS, tmp_path / "out")
    decoder = load_decoder(folder)
    text = TextEncoder(load_tokenizer(folder), 192)
    structure, params = split(decoder)
    other_weights = merge(structure, jax.tree.map(lambda leaf: leaf * 1.5, params))
    changes = {
        "prompt changed": (CrossEncoder(decoder, text, Prompt.parse("{}")), RUN, QUERIES),
        "reduction changed": (CrossEncoder(decoder, text, model.prompt, "mean"), RUN, QUERIES),
        "model changed": (CrossEncoder(other_weights, text, model.prompt), RUN, QUERIES),
        "data changed": (model, RUN, QUERIES | {"1": "another"}),
        "max_seq_length changed": (
            CrossEncoder(decoder, TextEncoder(text.tokenizer, 100), model.prompt), RUN, QUERIES,
        ),
    }  # fmt: skip
    before = files(tmp_path / "out.partial")
    for message, (other, run, queries) in changes.items():
        with pytest.raises(InputError, match=message):
            rerank_job(other, run, queries, DOCUMENTS, tmp_path / "out")
    with pytest.raises(InputError, match="data changed"):
        rerank_job(model, {"1": RUN["1"]}, QUERIES, DOCUMENTS, tmp_path / "out")
    assert files(tmp_path / "out.partial") == before
    assert rerank_job(model, RUN, QUERIES, DOCUMENTS, tmp_path / "out").resumed > 0


def test_what_is_missing_is_named(model, tmp_path):
    with pytest.raises(InputError, match="query 'x' without a text"):
        rerank_job(model, RUN | {"x": {"h": 1.0}}, QUERIES, DOCUMENTS, tmp_path / "out")
    with pytest.raises(
        InputError, match="2 documents, such as 'gone', 'lost', that the corpus does not hold"
    ):
        rerank_job(model, {"1": {"gone": 2.0, "h": 1.5, "lost": 1.0}}, QUERIES, DOCUMENTS, tmp_path / "out")
    with pytest.raises(InputError, match="'a b'"):
        rerank_job(model, {"1": {"a b": 2.0}}, QUERIES, [Document("a b", "c")], tmp_path / "out")
    with pytest.raises(InputError, match="no document"):
        rerank_job(model, {}, QUERIES, DOCUMENTS, tmp_path / "out")
    assert files(tmp_path) == {}


def test_nan_names_the_ids(model, tmp_path):
    structure, params = split(model.decoder)
    damaged = merge(structure, jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params))
    with pytest.raises(InputError, match=r"query '[12b]', document 'i' is NaN"):
        rerank_job(CrossEncoder(damaged, model.text, model.prompt), RUN, QUERIES, DOCUMENTS, tmp_path / "out")
    assert not (tmp_path / "out.trec").exists()


def test_one_warning_for_the_whole_job(folder, tmp_path, small_parts):
    short = CrossEncoder.from_pretrained(folder, prompt="Text: {} Query: ", max_seq_length=40)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = rerank_job(short, RUN, QUERIES | {"2": ""}, DOCUMENTS, tmp_path / "out")
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 1 and "3 with an empty query" in messages[0]
    assert report.scores.documents_cut > 0 and f"{report.scores.documents_cut} with a document" in messages[0]
    assert set(read_run(tmp_path / "out.trec")["2"].values()) == {0.0}
