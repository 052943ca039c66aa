"""What is read from and written to a bucket, by a file system in memory in the place of gcsfs."""

import gzip
import json

import decoders
import fsspec
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from sgpt_jax.cli.parser import main
from sgpt_jax.files.beir import DataSet
from sgpt_jax.files.corpora import read_corpus


class Bucket(MemoryFileSystem):
    protocol, cachable = "gs", False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))


@pytest.fixture
def bucket(monkeypatch):
    """gs://bucket/d with a data set as BEIR has them."""
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    folder = epath.Path("gs://bucket/d")
    (folder / "qrels").mkdir(parents=True)
    documents = [json.dumps({"_id": f"d{n}", "title": "", "text": f"text {n}"}) for n in range(5)]
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress("\n".join(documents).encode()))
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "text 3"}\n')
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td3\t1\n")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = decoders.write_checkpoint("llama", tmp_path_factory.mktemp("model"))
    return str(decoders.write_tokenizer(folder))


def test_corpora_and_data_sets(bucket):
    assert [document.id for document in read_corpus(f"{bucket}/corpus.jsonl.gz")] == [
        "d0",
        "d1",
        "d2",
        "d3",
        "d4",
    ]
    assert DataSet("d", bucket, "test").load().queries == {"q": "text 3"}


def test_an_index_is_read_from_a_bucket_and_written_to_a_folder(bucket, model, tmp_path, capsys):
    index = ["index", f"{bucket}/corpus.jsonl.gz", "--model", model, "-o"]
    assert main([*index, str(tmp_path / "index")]) == 0
    assert "5 documents" in capsys.readouterr().out
    assert main([*index, "gs://bucket/index"]) == 1
    assert "must be in a local folder" in capsys.readouterr().err


def test_vectors_are_written_to_a_bucket(bucket, model):
    (bucket / "texts.txt").write_text("one\ntwo\n")
    assert main(["embed", f"{bucket}/texts.txt", "-o", f"{bucket}/v.npy", "--model", model]) == 0
    with (bucket / "v.npy").open("rb") as stream:
        assert np.load(stream).shape[0] == 2


def test_training_reads_from_a_bucket_and_refuses_to_write_there(
    bucket, model, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("grain", reason="the train extra is not installed")
    from train.__main__ import main
    from train.data import read_pairs

    (bucket / "pairs.jsonl").write_text('{"query": "a", "positive": "b"}\n' * 2)
    assert len(list(read_pairs(f"{bucket}/pairs.jsonl"))) == 2
    monkeypatch.chdir(tmp_path)
    options = ["pairs", "--model", model, "--data", f"{bucket}/pairs.jsonl", "--output", "gs://bucket/out"]
    assert main(options) == 1 and "must be in a local folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()) and not epath.Path("gs://bucket/out").exists()
