"""Exact search, ties as trec_eval ranks them, the three dtypes, odd documents, damaged files."""

import functools
import json

import numpy as np
import pytest
from indexes import streamed

from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document
from sgpt_jax.index import build as index_build
from sgpt_jax.index import reader
from sgpt_jax.index.build import build_index
from sgpt_jax.index.files import Dtype
from sgpt_jax.index.search import Index

DTYPES: list[Dtype] = ["float32", "float16", "int8"]


def documents(count, name="d{}"):
    return [Document(name.format(number), f"text {number}") for number in range(count)]


def table(vectors):
    """An encoder that gives the vectors of `documents`, by the number in the text."""
    return streamed(lambda texts: vectors[[int(text.split()[1]) for text in texts]])


def ranked(scores, ids, k):
    """Reference: rows of one query by (score, id), both descending."""
    return sorted(range(len(ids)), key=lambda row: (scores[row], ids[row]), reverse=True)[:k]


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(index_build, "SHARD_ROWS", 50)


@pytest.mark.parametrize("k", [1, 7, 40, 233, 1000])
@pytest.mark.parametrize("block_size", [None, 1, 16, 50, 64, 1000])
def test_ties_rank_by_id_descending_in_any_block(tmp_path, small_shards, k, block_size):
    # Small integers: scores are exact and often equal, across blocks and shards (50, 50, 50, 50, 33 rows).
    rng = np.random.default_rng(0)
    corpus = documents(233)
    vectors = rng.integers(-1, 2, (233, 6)).astype(np.float32)
    vectors[rng.integers(0, 233, 60)] = 0
    queries = rng.integers(-1, 2, (37, 6)).astype(np.float32)
    queries[3] = 0  # every score is 0
    index = build_index(tmp_path / "i", corpus, table(vectors), similarity="dot", chunk_size=10)
    assert len(index.manifest.shards) == 5

    scores, rows = index.search(queries, k, block_size=block_size)

    assert scores.shape == rows.shape == (37, min(k, 233))
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
    exact = queries @ vectors.T
    ids = [document.id for document in corpus]
    for query in range(len(queries)):
        expected = ranked(exact[query], ids, k)
        assert rows[query].tolist() == expected
        assert scores[query].tolist() == exact[query, expected].tolist()


def test_negative_zero_ties_with_zero(tmp_path):
    vectors = np.array([[1, 0], [-0.0, 1], [0.0, 1], [-1, 5]], np.float32)
    index = build_index(tmp_path / "i", documents(4), table(vectors), similarity="dot")
    scores, rows = index.search(np.array([[1, 0], [-1, 0]], np.float32), 2)
    assert rows.tolist() == [[0, 2], [3, 2]]
    assert not np.signbit(scores[0]).any()


def test_ids_compare_as_strings_in_code_points(tmp_path):
    ids = ["9", "10", "é", "z", "\U0001f600", "\uffff", "Z"]
    corpus = [Document(id, f"text {number}") for number, id in enumerate(ids)]
    index = build_index(tmp_path / "i", corpus, table(np.ones((7, 3), np.float32)))
    scores, rows = index.search(np.ones((1, 3), np.float32), 5)
    assert index.ids(rows[0]) == ["\U0001f600", "\uffff", "é", "z", "Z"]
    np.testing.assert_allclose(scores, 1, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_search_equals_brute_force(tmp_path, small_shards, dtype, similarity):
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((333, 20)).astype(np.float32) * 3 + 1
    vectors[5] = 0
    index = build_index(
        tmp_path / "i", documents(333), table(vectors), dtype=dtype, similarity=similarity, chunk_size=25
    )
    queries = rng.standard_normal((9, 20)).astype(np.float32) + 1
    scores, rows = index.search(queries, 30, block_size=16)
    if similarity == "cosine":
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    stored = index.vectors(np.arange(333))
    step = {"float32": 1e-7, "float16": 5e-4, "int8": 2e-2}[dtype]
    np.testing.assert_allclose(stored, vectors, atol=step * np.abs(vectors).max())
    exact = queries.astype(np.float64) @ stored.T.astype(np.float64)
    order = np.argsort(-exact, axis=1)[:, :30]
    np.testing.assert_allclose(scores, np.take_along_axis(exact, order, 1), rtol=2e-5, atol=2e-6)
    assert rows.tolist() == order.tolist()


def test_many_queries_take_several_passes(tmp_path, monkeypatch):
    monkeypatch.setattr("sgpt_jax.index.topk.MAX_QUERIES", 8)
    rng = np.random.default_rng(2)
    vectors = rng.standard_normal((64, 8)).astype(np.float32)
    index = build_index(tmp_path / "i", documents(64), table(vectors), similarity="dot")
    _, rows = index.search(vectors[:21], 1)
    assert index.search(vectors[:21], 1)[1].shape == (21, 1)
    assert rows[:, 0].tolist() == (vectors[:21] @ vectors.T).argmax(axis=1).tolist()


def outlier_vectors(count, dimension, rng):
    """Like the vectors of decoders: a large common part, a few dimensions far wider than the others."""
    wide = np.ones(dimension, np.float32)
    wide[:3] = 10
    centres = rng.standard_normal((count // 10 + 1, dimension))
    vectors = centres[rng.integers(0, len(centres), count)] + 0.5 * rng.standard_normal((count, dimension))
    return (vectors * wide + 3 * wide).astype(np.float32)


def test_recall_of_small_dtypes_is_measured_and_high(tmp_path):
    vectors = outlier_vectors(1500, 48, np.random.default_rng(3))
    recall = {}
    for dtype in DTYPES:
        index = build_index(tmp_path / dtype, documents(1500), table(vectors), dtype=dtype, chunk_size=256)
        recall[dtype] = Index.open(tmp_path / dtype).info()["recall"]
        assert index.info()["vector_bytes"] == 1500 * (
            48 * {"float32": 4, "float16": 2, "int8": 1}[dtype] + (4 if dtype == "int8" else 0)
        )
    assert recall["float32"] is None
    assert recall["float16"]["recall@10"] > 0.97
    assert recall["int8"]["recall@10"] > 0.9
    assert recall["int8"]["recall@100"] > 0.9
    assert recall["int8"]["queries"] == 128


def test_recall_is_what_a_full_comparison_gives(tmp_path):
    vectors = outlier_vectors(300, 16, np.random.default_rng(4))
    exact = build_index(tmp_path / "a", documents(300), table(vectors), chunk_size=40)
    stored = build_index(tmp_path / "b", documents(300), table(vectors), dtype="int8", chunk_size=40)
    lists = [index.search(vectors[:40], 101)[1] for index in (exact, stored)]
    for depth in (10, 100):
        shares = [
            len(set(a[a != own][:depth]) & set(b[b != own][:depth])) / depth
            for own, (a, b) in enumerate(zip(*lists, strict=True))
        ]
        assert stored.info()["recall"][f"recall@{depth}"] == pytest.approx(np.mean(shares), abs=2e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_document(tmp_path, dtype):
    index = build_index(tmp_path / "i", documents(1), table(np.ones((1, 5), np.float32)), dtype=dtype)
    scores, rows = index.search(np.ones((2, 5), np.float32), 10)
    assert rows.tolist() == [[0], [0]]
    np.testing.assert_allclose(scores, 1, atol=1e-3)
    assert index.info()["recall"] is None


def test_odd_texts_and_ids_come_back(tmp_path, small_shards):
    texts = [
        "",
        " \t",
        "a\x00b",
        "\u2028\u0085\r\n",
        "e\u0301",
        "\u05d0\u200f",
        "\U0001f600",
        "x" * 70_000,
        "\ufeff",
    ]
    corpus = [Document(f"{text[:3]}{n}", text) for n, text in enumerate(texts * 7)]
    index = build_index(
        tmp_path / "i",
        iter(corpus),
        streamed(lambda batch: np.ones((len(batch), 2), np.float32)),
        chunk_size=5,
    )
    rows = [62, 0, 49, 50, 7]
    assert index.texts(rows) == [corpus[row].text for row in rows]
    assert index.ids(range(63)) == [document.id for document in corpus]
    assert index.texts([]) == []
    for row in (63, -1):
        with pytest.raises(IndexError):
            index.ids([row])


def test_all_texts_empty_and_lone_surrogates(tmp_path):
    ones = streamed(lambda batch: np.ones((len(batch), 2), np.float32))
    index = build_index(tmp_path / "e", [Document("a", ""), Document("b", "")], ones)
    assert Index.open(tmp_path / "e").texts([1, 0]) == ["", ""]
    index = build_index(tmp_path / "s", [Document("a", "x\ud83d"), Document("b", "\ud83d\ude00")], ones)
    assert index.texts([0, 1]) == ["x\ufffd", "\U0001f600"]


def test_without_texts(tmp_path):
    index = build_index(tmp_path / "i", documents(3), table(np.eye(3, dtype=np.float32)), store_texts=False)
    assert not list((tmp_path / "i").glob("*.text*"))
    with pytest.raises(InputError, match="holds no texts"):
        index.texts([0])


@pytest.mark.parametrize("id", ["", "a\ud83d"])
def test_bad_id(tmp_path, id):
    with pytest.raises(InputError, match="document 1: the id"):
        build_index(
            tmp_path / "i",
            [Document("ok", ""), Document(id, "")],
            streamed(lambda b: np.ones((len(b), 2), np.float32)),
        )


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        ("float32", np.nan, "document 'd2': its vector has NaN or infinity"),
        ("int8", np.inf, "document 'd2': its vector has NaN or infinity"),
        ("float16", 1e5, "document 'd2': its vector has NaN or infinity in float16"),
    ],
)
def test_vectors_that_cannot_be_stored(tmp_path, dtype, value, message):
    vectors = np.ones((4, 3), np.float32)
    vectors[2, 1] = value
    with pytest.raises(InputError, match=message):
        build_index(tmp_path / "i", documents(4), table(vectors), dtype=dtype, similarity="dot")
    assert not (tmp_path / "i").exists()


def test_large_vectors_are_fine_where_they_are_normalised(tmp_path):
    vectors = np.full((4, 3), 1e5, np.float32)
    index = build_index(tmp_path / "i", documents(4), table(vectors), dtype="float16")
    np.testing.assert_allclose(index.vectors([0]), 3**-0.5, rtol=1e-3)


def test_encoder_of_the_wrong_shape(tmp_path):
    for shape in ((3, 2), (4,), (4, 0)):
        wrong = streamed(functools.partial(lambda result, _: result, np.ones(shape, np.float32)))
        with pytest.raises(InputError, match="the encoder gave an array of shape"):
            build_index(tmp_path / "i", documents(4), wrong)


def test_empty_corpus_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="no document"):
        build_index(tmp_path / "i", [], table(np.ones((1, 2), np.float32)))
    assert not (tmp_path / "i").exists()


def test_bad_searches(tmp_path):
    index = build_index(tmp_path / "i", documents(4), table(np.ones((4, 3), np.float32)))
    for queries, k, message in (
        (np.ones((0, 3)), 1, "at least one row"),
        (np.ones(3), 1, "at least one row"),
        (np.ones((2, 4)), 1, "queries have 4 dimensions, but the index 3"),
        (np.ones((2, 3)), 0, "k must be at least 1"),
        (np.array([[1, 1, 1], [1, np.nan, 1]]), 1, "query 1 has NaN"),
    ):
        with pytest.raises(InputError, match=message):
            index.search(queries, k)
    for wrong, message in (
        ({"k": 1.5}, "k must be a whole number"),
        ({"k": 1, "block_size": -1}, "block_size must be at least 1, not -1"),
        ({"k": 1, "block_size": 2.0}, "block_size must be a whole number"),
    ):
        with pytest.raises(InputError, match=message):
            index.search(np.ones((2, 3)), **wrong)
    for rows in ([True, False], [1.5], ["1"], [[0, 1]]):
        with pytest.raises(InputError, match="rows must be a series of whole numbers"):
            index.ids(rows)
    assert index.ids([]) == [] and index.ids(np.array([2], np.uint8)) == index.ids([2])


def test_open_refuses_what_is_no_finished_index(tmp_path):
    with pytest.raises(InputError, match="is no index"):
        Index.open(tmp_path)
    with pytest.raises(InputError, match="is no index"):
        Index.open(tmp_path / "none")
    with pytest.raises(InputError, match="local folder"):
        Index.open("gs://bucket/index")


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_every_cut_or_missing_file_is_noticed(tmp_path, dtype):
    vectors = np.random.default_rng(5).standard_normal((30, 4)).astype(np.float32)
    build_index(tmp_path / "i", documents(30), table(vectors), dtype=dtype)
    files = sorted((tmp_path / "i").iterdir())
    assert len(files) == (8 if dtype == "float32" else 10)
    for file in files:
        content = file.read_bytes()
        for damaged in (content[:-1], content[: len(content) // 2], None):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            if damaged == content[:-1] and file.suffix == ".json":
                Index.open(tmp_path / "i")  # only the final newline is gone
            else:
                with pytest.raises(InputError, match=str(tmp_path)):
                    Index.open(tmp_path / "i")
            file.write_bytes(content)
    Index.open(tmp_path / "i")


def test_manifest_that_makes_no_sense(tmp_path):
    build_index(tmp_path / "i", documents(4), table(np.ones((4, 3), np.float32)))
    path = tmp_path / "i" / "manifest.json"
    good = json.loads(path.read_text())
    changes: list[dict[str, object]] = [
        {"format": "sgpt-jax index 99"},
        {"dtype": "int4"},
        {"dimension": -1},
        {"dimension": "3"},
        {"shards": []},
        {"shards": [{"start": 1, "rows": 4, "id_bytes": 8, "text_bytes": 28}]},
        {"shards": 3},
        {"surplus": 1},
    ]
    for change in changes:
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(InputError, match=r"manifest\.json: is damaged, or no index of this version"):
            Index.open(tmp_path / "i")
    for text in ("", "[]", "null", "{}"):
        path.write_text(text)
        with pytest.raises(InputError, match="is damaged"):
            Index.open(tmp_path / "i")


def test_flipped_bytes_in_strings_and_vectors(tmp_path):
    build_index(tmp_path / "i", documents(4), table(np.ones((4, 3), np.float32)))
    for column, value in (("ids", b"\xff" * 8), ("id-ends", b"\xff" * 32), ("vectors", b"\xff" * 48)):
        path = next((tmp_path / "i").glob(f"*.{column}"))
        good = path.read_bytes()
        path.write_bytes(value)
        with pytest.raises(InputError, match="damaged"):
            index = Index.open(tmp_path / "i")
            index.search(np.ones((1, 3), np.float32), 2)
            index.ids([0, 1])
        path.write_bytes(good)


def test_info(tmp_path):
    index = build_index(
        tmp_path / "i", documents(4), table(np.ones((4, 3), np.float32)), metadata={"model": "m", "n": 1}
    )
    assert index.info() == {
        "documents": 4,
        "dimension": 3,
        "dtype": "float32",
        "similarity": "cosine",
        "texts": True,
        "removed": 0,
        "shards": 1,
        "bytes": 4 * 12 + 4 * (2 + 8) + 4 * (6 + 8) + 4 * 4 + 6 * 4,  # the last for six checksums
        "vector_bytes": 48,
        "recall": None,
        "metadata": {"model": "m", "n": 1},
        "fingerprint": "",
    }
    assert (len(index), index.dimension, index.metadata["model"]) == (4, 3, "m")


def test_more_files_than_are_mapped_at_a_time(tmp_path, small_shards, monkeypatch):
    monkeypatch.setattr(reader, "MAX_MAPPED", 3)
    vectors = np.random.RandomState(0).randn(233, 8).astype(np.float32)
    index = build_index(tmp_path / "i", documents(233), table(vectors), similarity="dot", chunk_size=10)
    scores, rows = index.search(vectors[:4], 233)
    np.testing.assert_allclose(scores, -np.sort(-(vectors[:4] @ vectors.T), axis=1), rtol=1e-5, atol=1e-5)
    assert index.ids(rows[0]) == [f"d{row}" for row in rows[0]]
    assert index.texts(rows[0]) == [documents(233)[row].text for row in rows[0]]
    assert len(index._columns._mapped) <= 3
