"""FAISS and usearch files of an index find what the index finds."""

import builtins
import json

import numpy as np
import pytest

from sgpt_jax.cli.parser import main
from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document
from sgpt_jax.index.build import build_index
from sgpt_jax.index.change import remove_documents
from sgpt_jax.index.columns import normalized
from sgpt_jax.index.export import export_index
from sgpt_jax.index.search import Index


@pytest.fixture(scope="module", params=["float32", "float16", "int8"])
def index(request, tmp_path_factory):
    draw = np.random.RandomState(0)
    vectors = iter(np.split(draw.randn(700, 24).astype(np.float32) + 0.5, 7))
    documents = [Document(f"d/{number}\n", f"text {number}") for number in range(700)]
    folder = tmp_path_factory.mktemp(request.param) / "index"
    return build_index(
        folder, documents, lambda chunks: (next(vectors) for _ in chunks), dtype=request.param, chunk_size=100
    )


def queries():
    return normalized(np.random.RandomState(1).randn(9, 24).astype(np.float32) + 0.5)


def test_faiss_finds_the_same(index, tmp_path, capsys):
    faiss = pytest.importorskip("faiss", reason="FAISS is not installed")
    assert main(["export", str(index.folder), "-o", str(tmp_path / "x.faiss")]) == 0
    assert "x.faiss.ids.jsonl" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.faiss", "x.faiss.ids.jsonl"]
    flat = faiss.read_index(str(tmp_path / "x.faiss"))
    scores, rows = flat.search(queries(), 20)
    expected_scores, expected_rows = index.search(queries(), 20)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
    ids = [json.loads(line)["_id"] for line in (tmp_path / "x.faiss.ids.jsonl").read_text().splitlines()]
    assert ids == index.ids(range(len(index)))


def test_usearch_finds_nearly_the_same(index, tmp_path):
    usearch = pytest.importorskip("usearch.index", reason="usearch is not installed")
    ids = export_index(index, tmp_path / "new" / "x.usearch")
    assert ids.name == "x.usearch.ids.jsonl" and len(ids.read_text().splitlines()) == 700
    graph = usearch.Index.restore(str(tmp_path / "new" / "x.usearch"))
    assert len(graph) == 700
    found = graph.search(queries(), 10)
    scores, rows = index.search(queries(), 10)
    same = [
        len(set(ours) & set(theirs.tolist())) for ours, theirs in zip(rows.tolist(), found.keys, strict=True)
    ]
    assert np.mean(same) > 9.5
    best = found.keys[:, 0] == rows[:, 0]  # the graph is approximate, and made by several threads
    assert best.sum() > 6
    np.testing.assert_allclose(1 - found.distances[best, 0], scores[best, 0], atol=2e-3)


@pytest.mark.parametrize("library", ["faiss", "usearch"])
def test_removed_documents_leave_no_gap_in_the_keys(library, tmp_path):
    module = pytest.importorskip({"faiss": "faiss", "usearch": "usearch.index"}[library])
    draw = np.random.RandomState(3)
    vectors = normalized(draw.randn(30, 24).astype(np.float32))
    documents = [Document(f"d{number}", "text") for number in range(30)]
    build_index(tmp_path / "index", documents, lambda chunks: (vectors for _ in chunks))
    remove_documents(tmp_path / "index", ["d0", "d7", "d8"])
    index = Index.open(tmp_path / "index")
    file = tmp_path / f"x.{library}"
    ids = [json.loads(line)["_id"] for line in export_index(index, file).read_text().splitlines()]
    assert ids == index.ids(index.rows())
    found = (
        module.read_index(str(file)).search(vectors[9:], 1)[1]
        if library == "faiss"
        else module.Index.restore(str(file)).search(vectors[9:], 1).keys
    )
    assert [ids[key] for key in found[:, 0].tolist()] == [f"d{number}" for number in range(9, 30)]


def test_what_cannot_be_exported(index, tmp_path, capsys, monkeypatch):
    with pytest.raises(InputError, match=r"FILE\.faiss or FILE\.usearch"):
        export_index(index, tmp_path / "x.bin")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        export_index(index, tmp_path / "file" / "x.faiss")
    real = builtins.__import__

    def missing(name, *arguments, **options):
        if name.split(".")[0] in ("faiss", "usearch"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    for name, package in (("x.faiss", "faiss-cpu"), ("x.usearch", "usearch")):
        assert main(["export", str(index.folder), "-o", str(tmp_path / name)]) == 1
        assert f"pip install {package}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert len(Index.open(index.folder)) == 700
