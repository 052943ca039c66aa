"""Relevance judgements (qrels) and retrieval runs: reading, and writing in trec_eval's order."""

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sgpt_jax.errors import InputError
from sgpt_jax.files.hub_tables import is_table, read_rows
from sgpt_jax.files.lines import (
    PathLike,
    ReadReport,
    atomic_write,
    display_name,
    fix_surrogates,
    line_error,
    read_lines,
)
from sgpt_jax.metrics import rank

_TABLE = ("query-id", "corpus-id", "score")  # columns of judgements, as BEIR publishes them
_GRADE = re.compile(r"([+-]?[0-9]{1,18})(?:\.0+)?", re.ASCII)
_QUERY_HEADERS = {"queryid", "qid", "query", "topic", "topicid"}
_GRADE_HEADERS = {"score", "rel", "relevance", "label", "grade", "judgment", "judgement", "gain", "qrel"}


def read_qrels(
    path: PathLike, *, errors: str = "strict", report: ReadReport | None = None
) -> dict[str, dict[str, int]]:
    """Reads judgements as {query id: {document id: grade}}, in file order.

    Lines have three columns (query, document, grade; a header is recognised by its names) or the four of TREC (query,
    anything, document, grade), the same number in the whole file, separated by tabs or spaces. Ids may hold spaces
    where tabs separate. A Parquet file or a data set of the hub (see `hub_tables`) has the columns query-id, corpus-id
    and score. The same judgement twice is kept once and counted.

    Raises:
        InputError: mixed column counts, a grade that is no integer (``1.0`` is one), one document judged differently
            twice, or no judgement at all.
    """
    report = ReadReport() if report is None else report
    qrels: dict[str, dict[str, int]] = {}
    seen_lines: dict[tuple[str, str], int] = {}
    columns = 0
    for line, cells in _judgements(path, errors, report):
        if not columns:
            columns = len(cells)
            if columns not in (3, 4):
                raise line_error(path, line, f"judgements have 3 or 4 columns, not {columns}")
            if _is_header(cells):
                continue
        if len(cells) != columns:
            raise line_error(path, line, f"{len(cells)} columns, but {columns} in the lines before")
        query, document = cells[0], cells[-2]
        grade = _GRADE.fullmatch(cells[-1])
        if grade is None:
            raise line_error(path, line, f"the grade must be an integer, not {cells[-1]!r}")
        value = int(grade.group(1))
        first = seen_lines.setdefault((query, document), line)
        if first == line:
            qrels.setdefault(query, {})[document] = value
            report.records += 1
        elif qrels[query][document] == value:
            report.duplicates += 1
        else:
            other = qrels[query][document]
            message = f"query {query!r}, document {document!r} has grade {value}, but {other} in line {first}"
            raise line_error(path, line, message)
    if not qrels:
        raise InputError(f"{display_name(path)}: holds no judgement")
    return qrels


def _judgements(path: PathLike, errors: str, report: ReadReport) -> Iterator[tuple[int, list[str]]]:
    """Lines of judgements, cut into their cells."""
    if not is_table(path):
        for line, text in read_lines(path, errors=errors, report=report):
            yield line, _split(text, (3, 4))
        return
    for line, row in read_rows(path):
        missing = [name for name in _TABLE if name not in row]
        if missing:
            raise line_error(path, line, f"the judgements have no column {missing[0]!r}: {', '.join(row)}")
        yield line, [str(row[name]) for name in _TABLE]


def read_run(
    path: PathLike, *, errors: str = "strict", report: ReadReport | None = None
) -> dict[str, dict[str, float]]:
    """Reads a run as {query id: {document id: score}}, in file order.

    A file that begins with ``{`` is JSON {query: {document: score}}. Any other has TREC's six columns (query, anything,
    document, rank, score, tag), where the rank is not used, or MS MARCO's three (query, document, rank from 1), where
    the score is the rank with a minus before it. The same entry twice is kept once and counted.

    Raises:
        InputError: broken JSON, a wrong number of columns, a score that is no number or NaN (infinities are legal), a
            rank that is no whole number or given twice, one document with two scores, or an empty run.
    """
    report = ReadReport() if report is None else report
    lines = read_lines(path, errors=errors, report=report)
    first = next(lines, None)
    if first is None:
        raise InputError(f"{display_name(path)}: holds no run")
    lines = itertools.chain([first], lines)
    if first[1].lstrip().startswith("{"):
        run = _read_json_run(path, lines, report)
    else:
        run = _read_columns(path, lines, report)
    if not run:
        raise InputError(f"{display_name(path)}: holds no run")
    return run


def write_run(path: PathLike, run: Mapping[str, Mapping[str, float]], *, tag: str = "sgpt-jax") -> None:
    """Writes a run with TREC's six columns, atomically, in trec_eval's order, with ranks from 1.

    Raises:
        InputError: a NaN score, or an id that is empty or holds white space, which this format cannot express.
    """
    with atomic_write(path) as stream:
        stream.writelines(trec_lines(run, tag=tag))


def trec_lines(run: Mapping[str, Mapping[str, float]], *, tag: str = "sgpt-jax") -> Iterator[bytes]:
    """The lines that `write_run` writes, with its errors."""
    check_trec_ids(run)
    for query, scores in run.items():
        for number, (document, score) in enumerate(rank(scores, query=query).items(), 1):
            yield f"{query} Q0 {document} {number} {float(score)!r} {tag}\n".encode()


def write_json_run(path: PathLike, run: Mapping[str, Mapping[str, float]]) -> None:
    """Writes a run as JSON {query: {document: score}}, atomically, documents in trec_eval's order.

    JSON has no infinity: it is written as ``1e999``, a valid number that every reader of doubles turns back into
    infinity.

    Raises:
        InputError: a NaN score, or an id with a lone surrogate.
    """
    with atomic_write(path) as stream:
        stream.write(b"{")
        for number, (query, scores) in enumerate(run.items()):
            entries = ", ".join(
                f"{_json_id(document)}: {_json_number(float(score))}"
                for document, score in rank(scores, query=query).items()
            )
            separator = "," if number else ""
            stream.write(f"{separator}\n{_json_id(query)}: {{{entries}}}".encode())
        stream.write(b"\n}\n")


def _json_id(id: str) -> str:
    if fix_surrogates(id) != id:
        raise InputError(f"the id {id!r} holds half a character (a lone surrogate)")
    return json.dumps(id, ensure_ascii=False)


def _json_number(score: float) -> str:
    return ("1e999" if score > 0 else "-1e999") if math.isinf(score) else repr(score)


def check_trec_ids(run: Mapping[str, Iterable[str]]) -> None:
    """Raises InputError when the columns of a TREC run cannot hold one of its ids."""
    documents = dict.fromkeys(id for hits in run.values() for id in hits)
    for kind, ids in (("query", run), ("document", documents)):
        for id in ids:
            if not id or id.split() != [id] or fix_surrogates(id) != id:
                message = f"a TREC run cannot hold the {kind} id {id!r}: it is empty or has white space in it"
                raise InputError(message)


def _split(text: str, counts: tuple[int, ...]) -> list[str]:
    """Cells between tabs where that gives an expected count of full cells, else between runs of tabs and spaces."""
    if "\t" in text:
        cells = [cell.strip(" \r") for cell in text.split("\t")]
        if len(cells) in counts and all(cells):
            return cells
    return re.split("[ \t]+", text.strip(" \t\r"))


def _is_header(cells: list[str]) -> bool:
    first = re.sub("[-_ ]", "", cells[0].lower())
    return _GRADE.fullmatch(cells[-1]) is None and (
        first in _QUERY_HEADERS or cells[-1].lower() in _GRADE_HEADERS
    )


def _read_columns(
    path: PathLike, lines: Iterator[tuple[int, str]], report: ReadReport
) -> dict[str, dict[str, float]]:
    """A run of six columns (TREC), or of three with ranks for scores (MS MARCO)."""
    run: dict[str, dict[str, float]] = {}
    seen_lines: dict[tuple[str, str], int] = {}
    columns = 0
    for line, text in lines:
        cells = _split(text, (6, 3))
        if len(cells) == 3 and not cells[2].isdigit():  # no rank: perhaps TREC's six, between tabs and spaces
            spaced = _split(text.replace("\t", " "), (6,))
            cells = spaced if len(spaced) == 6 else cells
        columns = columns or len(cells)
        if len(cells) != columns or columns not in (3, 6):
            message = f"a TREC run has 6 columns, not {len(cells)} (MS MARCO's has 3: query, document, rank)"
            raise line_error(path, line, message)
        if columns == 6:
            query, document, score = cells[0], cells[2], _score(path, line, cells[4])
        else:
            query, document, score = cells[0], cells[1], -float(_rank(path, line, cells[2]))
        if math.isnan(score):
            raise line_error(path, line, f"the score of query {query!r}, document {document!r} is NaN")
        first = seen_lines.setdefault((query, document), line)
        if first == line:
            run.setdefault(query, {})[document] = score
            report.records += 1
        elif run[query][document] == score:
            report.duplicates += 1
        else:
            message = f"query {query!r}, document {document!r} has another score in line {first}"
            raise line_error(path, line, message)
    if columns == 3:
        for query, scores in run.items():
            if len(set(scores.values())) < len(scores):
                raise InputError(
                    f"{display_name(path)}: two documents of query {query!r} have the same rank: in three columns the "
                    "third is a rank; a run with scores has TREC's six"
                )
    return run


def _score(path: PathLike, line: int, text: str) -> float:
    try:
        score = float(text)
    except ValueError:
        score = None
    if score is None or "_" in text or not text.isascii():
        raise line_error(path, line, f"the score must be a number, not {text!r}")
    return score


def _rank(path: PathLike, line: int, text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text, re.ASCII) or int(text) < 1:
        raise line_error(path, line, f"the rank must be a whole number from 1, not {text!r}")
    return int(text)


def _read_json_run(
    path: PathLike, lines: Iterator[tuple[int, str]], report: ReadReport
) -> dict[str, dict[str, float]]:
    texts: list[str] = []
    for line, text in lines:
        texts.extend([""] * (line - 1 - len(texts)))  # blank lines again, so that JSON's lines are the file's
        texts.append(text)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key not in table:
                table[key] = value
            elif table[key] == value:
                report.duplicates += 1
            else:
                raise InputError(f"{display_name(path)}: {key!r} stands twice with different content")
        return table

    try:
        value = json.loads("\n".join(texts), strict=False, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise line_error(path, error.lineno, f"broken JSON: {error.msg}, column {error.colno}") from None
    except InputError:
        raise
    except ValueError as error:  # an integer with thousands of digits
        raise InputError(f"{display_name(path)}: broken JSON: {error}") from None
    except RecursionError:
        raise InputError(f"{display_name(path)}: JSON nested too deeply") from None
    run: dict[str, dict[str, float]] = {}
    for query, scores in value.items():
        if not isinstance(scores, dict):
            raise InputError(f"{display_name(path)}: query {query!r} must hold {{document: score}}")
        for id in (query, *scores):
            if not id or fix_surrogates(id) != id:
                raise InputError(f"{display_name(path)}: the id {id!r} is empty or holds a lone surrogate")
        for document, score in scores.items():
            which = f"{display_name(path)}: the score of query {query!r}, document {document!r}"
            if isinstance(score, bool) or not isinstance(score, int | float):
                raise InputError(f"{which} must be a number, not {score!r}")
            try:
                scores[document] = float(score)
            except OverflowError:
                raise InputError(f"{which} is out of range") from None
            if math.isnan(score):
                raise InputError(f"{which} is NaN")
        run[query] = scores
        report.records += len(scores)
    return run
