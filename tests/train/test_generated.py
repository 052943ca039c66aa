"""Queries that a decoder writes for `python -m train adapt --generate`: filters, interruptions, the command."""

import dataclasses
import json

import pytest
from etils import epath
from training import write_model

pytest.importorskip("bm25s", reason="the eval extra is not installed")

from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document
from sgpt_jax.files.lines import write_jsonl
from train import generated as stage
from train.__main__ import main, make_parser
from train.recipes import RECIPES

TOPICS = "heron salt bread bridge glue star fish yeast mill coffee".split()  # noqa: SIM905
DOCUMENTS = [
    Document(f"d{n}", f"Paper {n} tells what a {topic} does, why {topic}s matter, and who studies them.")
    for n, topic in enumerate(TOPICS)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture
def config(base, tmp_path):
    return dataclasses.replace(RECIPES["adapt"][0], model=base, output=str(tmp_path), generate="")


@pytest.fixture
def short(monkeypatch):
    """A prompt that leaves room in the 192 positions of the tiny decoders, and few tokens."""
    monkeypatch.setattr(stage, "EXAMPLES", (("A heron waits.", "how do herons catch fish"),))
    monkeypatch.setattr(stage, "NEW_TOKENS", 6)


def record(number, text, finished=True):
    return {"_id": f"d{number}", "text": text, "log_prob": -1.0, "finished": finished}


def test_what_filters_keep(config, tmp_path):
    written = [
        record(0, 'Query: "why do herons matter"'),
        record(1, "why do salts matter and so on", finished=False),
        record(2, ""),
        record(3, "bridges"),
        record(4, "Why  GLUES matter, and who"),  # stands in its document
        record(5, "how do herons catch fish"),  # an example's
        record(6, "what is it that a fish does"),
        record(7, "What is it that a fish  does"),
        record(8, "what a coffee does"),
        record(9, "123 456 789"),
    ]
    write_jsonl(tmp_path / "generated.jsonl", written)
    found = stage.generated(config, epath.Path(tmp_path), DOCUMENTS)
    # BM25 finds every document by "what", so d8 is found, too: of ten none is beyond the ten best.
    assert found.queries == {
        "d0": "why do herons matter",
        "d6": "what is it that a fish does",
        "d8": "what a coffee does",
    }
    assert found.documents == {one.id: one.text for one in DOCUMENTS}
    assert found.have_sources
    assert found.counts == {
        "documents": 10, "empty or not finished": 2, "too short or too long": 1, "no letter": 1,
        "too little beside it": 0, "stands in the rest too": 1, "repeated": 2, "not among BM25's 10 best": 0,
    }  # fmt: skip


def test_the_way_back_by_bm25(config, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "FOUND", 1)
    texts = ["why do herons matter", "what use is bread", "who studies bread"]
    write_jsonl(tmp_path / "generated.jsonl", [record(number, text) for number, text in enumerate(texts)])
    found = stage.generated(config, epath.Path(tmp_path), DOCUMENTS[:3])
    assert list(found.queries) == ["d0", "d2"]
    assert found.counts["not among BM25's 1 best"] == 1


def test_an_interruption_changes_nothing(config, tmp_path, monkeypatch, short):
    """Parts on disk are not written again; nor does a text depend on the documents beside it."""
    monkeypatch.setattr(stage, "_PART", 4)
    (tmp_path / "whole").mkdir()
    stage.generated(config, epath.Path(tmp_path / "whole"), DOCUMENTS)
    real, calls = stage.generate, []

    def stopped(*arguments, **options):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(options["seeds"])
        return real(*arguments, **options)

    (tmp_path / "parts").mkdir()
    monkeypatch.setattr(stage, "generate", stopped)
    with pytest.raises(KeyboardInterrupt):
        stage.generated(config, epath.Path(tmp_path / "parts"), DOCUMENTS)
    assert [file.name for file in (tmp_path / "parts/generated.partial").iterdir()] == ["000000.json"]
    calls.clear()
    monkeypatch.setattr(stage, "generate", lambda *a, **o: calls.append(o["seeds"]) or real(*a, **o))
    stage.generated(config, epath.Path(tmp_path / "parts"), DOCUMENTS)
    assert [len(seeds) for seeds in calls] == [4, 2]
    first, second = ((tmp_path / name / "generated.jsonl").read_bytes() for name in ("whole", "parts"))
    assert first == second
    assert not (tmp_path / "parts/generated.partial").exists()
    # What splitlines takes for an end of a line is none.
    odd = [record(number, f"why do\u2028herons\x85matter {number}") for number in range(len(DOCUMENTS))]
    write_jsonl(tmp_path / "parts/generated.jsonl", odd)
    assert len(stage.generated(config, epath.Path(tmp_path / "parts"), DOCUMENTS).counts) > 1
    (tmp_path / "parts/generated.jsonl").write_bytes(first[:-20])
    with pytest.raises(InputError, match="damaged"):
        stage.generated(config, epath.Path(tmp_path / "parts"), DOCUMENTS)


def run(base, corpus, out, *options):
    arguments = [
        "adapt",
        "--model",
        base,
        "--corpus",
        corpus,
        "--output",
        out,
        "--max-seq-length",
        48,
        *options,
    ]
    return main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    write_jsonl(path, [{"_id": one.id, "title": f"On {one.id} alone", "text": one.text} for one in DOCUMENTS])
    return path


@pytest.mark.filterwarnings("ignore:.*were cut")
def test_the_command(base, corpus, tmp_path, capsys, short):
    """Beside titles; queries written before are taken, and the teacher ranks their sources."""
    out = tmp_path / "out"
    options = ["--pseudo", "title", "--generate", "--group-size", 4, "--keep-rank", 4, "--batch-size", 4]
    options += ["--dev-queries", 0, "--steps", 1]
    assert run(base, corpus, out, *options, "--trainable", "nothing-of-this-name") == 1  # after the stages
    written = [json.loads(line) for line in (out / "adapt/generated.jsonl").read_text().splitlines()]
    assert [one["_id"] for one in written] == [one.id for one in DOCUMENTS]
    counts = json.loads((out / "adapt/counts.json").read_text())
    assert counts["generated"]["documents"] == 10
    for file in (out / "adapt").glob("generated.*.json*"):
        file.unlink()
    write_jsonl(
        out / "adapt/generated.jsonl",
        [
            one | {"text": f"why do {topic}s matter", "finished": True}
            for one, topic in zip(written, TOPICS, strict=True)
        ],
    )
    assert run(base, corpus, out, *options) == 0
    printed = capsys.readouterr().out
    assert "not among BM25's 10 best 0" in printed
    counts = json.loads((out / "adapt/counts.json").read_text())
    assert counts["generated"]["drawn"] == 10 == counts["generated"]["within the teacher's 4 best"]
    records = [json.loads(line) for line in (out / "adapt/examples.jsonl").read_text().splitlines()]
    assert {one["kind"] for one in records} == {"title", "generated"}
    assert run(base, corpus, tmp_path / "out", *options[:2], *options[3:], "--resume") == 1
    assert "generate" in capsys.readouterr().err


def test_who_writes(base, corpus, tmp_path, capsys):
    parse = make_parser().parse_args
    fixed = ["adapt", "--model", "M", "--corpus", "C", "--output", "O"]
    assert [parse([*fixed, *more]).generate for more in ([], ["--generate"], ["--generate", "G"])] == [
        None,
        "",
        "G",
    ]
    both_ways = write_model("qwen3_bidirectional", tmp_path / "both")
    for generator, message in ((both_ways, "bidirectional"), (tmp_path / "none", "none")):
        assert run(base, corpus, tmp_path / "out", "--generate", generator) == 1
        error = capsys.readouterr().err
        assert f"--generate: {generator}" in error
        assert message in error
        assert not (tmp_path / "out").exists()
