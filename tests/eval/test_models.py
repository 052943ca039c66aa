"""Evaluation with real (tiny, random) decoders: BEIR, prompt studies, and what tells models apart."""

import argparse
import hashlib
import json
from pathlib import Path

import adapters
import decoders
import eval_cases
import folders
import numpy as np
import pytest

pytest.importorskip("pytrec_eval", reason="the eval extra is not installed")
pytest.importorskip("bm25s", reason="the eval extra is not installed")


from eval import prompt_study
from eval.__main__ import main
from eval.labels import label
from eval.models import PROMPTS, bi_encoder
from eval.provenance import command, revision
from sgpt_jax.bi_encoder import BI_ENCODER_SETTINGS, BiEncoder
from sgpt_jax.cross_encoder import CrossEncoder
from sgpt_jax.errors import InputError
from sgpt_jax.files.beir import DataSet
from sgpt_jax.files.runs import read_run
from sgpt_jax.text.pairs import Prompt


def read(path):
    return json.loads(path.read_text())


def test_beir_with_a_bi_encoder_is_what_its_vectors_give(tiny, small, tmp_path):
    arguments = [
        "beir",
        small,
        "--model",
        tiny,
        "--pooling",
        "mean",
        "--brackets",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 0
    model = BiEncoder.from_pretrained(tiny, pooling="mean", brackets=True)
    data = DataSet("small", Path(small), "test").load()
    documents = list(data.documents())
    vectors = model.encode_document([document.text for document in documents])
    expected = model.similarity(model.encode_query(list(data.queries.values())), vectors)
    run = read_run(tmp_path / "out/small.trec")
    for row, query in zip(expected, data.queries, strict=True):
        found = [run[query][document.id] for document in documents]
        assert found == pytest.approx(row.tolist(), abs=2e-6)
    facts = read(tmp_path / "out/small.json")["model"]
    assert (
        facts["pooling"] == "mean" and facts["brackets"] is True and facts["revision"] == revision(Path(tiny))
    )
    weights = decoders.tensors("gpt_neo")
    assert facts["parameters"] == sum(np.size(tensor) for tensor in weights.values())


def test_beir_with_a_cross_encoder_is_what_it_predicts(tiny, small, tmp_path):
    arguments = [
        "--cross-encoder",
        tiny,
        "--rerank-depth",
        "3",
        "--prompt",
        "C",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(["beir", small, *arguments]) == 0
    model = CrossEncoder.from_pretrained(tiny, prompt=PROMPTS["C"])
    data = DataSet("small", Path(small), "test").load()
    texts = {document.id: document.text for document in data.documents()}
    for query, hits in read_run(tmp_path / "out/small.trec").items():
        expected = model.predict([(data.queries[query], texts[document]) for document in hits])
        assert list(hits.values()) == pytest.approx(expected.tolist(), rel=1e-4)
    result = read(tmp_path / "out/small.json")
    assert result["cross_encoder"]["prompt"]["prefix"] == "Document:\n"
    assert result["work"]["pairs"] == sum(map(len, read_run(tmp_path / "out/small.trec").values()))


def test_beir_with_a_reranker_is_what_its_folder_says(small, tmp_path):
    folder = folders.write_folder("qwen3_reranker", tmp_path / "model")
    arguments = ["--cross-encoder", str(folder), "--rerank-depth", "3", "--output", str(tmp_path / "out")]
    assert main(["beir", small, *arguments, "--prompt", "fish"]) == 0
    model = CrossEncoder.from_pretrained(folder, prompt="fish")
    data = DataSet("small", Path(small), "test").load()
    texts = {document.id: document.text for document in data.documents()}
    for query, hits in read_run(tmp_path / "out/small.trec").items():
        expected = model.predict([(data.queries[query], texts[document]) for document in hits])
        assert list(hits.values()) == pytest.approx(expected.tolist(), rel=1e-4)
    result = read(tmp_path / "out/small.json")
    assert result["cross_encoder"]["scoring"]["activation"] == "sigmoid"
    assert label(result).endswith('top 3, its own scoring, instruction "Find the passage that is about fish"')


def test_a_prompt_without_a_place_for_the_document_is_refused(tiny, small, tmp_path, capsys):
    arguments = ["--cross-encoder", tiny, "--prompt", "no place", "--output", str(tmp_path / "out")]
    assert main(["beir", small, *arguments]) == 1
    assert "one {} where the document goes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "A", "no place"], "one {} where the document goes"),
        (
            ["--prompts", "A", "--pooling", "mean", "--query-prompt", "x"],
            "--pooling, --query-prompt: only for a",
        ),
    ],
)
def test_a_study_is_refused_before_it_begins(options, message, tiny, small, tmp_path, capsys):
    arguments = ["--cross-encoder", tiny, "--output", str(tmp_path / "out")]
    assert main(["prompts", small, *arguments, *options]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_prompt_study(tiny, small, tmp_path, capsys):
    names = ["A", "G", "J", "L", "Text: {} Question: "]
    arguments = [
        "--cross-encoder",
        tiny,
        "--rerank-depth",
        "4",
        "--output",
        str(tmp_path / "out"),
        "--prompts",
        *names,
    ]
    assert main(["prompts", small, *arguments]) == 0
    table = (tmp_path / "out/prompts.md").read_text()
    assert table in capsys.readouterr().out
    for name, folder in zip(names, ("A", "G", "J", "L", "prompt-5"), strict=True):
        result = read(tmp_path / f"out/{folder}/small.json")
        value = result["metrics"]["ndcg@10"]
        assert f"| {name if len(name) == 1 else 'template'} | {value:.4f} |" in table
        assert result["first_stage"]["name"] == "BM25"
    first = read(tmp_path / "out/first-stage/small.json")["metrics"]["ndcg@10"]
    assert f"| (first stage) | {first:.4f} | BM25 |" in table
    # the same numbers as the command for one prompt
    assert main(["beir", small, *arguments[:4], "--prompt", "A", "--output", str(tmp_path / "one")]) == 0
    assert read(tmp_path / "one/small.json")["metrics"] == read(tmp_path / "out/A/small.json")["metrics"]
    capsys.readouterr()
    assert main(["prompts", small, *arguments]) == 0  # everything is there already
    assert capsys.readouterr().out.count("found in the output folder") == 6


def test_the_example_is_the_shortest_judged_pair(tmp_path):
    corpus = [
        {"_id": "d0", "title": "a long title that does not count", "text": "aa"},
        {"_id": "d1", "text": "aaaa"},
        {"_id": "d2", "text": "aaaaaaa"},
        {"_id": "d3", "text": "a"},
    ]
    queries = [{"_id": "q0", "text": "bb"}, {"_id": "q1", "text": "b"}]
    qrels = "q0\td0\t1\nq0\td3\t0\nq1\td1\t1\nq1\td2\t3\n"
    data = DataSet("x", eval_cases.write_beir(tmp_path / "x", corpus, queries, qrels), "test").load()

    class Characters:
        def plain_ids(self, texts, **options):
            return [list(text) for text in texts]

    class Model:
        text = Characters()

    found = prompt_study.find_example(data, eval_cases.Ready(Model()))
    assert found == prompt_study.Example(
        "d2", "q1", "aaaaaaa", "b"
    )  # 8 tokens for grade 3, less than 4 for grade 1
    assert prompt_study.find_example(data, eval_cases.Ready(Model()), shortest=4).document_id == "d2"
    with pytest.raises(InputError, match="no judged pair"):
        prompt_study.find_example(data, eval_cases.Ready(Model()), shortest=8)


EXAMPLE = prompt_study.Example("d", "q", "DOC", "QUERY")


SEARCHED = "Documents are searched to find matches with the same content.\n"
BOT = (
    "An intelligent, helpful bot is given. "
    'The bot responds "Yes" if the document is a fit to the query and "No" otherwise.\n###\n'
)


@pytest.mark.parametrize(
    ("name", "context"),
    [
        ("G", SEARCHED + 'The document "X" is a good search result for "'),
        ("H", SEARCHED + 'Document: "X"\n\nThe above document is a good match for the query: "'),
        ("J", SEARCHED + "Document:\nDOC\nQuery:\nQUERY\nDocument:\nX\nQuery:\n"),
        ("K", "Document:\nDOC\nQuery:\nQUERY\nDocument:\nX\nQuery:\n"),
        ("L", BOT + "Document: DOC\nQuery: QUERY\nBot: Yes\nDocument: X\nBot:"),
        ("M", BOT + "Document: DOC\nQuery: QUERY\nBot: Yes\nDocument: X\nBot: "),
        ("quoraD", "Question Body: X Question Title:"),
        ("quoraE", "Question Body: DOC Question Title: QUERY\nQuestion Body: X Question Title:"),
    ],
)
def test_contexts_of_the_papers_prompts(name, context):
    study = prompt_study.STUDIES[name]
    prompt = study.prompt(None if study.instruction is None else EXAMPLE)
    assert prompt.prefix + "X" + prompt.suffix == context


def test_all_the_papers_prompts_are_there():
    assert {*"ABCDEFGHIJKLM", *(f"quora{letter}" for letter in "ABCDE")} == prompt_study.STUDIES.keys()


def test_answers_are_scored_against_each_other(tiny):
    """log p(Yes) / (p(Yes) + p(No)), from the probabilities of the two as continuations."""
    model = CrossEncoder.from_pretrained(tiny, prompt=Prompt("Document: ", "\nBot:"))
    pairs = [("cat", "cats purr"), ("rain", "cats purr"), ("cat", "snow")]
    found = prompt_study.Answering(model, (" Yes", " No")).predict(pairs)
    for (query, document), score in zip(pairs, found.tolist(), strict=True):
        yes, no = model.predict([(word, f"{document}\nQuery: {query}") for word in (" Yes", " No")]).tolist()
        assert score == pytest.approx(-np.log1p(np.exp(no - yes)), rel=1e-4)
    assert (found < 0).all() and len(set(found.tolist())) == 3


def test_revision_is_the_hubs_commit_or_a_digest_of_the_files(tmp_path):
    commit = tmp_path / "models--org--name/snapshots" / ("0123456789" * 4)
    commit.mkdir(parents=True)
    assert revision(commit) == "0123456789" * 4
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    first = revision(folder)
    (folder / "notes.md").write_text("not part of the model")
    assert revision(folder) == first and first.startswith("sha256:")
    (folder / "config.json").write_text("{ }")
    assert revision(folder) != first
    (tmp_path / "a.gguf").write_bytes(b"abc")
    assert revision(tmp_path / "a.gguf") == "sha256:" + hashlib.sha256(b"abc").hexdigest()[:16]


def test_an_adapter_over_another_base_is_another_model(tmp_path):
    base = tmp_path / "base"
    decoders.write_checkpoint("llama", base)
    adapter = adapters.write_adapter("plain", tmp_path / "adapter", base)
    args = argparse.Namespace(**dict.fromkeys(BI_ENCODER_SETTINGS), mesh=None)
    args.model, args.dtype = str(adapter), "float32"
    first = bi_encoder(args).identity
    assert first["revision"] == revision(adapter) and first["base"] == [revision(base)]
    (base / "config.json").write_text((base / "config.json").read_text() + " ")
    assert bi_encoder(args).identity == first | {"base": [revision(base)]} != first
    args.model = str(base)
    assert "base" not in bi_encoder(args).identity


def test_commands_name_no_data_folder(monkeypatch):
    monkeypatch.setenv("SGPT_DATA", "/some/where/")
    line = command(["beir", "/some/where/scifact", "/some/where else", "--output", "a b"])
    assert line == "python -m eval beir $SGPT_DATA/scifact '/some/where else' --output 'a b'"
