"""Files as people have them: rules for texts, ids and lines; writers that never leave half a file."""

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import tracemalloc
import types

import numpy as np
import pytest

from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document, read_corpus, read_queries, read_texts
from sgpt_jax.files.lines import (
    ReadReport,
    atomic_write,
    fix_surrogates,
    read_lines,
    write_json,
    write_jsonl,
)


@pytest.fixture
def file(tmp_path):
    """Writes bytes (or text as UTF-8) to a file and returns its path as a str."""

    def make(content, name="corpus.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return make


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def test_beir_record_title_and_text(file):
    path = file(
        lines(
            {"_id": "1", "title": "A", "text": "b", "metadata": {"x": 1}},
            {"_id": "2", "text": " b "},
            {"_id": "3", "title": None, "text": "b"},
            {"_id": "4", "title": "", "text": "b"},
            {"_id": "5", "title": " ", "text": "b"},
            {"_id": "6", "title": "A", "text": None},
            {"id": 7, "text": ""},
            {"_id": None, "id": "8", "text": "b"},
        )
    )
    assert list(read_corpus(path)) == [
        Document("1", "A b", "A"),
        Document("2", " b "),
        Document("3", "b"),
        Document("4", "b"),
        Document("5", "b", " "),
        Document("6", "A", "A"),
        Document("7", ""),
        Document("8", "b"),
    ]


def test_ids_are_strings_and_leading_zeros_count(file):
    path = file('{"_id": 1, "text": "a"}\n{"_id": "01", "text": "b"}\n')
    assert [document.id for document in read_corpus(path)] == ["1", "01"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, "line 2: the record has neither `_id` nor `id`"),
        ({"_id": "x"}, "line 2: the record has no `text`"),
        ({"_id": "x", "text": 5}, "line 2: `text` must be a string"),
        ({"_id": "x", "text": "a", "title": ["t"]}, "line 2: `title` must be a string"),
        ({"_id": "", "text": "a"}, "line 2: the id is empty"),
        ({"_id": 1.0, "text": "a"}, "line 2: the id must be a string or an integer, not 1.0"),
        ({"_id": True, "text": "a"}, "line 2: the id must be a string or an integer, not True"),
        ({"_id": "a\ud83d", "text": "a"}, "line 2: the id .* lone surrogate"),
    ],
)
def test_bad_record_names_file_and_line(file, record, message):
    path = file(lines({"_id": "0", "text": "a"}, record))
    with pytest.raises(InputError, match=message) as caught:
        list(read_corpus(path, skip_bad_lines=True))
    assert path in str(caught.value)


@pytest.mark.parametrize("bad", ['{"_id": "x", "text": "a"', "[1, 2]", '"text"', "[" * 100_000, "9" * 5000])
def test_broken_json(file, bad):
    path = file('{"_id": "1", "text": "a"}\n' + bad + '\n{"_id": "2", "text": "b"}\n')
    with pytest.raises(InputError, match="line 2"):
        list(read_corpus(path))
    report = ReadReport()
    assert [document.id for document in read_corpus(path, skip_bad_lines=True, report=report)] == ["1", "2"]
    assert (report.records, report.skipped) == (2, 1)
    assert str(report) == "2 records, 1 bad lines skipped"


def test_bom_crlf_blank_lines_and_missing_newline_change_nothing(file):
    plain = lines({"_id": "1", "text": "a"}, {"_id": "2", "text": "b"}).encode()
    odd = b"\xef\xbb\xbf\r\n" + plain.replace(b"\n", b"\r\n \t\r\n\n").rstrip()
    assert list(read_corpus(file(odd, "odd.jsonl"))) == list(read_corpus(file(plain)))


def test_only_line_feed_ends_a_record(file):
    text = "a\u2028b\u0085c\rd\x0be\x1cf"
    path = file(json.dumps({"_id": "1", "text": text}, ensure_ascii=False).replace("\\r", "\r") + "\n")
    assert [document.text for document in read_corpus(path)] == [text]
    assert list(read_texts(file(text + "\n" + text + "\r\n", "t.txt"))) == [text, text]


def test_unicode_is_not_normalised(file):
    texts = ["e\u0301", "\u00e9", "\u05d0\u200f", "\U0001f600", "a\x00b", "\ufeffinner"]
    path = file("".join(f"{number}\t{text}\n" for number, text in enumerate(texts)), "corpus.tsv")
    assert [document.text for document in read_corpus(path)] == texts


def test_surrogates_in_text(file):
    path = file(r'{"_id": "1", "title": "\ud83d", "text": "\ud83d\ude00 \ude00 \ud83dx"}')
    assert list(read_corpus(path)) == [Document("1", "\ufffd \U0001f600 \ufffd \ufffdx", "\ufffd")]
    assert fix_surrogates("\ud83d" + "\ude00" + "\ud83d\ud83d\ude00") == "\U0001f600\ufffd\U0001f600"
    assert fix_surrogates("é") == "é"


def test_gzip_is_told_by_content(file):
    first, second = lines({"_id": "1", "text": "a"}), lines({"_id": "2", "text": "b"})
    two_members = gzip.compress(first.encode()) + gzip.compress(second.encode())
    assert [document.id for document in read_corpus(file(two_members, "c.jsonl"))] == ["1", "2"]
    assert [document.id for document in read_corpus(file(first, "c.jsonl.gz"))] == ["1"]


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress])
def test_other_compression_is_refused_by_name(compress, file):
    for name in ("corpus.jsonl", "corpus"):
        with pytest.raises(InputError, match=r"is compressed with (bzip2|xz); only gzip is read"):
            list(read_corpus(file(compress(b"text\n"), name)))


def test_damaged_gzip(file):
    content = gzip.compress(lines(*({"_id": str(n), "text": str(n)} for n in range(2000))).encode())
    for cut in (12, len(content) // 2, len(content) - 4):
        with pytest.raises(InputError, match=r"line .*gzip"):
            list(read_corpus(file(content[:cut])))
    flipped = content[: len(content) // 2] + b"\x55\xaa\x55" + content[len(content) // 2 + 3 :]
    with pytest.raises(InputError):
        list(read_corpus(file(flipped)))


def test_invalid_utf8(file):
    content = '{"_id": "1", "text": "ok \ufffd"}\n'.encode() + b'{"_id": "2", "text": "a\xffb\xc3("}\n'
    path = file(content)
    with pytest.raises(InputError, match=r"corpus.jsonl, line 2: invalid UTF-8 at byte 24 .*0xff"):
        list(read_corpus(path))
    report = ReadReport()
    assert [document.text for document in read_corpus(path, errors="replace", report=report)] == [
        "ok \ufffd",
        "a\ufffdb\ufffd(",
    ]
    assert report.replaced == 2


def test_byte_of_invalid_utf8_counts_the_bom(file):
    with pytest.raises(InputError, match="line 1: invalid UTF-8 at byte 5 "):
        list(read_lines(file(b"\xef\xbb\xbfa\xff")))


def test_duplicates(file):
    same = {"_id": "1", "title": "t", "text": "a"}
    report = ReadReport()
    path = file(lines(same, {"_id": "2", "text": "t a"}, same, {**same, "metadata": 1}))
    assert [document.id for document in read_corpus(path, report=report)] == ["1", "2"]
    assert (report.records, report.duplicates) == (2, 2)
    with pytest.raises(InputError, match=r"line 3: id '1' is in line 1 with different content"):
        list(read_corpus(file(lines(same, {"_id": "2", "text": ""}, {"_id": 1, "text": "t a"}))))


def test_nothing_in_the_file(file):
    for content in (b"", b"\xef\xbb\xbf\n \n", gzip.compress(b"")):
        with pytest.raises(InputError, match="holds no document"):
            list(read_corpus(file(content)))
        with pytest.raises(InputError, match="holds no query"):
            read_queries(file(content))
        assert list(read_texts(file(content))) == []


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match=r"none.jsonl: cannot be opened"):
        list(read_corpus(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match="cannot be opened"):
        list(read_corpus(tmp_path))


def test_tsv_two_and_three_columns(file):
    two = file('1\tsay "hi\n2\t\n', "c.tsv")
    assert list(read_corpus(two)) == [Document("1", 'say "hi'), Document("2", "")]
    three = file("1\tT\ttext\n2\t\ttext\n", "c.tsv")
    assert list(read_corpus(three)) == [Document("1", "T text", "T"), Document("2", "text")]


def test_tsv_header_gives_the_order(file):
    path = file("id\ttext\ttitle\n1\ttext\tT\n", "c.tsv")
    assert list(read_corpus(path)) == [Document("1", "T text", "T")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1\ta\n2\ta\tb\n", "line 2: 2 columns are needed, not 3"),
        ("1\ta\n2\n", "line 2: 2 columns are needed, not 1"),
        ("1\ta\tb\tc\n", "line 1: 2 or 3 columns are needed, not 4"),
        ("1\ta\n\n\tb\n", "line 3: the id is empty"),
    ],
)
def test_tsv_errors(file, content, message):
    with pytest.raises(InputError, match=message):
        list(read_corpus(file(content, "c.tsv")))


def test_plain_text_ids_are_line_numbers(file):
    path = file("first\n\nthird\tx\n{fourth\n", "c.txt")
    assert list(read_corpus(path)) == [
        Document("1", "first"),
        Document("3", "third\tx"),
        Document("4", "{fourth"),
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('\n {"_id": "9", "text": "a"}\n', [Document("9", "a")]),
        ("9\ta\n", [Document("9", "a")]),
        ("a b\n", [Document("1", "a b")]),
    ],
)
def test_unknown_name_is_told_by_its_first_line(file, content, expected):
    assert list(read_corpus(file(content, "corpus"))) == expected


def test_format_argument_wins_over_the_name(file):
    path = file("9\ta\n", "c.jsonl")
    assert list(read_corpus(path, format="tsv")) == [Document("9", "a")]
    assert list(read_corpus(path, format="text")) == [Document("1", "9\ta")]


def test_queries(file):
    assert read_queries(file("01\tq\n1\tp\n", "q.tsv")) == {"01": "q", "1": "p"}
    with pytest.raises(InputError, match=r"line 2.*different content"):
        read_queries(file("1\tq\n1\tp\n", "q.tsv"))


def test_texts_need_no_id_and_keep_repeats(file):
    path = file(lines({"text": "a"}, {"title": "T", "text": "a"}, {"text": "a"}))
    report = ReadReport()
    assert list(read_texts(path, report=report)) == ["a", "T a", "a"]
    assert report.records == 3
    assert list(read_texts(file("tab\tin text\n", "texts"))) == ["tab\tin text"]


def test_standard_input(monkeypatch):
    for content in (b"a\nb\n", gzip.compress(b"a\nb\n")):
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(content)))
        assert list(read_texts("-")) == ["a", "b"]
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"\xff")))
    with pytest.raises(InputError, match="standard input, line 1"):
        list(read_texts("-"))


def test_reading_needs_memory_for_the_ids_only(file):
    record = {"text": "x" * 4000}
    path = file("".join(json.dumps({"_id": str(n), **record}) + "\n" for n in range(5000)))
    tracemalloc.start()
    assert sum(1 for _ in read_corpus(path)) == 5000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000 < os.path.getsize(path) / 5


def test_json_is_always_valid(tmp_path):
    path = tmp_path / "out.json"
    value = {
        "nan": float("nan"),
        "inf": np.float32("inf"),
        1: np.int64(2),
        "list": (np.arange(2), [np.float64("nan")]),
        "text": "é\ud83d",
        "path": tmp_path,
    }
    write_json(path, value)
    raw = path.read_bytes()
    assert b"NaN" not in raw
    assert b"Infinity" not in raw
    assert json.loads(raw) == {
        "nan": None,
        "inf": None,
        "1": 2,
        "list": [[0, 1], [None]],
        "text": "é\ufffd",
        "path": str(tmp_path),
    }


def test_jsonl_round_trip(tmp_path):
    records = [{"_id": "1", "text": "a\u2028\nb"}, {"_id": "2", "text": ""}]
    write_jsonl(tmp_path / "c.jsonl", iter(records))
    assert [(d.id, d.text) for d in read_corpus(tmp_path / "c.jsonl")] == [("1", "a\u2028\nb"), ("2", "")]


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_jsonl(path, [{"a": 1}, {"a": object()}])
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as stream:
        stream.write(b"new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_write_follows_a_link_and_refuses_a_folder(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    write_json(tmp_path / "link.json", 1)
    assert (tmp_path / "real.json").read_text() == "1\n"
    assert (tmp_path / "link.json").is_symlink()
    with pytest.raises(InputError, match="cannot be opened"):
        write_json(tmp_path, 1)
    with pytest.raises(InputError, match="cannot be opened"):
        write_json(tmp_path / "no" / "out.json", 1)


def test_write_into_a_pipe(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    write_json(path, 1)
    assert os.read(reader, 10) == b"1\n"
    os.close(reader)


def test_many_ids_and_repeated_records(tmp_path):
    """The table of ids grows several times, and still knows the first ones."""
    path = tmp_path / "corpus.jsonl"
    records = [{"_id": str(number), "text": f"text {number}"} for number in range(9000)]
    write_jsonl(path, [*records, *records[::7]])
    report = ReadReport()
    assert [document.id for document in read_corpus(path, report=report)] == [r["_id"] for r in records]
    assert report.duplicates == len(records[::7])
    write_jsonl(path, [*records, {"_id": "4321", "text": "other"}])
    with pytest.raises(InputError, match="line 9001: id '4321' is in line 4322 with different content"):
        list(read_corpus(path))


def test_a_line_without_end_is_refused_where_it_becomes_too_long(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"ab\r\nabcd\r\nabcd\nabcde\n")
    lines = read_lines(path, max_bytes=4)
    assert [next(lines) for _ in range(3)] == [(1, "ab"), (2, "abcd"), (3, "abcd")]
    with pytest.raises(InputError, match=r"lines, line 4: longer than 4 bytes"):
        next(lines)


def test_records_of_more_than_the_allowed_bytes(tmp_path):
    """Also where they go over several lines: quoted cells of CSV, JSON arrays."""
    quoted = tmp_path / "x.csv"
    quoted.write_text('id,text\n1,ab\n2,"' + "long\n" * 9 + '"\n')
    assert len(list(read_corpus(quoted, max_bytes=50))) == 2
    with pytest.raises(InputError, match=r"x.csv, line 3: longer than 20 bytes"):
        list(read_corpus(quoted, max_bytes=20))
    array = tmp_path / "x.json"
    array.write_text("[" + ",\n".join(f'{{"id": {number}, "text": "a"}}' for number in range(40)) + "]")
    assert len(list(read_corpus(array))) == 40
    with pytest.raises(InputError, match=r"x.json, line 28: the JSON array is longer than 640 bytes"):
        list(read_corpus(array, max_bytes=40))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_a_gzip_bomb_and_an_endless_line_take_no_memory(tmp_path):
    """400 MB of one line, in 400 kB and as it is, with room for half of that."""
    bomb, plain = tmp_path / "bomb.jsonl", tmp_path / "plain.jsonl"
    with gzip.open(bomb, "wb", compresslevel=1) as stream:
        stream.write(b'{"_id": "a", "text": "b"}\n')
        for _ in range(400):
            stream.write(bytes(1 << 20))
    with plain.open("wb") as stream:
        stream.truncate(400 << 20)
    code = (
        "import resource, sys\n"
        "from sgpt_jax.files.corpora import read_corpus\n"
        "from sgpt_jax.errors import InputError\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20),) * 2)\n"
        "try:\n    print(len(list(read_corpus(sys.argv[1]))))\n"
        "except InputError as error:\n    print(error)\n"
    )
    for path, line in ((bomb, 2), (plain, 1)):
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
        assert f"{path}, line {line}: longer than 67,108,864 bytes" in done.stdout, done.stderr
