"""Re-ranking as a job that can be killed at any moment and goes on where it was.

Beside the output BASE lies the folder BASE.partial while the job is not finished: job.json says what the job is, and
each file of scores holds one part of its pairs. The parts are the same whenever the job is started, so that what comes
out is the same, bit for bit, however often it was interrupted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

from sgpt_jax.checkpoint.fingerprint import model_fingerprint
from sgpt_jax.cross_encoder import CrossEncoder
from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document
from sgpt_jax.files.lines import PathLike, atomic_write, write_json
from sgpt_jax.files.runs import check_trec_ids, write_json_run, write_run
from sgpt_jax.metrics import Run, cut
from sgpt_jax.reports import ScoreReport
from sgpt_jax.rerank import Pair, ordered_pairs, part_pairs, rerank, some, split_pairs, texts_of
from sgpt_jax.runtime.progress import Progress, progress


@dataclasses.dataclass
class RerankReport:
    """What a job did.

    Attributes:
        queries: queries in the result.
        pairs: pairs in the result.
        resumed: those of them that an earlier, interrupted start had scored.
        identical_ids_dropped: candidates that were the query itself.
        seconds: how long scoring took this time.
        scores: counts of all pairs, resumed ones included.
    """

    queries: int = 0
    pairs: int = 0
    resumed: int = 0
    identical_ids_dropped: int = 0
    seconds: float = 0.0
    scores: ScoreReport = dataclasses.field(default_factory=ScoreReport)

    @property
    def pairs_per_second(self) -> float:
        """The speed of this time's scoring; 0 when nothing was left to score."""
        return (self.pairs - self.resumed) / self.seconds if self.seconds else 0.0


def rerank_job(
    model: CrossEncoder,
    run: Run,
    queries: Mapping[str, str],
    documents: Iterable[Document],
    output: PathLike,
    *,
    depth: int = 100,
    ignore_identical_ids: bool = False,
    batch_tokens: int | None = None,
    show_progress: bool | None = None,
) -> RerankReport:
    """Scores the first documents of every query of a run, and writes BASE.trec and BASE.json, both whole or not at all.

    Documents beyond the depth are not part of the result, as in BEIR and the SGPT paper (depth 100). A job that was
    interrupted goes on when it is started again with the same arguments.

    Args:
        model: the cross-encoder.
        run: {query id: {document id: score}}, such as `read_run` gives. Ties rank as in trec_eval.
        queries: {id: text}; those that the run does not name are left out.
        documents: such as `read_corpus` gives; only those that are needed are kept.
        output: BASE; an ending .trec or .json is taken off.
        depth: candidates of a query that are scored.
        ignore_identical_ids: drop, before the cut, candidates whose id is the query's (ArguAna, Quora).
        batch_tokens: see `CrossEncoder.predict`.
        show_progress: None shows a bar on a terminal after a second.

    Raises:
        InputError: the run is empty or names queries or documents that are not there, an id cannot be in a TREC run, a
            score is NaN, or BASE.partial belongs to another job.
    """
    if depth < 1:
        raise InputError(f"depth must be positive, not {depth}")
    base = base_of(output)
    report = RerankReport()
    shallow, report.identical_ids_dropped = cut(run, depth, ignore_identical_ids=ignore_identical_ids)
    shallow = {query: hits for query, hits in shallow.items() if hits}
    texts = _check(shallow, queries, documents)
    pairs = ordered_pairs(shallow, texts)
    report.queries, report.pairs = len(shallow), len(pairs)
    folder = epath.Path(base + ".partial")
    parts = list(split_pairs(pairs, _open_job(folder, _describe(model, pairs, queries, texts))))
    stored = [_read_part(_part_file(folder, number), len(part)) for number, part in enumerate(parts)]
    report.resumed = sum(len(part) for part, found in zip(parts, stored, strict=True) if found)
    scored: dict[str, dict[str, float]] = {query: {} for query in shallow}
    start = time.perf_counter()
    with progress("re-ranking", "pair", len(pairs) - report.resumed, show=show_progress) as bar:
        for number, (part, found) in enumerate(zip(parts, stored, strict=True)):
            if found is None:
                found = _score(model, part, queries, texts, batch_tokens, bar)
                _write_part(_part_file(folder, number), *found)
            scores, counts = found
            report.scores.add(counts)
            for (query, document), score in zip(part, scores.tolist(), strict=True):
                scored[query][document] = score
    report.seconds = time.perf_counter() - start
    write_run(base + ".trec", scored)
    write_json_run(base + ".json", scored)
    folder.rmtree()
    if (warning := report.scores.warning()) is not None:
        warnings.warn(warning, stacklevel=2)
    return report


def base_of(output: PathLike) -> str:
    """BASE, of which an ending .trec or .json is taken off."""
    return re.sub(r"\.(trec|json)$", "", str(epath.Path(output)))


def _check(run: Run, queries: Mapping[str, str], documents: Iterable[Document]) -> dict[str, str]:
    """The texts of the run's documents; refuses at once what would fail after all the work.

    Raises:
        InputError: see `rerank_job`.
    """
    if not run:
        raise InputError("the run has no document to re-rank")
    check_trec_ids(run)
    if missing := [query for query in run if query not in queries]:
        raise InputError(f"the run has {some(missing, 'query', 'queries')} without a text")
    return texts_of(run, documents)


def _score(
    model: CrossEncoder,
    part: list[Pair],
    queries: Mapping[str, str],
    texts: Mapping[str, str],
    batch_tokens: int | None,
    bar: Progress,
) -> tuple[np.ndarray, ScoreReport]:
    """Scores of a part's pairs, float32 [n], and their counts."""
    counts = ScoreReport()
    run: dict[str, dict[str, float]] = {}
    for query, document in part:
        run.setdefault(query, {})[document] = 0.0
    scored = rerank(model, queries, run, texts, report=counts, batch_tokens=batch_tokens, show_progress=bar)
    return np.array([scored[query][document] for query, document in part], np.float32), counts


def _part_file(folder: epath.Path, number: int) -> epath.Path:
    return folder / f"{number:06d}.npz"


def _write_part(file: epath.Path, scores: np.ndarray, counts: ScoreReport) -> None:
    with atomic_write(file) as stream:
        np.savez(stream, scores=scores, counts=np.array(dataclasses.astuple(counts), np.int64))


def _read_part(file: epath.Path, pairs: int) -> tuple[np.ndarray, ScoreReport] | None:
    """A part's scores and counts, or None where it has to be computed, with a warning where it is damaged."""
    if not file.exists():
        return None
    try:
        with file.open("rb") as stream, np.load(stream) as stored:  # its zip format has checksums
            scores, counts = stored["scores"], stored["counts"]
        if (scores.shape, scores.dtype) == ((pairs,), np.float32):
            return scores, ScoreReport(*counts.tolist())
        reason = f"{scores.dtype}{list(scores.shape)} in place of float32[{pairs}]"
    except Exception as error:  # zipfile, zlib and NumPy have many for a file that is not as it was
        reason = str(error) or type(error).__name__
    warnings.warn(f"{file}: damaged, its {pairs} pairs are scored again ({reason})", stacklevel=3)
    return None


def _open_job(folder: epath.Path, description: dict[str, Any]) -> int:
    """Makes the job's folder, or checks that it is this job's. Returns the size of its parts."""
    file = folder / "job.json"
    if not file.exists():
        size = part_pairs()
        folder.mkdir(parents=True, exist_ok=True)
        job = description | {"part_pairs": size}
        write_json(file, job | {"digest": _digest(job)})
        return size
    try:
        found = json.loads(file.read_text())
        if found.pop("digest") != _digest(found):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{file}: damaged; remove {folder} to start again") from None
    if changed := [name for name, value in description.items() if found.get(name) != value]:
        raise InputError(
            f"{folder}: holds the scores of another job ({', '.join(changed)} changed); "
            "remove it, or choose another output"
        )
    return found["part_pairs"]


def _digest(job: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(job, sort_keys=True).encode(), digest_size=16).hexdigest()


def _describe(
    model: CrossEncoder, pairs: list[Pair], queries: Mapping[str, str], texts: Mapping[str, str]
) -> dict[str, Any]:
    """What scores depend on: two jobs with the same description have the same."""
    digest = hashlib.blake2b(digest_size=16)
    for pair in pairs:
        for id in pair:
            digest.update(f"{len(id)}:{id}".encode())
    asked, shown = (dict.fromkeys(ids) for ids in zip(*pairs, strict=True))
    for text in (*map(queries.__getitem__, asked), *map(texts.__getitem__, shown)):
        digest.update(f"{len(text)}:{text}".encode("utf-8", "surrogatepass"))
    return {
        "format": 1,
        **model.facts(),
        "max_seq_length": model.text.max_seq_length,
        "dtype": model.decoder.dtype.name,
        "model": model_fingerprint(model.decoder, {}, head=True),
        "data": digest.hexdigest(),
    }
