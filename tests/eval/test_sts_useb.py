"""STS and USEB: equal to sentence-transformers' evaluator and to USEB's own code, and strict about their files."""

import gzip
import json
import os
import re
from pathlib import Path

import eval_cases
import numpy as np
import pytest

pytest.importorskip("pytrec_eval", reason="the eval extra is not installed")
pytest.importorskip("scipy", reason="the eval extra is not installed")

from eval import sts, useb
from eval.__main__ import main
from sgpt_jax.errors import InputError
from sgpt_jax.files.sts import read_sts

EXPECTED = json.loads((eval_cases.FIXTURES / "expected.json").read_text())


@pytest.fixture
def fake(monkeypatch):
    model = eval_cases.Ready(eval_cases.HashEncoder())
    for module in (sts, useb):
        monkeypatch.setattr(module, "bi_encoder", lambda args: model)
    return model


def sts_line(score, first, second, *more):
    return "\t".join(["main-captions", "MSRvid", "2012test", "0001", str(score), first, second, *more]) + "\n"


def write_sts(path, pairs=None):
    lines = [sts_line(*pair) for pair in pairs or eval_cases.sts_pairs()]
    path.write_text("".join(lines), "utf-8", newline="\n")
    return path


def test_sts_equals_sentence_transformers():
    found = sts.evaluate(eval_cases.HashEncoder(), eval_cases.sts_pairs())
    for name in ("cosine", "euclidean", "manhattan", "dot"):
        for kind in ("spearman", "pearson"):
            expected = EXPECTED["embedding_similarity"][f"{kind}_{name}"]
            assert found[f"{kind}_{name}"] == pytest.approx(expected, abs=1e-6)
    assert found["spearman_max"] == pytest.approx(EXPECTED["embedding_similarity"]["spearman_max"], abs=1e-6)


def test_sts_command(tmp_path, fake, capsys):
    plain, zipped = write_sts(tmp_path / "sts-dev.csv"), tmp_path / "sts-test.csv.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    assert main(["sts", str(plain), str(zipped), "--model", "fake", "--output", str(tmp_path / "out")]) == 0
    dev, test = (json.loads((tmp_path / f"out/sts-{part}.json").read_text()) for part in ("dev", "test"))
    assert dev["metrics"] == test["metrics"] and dev["counts"] == {"pairs": 30} and dev["kind"] == "sts"
    assert "sts-dev: spearman_cosine -0.1083" in capsys.readouterr().out


def test_results_of_another_model_or_kind_are_not_replaced(tmp_path, fake, capsys):
    path, out = write_sts(tmp_path / "useb.csv"), tmp_path / "out"
    command = ["sts", str(path), "--model", "fake", "--output", str(out)]
    assert main(command) == 0 and main(command) == 0  # the same again
    result = json.loads((out / "useb.json").read_text())
    del result["settings"]  # as results were once
    (out / "useb.json").write_text(json.dumps(result))
    assert main(command) == 0
    fake.identity["revision"] = "another"
    assert main(command) == 1
    assert "useb.json: was made with other settings (model); give another" in capsys.readouterr().err
    folder = str(eval_cases.write_useb(tmp_path / "data-eval"))
    assert main(["useb", folder, "--model", "fake", "--output", str(out)]) == 1
    assert "useb.json: is a result of eval sts; give another" in capsys.readouterr().err
    assert json.loads((out / "useb.json").read_text())["model"]["revision"] == "made up"
    assert main(["useb", folder, "--model", "fake", "--output", str(tmp_path / "useb")]) == 0
    assert (
        main(["useb", folder, "--model", "fake", "--output", str(tmp_path / "useb"), "--split", "valid"]) == 1
    )
    assert "other settings (split)" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["sts", "useb"])
def test_options_of_queries_and_documents_are_refused(task, tmp_path, fake, capsys):
    source = write_sts(tmp_path / "a.csv") if task == "sts" else eval_cases.write_useb(tmp_path / "data-eval")
    options = ["--no-brackets", "--query-prompt", "x", "--document-prompt", "y"]
    assert main([task, str(source), "--model", "fake", *options]) == 1
    message = "--brackets, --query-prompt, --document-prompt: only for queries and documents"
    assert message in capsys.readouterr().err


def test_sts_quotes_are_plain_and_licence_columns_are_allowed(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(sts_line(1, '"No', "b") + sts_line(2, "c", 'd"', "licence", "more") + "\n")
    assert read_sts(path) == [(1.0, '"No', "b"), (2.0, "c", 'd"')]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (sts_line(1, "a", "b") + "a\tb\n", "x.csv, line 2: 7 to 9 columns are needed, not 2"),
        (sts_line("high", "a", "b"), "x.csv, line 1: the score must be a number"),
        (sts_line("nan", "a", "b"), "x.csv, line 1: the score must be a number"),
        (sts_line(1, "a", "b"), "holds 1 pairs"),
        (sts_line(1, "a", "b") + sts_line(1, "c", "d"), "no correlation exists"),
        (sts_line(1, "a", "b") + sts_line(2, "a", "b"), "no correlation exists"),
    ],
)
def test_sts_refuses(tmp_path, fake, capsys, text, message):
    (tmp_path / "x.csv").write_text(text)
    assert main(["sts", str(tmp_path / "x.csv"), "--model", "fake", "--output", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.skipif("SGPT_DATA" not in os.environ, reason="SGPT_DATA is not set")
@pytest.mark.parametrize(("part", "count"), [("train", 5749), ("dev", 1500), ("test", 1379)])
def test_sts_benchmark_is_read_whole(part, count):
    pairs = read_sts(Path(os.environ["SGPT_DATA"]) / f"sts/sts-{part}.csv.gz")
    assert len(pairs) == count
    assert all(0 <= score <= 5 and first and second for score, first, second in pairs)


# Our measures of a task, and USEB's names for them.
NAMES = {
    "askubuntu": {name: f"{name}_askubuntu_title" for name in ("map", "p@1", "p@5", "mrr")},
    "cqadupstack": {
        f"{measure} {forum}": f"{measure}_cqadupstack_{forum}"
        for measure in ("map@100", "ndcg@10")
        for forum in (*eval_cases.USEB_FORUMS, "avg")
    },
    "twitterpara": {
        f"{measure} {part}": f"{measure}_twitter_{part}"
        for measure in ("ap", "spearman")
        for part in ("twitterurl", "pit", "avg")
    },
    "scidocs": {
        f"{m} {r} {d}": f"{m}_scidocs_{r}_{d}"
        for m in ("map", "ndcg")
        for r in useb.SCIDOCS
        for d in ("cosine",)
    }
    | {f"{m} {d} avg": f"{m}_scidocs_{d}_avg" for m in ("map", "ndcg") for d in ("cosine", "euclidean")},
}


def test_useb_equals_its_own_code(tmp_path):
    folder = eval_cases.write_useb(tmp_path / "data-eval")
    found = useb.evaluate(eval_cases.HashEncoder(), folder)
    for task, names in NAMES.items():
        for ours, theirs in names.items():
            assert found[task][ours] == pytest.approx(EXPECTED["useb"][task][theirs], abs=1e-6), (task, ours)


def test_useb_scidocs_with_negative_grades(tmp_path):
    """A grade below 0 counts as 0, so nothing changes where 0 becomes -1."""
    folder = eval_cases.write_useb(tmp_path / "data-eval")
    path = folder / "scidocs/data.json"
    before = useb.evaluate(eval_cases.HashEncoder(), folder)["scidocs"]
    data = json.loads(path.read_text())
    for found in data["test"]["cite"].values():
        found.update({id: grade or -1 for id, grade in found.items()})
    path.write_text(json.dumps(data))
    assert useb.evaluate(eval_cases.HashEncoder(), folder)["scidocs"] == before


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("askubuntu/test.txt", lambda text: text.replace("3.25", "nan"), "one BM25 score, a number"),
        (
            "twitterpara/test.data",
            lambda text: text.split("\n")[0] + "\n",
            "twitterpara: .* cannot be measured",
        ),
        ("twitterpara/test.data", lambda text: "", "a task has no texts"),
        ("cqadupstack/corpus.json", lambda text: text.replace('": "', '": 7, "x": "', 1), "7 is no text"),
        ("cqadupstack/retrieval_split.json", lambda text: re.sub(r"\[[^]]*\]", "7", text), "must be a list"),
        ("scidocs/data.json", lambda text: re.sub(r'("title": )"[^"]*"', r"\g<1>7", text), "is no text"),
    ],
)
def test_useb_files_that_cannot_be_measured(file, change, message, tmp_path):
    folder = eval_cases.write_useb(tmp_path / "data-eval")
    before = (folder / file).read_text()
    (folder / file).write_text(change(before))
    assert (folder / file).read_text() != before
    with pytest.raises(InputError, match=message):
        useb.evaluate(eval_cases.HashEncoder(), folder)


def test_useb_command(tmp_path, fake, capsys):
    folder = eval_cases.write_useb(tmp_path / "data-eval")
    assert main(["useb", str(folder), "--model", "fake", "--output", str(tmp_path / "out")]) == 0
    metrics = json.loads((tmp_path / "out/useb.json").read_text())["metrics"]
    four = {
        "askubuntu": "map_askubuntu_title",
        "cqadupstack": "map@100_cqadupstack_avg",
        "twitterpara": "ap_twitter_avg",
        "scidocs": "map_scidocs_cosine_avg",
    }
    for task, measure in four.items():
        assert metrics[task] == pytest.approx(EXPECTED["useb"][task][measure], abs=1e-6)
    assert metrics["avg"] == pytest.approx(np.mean([metrics[task] for task in four]))
    assert main(["useb", str(folder), "--model", "fake", "--split", "valid"]) == 0
    assert capsys.readouterr().out.count("useb: askubuntu") == 2


@pytest.mark.parametrize(
    "case", [([1, 0, 1, 1], [4, 3, 2, 1]), ([1, 0, 1, 0], [2, 2, 2, 1]), ([0, 0], [1, 1])]
)
def test_average_precision_groups_ties(case):
    """By hand: precision at every distinct score, times the share of the hits found there."""
    labels, scores = case
    total = 0.0
    for level in sorted(set(scores), reverse=True):
        found = [label for label, score in zip(labels, scores, strict=True) if score >= level]
        here = sum(label for label, score in zip(labels, scores, strict=True) if score == level)
        total += here / max(1, sum(labels)) * sum(found) / len(found)
    assert useb.average_precision(labels, scores) == pytest.approx(total)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("askubuntu/text_tokenized.txt", "100\n", "text_tokenized.txt, line 1: 2 columns"),
        ("askubuntu/test.txt", "100\t101\t101 999\t1 2\n", "test.txt, line 1: question '999'"),
        ("askubuntu/test.txt", "100\t101\t101 102\t1\n", "test.txt, line 1: every candidate"),
        ("askubuntu/test.txt", "100\t\t101\t1\n", "holds no question"),
        ("twitterpara/Twitter_URL_Corpus_test.txt", "a\tb\t4\n", "line 1: the label"),
        ("twitterpara/test.data", "1\tt\ta\tb\tx\n", "test.data, line 1: the label"),
        ("cqadupstack/corpus.json", "{", "corpus.json: broken JSON"),
        ("cqadupstack/retrieval_split.json", '{"test": {"android": {"none": []}}}', "asks 'none'"),
        ("cqadupstack/retrieval_split.json", '{"test": {}}', "android must be an object"),
        ("scidocs/data.json", "[]", "not in USEB's layout"),
        ("scidocs/data.json", '{"corpus": {}}', "not in USEB's layout"),
    ],
)
def test_useb_refuses(tmp_path, fake, capsys, file, content, message):
    folder = eval_cases.write_useb(tmp_path / "data-eval")
    (folder / file).write_text(content)
    assert main(["useb", str(folder), "--model", "fake", "--output", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_useb_names_the_missing_folders(tmp_path, capsys):
    assert main(["useb", str(tmp_path), "--model", "fake"]) == 1
    assert "holds no folder askubuntu, cqadupstack, twitterpara, scidocs" in capsys.readouterr().err


def test_sts_names_refuse_to_share_a_file(tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_sts(tmp_path / folder / "sts-dev.csv")
    arguments = ["sts", str(tmp_path / "a/sts-dev.csv"), str(tmp_path / "b/sts-dev.csv"), "--model", "fake"]
    assert main(arguments) == 1 and "same name" in capsys.readouterr().err


def test_sts_similarities_of_zero_vectors_are_finite():
    found = sts.similarities(np.zeros((2, 3)), np.ones((2, 3)))
    assert all(np.isfinite(values).all() for values in found.values())


def test_a_missing_sts_file_is_named(fake, capsys):
    assert main(["sts", "nowhere.csv", "--model", "fake"]) == 1
    assert "nowhere.csv" in capsys.readouterr().err


def test_sts_errors_are_input_errors(tmp_path):
    with pytest.raises(InputError):
        read_sts(write_sts(tmp_path / "one.csv", [(1.0, "a", "b")]))
