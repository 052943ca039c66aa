"""An index that grows, loses documents and is compacted: what is found, what open readers see, kills at any moment."""

import gc
import itertools
import os
import shutil
import warnings

import numpy as np
import pytest
from indexes import encode, streamed, vectors_of

from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document
from sgpt_jax.index import build as index_build
from sgpt_jax.index.build import add_documents, build_index
from sgpt_jax.index.change import compact_index, remove_documents
from sgpt_jax.index.search import Index


def corpus(count, start=0):
    return [
        Document(f"d{n}", f"title {n} text of {n}, é" * (1 + n % 3), f"title {n}")
        for n in range(start, count)
    ]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def documents_of(index):
    return list(zip(index.ids(index.rows()), index.texts(index.rows()), strict=True))


def pairs(documents):
    return [(document.id, document.text) for document in documents]


def check_search(index, expected):
    """That just the expected documents are found, by every store, as numpy ranks them."""
    queries = vectors_of(["a", "b", "c"])
    stored = dict(zip(index.ids(index.rows()), index.vectors(index.rows()), strict=True))
    assert list(stored) == [document.id for document in expected]
    scaled = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    for k in (3, 1000):
        scores, rows = index.search(queries, k)
        assert scores.shape == (3, min(k, len(expected)))
        for query, found, values in zip(scaled, rows, scores, strict=True):
            exact = {id: float(query @ vector) for id, vector in stored.items()}
            best = sorted(exact, key=exact.__getitem__, reverse=True)[:k]
            assert index.ids(found) == best
            np.testing.assert_allclose(values, [exact[id] for id in best], atol=1e-5)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(index_build, "SHARD_ROWS", 8)


def changed(folder, dtype="float32"):
    """An index that has seen everything, what should be found, and a reader of each state on the way."""
    build_index(folder, corpus(11), encode, chunk_size=4, dtype=dtype)
    readers = [(Index.open(folder), corpus(11))]
    build_index(folder, corpus(18), encode, chunk_size=4, dtype=dtype)
    readers.append((Index.open(folder), corpus(18)))
    assert remove_documents(folder, ["d3", "d17", "nobody", "d3"]) == (2, ["nobody"])
    left = [document for document in corpus(18) if document.id not in ("d3", "d17")]
    readers.append((Index.open(folder), left))
    news = [corpus(18)[5], Document("d6", "another text"), Document("d3", "is back"), *corpus(30, 18)]
    add_documents(folder, news, encode)
    left = [document for document in left if document.id != "d6"] + news[1:]
    readers.append((Index.open(folder), left))
    return left, readers


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_what_is_found_after_every_change_and_by_open_readers(tmp_path, dtype):
    left, readers = changed(tmp_path / "i", dtype)
    compacted = compact_index(tmp_path / "i")
    readers.append((compacted, left))
    for index, expected in readers:
        assert documents_of(index) == pairs(expected)
        if dtype != "int8":
            check_search(index, expected)
        index.verify()
    assert (tmp_path / "i" / "compacted-1").is_dir() and len(compacted.manifest.shards) == 4
    # The readers' files are still there; without them, the next change removes them.
    before = [path.name for path in (tmp_path / "i").iterdir()]
    assert any(name.endswith(".vectors") for name in before)
    del index, readers
    remove_documents(tmp_path / "i", ["d0"])
    names = sorted(path.name for path in (tmp_path / "i").iterdir())
    assert names == (["calibration.npy"] if dtype == "int8" else []) + ["compacted-1", "manifest.json"]


def test_a_reader_that_the_garbage_collector_takes_says_nothing(tmp_path):
    build_index(tmp_path / "i", corpus(3), encode)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        index = Index.open(tmp_path / "i")
        index.itself = index  # a cycle, as in a service or a notebook
        assert len(os.listdir("/proc/self/fd")) == before + 1
        del index
        gc.collect()
    assert not [str(each.message) for each in told]
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_compacted_index_has_the_bytes_of_a_build_of_what_is_left(tmp_path):
    left, _ = changed(tmp_path / "i")
    compact_index(tmp_path / "i")
    build_index(tmp_path / "fresh", left, encode, chunk_size=4)
    fresh = files(tmp_path / "fresh")
    compacted = files(tmp_path / "i" / "compacted-1")
    assert compacted == {name: content for name, content in fresh.items() if name != "manifest.json"}
    assert compact_index(tmp_path / "i").manifest.generation == 1  # nothing was left to do
    # A corpus that begins with what is left lets it grow again; what a killed writer had begun goes.
    begun = tmp_path / "i" / "compacted-1" / ".000000000000-000000000008.json.1.partial"
    begun.write_text("{")
    index = build_index(tmp_path / "i", [*left, Document("more", "x")], encode, chunk_size=4)
    assert documents_of(index) == [*pairs(left), ("more", "x")] and not begun.exists()


@pytest.mark.parametrize("held", ["float32", "bfloat16", "int8"])
def test_removed_rows_are_not_found_on_the_devices(tmp_path, held):
    left, _ = changed(tmp_path / "i")
    check_search(Index.open(tmp_path / "i", resident=held), left)


def test_titles_and_snippets_stand_apart(tmp_path):
    documents = [Document("a", "Cells Mitosis divides.", "Cells"), Document("b", "Ferry. It crosses.", " ")]
    index = build_index(tmp_path / "i", documents, encode)
    hits = index.hits(np.array([0.5, 0.25]), [0, 1])
    assert [(hit.title, hit.snippet) for hit in hits] == [
        ("Cells", "Mitosis divides."),
        ("Ferry.", "It crosses."),
    ]
    assert (hits[0].id, hits[0].score, hits[0].text) == ("a", 0.5, "Cells Mitosis divides.")


class Stop(BaseException):
    pass


CHANGES = {
    "grow": lambda folder: build_index(folder, corpus(21), encode, chunk_size=4, dtype="int8"),
    "add": lambda folder: add_documents(folder, [Document("d2", "new"), *corpus(21, 9)], encode),
    "remove": lambda folder: remove_documents(folder, ["d1", "d10"]),
    "compact": compact_index,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_stop_at_every_write_of_a_change_alters_no_byte(tmp_path, monkeypatch, change):
    build_index(tmp_path / "start", corpus(11), encode, chunk_size=4, dtype="int8")
    if change == "compact":
        remove_documents(tmp_path / "start", ["d4"])
    shutil.copytree(tmp_path / "start", tmp_path / "whole")
    CHANGES[change](tmp_path / "whole")
    expected = files(tmp_path / "whole")
    real = {name: getattr(os, name) for name in ("replace", "unlink", "rmdir")} | {
        "fsync": lambda descriptor: None
    }
    left = 0

    def counted(name):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                raise Stop
            return real[name](*args, **kwargs)

        return call

    for name in real:
        monkeypatch.setattr(os, name, counted(name))
    for step in itertools.count(1):
        folder = tmp_path / "stopped"
        left = -1
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "start", folder)
        left = step
        try:
            CHANGES[change](folder)
        except Stop:
            left = -1
            Index.open(folder).verify()  # at any moment it is whole
            CHANGES[change](folder)
            assert files(folder) == expected, step
        else:
            break
    assert step > {"grow": 20, "add": 20, "remove": 2, "compact": 20}[change]


def test_what_was_interrupted_is_finished_first(tmp_path):
    build_index(tmp_path / "i", corpus(11), encode, chunk_size=4)

    @streamed
    def stopping(texts):
        if "text of 25" in texts[0]:
            raise Stop
        return vectors_of(texts)

    with pytest.raises(Stop):
        add_documents(tmp_path / "i", corpus(40, 21), stopping)
    assert len(Index.open(tmp_path / "i")) == 11
    for other in (lambda: remove_documents(tmp_path / "i", ["d1"]), lambda: compact_index(tmp_path / "i")):
        with pytest.raises(InputError, match="was interrupted while it grew"):
            other()
    with pytest.raises(InputError, match="not the one with which the index was growing"):
        add_documents(tmp_path / "i", corpus(40, 22), encode)
    (tmp_path / "i" / "growing.json").unlink()
    remove_documents(tmp_path / "i", ["d1"])
    assert len(Index.open(tmp_path / "i")) == 10 and not list((tmp_path / "i").glob("0*-0*.json"))


def test_changes_that_make_no_sense(tmp_path):
    build_index(tmp_path / "i", corpus(3), encode, chunk_size=4, metadata={"m": 1})
    with pytest.raises(InputError, match="no document would be left"):
        remove_documents(tmp_path / "i", ["d0", "d1", "d2"])
    for wrong, message in (("d1", "a list of ids, not one str"), ([3], "must be a str, not 3")):
        with pytest.raises(TypeError, match=message):
            remove_documents(tmp_path / "i", wrong)
    with pytest.raises(InputError, match="m is 1 there and 2 now"):
        add_documents(tmp_path / "i", corpus(9), encode, metadata={"m": 2})
    with pytest.raises(InputError, match="vectors of another model"):
        add_documents(tmp_path / "i", corpus(9), encode, metadata={"m": 1}, fingerprint="a" * 40)
    before = files(tmp_path / "i")
    add_documents(tmp_path / "i", corpus(3), encode, metadata={"m": 1})  # nothing is new
    assert files(tmp_path / "i") == before
    remove_documents(tmp_path / "i", ["d0"])
    path = tmp_path / "i" / "removed-1.rows"
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    with pytest.raises(InputError, match=r"removed-1.rows: is damaged"):
        Index.open(tmp_path / "i")
    path.unlink()
    with pytest.raises(InputError, match=r"removed-1.rows: cannot be read"):
        Index.open(tmp_path / "i")


def test_an_index_without_texts_grows(tmp_path):
    build_index(tmp_path / "i", corpus(6), encode, chunk_size=4, store_texts=False)
    add_documents(tmp_path / "i", corpus(7, 5), encode)
    index = compact_index(tmp_path / "i")
    assert sorted(index.ids(index.rows())) == [f"d{n}" for n in range(7)]
    with pytest.raises(InputError, match="holds no texts, so that a corpus cannot be compared"):
        build_index(tmp_path / "i", corpus(9), encode, chunk_size=4, store_texts=False)
