"""Every kind of file that a BEIR folder can hold, through the eval command: measured, or refused with file and line."""

import gzip
import json

import eval_cases
import pytest

pytest.importorskip("pytrec_eval", reason="the eval extra is not installed")
pytest.importorskip("bm25s", reason="the eval extra is not installed")

from eval.__main__ import main


@pytest.fixture
def folder(tmp_path):
    return eval_cases.small_beir(tmp_path / "small")


@pytest.fixture
def measure(folder, tmp_path, capsys):
    """Runs BM25 on the folder: the result, or the message after which the command gave up."""

    def run(*options, **files):
        for name, content in files.items():
            path = folder / {"qrels": "qrels/test.tsv"}.get(name, f"{name}.jsonl")
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        output = tmp_path / "out"
        code = main(["beir", str(folder), "--output", str(output), *options])
        captured = capsys.readouterr()
        if code:
            assert code == 1 and captured.err.startswith("error: ") and "Traceback" not in captured.err
            assert not output.exists(), "something was left behind"
            return captured.err
        result = json.loads((output / "small.json").read_text(), parse_constant=pytest.fail)
        assert sorted(path.name for path in output.iterdir()) == ["small.json", "small.trec"]
        return result

    return run


CORPUS = '{"_id": "d0", "title": "t", "text": "the cat sat"}\n{"_id": "d1", "text": "dogs bark"}\n'
QUERIES = '{"_id": "q0", "text": "cat"}\n{"_id": "q1", "text": "dog"}\n'
QRELS = "query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t1\n"


def perfect(result):
    return result["metrics"]["ndcg@10"] == 1.0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "\ufeff" + text,  # byte order mark
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.removesuffix("\n"),
        lambda text: "\n\n" + text.replace("\n", "\n \n"),
        lambda text: gzip.compress(text.encode()),  # whatever the name
        lambda text: gzip.compress(text[:20].encode()) + gzip.compress(text[20:].encode()),
    ],
    ids=["bom", "crlf", "no-final-newline", "blank-lines", "gzip", "gzip-of-two-members"],
)
def test_read_as_if_it_were_not_there(measure, spoil):
    assert perfect(measure(corpus=spoil(CORPUS), queries=spoil(QUERIES), qrels=spoil(QRELS)))


def test_gzip_by_name_and_tsv(folder, measure):
    for name in ("corpus", "queries"):
        (folder / f"{name}.jsonl").unlink()
    (folder / "corpus.tsv").write_text('d0\ta "quoted cat\nd1\tdogs bark\n')
    (folder / "queries.tsv").write_text("q0\tcat\nq1\tdog\n")
    (folder / "qrels/test.tsv").unlink()
    (folder / "qrels/test.tsv.gz").write_bytes(gzip.compress(QRELS.encode()))
    assert perfect(measure())


@pytest.mark.parametrize(
    "qrels",
    [
        "q0\td0\t1\nq1\td1\t1\n",
        "q0 d0 1\nq1 d1 1.0\n",
        "q0 0 d0 1\nq1 0 d1 1\n",
        "q0\t0\td0\t2\nq0\t0\td1\t-1\nq1\t0\td1\t1\n",
        QRELS,
    ],
    ids=["no-header", "spaces-and-1.0", "trec", "trec-tabs-negative", "header"],
)
def test_kinds_of_judgements(measure, qrels):
    assert perfect(measure(corpus=CORPUS, queries=QUERIES, qrels=qrels))


def test_ids_are_strings(measure):
    corpus = '{"_id": 1, "text": "cat"}\n{"id": "01", "text": "dog"}\n'
    queries = '{"_id": 7, "text": "dog"}\n'
    assert perfect(measure(corpus=corpus, queries=queries, qrels="7\t01\t1\n"))


def test_line_separators_inside_a_record(measure):
    corpus = '{"_id": "d0", "text": "cat\u2028and\u0085more"}\n{"_id": "d1", "text": "dogs\r bark"}\n'
    assert perfect(measure(corpus=corpus, queries=QUERIES, qrels=QRELS))


def test_ids_with_white_space_make_the_run_json(folder, tmp_path, capsys):
    eval_cases.write_beir(
        folder, [{"_id": "the cat", "text": "cat"}], [{"_id": "q 0", "text": "cat"}], "q 0\tthe cat\t1\n"
    )
    assert main(["beir", str(folder), "--output", str(tmp_path / "out")]) == 0
    assert list(json.loads((tmp_path / "out/small.run.json").read_text())) == ["q 0"]
    capsys.readouterr()
    again = ["beir", str(folder), "--first-stage", str(tmp_path / "out"), "--output", str(tmp_path / "again")]
    assert main(again) == 0 and "ndcg@10 1.0000" in capsys.readouterr().out


def test_title_null_and_text_null(measure):
    corpus = '{"_id": "d0", "title": null, "text": "cat"}\n{"_id": "d1", "title": "", "text": null}\n'
    result = measure(corpus=corpus, queries=QUERIES, qrels=QRELS)
    assert result["metrics"]["recall@10"] == 0.5 and result["counts"]["queries_without_hits"] == 1


def test_what_does_not_exist_is_counted_and_the_rest_evaluated(measure):
    result = measure(corpus=CORPUS, queries=QUERIES, qrels=QRELS + "q1\tgone\t1\nnobody\td0\t1\n")
    counts = result["counts"]
    assert counts["queries"] == 2 and counts["judged_queries_unknown"] == 1
    assert counts["judged_documents_unknown"] == 1 and counts["documents"] == 2
    assert result["metrics"]["recall@10"] == (1 + 1 / 2) / 2


def test_duplicates_are_counted(measure):
    result = measure(corpus=CORPUS + CORPUS, queries=QUERIES + QUERIES, qrels=QRELS + "q0\td0\t1\n")
    assert perfect(result)
    assert {k: v for k, v in result["counts"].items() if "duplicates" in k} == {
        "corpus_duplicates": 2,
        "queries_duplicates": 2,
        "qrels_duplicates": 1,
    }


def test_bad_lines_and_bad_bytes_on_request(measure):
    result = measure(
        *("--skip-bad-lines", "--encoding-errors", "replace"),
        corpus=CORPUS.encode() + b'{broken\n{"_id": "d2", "text": "\xff"}\n',
        queries=QUERIES,
        qrels=QRELS,
    )
    assert perfect(result)
    assert result["counts"]["corpus_skipped"] == 1 and result["counts"]["corpus_replaced"] == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"corpus": CORPUS + "{broken\n"}, "corpus.jsonl, line 3"),
        ({"corpus": CORPUS + "[1]\n"}, "corpus.jsonl, line 3"),
        ({"corpus": CORPUS + '{"text": "x"}\n'}, "corpus.jsonl, line 3"),
        ({"corpus": CORPUS + '{"_id": "d2"}\n'}, "corpus.jsonl, line 3"),
        (
            {"corpus": CORPUS + '{"_id": "d0", "text": "other"}\n'},
            "corpus.jsonl, line 3: id 'd0' is in line 1",
        ),
        ({"corpus": CORPUS + '{"_id": "\\ud83d", "text": "x"}\n'}, "corpus.jsonl, line 3"),
        (
            {"corpus": CORPUS.encode() + b'{"_id": "d2", "text": "\xff"}\n'},
            "corpus.jsonl, line 3: invalid UTF-8",
        ),
        ({"corpus": gzip.compress(CORPUS.encode())[:-12]}, "corpus.jsonl, line"),
        ({"corpus": b""}, "corpus.jsonl: holds no document"),
        ({"queries": ""}, "queries.jsonl: holds no query"),
        ({"queries": QUERIES + '{"_id": "q0", "text": "other"}\n'}, "queries.jsonl, line 3"),
        ({"qrels": ""}, "test.tsv: holds no judgement"),
        ({"qrels": "query-id\tcorpus-id\tscore\n"}, "test.tsv: holds no judgement"),
        ({"qrels": "other\td0\t1\n"}, "test.tsv: judges no query"),
        ({"qrels": QRELS + "q0\t0\td1\t1\n"}, "test.tsv, line 4"),
        ({"qrels": QRELS + "q0\td1\t1_0\n"}, "test.tsv, line 4"),
        ({"qrels": QRELS + "q0\td1\t0.5\n"}, "test.tsv, line 4"),
        ({"qrels": QRELS + "q0\td0\t2\n"}, "test.tsv, line 4"),
        ({"qrels": QRELS.encode() + b"q0\t\xff\t1\n"}, "test.tsv, line 4: invalid UTF-8"),
    ],
)
def test_refused_with_file_and_line(measure, files, message):
    assert message in measure(**{"corpus": CORPUS, "queries": QUERIES, "qrels": QRELS} | files)


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
def test_a_missing_file_is_named(folder, measure, name):
    (folder / name).unlink()
    assert f"holds no {name.removeprefix('qrels/')}" in measure()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("q0 Q0 d0 1 nan t\n", "run.trec, line 1: the score of query 'q0', document 'd0' is NaN"),
        ("q0 Q0 d0 1 1.0 t\nq0 Q0 d1\n", "run.trec, line 2"),
        ("q0 Q0 d0 1 high t\n", "run.trec, line 1"),
        ("q0 Q0 d0 1 2.0 t\nq0 Q0 d0 2 1.0 t\n", "run.trec, line 2"),
        ("", "run.trec: holds no run"),
        ('{"q0": {"d0": NaN}}', "'d0' is NaN"),
        ('{"q0": {"d0": 1}', "run.trec, line 1: broken JSON"),
        ("other Q0 d0 1 1.0 t\n", "run.trec: ranks none of the judged queries"),
    ],
)
def test_runs_are_refused_with_file_and_line(tmp_path, measure, run, message):
    (tmp_path / "run.trec").write_text(run)
    assert message in measure("--first-stage", str(tmp_path / "run.trec"))


def test_infinite_scores_are_legal(tmp_path, measure):
    (tmp_path / "run.trec").write_text(
        "q0 Q0 d6 1 inf t\nq0 Q0 d0 2 1 t\nq1 Q0 d1 1 -inf t\nq2 Q0 d9 1 1e99 t\n"
    )
    result = measure("--first-stage", str(tmp_path / "run.trec"))
    assert result["metrics"]["mrr@10"] == 1.0
