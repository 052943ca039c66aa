"""mteb's own evaluator over this project's models, beside `eval beir` on the same data."""

import json
import os
from pathlib import Path

import eval_cases
import numpy as np
import pytest

pytest.importorskip("pytrec_eval", reason="the eval extra is not installed")
pytest.importorskip("bm25s", reason="the eval extra is not installed")

from scipy import stats

from eval.__main__ import main
from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.files.beir import DataSet


def read(path):
    return json.loads(path.read_text())


def mteb_scores(folder, split, model, **task):
    pytest.importorskip("torch", reason="mteb evaluates with torch's loaders")
    mteb = pytest.importorskip("eval.mteb", reason="mteb is not installed")
    data = DataSet(folder.name, folder, split).load()
    adapter = mteb.BiEncoderModel if isinstance(model, BiEncoder) else mteb.CrossEncoderModel
    return mteb.evaluate(adapter(model), mteb.local_task(data, **task))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("brackets", [False, True])
def test_mteb_gives_the_same_figures(tiny, small, tmp_path, brackets):
    model = BiEncoder.from_pretrained(tiny, brackets=brackets)
    theirs = mteb_scores(Path(small), "test", model)
    option = "--brackets" if brackets else "--no-brackets"
    assert main(["beir", small, "--model", tiny, option, "--output", str(tmp_path / "out")]) == 0
    ours = read(tmp_path / "out/small.json")["metrics"]
    for name in ("ndcg", "map", "recall", "precision"):
        for k in (1, 3, 5, 10, 100, 1000):
            assert theirs[f"{name}@{k}"] == pytest.approx(ours[f"{name}@{k}"], abs=1e-6)
            assert theirs[f"{name}_at_{k}"] == pytest.approx(ours[f"{name}@{k}"], abs=6e-6)  # mteb rounds
    assert theirs["mrr_at_10"] == pytest.approx(ours["mrr@10"], abs=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_mteb_reranks_alike(tiny, small, tmp_path):
    pytest.importorskip("torch", reason="mteb evaluates with torch's loaders")
    pytest.importorskip("mteb", reason="mteb is not installed")
    options = ["--cross-encoder", tiny, "--rerank-depth", "5", "--output"]
    assert main(["beir", small, *options, str(tmp_path / "ours")]) == 0
    assert main(["mteb", small, *options, str(tmp_path / "theirs")]) == 0
    ours, theirs = (read(tmp_path / f"{part}/small.json")["metrics"] for part in ("ours", "theirs"))
    assert theirs["ndcg@10"] == pytest.approx(ours["ndcg@10"], abs=1e-6)
    assert theirs["map@100"] == pytest.approx(ours["map@100"], abs=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif("SGPT_DATA" not in os.environ, reason="SGPT_DATA is not set")
def test_mteb_gives_the_same_figures_on_scifact(tiny, tmp_path):
    pytest.importorskip("torch", reason="mteb evaluates with torch's loaders")
    pytest.importorskip("mteb", reason="mteb is not installed")
    folder = Path(os.environ["SGPT_DATA"]) / "scifact"
    options = ["--model", tiny, "--max-seq-length", "24", "--output"]
    assert main(["beir", str(folder), *options, str(tmp_path / "ours")]) == 0
    assert main(["mteb", str(folder), *options, str(tmp_path / "theirs")]) == 0
    ours, theirs = (read(tmp_path / f"{part}/scifact.json")["metrics"] for part in ("ours", "theirs"))
    assert ours["ndcg@10"] > 0
    for name, value in theirs.items():
        assert value == pytest.approx(ours[name], abs=1e-6), name


def test_adapters_satisfy_mtebs_protocols(tiny):
    pytest.importorskip("torch", reason="mteb evaluates with torch's loaders")
    mteb = pytest.importorskip("eval.mteb", reason="mteb is not installed")
    from mteb.models import CrossEncoderProtocol, EncoderProtocol, SearchProtocol

    encoder, ranker = mteb.BiEncoderModel(tiny), mteb.CrossEncoderModel(tiny)
    assert isinstance(encoder, EncoderProtocol) and not isinstance(encoder, SearchProtocol)
    assert isinstance(ranker, CrossEncoderProtocol)
    a, b = (
        encoder.encode([{"text": ["x", "y"]}, {"text": ["z"]}]),
        encoder.encode([{"text": ["u", "v", "w"]}]),
    )
    assert a.shape == b.shape == (3, encoder.model.dimension)
    assert encoder.similarity_pairwise(a, b) == pytest.approx(np.diag(encoder.similarity(a, b)), abs=1e-6)
    meta = encoder.mteb_model_meta
    assert meta.embed_dim == encoder.model.dimension and meta.n_parameters > meta.n_embedding_parameters > 0
    assert meta.memory_usage_mb == pytest.approx(4 * meta.n_parameters / 2**20) and not meta.use_instructions


def test_prompts_and_instructions_of_mtebs_tasks(tiny, tmp_path, monkeypatch):
    """Which prompt a task's texts get; an STS task by name, whose data are here, as mteb runs it."""
    pytest.importorskip("torch", reason="mteb evaluates with torch's loaders")
    ours = pytest.importorskip("eval.mteb", reason="mteb is not installed")
    import mteb
    from datasets import Dataset, DatasetDict
    from mteb.types import PromptType

    query, document = PromptType.query, PromptType.document
    sts, retrieval = (mteb.get_task(name).metadata for name in ("STSBenchmark", "NFCorpus"))
    named = ours.BiEncoderModel(
        tiny, prompts={"NFCorpus-query": "find: ", "STS": "same: "}, instruction="I: {instruction} Q: "
    )
    assert (named.prompt(retrieval, query), named.prompt(retrieval, document)) == ("find: ", None)
    assert named.prompt(sts, None) == "same: " and named.prompt(None, query) is None
    plain = ours.BiEncoderModel(named.model, instruction="I: {instruction} Q: ")
    assert plain.prompt(retrieval, query).startswith("I: Given a question, retrieve")
    assert plain.prompt(retrieval, document) is None and plain.prompt(sts, None).startswith(
        "I: Retrieve seman"
    )
    assert plain.mteb_model_meta.use_instructions

    def load(self, **options):
        rows = [
            {"sentence1": a, "sentence2": b, "score": s}
            for a, b, s in (("a b", "a", 4), ("c", "d", 1), ("e f", "e", 3))
        ]
        self.dataset = DatasetDict({"test": Dataset.from_list(rows)})
        self.data_loaded = True

    monkeypatch.setattr(type(mteb.get_task("STSBenchmark")), "load_data", load)
    (tmp_path / "p.json").write_text('{"STS": "same: "}')
    options = ["--prompts", str(tmp_path / "p.json"), "--output", str(tmp_path / "out")]
    assert main(["mteb", "--tasks", "STSBenchmark", "--model", tiny, *options]) == 0
    result = read(tmp_path / "out/STSBenchmark.json")
    vectors = named.model.encode(["a b", "c", "e f", "a", "d", "e"], prompt="same: ", normalize=True)
    cosines = (vectors[:3] * vectors[3:]).sum(axis=1)
    assert result["main_score"] == pytest.approx(stats.spearmanr(cosines, [4, 1, 3]).statistic, abs=1e-5)
    assert main(["mteb", "--tasks", "NoSuchTask", "--model", tiny, *options]) == 1


@pytest.fixture
def sts(monkeypatch):
    """Two tasks of mteb whose data are here; the second cannot be correlated. Returns mteb's own evaluate."""
    pytest.importorskip("torch", reason="mteb evaluates with torch's loaders")
    mteb = pytest.importorskip("mteb", reason="mteb is not installed")
    from datasets import Dataset, DatasetDict

    rows = {
        "STSBenchmark": [("a b", "a", 4), ("c", "d", 1), ("e f", "e", 3), ("g h", "i", 2)],
        "SICK-R": [("a", "a", 4), ("a", "a", 1)],
    }
    for name, pairs in rows.items():
        columns = [{"sentence1": a, "sentence2": b, "score": s} for a, b, s in pairs]

        def load(self, columns=columns, **options):
            self.dataset, self.data_loaded = DatasetDict({"test": Dataset.from_list(columns)}), True

        monkeypatch.setattr(type(mteb.get_task(name)), "load_data", load)
    return mteb.evaluate


@pytest.mark.filterwarnings("ignore")
def test_mtebs_cache_takes_no_other_model_for_this_one(tiny, sts, tmp_path):
    import mteb

    from eval.mteb import BiEncoderModel, CrossEncoderModel

    models = [
        BiEncoderModel(tiny, revision, **options)
        for revision in (None, "named")
        for options in (
            {},
            {"pooling": "mean"},
            {"truncate_dim": 4},
            {"dtype": "bfloat16"},
            {"prompts": {"STS": "x: "}},
            {"prompts": {"STS": "x? "}},
            {"instruction": "{instruction}"},
        )
    ]
    models += [BiEncoderModel(BiEncoder.from_pretrained(tiny).with_prompts(query="q: "))]
    models += [CrossEncoderModel(tiny, prompt=prompt) for prompt in (None, "{} a", "{} b")]
    cache = mteb.ResultCache(tmp_path)
    paths = [cache.get_task_result_path("STSBenchmark", model.mteb_model_meta) for model in models]
    assert len(set(paths)) == len(paths)
    assert models[0].mteb_model_meta == BiEncoderModel(tiny).mteb_model_meta

    def score(model):
        found = sts(model, mteb.get_task("STSBenchmark"), cache=cache, co2_tracker=False)
        return found.task_results[0].get_score()

    alone = [mteb_score(sts, model) for model in models[:3]]
    assert [score(model) for model in models[:3]] == alone


def mteb_score(evaluate, model, **options):
    import mteb

    task = mteb.get_task("STSBenchmark")
    found = evaluate(model, task, cache=None, co2_tracker=False, encode_kwargs=options)
    return found.task_results[0].get_score()


@pytest.mark.filterwarnings("ignore")
def test_options_of_mtebs_encode_are_used_or_refused(tiny, sts):
    from eval.mteb import BiEncoderModel, CrossEncoderModel

    encoder, ranker = BiEncoderModel(tiny, prompts={"STS": "x: "}), CrossEncoderModel(tiny)
    texts, of_mteb = [{"text": ["a b", "c"]}], {"hf_split": "test", "hf_subset": "default", "batch_size": 32}
    found = encoder.encode(texts, truncate_dim=4, normalize_embeddings=True, prompt="y: ", **of_mteb)
    expected = encoder.model.encode(["a b", "c"], prompt="y: ", truncate_dim=4, normalize=True)
    assert np.array_equal(found, expected)
    assert encoder.encode(texts, precision="int8", **of_mteb).dtype == np.int8
    with pytest.raises(TypeError, match="'chunks'"):
        encoder.encode(texts, chunks=3, **of_mteb)
    with pytest.raises(TypeError, match="'chunks'"):
        ranker.predict(texts, texts, chunks=3, **of_mteb)
    assert mteb_score(sts, encoder, prompt="") == mteb_score(sts, BiEncoderModel(tiny))
    one = encoder.similarity(expected[0], expected[1])  # as mteb's tasks of summaries ask
    assert one.shape == () and float(one) == encoder.similarity(expected[:1], expected[1:])[0, 0]


@pytest.mark.filterwarnings("ignore")
def test_a_task_of_mteb_that_fails_does_not_take_the_others_with_it(tiny, sts, tmp_path, monkeypatch, capsys):
    import mteb

    def evaluate(model, task, **options):
        if task.metadata.name == "STS12":
            raise RuntimeError("no such luck")
        assert options["encode_kwargs"]["batch_tokens"] == 64
        return sts(model, task, **options)

    monkeypatch.setattr(mteb, "evaluate", evaluate)
    monkeypatch.setattr(type(mteb.get_task("STS12")), "load_data", lambda self, **options: None)
    tasks = ["--tasks", "STS12", "SICK-R", "STSBenchmark", "--batch-tokens", "64"]
    assert main(["mteb", *tasks, "--model", tiny, "--output", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert "failed: STS12 (RuntimeError: no such luck)" in captured.err and "SICK-R: - by" in captured.out
    assert read(tmp_path / "out/SICK-R.json")["main_score"] is None
    assert isinstance(read(tmp_path / "out/STSBenchmark.json")["main_score"], float)


@pytest.mark.filterwarnings("ignore")
def test_results_of_mteb_replace_no_other_ones(tiny, small, tmp_path, capsys):
    pytest.importorskip("torch", reason="mteb evaluates with torch's loaders")
    pytest.importorskip("mteb", reason="mteb is not installed")
    for name, prompts in (("one", {"small-query": "x: "}), ("two", {"Local-small-query": "x: "})):
        (tmp_path / f"{name}.json").write_text(json.dumps(prompts))
    arguments = ["mteb", small, "--model", tiny, "--output", str(tmp_path / "out")]
    assert main(arguments) == 0 and main(arguments) == 0  # the same again
    for options, message in (
        (["--pooling", "mean"], "small.json: was made with other settings (model); give another"),
        (["--prompts", str(tmp_path / "one.json")], "other settings (prompts)"),
    ):
        assert main([*arguments, *options]) == 1 and message in capsys.readouterr().err
    assert main(["beir", small, "--output", str(tmp_path / "out"), "--model", tiny]) == 1
    assert "is a result of eval mteb" in capsys.readouterr().err
    arguments[-1] = str(tmp_path / "prompted")
    for name in ("one", "two"):
        assert main([*arguments, "--prompts", str(tmp_path / f"{name}.json")]) == 0
    metrics, plain = (read(tmp_path / f"{part}/small.json")["metrics"] for part in ("prompted", "out"))
    options = ["--model", tiny, "--query-prompt", "x: ", "--output", str(tmp_path / "beir")]
    assert main(["beir", small, *options]) == 0
    expected = read(tmp_path / "beir/small.json")["metrics"]
    assert metrics["map@100"] == pytest.approx(expected["map@100"], abs=1e-6) != plain["map@100"]


@pytest.mark.filterwarnings("ignore")
def test_mteb_refuses(tiny, small, tmp_path, capsys):
    pytest.importorskip("torch", reason="mteb evaluates with torch's loaders")
    pytest.importorskip("mteb", reason="mteb is not installed")
    (tmp_path / "p.json").write_text('{"STS": "a", "NFCorpus-query": "b", "query": "c", "STZ": "d"}')
    (tmp_path / "run.trec").write_text("q0 Q0 d0 1 2.0 t\nq0 Q0 gone 2 1.0 t\n")
    task = ["--tasks", "STSBenchmark", "--model", tiny]
    for options, message in (
        ([*task, "--split", "dev", "--skip-bad-lines"], "--split, --skip-bad-lines: only for a data set"),
        ([*task, "--ignore-identical-ids", "--encoding-errors", "replace"], "--ignore-identical-ids, --enc"),
        ([*task, "--cache", "x"], "--cache: only for a data set"),
        ([*task, "--prompts", str(tmp_path / "p.json")], "p.json: 'STZ' names no task"),
        ([small, "--cross-encoder", tiny, "--first-stage", str(tmp_path / "run.trec")], "'gone' for query"),
    ):
        assert main(["mteb", *options, "--output", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")
def test_mteb_has_the_mean_of_cqadupstack(tiny, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch", reason="mteb evaluates with torch's loaders")
    pytest.importorskip("mteb", reason="mteb is not installed")
    monkeypatch.setattr("eval.datasets.FORUMS", ("gis", "tex"))
    for forum, texts in (("gis", ["a b", "c", "d e"]), ("tex", ["e", "a b c", "d"])):
        corpus = [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)]
        folder = tmp_path / "cqadupstack" / forum
        eval_cases.write_beir(folder, corpus, [{"_id": "q0", "text": "a"}], "q0\td0\t1\n")
    options = ["--model", tiny, "--output", str(tmp_path / "out")]
    assert main(["mteb", str(tmp_path / "cqadupstack"), *options]) == 0
    mean, *parts = (
        read(tmp_path / f"out/cqadupstack{part}.json")["metrics"]["ndcg@10"] for part in ("", "-gis", "-tex")
    )
    assert mean == pytest.approx(np.mean(parts)) and "cqadupstack: ndcg@10" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "out"), "--no-published"]) == 0
    assert f"by mteb [1] | {mean:.4f} |" in capsys.readouterr().out
