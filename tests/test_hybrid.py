"""Hybrid search: the formula, and the words of an index's own texts beside its vectors."""

import decoders
import pytest

pytest.importorskip("bm25s", reason="the eval extra is not installed")

from sgpt_jax.bm25 import Bm25
from sgpt_jax.cli.parser import main
from sgpt_jax.files.corpora import Document, read_corpus
from sgpt_jax.files.lines import write_jsonl
from sgpt_jax.files.runs import read_run
from sgpt_jax.hybrid import fuse
from sgpt_jax.metrics import rank


def test_the_formula():
    run = {"q": {"a": 9.0, "b": 8.0, "c": 7.0}, "r": {"x": 1.0, "z": 1.0}, "t": {}}
    words = {"q": {"c": 3.0, "d": 2.0, "a": 1.5}, "s": {"y": 0.4}}
    fused = fuse(run, words, 3)
    assert list(fused["q"]) == ["a", "c", "d"]
    assert fused["q"] == pytest.approx({"a": (1 + 1 / 2) / 2, "c": (0 + 1) / 2, "d": (0 + 2 / 3) / 2})
    assert fused["r"] == {"x": 0.5, "z": 0.5} and fused["s"] == {"y": 0.5} and fused["t"] == {}
    other = {"q": {id: 100 * score - 7 for id, score in run["q"].items()}}
    assert fuse(other, words, 3)["q"] == pytest.approx(fused["q"])  # a ranking's own scale does not matter
    # With 1,000 hits or more, BM25's last one counts as nothing too, and what is behind it is not looked at.
    many = {"q": {f"d{n:04}": 2.0 - n / 1000 for n in range(1200)}}
    scores = fuse({}, many, 2000)["q"]
    assert len(scores) == 1000 and scores["d0000"] == 0.5 and scores["d0999"] == 0


def test_infinite_scores_are_the_ends_of_the_scale():
    infinite = float("inf")
    assert fuse({"q": {"a": infinite, "b": 2.0, "c": 1.0, "d": -infinite}}, {}, 4)["q"] == {
        "a": 0.5,
        "b": 0.5,
        "c": 0,
        "d": 0,
    }
    assert fuse({"q": {"a": infinite, "b": -infinite}}, {}, 4)["q"] == {"a": 0.5, "b": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = decoders.write_checkpoint("llama", tmp_path_factory.mktemp("hybrid") / "tiny")
    return str(decoders.write_tokenizer(folder))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    words = "heron ferry market bay water night shallow day".split()  # noqa: SIM905
    texts = [f"{words[i % 8]} {words[(3 * i + 1) % 8]} {words[(i * i + 2) % 8]}" for i in range(20)]
    write_jsonl(path, [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts)])
    return path


def test_search_joins_both(model, corpus, tmp_path, capsys):
    index = str(tmp_path / "index")
    assert main(["index", str(corpus), "-o", index, "--model", model]) == 0
    (tmp_path / "queries.tsv").write_text("q\theron at night\nnothing\tzebra\n")
    common = ["search", index, "--queries", str(tmp_path / "queries.tsv"), "-o", str(tmp_path / "run.trec")]
    assert main([*common, "-k", "20"]) == 0
    by_vectors = read_run(tmp_path / "run.trec")
    assert main([*common, "-k", "5", "--hybrid"]) == 0
    found = read_run(tmp_path / "run.trec")
    words = Bm25(Document(one.id, one.text) for one in read_corpus(corpus))
    expected = fuse(by_vectors, words.search({"q": "heron at night", "nothing": "zebra"}, 1000), 5)
    assert {query: list(hits) for query, hits in found.items()} == {q: list(h) for q, h in expected.items()}
    assert list(found["q"]) != list(rank(by_vectors["q"], 5))
    assert list(found["nothing"]) == list(rank(by_vectors["nothing"], 5))
    capsys.readouterr()
    assert main(["search", index, "heron at night", "--hybrid", "-k", "3", "--rerank", "4"]) == 0
    listing = capsys.readouterr().out.splitlines()[1:]
    assert len(listing) == 3 and all(line.split()[2] in list(expected["q"])[:4] for line in listing)
    best = next(iter(expected["q"]))
    (tmp_path / "ids.txt").write_text(best + "\n")
    assert main(["index", "-o", index, "--remove", f"@{tmp_path}/ids.txt"]) == 0
    assert main([*common, "-k", "20", "--hybrid"]) == 0
    assert len(left := read_run(tmp_path / "run.trec")["q"]) == 19 and best not in left


def test_an_index_without_texts_is_refused(model, corpus, tmp_path, capsys):
    index = str(tmp_path / "index")
    assert main(["index", str(corpus), "-o", index, "--model", model, "--no-texts"]) == 0
    assert main(["search", index, "heron", "--hybrid"]) == 1
    assert "this index holds no texts" in capsys.readouterr().err
