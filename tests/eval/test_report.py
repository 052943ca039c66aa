"""Reports and significance tests."""

import json

import eval_cases
import numpy as np
import pytest
from etils import epath

pytest.importorskip("pytrec_eval", reason="the eval extra is not installed")
pytest.importorskip("bm25s", reason="the eval extra is not installed")
pytest.importorskip("scipy", reason="the eval extra is not installed")

from scipy import stats

from eval.__main__ import main
from eval.datasets import AVERAGES
from eval.report import _series, collect, published
from eval.results import read_result
from eval.significance import compare


def beir(name="scifact", value=0.5, **more):
    return {
        "kind": "beir",
        "name": name,
        "metrics": {"ndcg@10": value, "recall@100": 0.9},
        "first_stage": {"name": "BM25"},
        "model": None,
        "cross_encoder": None,
        "command": f"python -m eval beir {name}",
        "queries": ["a", "b", "c"],
        "per_query": {"ndcg@10": [value - 0.1, value, value + 0.1]},
    } | more


def model(source="org/base", **options):
    return {"source": source, "pooling": "weightedmean", "parameters": 135_000_000, **options}


def cross(depth=10):
    encoder = {
        "source": "org/base",
        "parameters": 135_000_000,
        "prompt": {"prefix": "Text: ", "suffix": " Q: "},
    }
    return {"cross_encoder": encoder, "settings": {"cross_encoder": {"rerank_depth": depth}}}


def write(folder, *results):
    folder.mkdir(parents=True, exist_ok=True)
    for number, result in enumerate(results):
        (folder / f"{number}.json").write_text(json.dumps(result))
    return folder


def test_systems_by_data_sets_with_published_rows_and_commands(tmp_path, capsys):
    write(tmp_path / "bm25", beir(value=0.6713), beir("nfcorpus", 0.3173))
    write(tmp_path / "model", beir(model=model(), first_stage={"name": "bi-encoder"}, value=0.4))
    write(tmp_path / "ce", beir(value=0.7, **cross()), beir(value=0.71, **cross(100)))
    sts = {
        "kind": "sts",
        "name": "sts-test",
        "metrics": {"spearman_cosine": 0.8},
        "model": model(),
        "command": "c",
    }
    write(tmp_path / "sts", sts, {"other": "json"})
    assert main(["report", *(str(tmp_path / part) for part in ("bm25", "model", "ce", "sts"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[4] == "| system | nfcorpus | scifact | sts-test (Spearman) |"
    assert lines[6:10] == [
        "| BM25 [1] | 0.3173 | 0.6713 |  |",
        "| org/base (weightedmean) [2] |  | 0.4000 | 0.8000 |",
        '| org/base on BM25, top 10, prompt "Text: {} Q: " [3] |  | 0.7000 |  |',
        '| org/base on BM25, top 100, prompt "Text: {} Q: " [4] |  | 0.7100 |  |',
    ]
    assert "| BM25 (Elasticsearch) (published) [5] | 0.3060 | 0.6110 |  |" in lines
    assert any(
        line.startswith("| SGPT-BE-5.8B (batch 256) (published)") and "0.7470" in line for line in lines
    )
    assert "1. `python -m eval beir scifact`; `python -m eval beir nfcorpus`" in lines
    assert any(line.startswith("5. published: SGPT paper") for line in lines)


def test_any_two_rows_are_compared(tmp_path, capsys):
    """The difference, and the p-value of `eval significance`; rows without values for every query are left out."""
    draw = np.random.default_rng(0)
    queries = [f"q{n}" for n in range(40)]
    values = [draw.random(40), draw.random(40), draw.random(40)]
    order = draw.permutation(40)
    results = [
        beir(value=0.5, queries=queries, per_query={"ndcg@10": values[0].tolist()}),
        beir(value=0.5, queries=queries, per_query={"ndcg@10": values[1].tolist()}, model=model()),
        beir(
            value=0.5,
            queries=[queries[n] for n in order],
            per_query={"ndcg@10": values[2][order].tolist()},
            model=model(pooling="mean"),
        ),
        {key: value for key, value in beir(value=0.7, **cross()).items() if key != "per_query"},
    ]
    folder = write(tmp_path / "r", *results)
    assert main(["report", str(folder), "--no-published", "--significance"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("scifact: row minus column"))
    assert lines[start + 2] == "| | [1] | [2] |"
    cells = {}
    for row, column in ((1, 0), (2, 0), (2, 1)):
        found = compare(values[column], values[row])
        cells[row, column] = f"{found.difference:+.4f} ({found.p_bootstrap:.4f})"
    assert lines[start + 4] == f"| [2] | {cells[1, 0]} |  |"
    assert lines[start + 5] == f"| [3] | {cells[2, 0]} | {cells[2, 1]} |"


def test_no_published_rows_on_request_or_for_other_metrics(tmp_path, capsys):
    folder = write(tmp_path / "r", beir())
    for option in (["--no-published"], ["--metric", "recall@100"]):
        assert main(["report", str(folder), *option]) == 0
        assert "published" not in capsys.readouterr().out


def test_the_same_system_twice_has_two_rows():
    rows = collect([beir(value=0.1), beir(value=0.2), beir("nfcorpus", 0.3)])
    assert [row.values for row in rows] == [{"scifact": 0.1, "nfcorpus": 0.3}, {"scifact": 0.2}]


def test_options_that_change_numbers_are_in_the_name():
    options = [
        {},
        {"brackets": True},
        {"dtype": "bfloat16"},
        {"biases": "sha256:0123456789"},
        {"pooling": "mean"},
        {"weights": "int8"},
        {"adapter": ["sha256:0123456789"]},
        {"query_prompt": "find: "},
        {"query_prompt": ""},
        {"document_prompt": "find: "},
        {"bidirectional": True},
        {"truncate_dim": 64},
    ]
    names = [row.name for row in collect([beir(model=model(**option)) for option in options])]
    assert len(set(names)) == len(names) == 12 and names[1] == "org/base (weightedmean, brackets)"
    assert names[6] == "org/base (weightedmean, adapter 23456789)"
    assert names[7] == 'org/base (weightedmean, query prompt "find: ")'


def test_other_models_of_one_name_have_rows_of_their_own():
    """What else tells them apart stands in the name where it has to; STS may read more tokens than BEIR."""
    one, two = ({"revision": f"sha256:0000000{n}99999999{n}", "max_seq_length": 300} for n in "12")
    sts = {"kind": "sts", "name": "sts-test", "metrics": {"spearman_cosine": 0.8}}
    results = [beir(model=model(**one)), sts | {"model": model(**one | {"max_seq_length": 8192})}]
    (row,) = collect(results)
    assert row.name == "org/base (weightedmean)" and len(row.values) == 2
    rows = collect([*results, beir("nfcorpus", model=model(**two))])
    assert [row.name for row in rows] == [
        "org/base (weightedmean), revision 99999991, 300 and 8192 tokens",
        "org/base (weightedmean), revision 99999992, 300 tokens",
    ]
    rows = collect([beir(model=model(**one)), beir("nfcorpus", model=model(**one | {"max_seq_length": 64}))])
    assert [row.name for row in rows] == [
        "org/base (weightedmean), 300 tokens", "org/base (weightedmean), 64 tokens",
    ]  # fmt: skip
    first = [{"name": "bi-encoder", "model": model(**each)} for each in (one, two)]
    assert (
        len(
            collect(
                [beir(first_stage=first[0], **cross()), beir("nfcorpus", first_stage=first[1], **cross())]
            )
        )
        == 2
    )


def test_averages_of_complete_rows():
    names = AVERAGES["average_5"]
    (row,) = collect([beir(name, 0.1 * number) for number, name in enumerate(names)])
    assert row.values["average_5"] == pytest.approx(0.2) and "average_11" not in row.values
    shown = {row.name: row.values for row in published({*names, "average_5"})}
    assert shown["SGPT-BE-5.8B (batch 256)"]["average_5"] == pytest.approx(0.4384)


def test_published_averages_are_the_papers():
    """The values that the paper prints for its two averages come out of the table."""
    rows = {row.name: row.values for row in published({"average_18", "average_11"})}
    for name, eleven, eighteen in (
        ("BM25 (Elasticsearch)", 0.477, 0.428),
        ("SGPT-CE-6.1B@100", 0.499, 0.462),
        ("SGPT-CE-125M@10", 0.485, 0.436),
        ("SGPT-BE-5.8B (batch 256)", 0.550, 0.490),
    ):
        assert rows[name]["average_11"] == pytest.approx(eleven, abs=6e-4)
        assert rows[name]["average_18"] == pytest.approx(eighteen, abs=6e-4)


@pytest.mark.parametrize(
    ("x", "suffix", "start"),
    [("depth", "png", b"\x89PNG"), ("parameters", "pdf", b"%PDF"), ("seconds", "svg", b"<?xml")],
)
def test_plot(tmp_path, x, suffix, start):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    more = {"seconds": {"total": 12.5}}
    folder = write(
        tmp_path / "r",
        beir(**cross(10), **more),
        beir(value=0.6, **cross(100), **more),
        beir("nfcorpus", 0.3, **cross(10), **more),
        beir("nfcorpus", 0.2),
    )
    table, figure = tmp_path / "t.md", tmp_path / f"t.{suffix}"
    arguments = ["report", str(folder), "--output", str(table), "--plot", str(figure), "--x", x]
    assert main(arguments) == 0
    content = figure.read_bytes()
    assert content.startswith(start) and "| system |" in table.read_text()
    assert main(arguments) == 0 and figure.read_bytes() == content
    if suffix == "svg":  # one entry a system, in both panels
        text = content.decode()
        assert text.count("org/base on BM25, top 10,") == 1 and text.count(">BM25<") == 1
        assert "BM25 (Elasticsearch), published" in text and "nfcorpus" in text


def test_intervals_and_series():
    (row,) = collect([beir(value=0.5)])
    low, high = row.intervals["scifact"]
    assert 0.4 <= low < 0.45 and 0.55 < high <= 0.6  # resampled means of 0.4, 0.5 and 0.6
    rows = published({"scifact"})
    assert {_series(row, "parameters") for row in rows} == {
        "BM25 (Elasticsearch), published", "SGPT-CE, published", "SGPT-BE, published",
    }  # fmt: skip
    # No line over the depth joins models of two sizes.
    assert {_series(row, "depth") for row in rows if row.depth} == {
        "SGPT-CE-125M, published", "SGPT-CE-6.1B, published",
    }  # fmt: skip


def test_names_of_models_and_not_of_files():
    names = [
        collect([beir(model=model(source))])[0].name
        for source in ("/data/SmolLM2-135M-Instruct.Q4_1.gguf", "/data/tiny.gguf", "org/base")
    ]
    assert names == [
        "SmolLM2-135M-Instruct (Q4_1, weightedmean)", "tiny (weightedmean)", "org/base (weightedmean)",
    ]  # fmt: skip


def test_results_of_mteb(tmp_path, capsys):
    folder = tmp_path / "org__model" / "rev"
    folder.mkdir(parents=True)
    (folder / "model_meta.json").write_text(json.dumps({"name": "org/model", "n_parameters": 5}))
    scores = {
        "test": [{"hf_subset": "default", "ndcg_at_10": 0.25, "main_score": 0.25, "languages": ["eng"]}]
    }
    task = {"task_name": "TRECCOVID", "mteb_version": "2.1", "scores": scores, "evaluation_time": 3.0}
    (folder / "TRECCOVID.json").write_text(json.dumps(task))
    nothing = float("nan")  # mteb writes it where a measure is the same for all queries
    scores = {
        "test": [{"main_score": 0.5, "nauc_ndcg_at_10": nothing}, {"main_score": 0.7, "nauc_ndcg_at_10": 0.1}]
    }
    (folder / "STS22.json").write_text(json.dumps(task | {"task_name": "STS22", "scores": scores}))
    assert main(["report", str(tmp_path), "--no-published"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| system | trec-covid | sts22 (main score) |" in lines
    assert "| org/model, by mteb [1] | 0.2500 | 0.6000 |" in lines and "1. `mteb 2.1`" in lines
    json.dumps(read_result(epath.Path(folder / "STS22.json")), allow_nan=False)


def test_curves_of_training(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two", "more/two"):
        (tmp_path / name).mkdir(parents=True)
        lines = [json.dumps({"step": step, "loss": 1 / (1 + step), "lr": 0.1}) for step in range(120)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines))
    with (tmp_path / "one" / "metrics.jsonl").open("a") as stream:
        stream.write('\n{"step": 120, "lo')  # the run goes on
    (tmp_path / "one" / "dev.jsonl").write_text('{"step": 10, "dev": 0.5}\n')
    runs, figure = ["one", "two", "more/two"], tmp_path / "c.svg"
    assert main(["curves", *runs, "--plot", str(figure)]) == 0
    text = figure.read_text()
    assert all(text.count(f">{run}<") == 1 for run in runs) and ">dev metric<" in text
    assert main(["curves", str(tmp_path), "--plot", str(figure)]) == 1
    assert "holds no run" in capsys.readouterr().err
    assert main(["curves", *runs, "--plot", "c.jpeg"]) == 1
    assert "ends in .png, .pdf, .svg" in capsys.readouterr().err


def test_report_refuses(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd.json").write_text("{")
    bare = write(tmp_path / "bare", beir())
    for arguments, message in (
        (["nowhere"], "no such file or folder"),
        ([str(tmp_path / "empty")], "holds no result"),
        ([str(tmp_path / "odd.json")], "cannot be read as a result"),
        ([str(bare), "--metric", "ndcg@7"], "none of the results has ndcg@7"),
        ([str(bare), "--no-published", "--plot", str(tmp_path / "x.png")], "for the x axis"),
        ([str(bare), "--x", "depth"], "--x: only for a --plot"),
    ):
        assert main(["report", *arguments]) == 1 and message in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_comparison_is_scipys_t_test_and_a_seeded_bootstrap():
    random = np.random.RandomState(0)
    a = random.rand(200)
    b = np.clip(a + 0.02 + 0.1 * random.standard_normal(200), 0, 1)
    found = compare(a, b)
    assert found.p_t == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert found.difference == pytest.approx(np.mean(b - a)) and found.wins + found.losses <= 200
    spread = stats.bootstrap((b - a,), np.mean, method="percentile", rng=np.random.default_rng(1))
    assert found.low == pytest.approx(spread.confidence_interval.low, abs=2e-3)
    assert found.high == pytest.approx(spread.confidence_interval.high, abs=2e-3)
    assert found.p_bootstrap == pytest.approx(found.p_t, abs=0.02)  # the differences are close to normal
    assert compare(a, b) == found and compare(a, b, seed=1) != found
    back = compare(b, a)
    assert back.difference == pytest.approx(-found.difference) and back.p_t == pytest.approx(found.p_t)


def test_no_difference_is_no_significance():
    values = np.array([0.5, 0.25, 1.0])
    found = compare(values, values)
    assert found.p_t == found.p_bootstrap == 1.0 and found.low == found.high == 0.0


def test_one_query_tells_nothing_of_chance(tmp_path, capsys):
    found = compare(np.array([0.25]), np.array([0.5]))
    assert found.difference == 0.25 and found.wins == 1
    assert found.low is found.high is found.p_t is found.p_bootstrap is None
    a, b = (
        write(tmp_path / name, beir(value=value, queries=["a"], per_query={"ndcg@10": [value]}))
        for name, value in (("a", 0.25), ("b", 0.5))
    )
    assert main(["significance", str(a), str(b)]) == 0
    assert "| scifact | 1 | 0.2500 | 0.5000 | +0.2500 | - to - | - | - | 1 / 0 |" in capsys.readouterr().out
    assert main(["report", str(a), str(b), "--significance", "--no-published"]) == 0
    assert "| [2] | +0.2500 (-) |" in capsys.readouterr().out


def test_significance_of_two_commands(tmp_path, monkeypatch, capsys):
    small = str(eval_cases.small_beir(tmp_path / "small"))
    assert main(["beir", small, "--output", str(tmp_path / "a")]) == 0
    (tmp_path / "run.trec").write_text("q2 Q0 d9 1 1.0 t\nq0 Q0 d1 1 1.0 t\n")
    assert (
        main(["beir", small, "--first-stage", str(tmp_path / "run.trec"), "--output", str(tmp_path / "b")])
        == 0
    )
    capsys.readouterr()
    assert main(["significance", str(tmp_path / "a"), str(tmp_path / "b"), "--samples", "1000"]) == 0
    table = capsys.readouterr().out
    row = table.splitlines()[-1]
    monkeypatch.chdir(small)
    options = ["--samples", "100", "--queries", "2", "--data", "."]
    assert main(["significance", str(tmp_path / "a"), str(tmp_path / "b"), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-6] == "small: the queries that differ most" and lines[-4].startswith("| query | text | A |")
    changes = [abs(float(line.split("|")[5])) for line in lines[-2:]]
    assert changes == sorted(changes, reverse=True) and "| dog bark |" in lines[-2] + lines[-1]
    a, b = (json.loads((tmp_path / part / "small.json").read_text())["metrics"]["ndcg@10"] for part in "ab")
    assert row.startswith(f"| small | 3 | {a:.4f} | {b:.4f} | {b - a:+.4f} |")


@pytest.mark.parametrize("arguments", [["significance", "a", "b"], ["large-index", "--output", "out"]])
def test_seeds_are_no_negative_numbers(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--seed", "-1"])
    assert "must be a whole number from 0, not '-1'" in capsys.readouterr().err


def test_significance_refuses(tmp_path, capsys):
    small = eval_cases.small_beir(tmp_path / "small")
    a = write(tmp_path / "a", beir())
    for other, options, message in (
        (beir("nfcorpus"), [], "no data set in common"),
        (beir(queries=["a", "b", "x"]), [], "different queries"),
        (beir(), ["--metric", "ndcg@3"], "is not kept for every query; these are: ndcg@10"),
        (beir(), ["--data", str(small)], "--data: only for --queries"),
        (beir(), ["--data", str(small), "--queries", "2"], "small is none of the data sets (scifact)"),
    ):
        b = write(tmp_path / "b", other)
        assert main(["significance", str(a), str(b), *options]) == 1 and message in capsys.readouterr().err
    twice = write(tmp_path / "twice", beir(), beir())
    assert main(["significance", str(a), str(twice)]) == 1 and "twice" in capsys.readouterr().err
