"""Data sets of the Hugging Face hub, from folders as `datasets` writes and reads them; Parquet files."""

import decoders
import numpy as np
import pytest

import sgpt_jax as sgpt
from eval.beir import evaluate
from sgpt_jax.cli import indexing
from sgpt_jax.cli.parser import main
from sgpt_jax.errors import InputError
from sgpt_jax.files.beir import DataSet
from sgpt_jax.files.corpora import read_corpus, read_queries
from sgpt_jax.files.sts import read_sts
from train.data import Example, nli_triplets, read_nli, read_pairs
from train.hub import HubExamples

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """Nothing is left in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
        yield


def write_config(folder, config, split, rows, features=None):
    """A configuration with one split, as the hub has it: folder/config/split-0.parquet; and the README's header."""
    (folder / config).mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(folder / config / f"{split}-00000-of-00001.parquet")
    known: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*/*.parquet")):
        known.setdefault(path.parent.name, []).append(path.name.partition("-")[0])
    entries = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {name}/{split}*\n" for split in splits)
        for name, splits in known.items()
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    return folder


@pytest.fixture(scope="module")
def all_nli(tmp_path_factory):
    """sentence-transformers/all-nli: configurations triplet and pair-class."""
    folder = tmp_path_factory.mktemp("hub") / "all-nli"
    rows = [{"anchor": f"a{i}", "positive": f"p{i}", "negative": f"n{i}"} for i in range(5)]
    write_config(folder, "triplet", "train", rows)
    labels = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
    features = datasets.Features(
        {"premise": datasets.Value("string"), "hypothesis": datasets.Value("string"), "label": labels}
    )
    rows = [
        {"premise": "a man plays", "hypothesis": text, "label": label}
        for text, label in (("someone plays", 0), ("nobody plays", 2), ("a cat", 1), ("?", -1))
    ]
    for split in ("train", "dev"):
        write_config(folder, "pair-class", split, rows if split == "train" else rows[:1], features)
    return folder


def test_triplets_by_number(all_nli):
    examples = HubExamples(f"hf:{all_nli}:triplet:train")
    assert len(examples) == 5 and examples.negatives == 1
    assert examples.get(3, 0) == Example("a3", "p3", ("n3",))
    assert examples.keys(3, 0) == examples.keys(3, 1) != examples.keys(2, 0)
    assert examples.digest() == HubExamples(f"hf:{all_nli}:triplet:train").digest()
    assert examples.digest() != HubExamples(f"hf:{all_nli}:triplet:", "train[:40%]").digest()
    assert HubExamples(f"hf:{all_nli}:triplet:train", negatives=0).get(3, 0) == Example("a3", "p3")
    assert len(HubExamples(f"hf:{all_nli}:triplet:", "train[:40%]")) == 2
    with pytest.raises(InputError, match="labelled ones are for the recipe nli"):
        HubExamples(f"hf:{all_nli}:pair-class:train")
    with pytest.raises(InputError, match="has no split 'test' \\(there are: train\\)"):
        HubExamples(f"hf:{all_nli}:triplet:test")
    with pytest.raises(InputError, match="hf:PATH:CONFIG:SPLIT"):
        HubExamples("hf:a:b:c:d")


def test_hard_negatives_by_number(tmp_path):
    """msmarco's triplet-50 has negative_1, negative_2, ...; others have lists of positives and negatives."""
    rows = [
        {"query": f"q{i}", "positive": f"p{i}", "negative_1": f"m{i}", "negative_2": f"n{i}"}
        for i in range(3)
    ]
    write_config(tmp_path / "numbered", "triplet", "train", rows)
    examples = HubExamples(f"hf:{tmp_path / 'numbered'}")
    assert examples.negatives == 2 and examples.get(1, 0) == Example("q1", "p1", ("m1", "n1"))
    rows = [
        {"query": "a", "pos": ["b", "c"], "neg": ["d", "e", "f"]},
        {"query": "g", "pos": ["h"], "neg": []},
        {"query": "i", "pos": ["j"], "neg": ["k"]},
    ]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    examples = HubExamples(f"hf:{tmp_path / 'saved'}", negatives=2)
    assert [examples.get(i, 0) for i in range(len(examples))] == [
        Example("a", "b", ("d", "e")), Example("a", "c", ("d", "e")), Example("g", "h"), Example("i", "j", ("k",)),
    ]  # fmt: skip
    assert examples.negatives == 2


def test_nli_by_the_names_of_the_labels(all_nli):
    rows = list(read_nli(f"hf:{all_nli}:pair-class:train"))
    assert rows == [
        ("a man plays", "someone plays", "entailment"),
        ("a man plays", "nobody plays", "contradiction"),
        ("a man plays", "a cat", "neutral"),
    ]
    assert len(nli_triplets(rows, 0)) == 2
    assert len(list(read_nli(f"hf:{all_nli}:pair-class:", "dev"))) == 1


def test_parquet_files(tmp_path):
    path = tmp_path / "x.parquet"
    datasets.Dataset.from_list([{"query": "a", "positive": "b", "negatives": ["c", "d"]}]).to_parquet(path)
    assert read_pairs(str(path)) == [Example("a", "b", ("c", "d"))]
    rows = [
        {"sentence1": "a", "sentence2": "b", "score": 0.5},
        {"sentence1": "c", "sentence2": "d", "score": 1.0},
    ]
    datasets.Dataset.from_list(rows).to_parquet(path)
    assert read_sts(path) == [(0.5, "a", "b"), (1.0, "c", "d")]
    path.write_text("not parquet")
    with pytest.raises(InputError, match=r"x\.parquet: cannot be read"):
        read_sts(path)


@pytest.fixture(scope="module")
def scifact(tmp_path_factory):
    """BeIR/scifact and BeIR/scifact-qrels as published: configurations corpus and queries; judgements as TSV."""
    folder = tmp_path_factory.mktemp("beir") / "scifact"
    texts = ("a heron waits", "the ferry crosses twice", "a market at night")
    write_config(
        folder,
        "corpus",
        "corpus",
        [{"_id": str(i), "title": "", "text": text} for i, text in enumerate(texts)],
    )
    write_config(folder, "queries", "queries", [{"_id": "7", "title": "", "text": "night market"}])
    qrels = folder.parent / "scifact-qrels"
    qrels.mkdir()
    (qrels / "test.tsv").write_text("query-id\tcorpus-id\tscore\n7\t2\t1\n")
    (qrels / "train.tsv").write_text("query-id\tcorpus-id\tscore\n7\t1\t1\n")
    return folder


def test_beir_as_published(scifact):
    found = DataSet("scifact", f"hf:{scifact}", "test").load()
    assert found.queries == {"7": "night market"} and found.qrels == {"7": {"2": 1}}
    assert [document.id for document in found.documents()] == ["0", "1", "2"]
    result = evaluate(f"hf:{scifact}")
    assert result["metrics"]["ndcg@10"] == 1.0 and result["queries"] == ["7"]
    assert read_queries(f"hf:{scifact}:queries:") == {"7": "night market"}


def test_mteb_layout(scifact, tmp_path):
    folder = tmp_path / "mteb"
    for config in ("corpus", "queries"):
        table = datasets.load_dataset(
            "parquet", data_files=str(scifact / config / "*.parquet"), split="train"
        )
        write_config(folder, config, config, table.to_list())
    write_config(folder, "default", "test", [{"query-id": "7", "corpus-id": "2", "score": 1.0}])
    assert DataSet("x", f"hf:{folder}", "test").load().qrels == {"7": {"2": 1}}


def test_an_index_of_a_data_set(scifact, tmp_path):
    folder = decoders.write_tokenizer(decoders.write_checkpoint("llama", tmp_path / "tiny"))
    model = sgpt.BiEncoder.from_pretrained(folder)
    index = sgpt.index_corpus(tmp_path / "i", f"hf:{scifact}:corpus:corpus", model)
    documents = list(read_corpus(f"hf:{scifact}:corpus:corpus"))
    assert index.ids(np.arange(3)) == ["0", "1", "2"] and index.texts([2]) == [documents[2].text]


def test_one_data_set_is_streamed_into_an_index_and_several_are_counted(tmp_path, monkeypatch, capsys):
    model = decoders.write_tokenizer(decoders.write_checkpoint("llama", tmp_path / "model"))
    sources = []
    for name in ("a", "b"):
        rows = [{"_id": f"{name}{n}", "text": f"heron {n}", "score": 0.5} for n in range(3)]
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / name)
        sources.append(f"hf:{tmp_path / name}")
    counts = []
    count = indexing.count_corpus
    monkeypatch.setattr(indexing, "count_corpus", lambda *a: counts.append(a[0]) or count(*a))
    for corpus, number in ((sources[:1], 3), (sources, 6)):
        folder = str(tmp_path / str(number))
        assert main(["index", *corpus, "-o", folder, "--model", str(model)]) == 0
        assert f"{number} documents" in capsys.readouterr().out
    assert counts == [sources]
