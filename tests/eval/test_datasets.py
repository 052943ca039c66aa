"""BEIR data sets: finding files, downloading archives, refusing what is not the published one."""

import hashlib
import zipfile

import eval_cases
import pytest

pytest.importorskip("pytrec_eval", reason="the eval extra is not installed")

from eval import datasets
from eval.datasets import AVERAGES, FORUMS, default_split, forums_of, obtain, unzip
from sgpt_jax.errors import InputError
from sgpt_jax.files.beir import DataSet, find


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A stand-in for BEIR's server: `publish(name, files)` puts an archive there and its MD5 into the table."""
    server = tmp_path / "server"
    server.mkdir()
    monkeypatch.setattr(datasets, "URL", server.as_uri() + "/{name}.zip")

    def publish(name, folder=None, names=()):
        archive = server / f"{name}.zip"
        with zipfile.ZipFile(archive, "w") as content:
            for file in sorted(folder.rglob("*")) if folder else ():
                content.write(file, f"{name}/{file.relative_to(folder)}")
            for entry in names:
                content.writestr(entry, "text")
        monkeypatch.setitem(datasets.MD5, name, hashlib.md5(archive.read_bytes()).hexdigest())
        return archive

    return publish


def test_a_published_set_is_downloaded_once(tmp_path, published):
    archive = published("scifact", eval_cases.small_beir(tmp_path / "made"))
    folder = obtain("scifact", tmp_path / "cache")
    assert DataSet("scifact", folder, "test").load().queries["q0"] == "cat"
    archive.unlink()
    assert obtain("scifact", tmp_path / "cache") == folder
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["scifact"]  # no scratch left


def test_a_wrong_md5_is_refused(tmp_path, published, monkeypatch):
    published("scifact", eval_cases.small_beir(tmp_path / "made"))
    monkeypatch.setitem(datasets.MD5, "scifact", "0" * 32)
    with pytest.raises(InputError, match=r"MD5 is .*, BEIR publishes 0000"):
        obtain("scifact", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    "entry",
    ["../evil.txt", "scifact/../../evil.txt", "/evil.txt", "scifact\\..\\..\\evil.txt", "C:/evil.txt"],
)
def test_entries_that_point_outside_are_refused_whole(tmp_path, published, entry):
    published("scifact", names=["scifact/corpus.jsonl", entry])
    with pytest.raises(InputError, match="points outside"):
        obtain("scifact", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    assert not list(tmp_path.rglob("evil.txt"))


def test_links_in_archives_are_refused(tmp_path):
    archive = tmp_path / "links.zip"
    with zipfile.ZipFile(archive, "w") as content:
        link = zipfile.ZipInfo("scifact/corpus.jsonl")
        link.external_attr = 0o120777 << 16
        content.writestr(link, "/etc/passwd")
    with pytest.raises(InputError, match="points outside"):
        unzip(archive, tmp_path / "out")


def test_a_damaged_archive_is_refused(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(InputError, match="no complete zip"):
        unzip(tmp_path / "x.zip", tmp_path / "out")


def test_no_network_is_a_message(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "URL", (tmp_path / "nowhere").as_uri() + "/{name}.zip")
    with pytest.raises(InputError, match=r"cannot be downloaded .*give a local folder"):
        obtain("scifact", tmp_path / "cache")


def test_an_unknown_name_says_what_there_is(tmp_path):
    with pytest.raises(InputError, match=r"robust04: is no folder, and no data set .*scifact"):
        obtain("robust04", tmp_path)  # its licence allows no download


def test_files_are_found_zipped_or_not_but_never_guessed(tmp_path):
    (tmp_path / "corpus.jsonl.gz").write_bytes(b"")
    assert find(tmp_path, "corpus", ("jsonl", "tsv")).name == "corpus.jsonl.gz"
    (tmp_path / "corpus.jsonl").write_bytes(b"")
    with pytest.raises(InputError, match=r"both corpus.jsonl and corpus.jsonl.gz"):
        find(tmp_path, "corpus", ("jsonl", "tsv"))
    with pytest.raises(InputError, match=r"holds no queries.jsonl"):
        find(tmp_path, "queries", ("jsonl", "tsv"))


def test_ms_marco_is_measured_on_dev():
    assert default_split("msmarco") == "dev" and default_split("scifact") == "test"


def test_cqadupstack_is_all_twelve_or_nothing(tmp_path):
    for forum in FORUMS:
        (tmp_path / forum).mkdir()
    assert [path.name for path in forums_of(tmp_path)] == list(FORUMS)
    (tmp_path / "gis").rmdir()
    with pytest.raises(InputError, match="but not gis"):
        forums_of(tmp_path)
    (tmp_path / "corpus.jsonl").touch()
    assert forums_of(tmp_path) == []


def test_the_papers_lists():
    assert [len(names) for names in AVERAGES.values()] == [18, 11, 5]
    assert all(len(set(names)) == len(names) for names in AVERAGES.values())
    assert "msmarco" not in AVERAGES["average_18"] and set(AVERAGES["average_11"]) < set(
        AVERAGES["average_18"]
    )
    assert set(AVERAGES["average_18"]) - set(datasets.MD5) == {"bioasq", "signal1m", "trec-news", "robust04"}
