"""python -m eval beir: stages, results, resuming, MS MARCO's split, CQADupStack's mean, the paper's averages."""

import json

import eval_cases
import numpy as np
import pytest

pytest.importorskip("pytrec_eval", reason="the eval extra is not installed")
pytest.importorskip("bm25s", reason="the eval extra is not installed")

import pytrec_eval

import eval.beir
from eval.__main__ import main
from eval.datasets import AVERAGES, FORUMS
from eval.labels import label
from sgpt_jax.errors import InputError
from sgpt_jax.files.runs import read_qrels, read_run
from sgpt_jax.hybrid import fuse
from sgpt_jax.runtime import processes


@pytest.fixture
def models(monkeypatch):
    """Fakes in the place of --model and --cross-encoder."""
    found = {
        "bi": eval_cases.Ready(eval_cases.HashEncoder(256)),
        "cross": eval_cases.Ready(eval_cases.WordOverlap(), prompt={"prefix": "a", "suffix": "b"}),
    }
    monkeypatch.setattr(eval.beir, "bi_encoder", lambda args: found["bi"])
    monkeypatch.setattr(eval.beir, "cross_encoder", lambda args: found["cross"])
    return found


@pytest.fixture
def small(tmp_path):
    return eval_cases.small_beir(tmp_path / "small")


def run(*arguments):
    return main(["beir", *map(str, arguments)])


def read(path):
    return json.loads(path.read_text())


def test_a_result_has_what_is_needed_to_repeat_it(small, tmp_path, models):
    assert run(small, "--model", "fake", "--output", tmp_path / "out") == 0
    result = read(tmp_path / "out/small.json")
    assert set(result["metrics"]) == {
        f"{name}@{k}"
        for name in ("ndcg", "map", "recall", "precision", "mrr")
        for k in (1, 3, 5, 10, 100, 1000)
    }
    assert result["model"] == {"source": "org/fake", "revision": "made up", "parameters": 1000}
    assert result["first_stage"] == {"name": "bi-encoder"} and result["cross_encoder"] is None
    assert result["counts"]["queries"] == 3 and result["counts"]["documents"] == 10
    assert result["settings"]["split"] == "test" and result["settings"]["model"] == {"revision": "made up"}
    assert {"python", "jax", "numpy", "pytrec_eval-terrier", "sgpt-jax"} <= result["versions"].keys()
    assert result["device"]["platform"] and result["seconds"]["total"] > 0
    assert result["command"].startswith("python -m eval") and result["created"]
    assert result["queries"] == ["q0", "q1", "q2"] and len(result["per_query"]["ndcg@10"]) == 3
    assert np.mean(result["per_query"]["ndcg@10"]) == pytest.approx(result["metrics"]["ndcg@10"])


def test_the_run_file_gives_the_metrics_to_trec_eval(small, tmp_path, models):
    assert run(small, "--model", "fake", "--output", tmp_path / "out") == 0
    qrels, ranked = read_qrels(small / "qrels/test.tsv"), read_run(tmp_path / "out/small.trec")
    assert all(len(hits) == 10 for hits in ranked.values())  # fewer than 1000: all documents, none invented
    values = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "map_cut.100"}).evaluate(ranked)
    metrics = read(tmp_path / "out/small.json")["metrics"]
    assert metrics["ndcg@10"] == pytest.approx(np.mean([v["ndcg_cut_10"] for v in values.values()]), abs=1e-6)
    assert metrics["map@100"] == pytest.approx(np.mean([v["map_cut_100"] for v in values.values()]), abs=1e-6)


def test_hybrid(small, tmp_path, models):
    """Both rankings fused, before re-ranking; a run's own result says what it is."""
    for name, options in {
        "model": ("--model", "fake"),
        "bm25": (),
        "both": ("--model", "fake", "--hybrid"),
        "from run": ("--first-stage", tmp_path / "model", "--hybrid"),
        "reranked": ("--first-stage", tmp_path / "both", "--cross-encoder", "fake", "--rerank-depth", 3),
        "reranked run": (
            "--first-stage",
            tmp_path / "from run",
            "--cross-encoder",
            "fake",
            "--rerank-depth",
            3,
        ),
    }.items():
        assert run(small, *options, "--output", tmp_path / name) == 0
    runs = {name: read_run(tmp_path / name / "small.trec") for name in ("model", "bm25", "both", "from run")}
    assert runs["both"] == runs["from run"] == fuse(runs["model"], runs["bm25"], 1000)
    result, reranked = read(tmp_path / "both/small.json"), read(tmp_path / "reranked/small.json")
    assert result["settings"]["hybrid"]["fusion"] == {"scores": "min-max", "depth": 1000}
    assert " on org/fake + BM25 (scaled scores), top 3, " in label(reranked)
    assert label(read(tmp_path / "reranked run/small.json")) == label(reranked)
    assert reranked["first_stage"]["metrics"] == result["metrics"]
    assert run(small, "--hybrid", "--output", tmp_path / "none") == 1


def test_reranking_bm25(small, tmp_path, models):
    assert run(small, "--output", tmp_path / "bm25") == 0
    assert run(small, "--cross-encoder", "fake", "--rerank-depth", 2, "--output", tmp_path / "out") == 0
    result, first = read(tmp_path / "out/small.json"), read(tmp_path / "bm25/small.json")
    assert result["first_stage"]["name"] == "BM25" and result["first_stage"]["k1"] == 0.9
    assert result["first_stage"]["metrics"] == first["metrics"]
    assert result["settings"]["cross_encoder"]["rerank_depth"] == 2
    deep, shallow = read_run(tmp_path / "bm25/small.trec"), read_run(tmp_path / "out/small.trec")
    assert {query: set(hits) for query, hits in shallow.items()} == {
        query: set(list(hits)[:2]) for query, hits in deep.items()
    }
    assert shallow["q2"]["d9"] == 1.0  # both of the query's words, says the fake


def test_both_stages_in_one_command(small, tmp_path, models):
    assert run(small, "--model", "fake", "--output", tmp_path / "first") == 0
    options = ("--model", "fake", "--cross-encoder", "fake", "--rerank-depth", 3)
    assert run(small, *options, "--output", tmp_path / "both") == 0
    options = ("--first-stage", tmp_path / "first", "--cross-encoder", "fake", "--rerank-depth", 3)
    assert run(small, *options, "--output", tmp_path / "file") == 0
    both, file = read(tmp_path / "both/small.json"), read(tmp_path / "file/small.json")
    assert both["metrics"] == file["metrics"]
    assert both["first_stage"]["metrics"] == read(tmp_path / "first/small.json")["metrics"]
    assert (
        file["first_stage"]["name"] == "bi-encoder" and file["first_stage"]["model"]["source"] == "org/fake"
    )


def test_two_first_stages_are_refused(small, tmp_path, models, capsys):
    assert run(small, "--model", "fake", "--first-stage", "x", "--output", tmp_path / "out") == 1
    assert "give one of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--cross-encoder", "fake", "--biases", "x", "--truncate-dim", 3),
            "--biases, --truncate-dim: only for a --model",
        ),
        (
            ("--model", "fake", "--prompt", "x {}", "--rerank-depth", 100),
            "--prompt, --rerank-depth: only for a --cross-encoder",
        ),
        (
            ("--dtype", "bfloat16", "--weights", "int8", "--batch-tokens", 64),
            "--dtype, --weights, --batch-tokens: only for a --model or a --cross-encoder",
        ),
    ],
)
def test_options_of_a_model_that_is_not_asked_for_are_refused(
    options, message, small, tmp_path, models, capsys
):
    assert run(small, *options, "--output", tmp_path / "out") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_first_stage_of_unknown_documents_cannot_be_reranked(small, tmp_path, models, capsys):
    (tmp_path / "run.trec").write_text("q0 Q0 d0 1 2.0 t\nq0 Q0 gone 2 1.0 t\n")
    options = (
        "--cross-encoder",
        "fake",
        "--first-stage",
        tmp_path / "run.trec",
        "--output",
        tmp_path / "out",
    )
    assert run(small, *options) == 1
    assert "'gone' for query 'q0'" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_is_there_is_not_computed_again(small, tmp_path, models, capsys):
    other = eval_cases.small_beir(tmp_path / "other")
    arguments = ("--model", "fake", "--output", tmp_path / "out")
    assert run(small, *arguments) == 0
    models["bi"].loads = 0
    first = read(tmp_path / "out/small.json")
    assert run(small, *arguments) == 0 and models["bi"].loads == 0
    assert run(small, other, *arguments) == 0 and models["bi"].loads > 0
    assert "small: " in capsys.readouterr().out
    assert (
        read(tmp_path / "out/small.json") == first
        and read(tmp_path / "out/other.json")["metrics"] == first["metrics"]
    )


def test_results_of_other_settings_are_not_mixed(small, tmp_path, models, capsys):
    assert run(small, "--model", "fake", "--output", tmp_path / "out") == 0
    before = (tmp_path / "out/small.json").read_bytes()
    models["bi"].identity["revision"] = "another"
    assert run(small, "--model", "fake", "--output", tmp_path / "out") == 1
    assert "was made with other settings (model)" in capsys.readouterr().err
    assert (tmp_path / "out/small.json").read_bytes() == before
    assert run(small, "--model", "fake", "--output", tmp_path / "out", "--overwrite") == 0
    assert read(tmp_path / "out/small.json")["model"]["revision"] == "another"


def test_one_name_twice_is_refused(small, tmp_path, models, capsys):
    twin = eval_cases.small_beir(tmp_path / "elsewhere/small")
    assert run(small, twin, "--output", tmp_path / "out") == 1
    assert "has the name of" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "ignored"), [("arguana", True), ("quora", True), ("scidocs", False)])
@pytest.mark.parametrize("stage", [(), ("--model", "fake"), ("--cross-encoder", "fake")])
def test_identical_ids(tmp_path, models, name, ignored, stage):
    """In ArguAna every query is a document; it would always find itself first."""
    corpus = [
        {"_id": id, "text": text} for id, text in (("q0", "cat dog"), ("d1", "cat dog mouse"), ("d2", "rain"))
    ]
    folder = eval_cases.write_beir(tmp_path / name, corpus, [{"_id": "q0", "text": "cat dog"}], "q0\td1\t1\n")
    assert run(folder, *stage, "--output", tmp_path / "out") == 0
    result = read(tmp_path / f"out/{name}.json")
    assert result["metrics"]["ndcg@1"] == float(ignored)
    assert result["counts"]["identical_ids_dropped"] == int(ignored)
    assert ("q0" in read_run(tmp_path / f"out/{name}.trec")["q0"]) is not ignored
    option = "--no-ignore-identical-ids" if ignored else "--ignore-identical-ids"
    assert run(folder, *stage, option, "--output", tmp_path / "turned") == 0
    assert read(tmp_path / f"turned/{name}.json")["metrics"]["ndcg@1"] == float(not ignored)


def test_ms_marco_uses_dev_and_split_can_be_given(tmp_path):
    folder = eval_cases.small_beir(tmp_path / "msmarco", split="dev")
    assert run(folder, "--output", tmp_path / "out") == 0
    assert read(tmp_path / "out/msmarco.json")["settings"]["split"] == "dev"
    assert run(folder, "--split", "test", "--output", tmp_path / "test") == 1
    other = eval_cases.small_beir(tmp_path / "other", split="train")
    assert run(other, "--split", "train", "--output", tmp_path / "train") == 0


def test_cqadupstack_is_the_mean_of_its_forums(tmp_path):
    random = np.random.RandomState(0)
    for forum in FORUMS:
        folder = eval_cases.small_beir(tmp_path / "cqadupstack" / forum)
        judged = "".join(f"q{query}\td{random.randint(10)}\t1\n" for query in range(3))
        (folder / "qrels/test.tsv").write_text(judged)
    assert run(tmp_path / "cqadupstack", "--output", tmp_path / "out") == 0
    parts = [read(tmp_path / f"out/cqadupstack-{forum}.json") for forum in FORUMS]
    mean = read(tmp_path / "out/cqadupstack.json")
    for key, value in mean["metrics"].items():
        assert value == pytest.approx(np.mean([part["metrics"][key] for part in parts]), abs=1e-12)
    assert len({part["metrics"]["ndcg@10"] for part in parts}) > 2
    assert mean["counts"]["queries"] == 36 and not (tmp_path / "out/cqadupstack.trec").exists()
    assert mean["forums"]["cqadupstack-gis"] == parts[FORUMS.index("gis")]["metrics"]["ndcg@10"]


def test_the_papers_averages(tmp_path, capsys):
    names = AVERAGES["average_5"]
    folders = [eval_cases.small_beir(tmp_path / name) for name in names]
    (folders[0] / "qrels/test.tsv").write_text("q0\td2\t1\n")  # so that not all are the same
    assert run(*folders[:-1], "--output", tmp_path / "out") == 0
    assert not (tmp_path / "out/averages.json").exists()
    assert run(*folders, "--output", tmp_path / "out") == 0
    averages = read(tmp_path / "out/averages.json")["metrics"]
    assert list(averages) == ["average_5"]
    expected = np.mean([read(tmp_path / f"out/{name}.json")["metrics"]["ndcg@10"] for name in names])
    assert averages["average_5"]["ndcg@10"] == pytest.approx(expected, abs=1e-12)
    assert "average_5: ndcg@10" in capsys.readouterr().out

    # Another system's result in the same folder is averaged with none of these; runs are one system, a file each.
    before = read(tmp_path / "out/averages.json")
    assert run(*folders, "--first-stage", tmp_path / "out", "--output", tmp_path / "runs") == 0
    averages = read(tmp_path / "runs/averages.json")
    assert averages["metrics"] == before["metrics"] and averages["system"] != before["system"]
    (tmp_path / "run.trec").write_text("q0 Q0 d9 1 1.0 t\n")
    other = ("--first-stage", tmp_path / "run.trec", "--overwrite", "--output", tmp_path / "out")
    capsys.readouterr()
    assert run(folders[1], *other) == 0
    assert "average_5" not in capsys.readouterr().out
    assert read(tmp_path / "out/averages.json") == before


def test_help_and_wrong_usage(capsys):
    for arguments in (
        ["--help"],
        *([task, "--help"] for task in ("beir", "prompts", "sts", "useb", "report")),
    ):
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
    assert "re-ranking" in capsys.readouterr().out
    for arguments in ([], ["nonsense"], ["beir"], ["beir", "x", "--output", "y", "--rerank-depth", "0"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)


def test_a_missing_package_is_named(monkeypatch, capsys):
    def missing(path, package):
        raise ModuleNotFoundError("No module named 'bm25s'", name="bm25s")

    monkeypatch.setattr("eval.__main__.importlib.import_module", missing)
    assert main(["beir", "x", "--output", "y"]) == 1
    assert capsys.readouterr().err == "error: beir needs bm25s: pip install 'sgpt-jax[eval]'\n"


@pytest.mark.parametrize("part", ["qrels/test.tsv", "queries.jsonl", "corpus.jsonl"])
def test_results_of_other_data_are_not_mixed(part, small, tmp_path, capsys):
    """Old results do not say which files they were made of: they stay what they are."""
    assert run(small, "--output", tmp_path / "out") == 0
    with (small / part).open("a") as stream:
        stream.write("q0\td1\t1\n" if part.startswith("qrels") else '{"_id": "new", "text": "cat"}\n')
    capsys.readouterr()
    assert run(small, "--output", tmp_path / "out") == 1
    assert "was made with other settings (data)" in capsys.readouterr().err
    result = read(tmp_path / "out/small.json")
    del result["settings"]["data"]
    (tmp_path / "out/small.json").write_text(json.dumps(result))
    assert run(small, "--output", tmp_path / "out") == 0
    assert "found in the output folder" in capsys.readouterr().out


def test_more_documents_are_reranked_than_metrics_look_at(tmp_path, models):
    corpus = [{"_id": f"d{i}", "text": f"cat {i}"} for i in range(1005)]
    folder = eval_cases.write_beir(tmp_path / "big", corpus, [{"_id": "q0", "text": "cat"}], "q0\td1\t1\n")
    (tmp_path / "run.trec").write_text("".join(f"q0 Q0 d{i} 1 {-i} t\n" for i in range(1005)))
    first = ("--first-stage", tmp_path / "run.trec", "--cross-encoder", "fake")
    assert run(folder, *first, "--rerank-depth", 1003, "--output", tmp_path / "out") == 0
    assert len(models["cross"].model.pairs) == 1003


@pytest.mark.parametrize("depth", [0, -1, 2.5, True])
def test_a_depth_is_a_number_of_documents(depth, small):
    with pytest.raises(InputError, match="rerank_depth must be"):
        eval.beir.evaluate(small, cross_encoder=eval_cases.WordOverlap(), rerank_depth=depth)


def test_averages_are_of_the_usual_judgements(tmp_path, capsys):
    names = AVERAGES["average_5"]
    folders = [eval_cases.small_beir(tmp_path / name, split) for name in names for split in ("test", "train")]
    assert run(*folders[2::2], "--output", tmp_path / "out") == 0
    assert run(folders[0], "--split", "train", "--output", tmp_path / "out") == 0
    assert not (tmp_path / "out/averages.json").exists()
    assert main(["report", str(tmp_path / "out"), "--no-published"]) == 0
    table = capsys.readouterr().out
    assert f"{names[0]}, train |" in table and "average_5" not in table


def test_a_run_replaces_that_of_the_other_form(tmp_path, capsys):
    corpus = [{"_id": "d 0", "text": "cat"}, {"_id": "d1", "text": "dog"}]
    query = [{"_id": "q0", "text": "cat"}]
    folder = eval_cases.write_beir(tmp_path / "ids", corpus, query, "q0\td 0\t1\n")
    assert run(folder, "--output", tmp_path / "out") == 0
    corpus[0]["_id"] = "d0"
    eval_cases.write_beir(folder, corpus, query, "q0\td0\t1\n")
    assert run(folder, "--output", tmp_path / "out", "--overwrite") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ids.json", "ids.trec"]


def test_results_that_do_not_say_what_an_adapter_lies_over_are_not_made_again(
    small, tmp_path, models, capsys
):
    arguments = ("--model", "fake", "--output", tmp_path / "out")
    models["bi"].identity["base"] = ["a1"]
    assert run(small, *arguments) == 0
    models["bi"].identity["base"] = ["b2"]
    assert run(small, *arguments) == 1 and "other settings (model)" in capsys.readouterr().err
    result = json.loads((tmp_path / "out/small.json").read_text())
    del result["settings"]["model"]["base"]
    (tmp_path / "out/small.json").write_text(json.dumps(result))
    assert run(small, *arguments) == 0 and "found in the output folder" in capsys.readouterr().out


def test_processes_that_would_measure_different_systems_are_refused(
    small, tmp_path, models, monkeypatch, capsys
):
    other = {"model": {"revision": "another"}}
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "gather", lambda value: [value, value and value | other])
    assert run(small, "--model", "fake", "--output", tmp_path / "out") == 1
    assert "the processes differ in model: start the same command" in capsys.readouterr().err
