"""A corpus of several files by row: the same documents, however it is cut, and errors that name the line."""

import gzip
import itertools
import json

import pytest

from sgpt_jax.errors import InputError
from sgpt_jax.files import counted, hub_tables
from sgpt_jax.files.corpora import Document, read_corpus
from sgpt_jax.files.counted import Reading, count_corpus
from sgpt_jax.runtime import processes


def line(number, text=None):
    value = {
        "_id": f"d{number}",
        "title": f"t{number}" * (number % 2),
        "text": text or f"text of {number} é\r" * (number % 4),
    }
    return json.dumps(value, ensure_ascii=False).encode()


def everything(corpus):
    return list(corpus.read(0, corpus.total))


@pytest.fixture
def folder(tmp_path):
    """JSON lines with a byte order mark, blank lines, CRLF, a repeated record, no end of the last line; gzip; TSV."""
    place = tmp_path / "corpus"
    place.mkdir()
    lines = [line(n) + b"\r\n" * (n % 3 == 0) for n in range(40)]
    lines[7] += b"\n\n  "
    (place / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join([*lines, line(3), line(40)]))
    (place / "b.jsonl.gz").write_bytes(
        gzip.compress(b"\n".join(line(n) for n in range(41, 50)) + b"\n" + line(5))
    )
    (place / "c.tsv").write_text("".join(f"d{n}\ttext {n}\n" for n in range(50, 55)))
    (place / "notes.md").write_text("no documents")
    return place


def expected(folder):
    found = {}
    for name in ("a.jsonl", "b.jsonl.gz", "c.tsv"):
        found |= {document.id: document for document in read_corpus(folder / name)}
    return list(found.values())


@pytest.mark.parametrize("size", [41, 333, 1 << 24])
def test_any_cut_gives_the_same_rows(folder, tmp_path, monkeypatch, size):
    monkeypatch.setattr(counted, "PART_BYTES", size)
    corpus = count_corpus([folder], tmp_path / "notes", Reading())
    documents = expected(folder)
    assert corpus.total == len(documents) == 55 and everything(corpus) == documents
    assert (corpus.report.records, corpus.report.duplicates) == (55, 2)
    for start, stop in ((40, 44), (3, 5), (5, 9), (54, 90), (7, 7), (0, 55)):  # any order
        assert list(corpus.read(start, stop)) == documents[start:stop]


def test_counting_goes_on_and_each_process_counts_its_share(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(counted, "PART_BYTES", 300)
    read = []
    real = counted._count
    monkeypatch.setattr(counted, "_count", lambda part, *rest: (read.append(part), real(part, *rest)))
    with monkeypatch.context() as other:
        other.setattr(processes, "mine", lambda number: number % 2 == 1)
        other.setattr(processes, "first", lambda: False)
        with pytest.raises(OSError, match=r"000000.npy"):  # what another process should have counted
            count_corpus([folder], tmp_path / "notes", Reading())
    half = len(read)
    corpus = count_corpus([folder], tmp_path / "notes", Reading())
    assert len(read) == len(set(read)) and half == len(read) // 2
    assert everything(corpus) == expected(folder)
    count_corpus([folder], tmp_path / "notes", Reading())
    assert len(read) == len(set(read))
    with (folder / "c.tsv").open("a") as stream:
        stream.write("d99\tmore\n")
    with pytest.raises(InputError, match=r"c\.tsv: changed since it was counted"):
        everything(corpus)
    assert count_corpus([folder], tmp_path / "notes", Reading()).total == 56


@pytest.mark.parametrize("corpus", ["corpus.jsonl", "corpus.jsonl.gz"])
@pytest.mark.parametrize("beside", ["queries.jsonl", "queries.tsv", "qrels/test.tsv"])
def test_queries_beside_a_corpus_are_no_documents(corpus, beside, tmp_path):
    data = b"\n".join([line(0), line(1)])
    (tmp_path / corpus).write_bytes(gzip.compress(data) if corpus.endswith(".gz") else data)
    (tmp_path / beside).parent.mkdir(exist_ok=True)
    (tmp_path / beside).write_bytes(b"q1\ta query\n" if beside.endswith(".tsv") else line(99))
    (tmp_path / "train.jsonl").write_bytes(line(2))
    count = itertools.count()

    def ids():
        documents = everything(count_corpus([tmp_path], tmp_path / f"notes{next(count)}", Reading()))
        return [document.id for document in documents]

    assert ids() == ["d0", "d1"]
    (tmp_path / corpus).rename(
        tmp_path / corpus.replace("corpus", "more")
    )  # a folder of files like any other
    assert set(ids()) >= {"d0", "d1", "d2"}


@pytest.mark.parametrize("size", [10, 1 << 24])
def test_errors_name_the_line_of_the_file(tmp_path, monkeypatch, size):
    monkeypatch.setattr(counted, "PART_BYTES", size)
    path = tmp_path / "corpus.jsonl"
    count = itertools.count()

    def problem(lines, **how):
        path.write_bytes(b"\n".join(lines))
        return count_corpus([path], tmp_path / f"notes{next(count)}", Reading(**how))

    with pytest.raises(InputError, match=r"corpus.jsonl, line 4: broken JSON"):
        problem([line(0), b"", line(1), b"{broken", line(2)])
    assert problem([line(0), b"", line(1), b"{broken", line(2)], skip_bad_lines=True).report.skipped == 1
    with pytest.raises(InputError, match=r"corpus.jsonl, line 3: the record has neither"):
        problem([line(0), line(1), b'{"text": "x"}'])
    with pytest.raises(InputError, match=r"line 3: invalid UTF-8"):
        problem([line(0), line(1), line(2) + b"\xff"])
    with pytest.raises(
        InputError, match=r"corpus.jsonl, line 5: id 'd1' is in line 2 with different content"
    ):
        problem([line(0), line(1), line(2), b"", line(1, "other"), line(3)])
    other = tmp_path / "other.jsonl"
    other.write_bytes(line(9) + b"\n" + line(2, "other"))
    path.write_bytes(line(0) + b"\n" + line(2))
    with pytest.raises(
        InputError, match=r"other.jsonl, line 2: id 'd2' is in .*corpus.jsonl, line 2 with different"
    ):
        count_corpus([path, other], tmp_path / "notes", Reading())
    path.write_bytes(b"\n")
    with pytest.raises(InputError, match="holds no document"):
        count_corpus([path], tmp_path / "notes", Reading())
    with pytest.raises(InputError, match=r"none.jsonl: cannot be opened"):
        count_corpus([tmp_path / "none.jsonl"], tmp_path / "notes", Reading())


def test_parquet_is_read_by_row_groups(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the parquet extra is not installed")
    from pyarrow import parquet

    rows = {
        "id": [1, 2, 3, 4, 5],
        "title": ["a", None, "", "b", "c"],
        "text": list("vwxyz"),
        "url": ["u"] * 5,
    }
    parquet.write_table(pyarrow.table(rows), tmp_path / "x.parquet", row_group_size=2)
    corpus = count_corpus([tmp_path], tmp_path / "notes", Reading())
    assert len(corpus._parts) == 3
    assert list(corpus.read(1, 4)) == [Document("2", "w"), Document("3", "x"), Document("4", "b y", "b")]
    parquet.write_table(
        pyarrow.table(rows | {"text": [1, 2, 3, 4, 5]}), tmp_path / "x.parquet", row_group_size=2
    )
    with pytest.raises(InputError, match=r"x.parquet, row group 0, row 1: `text` must be a string, not 1"):
        count_corpus([tmp_path], tmp_path / "notes", Reading())
    parquet.write_table(pyarrow.table({"Text": ["a"], "id": [1]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="`Text` is not a known key; `text` is one that looks like it"):
        count_corpus([tmp_path], tmp_path / "notes", Reading())
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"x.parquet: cannot be read"):
        count_corpus([tmp_path], tmp_path / "notes", Reading())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set of the hub with a repeated record; a second one."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    records = [json.loads(line(n)) for n in [*range(20), 3]]
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "first")
    folder = tmp_path / "second"
    folder.mkdir()
    datasets.Dataset.from_list([json.loads(line(n)) for n in range(20, 30)]).to_parquet(
        folder / "train.parquet"
    )
    return [f"hf:{tmp_path / 'first'}", f"hf:{folder}"]


def test_rows_of_the_hub_are_parts(hub, tmp_path, monkeypatch):
    whole = {document.id: document for source in hub for document in read_corpus(source)}
    monkeypatch.setattr(counted, "PART_ROWS", 4)
    corpus = count_corpus(hub, tmp_path / "notes", Reading())
    assert corpus.total == 30 and everything(corpus) == list(whole.values())
    assert list(corpus.read(17, 23)) == list(whole.values())[17:23]
    # A process reads the rows that it needs, and no others.
    asked, select = [], hub_tables.Rows.select

    class Watched:
        def __init__(self, table):
            self.table = table

        def __getitem__(self, chosen):
            asked.append(chosen)
            return self.table[chosen]

    monkeypatch.setattr(hub_tables.Rows, "select", lambda *arguments: Watched(select(*arguments)))
    found = count_corpus(hub, tmp_path / "notes", Reading()).read(9, 11)
    assert [document.id for document in found] == ["d9", "d10"] and asked == [slice(8, 12)]


def test_rows_of_the_hub_that_break_a_rule(hub, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(counted, "PART_ROWS", 4)
    for name, records, message in (
        (
            "twice",
            [json.loads(line(n)) for n in range(9)] + [json.loads(line(4, "new"))],
            "row 10: id 'd4' is in row 5",
        ),
        ("none", [*({"_id": f"d{n}", "text": "a"} for n in range(6)), {"_id": None, "text": "a"}], "row 7: "),
        ("strange", [{"_id": "a", "texts": "b"}], "`text` is one that looks like it"),
    ):
        datasets.Dataset.from_list(records).save_to_disk(tmp_path / name)
        with pytest.raises(InputError, match=message):
            everything(count_corpus([f"hf:{tmp_path / name}"], tmp_path / "notes", Reading()))


def test_lines_of_text_are_numbered_on_from_file_to_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\nthree")
    (tmp_path / "b.jsonl").write_bytes(line(1))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"\nfive\n"))
    (tmp_path / "d").write_text("six\nseven\n")
    files = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.txt.gz", "d")]
    documents = everything(count_corpus(files, tmp_path / "notes", Reading()))
    assert [document.id for document in documents] == ["1", "3", "d1", "5", "6", "7"]
    assert [document.numbered for document in documents] == [True, True, False, True, True, True]
    (tmp_path / "d").write_bytes(b"six\n\xff\n")
    with pytest.raises(InputError, match=r"/d, line 2: invalid UTF-8"):
        count_corpus(files, tmp_path / "notes", Reading())


def test_of_a_folder_no_file_of_records_is_left_out_silently(tmp_path):
    (tmp_path / "0.jsonl").write_bytes(line(0))
    (tmp_path / "._0.jsonl").write_bytes(b"\x00\x05\x16\x07")
    assert count_corpus([tmp_path], tmp_path / "notes", Reading()).total == 1
    (tmp_path / "0.jsonl.zip").write_bytes(b"PK\x03\x04")  # what it was unpacked from
    assert count_corpus([tmp_path], tmp_path / "notes", Reading()).total == 1
    (tmp_path / "1.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(InputError, match=r"1\.jsonl\.zst: of compressed files only gzip is read"):
        count_corpus([tmp_path], tmp_path / "notes", Reading())


def test_a_failing_call_forgets_its_own_counts_alone(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as other:
        other.setattr(counted, "_repeated", None)
        with pytest.raises(TypeError):  # as if it was killed
            count_corpus([folder], tmp_path / "notes", Reading())
    kept = sorted((tmp_path / "notes").rglob("*"))
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(InputError):
        count_corpus([tmp_path / "bad.jsonl"], tmp_path / "notes", Reading())
    assert sorted((tmp_path / "notes").rglob("*")) == kept
    count_corpus([folder], tmp_path / "notes", Reading()).forget()
    assert not (tmp_path / "notes").exists()
