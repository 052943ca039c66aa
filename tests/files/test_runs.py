"""Judgements and runs: told apart by content, strict about numbers, written in trec_eval's order."""

import json
import os
from typing import Any

import numpy as np
import pytest

from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import ReadReport
from sgpt_jax.files.runs import read_qrels, read_run, write_json_run, write_run


@pytest.fixture
def file(tmp_path):
    def make(content, name="file"):
        (tmp_path / name).write_bytes(content.encode())
        return str(tmp_path / name)

    return make


@pytest.mark.parametrize(
    "content",
    [
        "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\n01\td1\t-2\n",
        "q1\td1\t1\nq1\td2\t0\n01\td1\t-2",
        "q1 d1 1\nq1  d2  0 \n01 d1 -2\n",
        "q1 0 d1 1\nq1 0 d2 0\n01 0 d1 -2\n",
        "q1\t0\td1\t1\r\n\r\nq1\tQ0\td2\t0.0\r\n01\t0\td1\t-2.00\r\n",
        "\ufeffqid did rel\nq1 d1 +1\nq1 d2 0\n01 d1 -2\n",
        "q1\t0\t\td1\t1\nq1 0 d2\t0\n01 0 d1 -2\n",
    ],
)
@pytest.mark.parametrize("name", ["test.tsv", "qrels.txt"])
def test_qrels_are_told_apart_by_content(file, content, name):
    assert read_qrels(file(content, name)) == {"q1": {"d1": 1, "d2": 0}, "01": {"d1": -2}}


def test_qrels_ids_with_spaces_between_tabs(file):
    assert read_qrels(file("q 1\td\u00a01\t1\n")) == {"q 1": {"d\u00a01": 1}}


@pytest.mark.parametrize("grade", ["1_0", "0.5", "nan", "high", "1e1", "٣", "", "9" * 5000])
def test_grade_must_be_an_integer(file, grade):
    with pytest.raises(InputError, match="line 3"):
        read_qrels(file(f"q d0 1\n\nq d1 {grade}\n"))


def test_first_line_is_no_header_unless_its_names_say_so(file):
    with pytest.raises(InputError, match=r"line 1: the grade must be an integer, not '0\.5'"):
        read_qrels(file("q1 d1 0.5\nq1 d2 1\n"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q d 1\nq 0 d 1\n", "line 2: 4 columns, but 3"),
        ("q 0 d 1\n\nq d 1\n", "line 3: 3 columns, but 4"),
        ("q d\n", "line 1: judgements have 3 or 4 columns, not 2"),
        ("q d 1\nq e 1\nq d 2\n", "line 3: .* has grade 2, but 1 in line 1"),
        ("query-id corpus-id score\n", "holds no judgement"),
        ("", "holds no judgement"),
    ],
)
def test_qrels_errors(file, content, message):
    with pytest.raises(InputError, match=message):
        read_qrels(file(content))


def test_repeated_judgement_is_counted(file):
    report = ReadReport()
    assert read_qrels(file("q d 1\nq d 1.0\n"), report=report) == {"q": {"d": 1}}
    assert (report.records, report.duplicates) == (1, 1)


RUN = {"q1": {"a": 0.25, "b": 0.5, "c": 0.5, "é": float("-inf")}, "2": {"x": float("inf"), "y": 1e300}}


@pytest.mark.parametrize("write", [write_run, write_json_run])
def test_run_round_trip(tmp_path, write):
    write(tmp_path / "out", RUN)
    report = ReadReport()
    assert read_run(tmp_path / "out", report=report) == RUN
    assert report.records == 6


def test_trec_lines_with_tabs_and_spaces(file):
    """Two tabs do not make a line MS MARCO's, whose third column is a rank."""
    assert read_run(file("q0\tQ0 d0 1\t5.0 tag\nq0\tQ0 d1 2\t4 tag\n")) == {"q0": {"d0": 5.0, "d1": 4.0}}
    assert read_run(file("a b c\td e\t3\n")) == {"a b c": {"d e": -3.0}}


def test_run_of_ms_marco_has_ranks_for_scores(file):
    assert read_run(file("q1\td7\t1\nq1\td2\t2\n2\td7\t1\n")) == {
        "q1": {"d7": -1.0, "d2": -2.0}, "2": {"d7": -1.0},
    }  # fmt: skip
    for content, message in (
        ("q d 0.5\n", "line 1: the rank must be a whole number from 1, not '0.5'"),
        ("q d 0\n", "line 1: the rank must be a whole number"),
        ("q d 1\nq e 1\n", "two documents of query 'q' have the same rank: in three columns"),
        ("q d 1\nq d 2\n", "line 2: query 'q', document 'd' has another score in line 1"),
        ("q d 1\nq Q0 e 2 0.5 t\n", "line 2: a TREC run has 6 columns"),
    ):
        with pytest.raises(InputError, match=message):
            read_run(file(content))


def test_trec_lines_are_in_trec_evals_order(tmp_path):
    near: dict[str, Any] = {
        "a": 0.1,
        "b": float(np.nextafter(0.1, 0)),
        "10": 2.0,
        "9": 2.0,
        "é": 0.1,
        "z": np.float32(0.5),
    }
    write_run(tmp_path / "out", {"q": near}, tag="t")
    assert (tmp_path / "out").read_text().splitlines() == [
        "q Q0 9 1 2.0 t",
        "q Q0 10 2 2.0 t",
        "q Q0 z 3 0.5 t",
        "q Q0 é 4 0.1 t",
        f"q Q0 b 5 {near['b']!r} t",  # equal to a's score in float32
        "q Q0 a 6 0.1 t",
    ]


def test_json_run_is_valid_json(tmp_path):
    write_json_run(tmp_path / "out.json", RUN)

    def refuse(constant):
        raise AssertionError(constant)

    parsed = json.loads((tmp_path / "out.json").read_text(), parse_constant=refuse)
    assert list(parsed["q1"]) == ["c", "b", "a", "é"]
    assert parsed["2"]["x"] == float("inf")


@pytest.mark.parametrize("write", [write_run, write_json_run])
def test_nan_is_refused_and_nothing_is_written(tmp_path, write):
    with pytest.raises(InputError, match="query 'q', document 'd' is NaN"):
        write(tmp_path / "out", {"p": {"d": 1.0}, "q": {"d": float("nan")}})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("id", ["", "a b", "a\nb", "a\u2028b", "\ud83d"])
def test_trec_run_refuses_ids_that_it_cannot_hold(tmp_path, id):
    runs: list[dict[str, dict[str, float]]] = [{"q": {id: 1.0}}, {id: {"d": 1.0}}]
    for run in runs:
        with pytest.raises(InputError, match="cannot hold"):
            write_run(tmp_path / "out", run)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q Q0 d 1 nan t\n", "line 1: the score of query 'q', document 'd' is NaN"),
        ("q Q0 d 1 0.5 t\nq Q0 e 2 1_0 t\n", "line 2: the score must be a number, not '1_0'"),
        ("q Q0 d 1 x t\n", "line 1: the score must be a number"),
        ("q Q0 d 1 0.5\n", "line 1: a TREC run has 6 columns, not 5"),
        ("q Q0 d 1 0.5 t\n\nq Q0 d 2 0.4 t\n", "line 3: query 'q', document 'd' has another score in line 1"),
        ("", "holds no run"),
        ("{}", "holds no run"),
        ('{"q": {"d": NaN}}', "query 'q', document 'd' is NaN"),
        ('{"q": {"d": "1"}}', "query 'q', document 'd' must be a number"),
        ('{"q": {"d": true}}', "must be a number"),
        ('{"q": [1]}', "query 'q' must hold"),
        ('{"q": {"d": 1}, "q": {"d": 2}}', "'q' stands twice with different content"),
        ('{"q": {"d": 1, "d": 2}}', "'d' stands twice"),
        ('\n\n{"q":\n {"d": 1,}}', "line 4: broken JSON"),
        ('{"q": {"d": ' + "9" * 400 + "}}", "out of range"),
        ('{"q": {"d": ' + "9" * 5000 + "}}", "broken JSON"),
        ('{"q": {"\\ud83d": 1}}', "lone surrogate"),
    ],
)
def test_run_errors(file, content, message):
    with pytest.raises(InputError, match=message):
        read_run(file(content))


def test_repeated_run_entries_are_counted(file):
    report = ReadReport()
    assert read_run(file("q Q0 d 1 0.5 t\nq Q0 d 2 0.50 t\n"), report=report) == {"q": {"d": 0.5}}
    assert read_run(file('{"q": {"d": 0.5}, "q": {"d": 0.5}}'), report=report) == {"q": {"d": 0.5}}
    assert report.duplicates == 2


def test_tabs_and_odd_columns_in_trec_runs(file):
    assert read_run(file("\ufeffq\tQ0\td\t1\t-inf\tmy run\r\n")) == {"q": {"d": float("-inf")}}
