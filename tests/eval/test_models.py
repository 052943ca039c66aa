"""Evaluation with real (tiny, random) decoders: BEIR, prompt studies, and mteb's own evaluator on the same data."""

import argparse
import hashlib
import json
import os
from pathlib import Path

import adapters
import decoders
import eval_cases
import folders
import numpy as np
import pytest

pytest.importorskip("pytrec_eval", reason="the eval extra is not installed")
pytest.importorskip("bm25s", reason="the eval extra is not installed")

from scipy import stats

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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    decoders.write_checkpoint("gpt_neo", folder)
    decoders.write_tokenizer(folder)
    return str(folder)


@pytest.fixture
def small(tmp_path):
    return str(eval_cases.small_beir(tmp_path / "small"))


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
