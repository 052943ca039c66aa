"""Tables and records as people have them: CSV, headers, JSON arrays, every spelling of a field, and what is refused."""

import gzip
import json

import pytest

from sgpt_jax.errors import InputError
from sgpt_jax.files.columns import DOCUMENT, EXAMPLE, QUERY
from sgpt_jax.files.corpora import Document, read_corpus, read_queries, read_texts
from sgpt_jax.files.lines import ReadReport
from sgpt_jax.files.sts import read_sts


@pytest.fixture
def file(tmp_path):
    def make(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return make


# CSV

CSV = 'id,title,text\n1,"Heron, grey","stands\nin ""shallow"" water"\n\n2,,"plain"\n'
HERON = [Document("1", 'Heron, grey stands\nin "shallow" water', "Heron, grey"), Document("2", "plain")]


@pytest.mark.parametrize(
    "content",
    [CSV, CSV.replace("\n", "\r\n"), "\ufeff" + CSV, CSV.rstrip(), "\n\n" + CSV, gzip.compress(CSV.encode())],
    ids=["plain", "crlf", "bom", "no-final-newline", "blank-lines", "gzip"],
)
def test_csv_is_read_as_csv(file, content):
    assert list(read_corpus(file("corpus.csv", content))) == HERON


def test_csv_columns_in_any_order_and_others_beside_them(file):
    path = file("corpus.csv", "url,Contents,DocID\nhttp://x,text,7\n")
    assert list(read_corpus(path)) == [Document("7", "text")]
    assert read_queries(file("queries.csv", 'qid,query\n7,"what, where"\n')) == {"7": "what, where"}
    assert list(read_texts(file("texts.csv", 'text\n"a, b"\nc\n'))) == ["a, b", "c"]
    long = "x" * 300_000  # more than the csv module allows of itself
    assert next(iter(read_corpus(file("long.csv", f"id,text\n1,{long}\n")))).text == long


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1,a\n2,b\n", "line 1: a CSV file needs a header that names `_id` and `text`"),
        ("id;text\n1;a\n", "line 1: a CSV file needs a header"),
        ("id,text\n1,a,b\n", "line 2: 2 columns are needed, not 3"),
        ('id,text\n1,"a\nb"\n2\n', "line 4: 2 columns are needed, not 1"),
        ('id,text\n1,a\n2,"open\nend\n', "line 3: broken CSV"),
        ('id,text\n1,"a"b\n', "line 2: broken CSV"),
        ("id,text\n,a\n", "line 2: the id is empty"),
        ("id,text,passage\n1,a,b\n", "line 1: the columns `text` and `passage` mean the same thing"),
        ("id,title\n1,a\n", "line 1: id, title looks like a header, but names no `text`"),
    ],
)
def test_csv_that_is_refused(file, content, message):
    with pytest.raises(InputError, match=message):
        list(read_corpus(file("corpus.csv", content)))


def test_csv_errors_name_the_line_where_the_record_begins(file):
    content = 'id,text\n1,"a\nb\nc"\n\n2,"d\ne"\n1,other\n'
    with pytest.raises(InputError, match=r"line 8: id '1' is in line 2 with different content"):
        list(read_corpus(file("corpus.csv", content)))


# Headers of TSV


@pytest.mark.parametrize(
    "header",
    ["docid\ttext", "pid\tpassage", "corpus-id\tcontents", "_id\tcontent", "ID\tText", "doc_id\tbody"],
)
def test_tsv_headers_of_a_corpus(file, header):
    assert list(read_corpus(file("c.tsv", f'{header}\n7\tsay "hi\n'))) == [Document("7", 'say "hi')]


@pytest.mark.parametrize("header", ["qid\tquery", "query-id\ttext", "query_id\tquestion"])
def test_tsv_headers_of_queries(file, header):
    assert read_queries(file("q.tsv", f"{header}\n7\twhat\n")) == {"7": "what"}


def test_a_header_that_does_not_fit_is_no_record(file):
    with pytest.raises(InputError, match="line 1: title, text looks like a header, but names no `_id`"):
        list(read_corpus(file("c.tsv", "title\ttext\n1\ta\n")))
    with pytest.raises(InputError, match="names no `_id`"):
        list(read_corpus(file("c.tsv", "Titles\tTexts\n1\ta\n")))
    assert list(read_corpus(file("c.tsv", "the title\ttext\n"))) == [Document("the title", "text")]


# Spellings in JSON


@pytest.mark.parametrize("id", DOCUMENT.spellings["id"])
@pytest.mark.parametrize("text", DOCUMENT.spellings["text"])
def test_spellings_of_documents(file, id, text):
    record = {id: 7, "title": "T", text: "words", "metadata": {"text": 1}, "url": "u", "spans": [1]}
    assert list(read_corpus(file("c.jsonl", json.dumps(record)))) == [Document("7", "T words", "T")]


@pytest.mark.parametrize("id", QUERY.spellings["id"])
@pytest.mark.parametrize("text", QUERY.spellings["text"])
def test_spellings_of_queries(file, id, text):
    path = file("q.jsonl", json.dumps({id: "7", text: "words"}))
    assert read_queries(path) == {"7": "words"}
    assert list(read_texts(path)) == ["words"]


def test_two_keys_of_one_meaning(file):
    same = {"_id": "1", "id": "1", "text": "a", "contents": "a", "body": "", "passage": None}
    assert list(read_corpus(file("c.jsonl", json.dumps(same)))) == [Document("1", "a")]
    for extra, names in (({"docid": "2"}, "`_id` and `docid`"), ({"segment": "b"}, "`text` and `segment`")):
        path = file("c.jsonl", '{"_id": "0", "text": ""}\n' + json.dumps({"_id": "1", "text": "a"} | extra))
        with pytest.raises(InputError, match=rf"c.jsonl, line 2: {names} mean the same thing, and differ"):
            list(read_corpus(path))


@pytest.mark.parametrize(
    ("key", "known"),
    [("Text", "text"), ("texts", "text"), ("docId", "docid"), ("ID", "_id"), ("Titles", "title")],
)
def test_a_key_that_looks_like_a_field_is_refused(file, key, known):
    record = json.dumps({"_id": "1", "text": "a", key: "b"})
    with pytest.raises(
        InputError, match=f"line 1: `{key}` is not a known key; `{known}` is one that looks like"
    ):
        list(read_corpus(file("c.jsonl", record)))


def test_every_spelling_means_one_thing():
    for columns in (DOCUMENT, QUERY, EXAMPLE):
        keys = [key for spellings in columns.spellings.values() for key in spellings]
        assert len(keys) == len(set(keys))


# JSON arrays


@pytest.mark.parametrize("name", ["c.json", "c.jsonl", "c", "c.json.gz"])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_array(file, name, indent):
    records = [{"id": 1, "text": "a, ] }"}, {"id": 2, "text": "b\u2028", "tags": [[1], {"x": []}]}]
    path = file(name, "\n" + json.dumps(records, indent=indent, ensure_ascii=False) + "\n")
    assert list(read_corpus(path)) == [Document("1", "a, ] }"), Document("2", "b\u2028")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[\n{"id": 1, "text": "a"},\n\n{"id": 2}\n]', "line 4: the record has no `text`"),
        ('[\n{"id": 1, "text": "a"},\n7\n]', "line 3: a JSON object is needed, not 7"),
        ('[\n{"id": 1, "text": "a"}\n{"id": 2, "text": "b"}]', "line 3: broken JSON: a comma"),
        ('[\n{"id": 1, "text": "a"},\n{"id": 2, "text": "b"', "line 3: broken JSON"),
        ('[{"id": 1, "text": "a"}]\nmore', "broken JSON: text behind"),
        ('[\n{"id": 1, "text": "a"}', "broken JSON"),
    ],
)
def test_json_array_that_is_refused(file, content, message):
    with pytest.raises(InputError, match=message):
        list(read_corpus(file("c.json", content)))


def test_json_array_with_bad_elements_skipped(file):
    report = ReadReport()
    path = file("c.json", '[{"id": 1, "text": "a"}, null, "x", {"id": 2, "text": "b"}]')
    assert len(list(read_corpus(path, skip_bad_lines=True, report=report))) == 2
    assert (report.records, report.skipped) == (2, 2)


def test_brackets_in_plain_text_are_text(file):
    assert list(read_texts(file("texts", "[SOS] a text\n[1]\n"))) == ["[SOS] a text", "[1]"]


# Semantic textual similarity

PAIRS = [(4.5, "a, b", 'c "d"'), (0.0, "e", "f")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("sts.csv", 'g\tf\ty\t1\t4.5\ta, b\tc "d"\ng\tf\ty\t2\t0\te\tf\tlicence\n'),
        ("three.tsv", 'a, b\tc "d"\t4.5\ne\tf\t0\n'),
        ("three-first.txt", '4.5\ta, b\tc "d"\n0\te\tf\n'),
        ("three.csv", '"a, b","c ""d""",4.5\ne,f,0\n'),
        ("header.csv", 'score,sentence1,sentence2\n4.5,"a, b","c ""d"""\n0,e,f\n'),
        ("glue.tsv", 'index\tgenre\tsentence1\tsentence2\tscore\n0\tx\ta, b\tc "d"\t4.5\n1\tx\te\tf\t0\n'),
        ("rows.jsonl", "".join(json.dumps(dict(zip(("score", "sentence1", "sentence2"), pair, strict=True))) + "\n"
                               for pair in PAIRS)),
        ("rows.json", json.dumps([dict(zip(("similarity_score", "text1", "text2"), p, strict=True)) for p in PAIRS])),
    ],
)  # fmt: skip
def test_sts_files(file, name, content):
    assert read_sts(file(name, content)) == PAIRS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\tb\tc\n", "line 1: STS-Benchmark's 7 to 9 columns are needed, 3 with a score first or last"),
        ("1\tb\t2\n", "line 1: .* not 3 columns"),
        ("a\tb\t1\nc\td\n", "line 2: 3 columns are needed, not 2"),
        ("a\tb\t1\nc\td\tnan\n", "line 2: the score must be a number, not 'nan'"),
        ("a,b,1\nc,d,1\n", "all scores are the same"),
        ("a,b,1\n", "holds 1 pairs"),
        ("", "holds 0 pairs"),
        (
            "sentence1,sentence2\na,b\n",
            "line 1: sentence1, sentence2 looks like a header, but names no `score`",
        ),
        ('{"sentence1": "a", "score": 1}', "line 1: the record has no `sentence2`"),
        ('{"sentence1": "a", "sentence2": 5, "score": 1}', "line 1: a sentence must be a string, not 5"),
        ('{"sentence1": "a", "sentence2": "b", "score": true}', "line 1: the score must be a number"),
        ('{"sentence1": "a", "sentence2": "b", "scores": 1}', "line 1: `scores` is not a known key; `score`"),
    ],
)
def test_sts_files_that_are_refused(file, content, message):
    with pytest.raises(InputError, match=message):
        read_sts(file("x.csv", content))
