"""Adaptation without labels: pseudo queries, groups, the temperature, the loss over lists, the command as a whole."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from training import FOLDER, check_parameters, expected, write_model

pytest.importorskip("bm25s", reason="the eval extra is not installed")

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.bm25 import Bm25
from sgpt_jax.checkpoint.bias_sets import load_bias_set
from sgpt_jax.checkpoint.export import export_tensors
from sgpt_jax.cross_encoder import CrossEncoder
from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document
from sgpt_jax.files.lines import write_jsonl
from train.__main__ import main
from train.adaptation import adaptation
from train.dev import HeldOut, PseudoEvaluator
from train.pseudo import given, sentences, titles
from train.recipes import RECIPES
from train.teaching import group, source_ranks, temperature

ADAPT = RECIPES["adapt"][0]
WORDS = "heron sea bread bridge glue star salt fish yeast mill coffee hide law ferry harbour knife".split()  # noqa: SIM905


def document(id, title, below):
    return Document(id, f"{title} {below}" if title else below, title)


BELOW = "Rivers carry dissolved rock to the sea. Only the water leaves it again! Salt stays behind."


def test_titles_leave_their_documents():
    found = titles(
        [
            document("a", "Why the sea is salty", BELOW),
            document("b", "Why the  Sea is salty", BELOW + " More."),  # the same but for case and spaces
            document("c", "", BELOW),
            document("d", "Two words", BELOW),
            document("e", "123 456 789", BELOW),
            document("f", "On glue and wood", "Too short."),
            document("g", "dissolved rock to the sea", BELOW),
            document("h", "Where salt comes from", BELOW),
        ]
    )
    assert found.queries == {"a": "Why the sea is salty", "h": "Where salt comes from"}
    assert found.documents["a"] == found.documents["c"] == BELOW
    assert list(found.counts.values()) == [8, 1, 1, 1, 1, 1, 1]


def test_a_sentence_leaves_its_document():
    corpus = [document(str(n), "Salt", BELOW + f" There are {n} kinds of salt in it.") for n in range(30)]
    found = sentences([*corpus, document("one", "Salt", "No sentence beside this one")], seed=0)
    for one in corpus:
        query, rest = found.queries.get(one.id), found.documents[one.id]
        if query is not None:
            assert query in one.text
            assert query not in rest
            assert rest.startswith("Salt ")
            assert len(query) + 1 + len(rest) == len(one.text)
    # Of four sentences the last is another in each document, and the others repeat.
    assert 1 < len(found.queries) < 15
    assert found.counts["repeated"] == 30 - len(found.queries)
    # What is drawn from a document does not depend on the others.
    assert sentences(corpus[7:8], seed=0).documents["7"] == found.documents["7"]
    assert sentences(corpus, seed=1).documents != {id: found.documents[id] for id in map(str, range(30))}


def test_groups_are_neighbours_and_hold_every_query_once():
    topics = [f"topic{n}" for n in range(5)]
    texts = {f"{topic}.{n}": f"{topic} thing {n + 100}" for topic in topics for n in range(4)}
    index = Bm25(Document(id, text) for id, text in texts.items())
    found = group({id: text.split()[0] for id, text in texts.items()}, index, 4, np.random.default_rng(0))
    assert sorted(sorted(ids) for ids in found) == sorted(
        [f"{topic}.{n}" for n in range(4)] for topic in topics
    )
    apart = group(dict.fromkeys(texts, "nothing alike"), index, 3, np.random.default_rng(0))
    assert [len(ids) for ids in apart] == [3] * 6 + [2]
    assert sorted(id for ids in apart for id in ids) == sorted(texts)


def test_the_temperature_gives_the_entropy():
    lists = [list(np.random.default_rng(n).normal(size=8) * 15) for n in range(20)]
    degrees = temperature([*lists, [3.0]], 1.2)
    entropies = []
    for scores in lists:
        probabilities = np.exp(np.array(scores) / degrees) / np.exp(np.array(scores) / degrees).sum()
        entropies.append(-np.sum(probabilities * np.log(probabilities)))
    assert np.mean(entropies) == pytest.approx(1.2, abs=1e-6)
    assert temperature([[1.0]], 1.0) == 1.0
    assert source_ranks({"a": {"a": 1.0, "b": 2.0, "c": 1.0}, "b": {"a": 0.0, "b": 2.0}}) == {"a": 3, "b": 1}


def test_three_steps_over_lists_against_torch(tmp_path):
    """By the command; two rows at a time, and documents that stand in four lists."""
    source, out, wanted = (
        write_model("gpt_neo", tmp_path / "base"),
        tmp_path / "out",
        expected("gpt_neo", "lists"),
    )
    code = main(
        f"pairs --model {source} --data {FOLDER / 'lists.jsonl'} --output {out} --batch-size 8 --chunk-size 2 "
        "--max-seq-length 75 --lr 3e-4 --warmup-steps 1 --steps 3 --no-shuffle --distill kl --near 1".split()
    )
    assert code == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([line["loss"] for line in lines], wanted["losses"], rtol=1e-5)
    before, after = (BiEncoder.from_pretrained(folder) for folder in (source, out))
    check_parameters(
        dict(export_tensors(after.decoder, after.hf_config)),
        dict(export_tensors(before.decoder, before.hf_config)),
        wanted,
    )


def test_held_out_queries():
    """MRR by kind, and apart for those that BM25 finds."""

    class Vectors:
        similarity_name = "cosine"

        def encode_query(self, texts, **_):
            return np.array([[np.cos(float(text)), np.sin(float(text))] for text in texts], np.float32)

        encode_document = encode_query

    documents = [Document(str(n), f"{n / 20}") for n in range(14)]
    kinds = {
        "title": HeldOut({"0": "0", "2": "0", "13": "0"}, documents, frozenset({"2"})),
        "sentence": HeldOut({"5": "0.25"}, documents, frozenset()),
    }
    evaluator = PseudoEvaluator(kinds)
    assert evaluator(Vectors()) == pytest.approx((1 + 1 / 3 + 0 + 1) / 4)
    assert evaluator.details == pytest.approx(
        {"title": 4 / 9, "sentence": 1, "found by BM25": 1 / 3, "missed by BM25": 2 / 3}
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    records = []
    for number in range(40):
        title = list(draw.choice(WORDS, 4, replace=False))
        lines = [" ".join(draw.choice([*title, *WORDS[:6]], 7)).capitalize() for _ in range(3)]
        records.append({"_id": f"d{number}", "title": " ".join(title), "text": ". ".join(lines) + "."})
    write_jsonl(path, records)
    (path.parent / "queries.txt").write_text("salt of the sea\nbread and yeast\nferry to the harbour\n")
    return path


OPTIONS = "--batch-size 8 --max-seq-length 64 --group-size 4 --lr 1e-2 --dev-documents 20 --keep-rank 4"


NONE = ("--teacher", "none", "--keep-rank", "3")


def run(base, corpus, out, *options):
    arguments = ["adapt", "--model", base, "--corpus", corpus, "--output", out, *OPTIONS.split(), *options]
    return main(list(map(str, arguments)))


@pytest.mark.filterwarnings("ignore:.*were cut")
def test_the_command(base, corpus, tmp_path, capsys):
    """It leaves a bias set; when it stopped before the first step it goes on, and asks the teacher nothing twice."""
    out = tmp_path / "out"
    options = ["--queries", corpus.parent / "queries.txt", "--steps", 4, "--eval-every", 2]
    assert run(base, corpus, out, *options, "--trainable", "nothing-of-this-name") == 1  # after the stages
    first = {path.name: path.read_bytes() for path in (out / "adapt").iterdir()}
    counts = json.loads(first["counts.json"])
    assert counts["title"]["held out"] == 4
    assert counts["title"]["drawn"] == 36 == counts["title"]["within the teacher's 4 best"]
    assert counts["query"]["drawn"] == 3
    records = [json.loads(line) for line in first["examples.jsonl"].splitlines()]
    assert {record["kind"] for record in records} == {"title", "sentence", "query"}
    groups = itertools.groupby(records, lambda record: (record["kind"], *sorted(record["documents"])))
    sizes = [len(list(members)) for _, members in groups]
    whole = max(sizes)
    assert 1 < sizes.count(whole) < len(sizes)
    assert set(sizes[: sizes.count(whole)]) == {whole}  # those that lack a query come last
    held = set(json.loads(first["title.dev.json"])["queries"])
    assert held.isdisjoint(record["query"] for record in records if record["kind"] == "title")
    stamps = {path.name: path.stat().st_mtime_ns for path in (out / "adapt").glob("*.teacher.json")}
    assert len(stamps) == 3
    capsys.readouterr()
    assert run(base, corpus, out, *options) == 0
    printed = capsys.readouterr().out
    assert "held out 4" in printed
    assert "missed by BM25" in printed or "found by BM25" in printed
    assert {path.name: path.stat().st_mtime_ns for path in (out / "adapt").glob("*.teacher.json")} == stamps
    assert {path.name: path.read_bytes() for path in (out / "adapt").iterdir()} == first
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4
    biases = load_bias_set(out / "biases.safetensors")
    assert biases.header["training"]["data"] == "corpus.jsonl"
    assert biases.header["training"]["dev_metric"] == "MRR@10"
    assert run(base, corpus, tmp_path / "out", *options, "--seed", 1, "--resume") == 1
    assert "other options: seed" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*were cut")
def test_scores_are_the_cross_encoders(base, corpus, tmp_path):
    """Of the text that the student reads, over a temperature, the positive first."""
    config = dataclasses.replace(
        ADAPT, model=base, corpus=str(corpus), output=str(tmp_path), pseudo=("title",), group_size=4,
        max_seq_length=24, keep_rank=4, dev_queries=0,
    )  # fmt: skip
    made = adaptation(config)
    assert made.evaluator is None
    degrees = json.loads((tmp_path / "adapt/counts.json").read_text())["title"]["temperature"]
    teacher = CrossEncoder.from_pretrained(base)
    example = made.examples.get(5, 0)
    texts = [example.positive, *example.negatives]
    cut = [teacher.text.tokenizer.decode(teacher.text.plain_ids([text])[0][:24]) for text in texts]
    assert all(len(short) < len(text) for short, text in zip(cut, texts, strict=True))
    scores = teacher.predict([(example.query, text) for text in cut])
    np.testing.assert_allclose(np.array(example.scores) * degrees, scores, rtol=1e-3)
    assert example.query not in example.positive
    assert example.scores[1] == max(example.scores[1:])


@pytest.mark.filterwarnings("ignore:.*were cut")
def test_without_a_teacher_and_an_early_end(base, corpus, tmp_path, capsys):
    """A rate of nearly nothing finds nothing better; --resume adds no steps to a run that has ended."""
    options = ["--pseudo", "title", "--teacher", "none", "--steps", 12, "--eval-every", 2, "--patience", 2]
    options += ["--lr", "1e-12", "--keep-rank", 3]
    assert run(base, corpus, tmp_path, *options) == 0
    assert "2 evaluations in a row were no better" in capsys.readouterr().out
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6
    assert "temperature" not in json.loads((tmp_path / "adapt/counts.json").read_text())["title"]
    assert run(base, corpus, tmp_path, *options, "--resume") == 0
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6
    assert load_bias_set(tmp_path / "biases.safetensors").header["training"]["steps"] == 6


@pytest.mark.filterwarnings("ignore:.*were cut")
def test_an_entropy_that_is_out_of_reach(base, tmp_path):
    """Of two documents it is ln 2 at the most: the run says what it is instead."""
    texts = [f"{first} {BELOW} And there is more of it." for first in ("Herons wait.", "Mills grind slowly.")]
    titles = ["Of herons and lakes", "Of mills and rye"]
    corpus = [{"_id": t.split()[1], "title": t, "text": text} for t, text in zip(titles, texts, strict=True)]
    write_jsonl(tmp_path / "corpus.jsonl", corpus)
    config = dataclasses.replace(
        ADAPT,
        model=base,
        corpus=str(tmp_path / "corpus.jsonl"),
        output=str(tmp_path),
        pseudo=("title",),
        dev_queries=0,
    )
    (note,) = adaptation(config).notes[1:]
    assert "title: the teacher's lists are too short" in note and "for --entropy 1: the mean is 0.693" in note


def test_zero_biases_are_added_where_they_alone_train():
    assert ADAPT.settled().add_biases
    assert not dataclasses.replace(ADAPT, trainable="lora").settled().add_biases
    assert not RECIPES["pairs"][0].settled().add_biases


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pseudo", "titles"], "--pseudo titles: the kinds are title, sentence"),
        (["--pseudo", ""], "no queries"),
        (["--entropy", "1.5"], "--entropy 1.5"),
        ([*NONE, "--queries", "QUERIES"], "--queries needs a teacher"),
        ([*NONE, "--distill", "margin"], "--distill is about a teacher's scores"),
        ([*NONE, "--near", "2"], "--near is about a teacher's scores"),
        ([*NONE, "--entropy", "0.5"], "--entropy is about a teacher's scores"),
        (["--teacher", "none", "--keep-rank", "1"], "--keep-rank is about a teacher's scores"),
        ([*NONE, "--distill-weight", "2"], "--distill-weight is for --distill"),
        (
            ["--dev-queries", "0", "--eval-every", "2"],
            "--eval-every is about evaluations, which need --dev-queries",
        ),
        (["--group-size", "1"], "--group-size must be at least 2"),
    ],
)
def test_refusals(options, message, base, corpus, tmp_path, monkeypatch, capsys):
    (tmp_path / "state.json").write_text("{}")  # what lies here says nothing of the corpus
    monkeypatch.chdir(tmp_path)
    options = [str(corpus.parent / "queries.txt") if option == "QUERIES" else option for option in options]
    assert run(base, corpus, tmp_path / "out", *options) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_query_is_left(base, tmp_path, capsys):
    (tmp_path / "corpus.txt").write_text("one line\nanother line\n")
    assert run(base, tmp_path / "corpus.txt", tmp_path / "out") == 1
    assert "no query is left" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="the kinds are"):
        adaptation(dataclasses.replace(ADAPT, corpus="c", output="o", pseudo=("x",)))
    assert given({"1": " a ", "2": " "}, []).queries == {"1": "a"}
