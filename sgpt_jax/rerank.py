"""Re-ranking a run with a cross-encoder: a job that can be killed at any moment and goes on where it was.

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
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from sgpt_jax.cross_encoder import CrossEncoder, NaNScoreError, ScoreReport
from sgpt_jax.decoder.model import split
from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document
from sgpt_jax.files.lines import PathLike, atomic_write, write_json
from sgpt_jax.files.runs import write_json_run, write_run

Run = Mapping[str, Mapping[str, float]]

# Pairs a part: about a minute's work on a CPU, several full batches on an accelerator.
PART_PAIRS = {"cpu": 512, "gpu": 8192, "tpu": 8192}


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


def rerank(
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
        run: {query id: {document id: score}}, such as `io.read_run` gives. Ties rank as in trec_eval.
        queries: {id: text}; those that the run does not name are left out.
        documents: such as `io.read_corpus` gives; only those that are needed are kept.
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
    base = re.sub(r"\.(trec|json)$", "", str(epath.Path(output)))
    report = RerankReport()
    candidates = _candidates(run, depth, ignore_identical_ids, report)
    _check_ids(candidates)
    if missing := [query for query in candidates if query not in queries]:
        raise InputError(f"the run has {_some(missing, 'query', 'queries')} without a text")
    wanted = {document for hits in candidates.values() for document in hits}
    texts = {document.id: document.text for document in documents if document.id in wanted}
    if missing := [document for document in dict.fromkeys(_flat(candidates)) if document not in texts]:
        raise InputError(
            f"the run has {_some(missing, 'document', 'documents')} that the corpus does not hold"
        )
    report.queries, report.pairs = len(candidates), sum(map(len, candidates.values()))

    # The longest first, so that what does not fit in memory shows at once; the queries of a document together.
    asking: dict[str, list[str]] = {}
    for query, hits in candidates.items():
        for document in hits:
            asking.setdefault(document, []).append(query)
    order = sorted(asking, key=lambda document: (-len(texts[document]), document))
    pairs = [(query, document) for document in order for query in asking[document]]
    folder = epath.Path(base + ".partial")
    parts = list(_parts(pairs, _open_job(folder, _describe(model, pairs, queries, texts))))
    stored = [_read_part(_part_file(folder, number), len(part)) for number, part in enumerate(parts)]
    report.resumed = sum(len(part) for part, found in zip(parts, stored, strict=True) if found)
    scored: dict[str, dict[str, float]] = {query: {} for query in candidates}
    start = time.perf_counter()
    with tqdm(
        total=len(pairs) - report.resumed,
        unit="pair",
        desc="re-ranking",
        delay=1,
        disable=None if show_progress is None else not show_progress,
    ) as bar:
        for number, (part, found) in enumerate(zip(parts, stored, strict=True)):
            if found is None:
                found = _score(model, part, queries, texts, batch_tokens)
                _write_part(_part_file(folder, number), *found)
                bar.update(len(part))
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


def _candidates(
    run: Run, depth: int, ignore_identical_ids: bool, report: RerankReport
) -> dict[str, list[str]]:
    """The document ids of every query that are to be scored, in trec_eval's order."""
    candidates = {}
    for query, scores in run.items():
        with np.errstate(over="ignore"):
            order = sorted(
                scores, key=lambda document: (np.float32(scores[document]), document), reverse=True
            )
        if ignore_identical_ids and query in scores:
            order.remove(query)
            report.identical_ids_dropped += 1
        if order:
            candidates[query] = order[:depth]
    if not candidates:
        raise InputError("the run has no document to re-rank")
    return candidates


def _flat(candidates: Mapping[str, list[str]]) -> Iterator[str]:
    return (document for hits in candidates.values() for document in hits)


def _check_ids(candidates: Mapping[str, list[str]]) -> None:
    """Refuses at once what `write_run` would refuse after all the work."""
    for id in (*candidates, *dict.fromkeys(_flat(candidates))):
        if id.split() != [id]:
            raise InputError(f"a TREC run cannot hold the id {id!r}: it is empty or has white space in it")


def _some(ids: list[str], one: str, many: str) -> str:
    shown = ", ".join(map(repr, ids[:5]))
    return f"{one} {shown}" if len(ids) == 1 else f"{len(ids)} {many}, such as {shown},"


def _parts(pairs: list[tuple[str, str]], size: int) -> Iterator[list[tuple[str, str]]]:
    """Cuts the pairs between documents, into parts of `size` pairs or somewhat more."""
    part: list[tuple[str, str]] = []
    for pair in pairs:
        if len(part) >= size and pair[1] != part[-1][1]:
            yield part
            part = []
        part.append(pair)
    yield part


def _score(
    model: CrossEncoder,
    part: list[tuple[str, str]],
    queries: Mapping[str, str],
    texts: Mapping[str, str],
    batch_tokens: int | None,
) -> tuple[np.ndarray, ScoreReport]:
    counts = ScoreReport()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # told once, at the end, from the counts
            scores = model.predict(
                [(queries[query], texts[document]) for query, document in part],
                batch_tokens=batch_tokens,
                show_progress=False,
                report=counts,
            )
    except NaNScoreError as error:
        query, document = part[error.index]
        raise InputError(f"the score of query {query!r}, document {document!r} is NaN") from None
    return scores, counts


def _part_file(folder: epath.Path, number: int) -> epath.Path:
    return folder / f"{number:06d}.npz"


def _write_part(file: epath.Path, scores: np.ndarray, counts: ScoreReport) -> None:
    with atomic_write(file) as stream:
        np.savez(stream, scores=scores, counts=np.array(dataclasses.astuple(counts), np.int64))


def _read_part(file: epath.Path, pairs: int) -> tuple[np.ndarray, ScoreReport] | None:
    """A part's scores and counts, or None where it has to be computed."""
    if not file.exists():
        return None
    with file.open("rb") as stream, np.load(stream) as stored:
        scores, counts = stored["scores"], stored["counts"]
    if scores.shape != (pairs,):
        raise InputError(f"{file}: does not belong to this job; remove its folder to start again")
    return scores, ScoreReport(*counts.tolist())


def _open_job(folder: epath.Path, description: dict[str, Any]) -> int:
    """Makes the job's folder, or checks that it is this job's. Returns the size of its parts."""
    file = folder / "job.json"
    if not file.exists():
        size = PART_PAIRS.get(jax.default_backend(), 8192)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, description | {"part_pairs": size})
        return size
    try:
        found = json.loads(file.read_text())
    except ValueError:
        found = {}
    if changed := [name for name, value in description.items() if found.get(name) != value]:
        raise InputError(
            f"{folder}: holds the scores of another job ({', '.join(changed)} changed); "
            "remove it, or choose another output"
        )
    return found["part_pairs"]


def _describe(
    model: CrossEncoder, pairs: list[tuple[str, str]], queries: Mapping[str, str], texts: Mapping[str, str]
) -> dict[str, Any]:
    """What scores depend on: two jobs with the same description have the same."""
    digest = hashlib.blake2b(digest_size=16)
    for query, document in pairs:
        for text in (query, document):
            digest.update(f"{len(text)}:{text}".encode())
    asked, shown = (dict.fromkeys(ids) for ids in zip(*pairs, strict=True))
    for text in (*map(queries.__getitem__, asked), *map(texts.__getitem__, shown)):
        digest.update(f"{len(text)}:{text}".encode("utf-8", "surrogatepass"))
    return {
        "format": 1,
        "prompt": dataclasses.asdict(model.prompt),
        "reduction": model.reduction,
        "max_seq_length": model.text.max_seq_length,
        "dtype": model.decoder.dtype.name,
        "model": _fingerprint(model),
        "data": digest.hexdigest(),
    }


def _fingerprint(model: CrossEncoder) -> str:
    """Tells models apart by their config and the first numbers of every weight."""
    _, params = split(model.decoder)
    digest = hashlib.blake2b(repr(model.decoder.config).encode(), digest_size=16)

    @jax.jit
    def first_numbers(params: Any) -> list[jax.Array]:
        return [leaf[(0,) * (leaf.ndim - 1)][:64] for leaf in jax.tree.leaves(params)]

    for numbers in first_numbers(params):
        digest.update(np.asarray(numbers).tobytes())
    return digest.hexdigest()
