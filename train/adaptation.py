"""Training data from a corpus without labels: what `python -m train adapt` does before the first step.

Under OUT/adapt, and each stage is passed over when its file is there already: generated.jsonl (with --generate, what a
decoder wrote; generated.partial while it writes), KIND.queries.jsonl (the pseudo queries), KIND.lists.json (their
candidates, found by BM25, in the order of training), KIND.dev.json (what is held out), KIND.teacher.json (the teacher's
scores; KIND.teacher.partial while they are being made), and, made anew at every start, examples.jsonl and counts.json,
which tells what every filter kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from sgpt_jax.bm25 import Bm25
from sgpt_jax.cross_encoder import CrossEncoder
from sgpt_jax.decoder.sharding import device_mesh
from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document, read_corpus, read_texts
from sgpt_jax.files.lines import write_json, write_jsonl
from sgpt_jax.files.runs import read_run, write_json_run
from sgpt_jax.metrics import Run
from sgpt_jax.rerank_job import rerank_job

from .data import Example, examples_digest, text_key, texts_digest
from .dev import HeldOut, PseudoEvaluator
from .generated import KIND as GENERATED
from .generated import check_generator, generated, generator_of, settings
from .pseudo import KINDS, PseudoQueries, given, make
from .recipes import NO_TEACHER, TrainConfig
from .teaching import group, mean_entropy, source_ranks, temperature

FOLDER = "adapt"
# Documents that a real query, of which nobody knows a source, brings into its group: the best of BM25.
_HITS = 2
# A held-out query counts as found by BM25 when its source is among so many best.
_FOUND = 10
# How near the mean entropy of the teacher's lists comes to the one that is asked for, where it can be had.
_NEAR = 1e-3


class _Record(NamedTuple):
    """An example by ids: its documents, the positive first, and the teacher's scores of them, or None."""

    kind: str
    query: str
    documents: list[str]
    scores: list[float] | None


class AdaptationExamples:
    """The examples of an adaptation, whose texts are held once: an `ExampleSource`, the same in every epoch."""

    def __init__(self, sides: Mapping[str, PseudoQueries], records: list[_Record]):
        self._sides, self._records = sides, records
        self.negatives = max((len(record.documents) - 1 for record in records), default=0)

    def __len__(self) -> int:
        return len(self._records)

    def get(self, index: int, epoch: int) -> Example:
        record = self._records[index]
        side = self._sides[record.kind]
        positive, *negatives = (side.documents[id] for id in record.documents)
        scores = None if record.scores is None else tuple(record.scores)
        return Example(side.queries[record.query], positive, tuple(negatives), scores)

    def keys(self, index: int, epoch: int) -> tuple[int, ...]:
        example = self.get(index, epoch)
        return text_key(example.query), text_key(example.positive)

    def digest(self) -> str:
        return examples_digest(self.get(index, 0) for index in range(len(self)))


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """What training needs: the examples, the held-out queries (None without any), and what to tell the user."""

    examples: AdaptationExamples
    evaluator: PseudoEvaluator | None
    notes: list[str]


def adaptation(config: TrainConfig) -> Adaptation:
    """Runs the stages that are left, each of which can be killed and goes on where it was.

    Raises:
        InputError: an option or a file does not fit, no query is left, or OUT/adapt holds other stages.
    """
    check_adaptation(config)
    documents = list(read_corpus(config.corpus))
    real = list(read_texts(config.queries)) if config.queries else []
    sides = {kind: make(kind, documents, config.seed) for kind in config.pseudo}
    if config.queries:
        sides["query"] = given({str(number): text for number, text in enumerate(real, 1)}, documents)
    if config.generate is not None:
        check_generator(generator_of(config))
    elif not any(side.queries for side in sides.values()):
        counts_of = {kind: side.counts for kind, side in sides.items()}
        raise InputError(f"{config.corpus}: no query is left ({_sentence(counts_of)})")
    folder = epath.Path(config.output) / FOLDER
    _open(folder, _describe(config, documents, real))
    if config.generate is not None:
        sides[GENERATED] = generated(config, folder, documents)
    lists: dict[str, dict[str, dict[str, float]]] = {}
    held_out: dict[str, HeldOut] = {}
    counts: dict[str, dict[str, int | float]] = {}
    for kind, side in sides.items():
        held, lists[kind] = _candidates(config, folder, side)
        counts[kind] = {**side.counts, "left": len(side.queries), "drawn": len(lists[kind])}
        if held is not None:
            held_out[kind] = held
            counts[kind] |= {"held out": len(held.queries), "of these found by BM25": len(held.found)}
    if not any(lists.values()):
        raise InputError(f"{config.corpus}: no query is left ({_sentence(counts)})")
    scores = _teach(config, folder, sides, lists)
    records = []
    notes = []
    for kind in sides:
        if lists[kind]:
            more, note = _records(config, sides[kind], lists[kind], scores.get(kind), counts[kind])
            records += more
            notes += note
    records = _shuffled(records, config)
    write_jsonl(folder / "examples.jsonl", [record._asdict() for record in records])
    write_json(folder / "counts.json", counts)
    evaluator = PseudoEvaluator(held_out) if held_out else None
    return Adaptation(AdaptationExamples(sides, records), evaluator, [_sentence(counts), *notes])


def check_adaptation(config: TrainConfig) -> None:
    """Refuses options that make no sense together.

    Raises:
        InputError: naming the option.
    """
    if jax.process_count() > 1:
        raise InputError("adapt runs in one process, on all the devices that it sees (--mesh)")
    for kind in config.pseudo:
        if kind not in KINDS:
            raise InputError(f"--pseudo {kind}: the kinds are {', '.join(KINDS)}")
    if not config.pseudo and not config.queries and config.generate is None:
        raise InputError(
            "no queries: name kinds of pseudo queries (--pseudo), a file of real ones (--queries), or --generate"
        )
    if not 0 < config.entropy < np.log(config.group_size):
        raise InputError(
            f"--entropy {config.entropy:g}: of {config.group_size} candidates it is between 0 and the logarithm of "
            "their number"
        )
    if config.teacher == NO_TEACHER and config.queries:
        raise InputError("--queries needs a teacher: nobody else knows which documents they ask for")


def _describe(config: TrainConfig, documents: list[Document], real: Iterable[str]) -> dict[str, Any]:
    """What the stages depend on."""
    parts = (part for document in documents for part in (document.id, document.title, document.text))
    asked = hashlib.blake2b("\n".join(real).encode("utf-8", "surrogatepass"), digest_size=16)
    options = ("pseudo", "pseudo_queries", "group_size", "dev_queries", "dev_documents", "seed")
    described: dict[str, Any] = {"corpus": texts_digest(parts), "queries": asked.hexdigest()}
    described |= {name: getattr(config, name) for name in options}
    teacher = {"source": config.teacher or config.model}
    if config.generate is not None:
        described["generator"] = settings(config)
    if config.teacher != NO_TEACHER:
        teacher |= {name: getattr(config, name) for name in ("dtype", "weights", "max_seq_length")}
    return json.loads(json.dumps(described | {"teacher": teacher}))


def _open(folder: epath.Path, description: dict[str, Any]) -> None:
    """Makes the folder of the stages, or checks that those in it are these."""
    file = folder / "job.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, description)
        return
    try:
        found = json.loads(file.read_text())
        names = dict.fromkeys([*description, *found])
        changed = [name for name in names if found.get(name) != description.get(name)]
    except (ValueError, AttributeError):
        raise InputError(f"{file}: damaged; remove {folder} to start again") from None
    if changed:
        raise InputError(
            f"{folder}: holds another adaptation ({', '.join(changed)} changed); remove it, or choose another --output"
        )


def _candidates(
    config: TrainConfig, folder: epath.Path, side: PseudoQueries
) -> tuple[HeldOut | None, dict[str, dict[str, float]]]:
    """What is held out of a kind, and the candidates of the other queries, {query: {document: 0}}, group by group."""
    dev, file = folder / f"{side.kind}.dev.json", folder / f"{side.kind}.lists.json"
    if not file.exists():
        write_jsonl(
            folder / f"{side.kind}.queries.jsonl",
            [{"_id": id, "text": text} for id, text in side.queries.items()],
        )
        draw = np.random.default_rng((config.seed, *side.kind.encode()))
        index = Bm25(Document(id, text) for id, text in side.documents.items())
        ids = list(side.queries)
        order = [ids[number] for number in draw.permutation(len(ids)).tolist()]
        held = order[: min(config.dev_queries, len(order) // 10)] if side.have_sources else []
        if held:
            write_json(dev, _hold_out(config, side, held, index, draw))
        drawn = {id: side.queries[id] for id in order[len(held) :][: config.pseudo_queries]}
        lists = _lists(config, drawn, index, draw, side.have_sources)
        write_json_run(file, {query: dict.fromkeys(found, 0.0) for query, found in lists.items()})
    held_out = None
    if dev.exists():
        stored = json.loads(dev.read_text())
        held_out = HeldOut(
            {id: side.queries[id] for id in stored["queries"]},
            [Document(id, side.documents[id]) for id in stored["documents"]],
            frozenset(stored["found"]),
        )
    return held_out, json.loads(file.read_text())


def _hold_out(
    config: TrainConfig, side: PseudoQueries, held: list[str], index: Bm25, draw: np.random.Generator
) -> dict[str, list[str]]:
    """The ids of the held-out queries, of those that BM25 finds, and of the documents that are searched for them.

    These are the sources, the best of BM25 for each query, and others drawn from all, up to the number asked for.
    """
    found, pool = [], dict.fromkeys(held)
    for id in held:
        hits = index.candidates(side.queries[id], _FOUND)
        pool |= dict.fromkeys(hits)
        found += [id] * (id in hits)
    others = [id for id in side.documents if id not in pool]
    missing = max(0, min(config.dev_documents - len(pool), len(others)))
    chosen = (
        [others[number] for number in draw.choice(len(others), missing, replace=False)] if missing else []
    )
    return {"queries": held, "found": found, "documents": [*pool, *chosen]}


def _lists(
    config: TrainConfig, queries: dict[str, str], index: Bm25, draw: np.random.Generator, have_sources: bool
) -> dict[str, list[str]]:
    """The candidates of every query: the documents of its group."""
    if have_sources:
        groups = group(queries, index, config.group_size, draw)
        return {query: members for members in groups for query in members}
    # Real queries are grouped by their own words, and bring the best documents of each.
    alike = Bm25(Document(id, text) for id, text in queries.items())
    lists: dict[str, list[str]] = {}
    for members in group(queries, alike, config.group_size, draw):
        pool = dict.fromkeys(hit for query in members for hit in index.candidates(queries[query], _HITS))
        lists |= {query: list(pool) for query in members if pool}
    return lists


def _teach(
    config: TrainConfig, folder: epath.Path, sides: Mapping[str, PseudoQueries], lists: Mapping[str, Run]
) -> dict[str, Run]:
    """The teacher's scores of all lists, by kind; none at all without a teacher."""
    if config.teacher == NO_TEACHER:
        return {}
    files = {kind: folder / f"{kind}.teacher.json" for kind in sides if lists[kind]}
    if not all(file.exists() for file in files.values()):
        teacher = CrossEncoder.from_pretrained(
            config.teacher or config.model,
            dtype=config.dtype,
            weights=config.weights,
            mesh=device_mesh(config.mesh),
        )
        for kind, file in files.items():
            if not file.exists():
                needed = {document for found in lists[kind].values() for document in found}
                texts = {id: sides[kind].documents[id] for id in needed}
                shown = _cut(teacher, texts, config.max_seq_length)
                depth = max(map(len, lists[kind].values()))
                rerank_job(teacher, lists[kind], sides[kind].queries, shown, file, depth=depth)
    return {kind: read_run(file) for kind, file in files.items()}


def _cut(teacher: CrossEncoder, texts: Mapping[str, str], length: int) -> list[Document]:
    """The documents as far as the student reads them: their first `length` tokens."""
    encodings = teacher.text.tokenizer.backend_tokenizer.encode_batch(
        list(texts.values()), add_special_tokens=False
    )
    return [
        Document(id, text[: tokens.offsets[length - 1][1]] if len(tokens) > length else text)
        for (id, text), tokens in zip(texts.items(), encodings, strict=True)
    ]


def _records(
    config: TrainConfig,
    side: PseudoQueries,
    lists: Run,
    scores: Run | None,
    counts: dict[str, int | float],
) -> tuple[list[_Record], list[str]]:
    """The examples of a kind, in the order of the lists: those whose source the teacher puts near the top; notes."""
    if scores is None:
        return [
            _Record(side.kind, query, [query, *(id for id in found if id != query)], None)
            for query, found in lists.items()
        ], []
    kept = list(lists)
    if side.have_sources:
        ranks = source_ranks({query: scores[query] for query in kept})
        kept = [query for query in kept if ranks[query] <= config.keep_rank]
        counts["the teacher's best"] = sum(rank == 1 for rank in ranks.values())
        counts[f"within the teacher's {config.keep_rank} best"] = len(kept)
    values = [list(scores[query].values()) for query in kept]
    degrees = temperature(values, config.entropy)
    counts["temperature"] = round(degrees, 4)
    reached, notes = mean_entropy(values, degrees), []
    if abs(reached - config.entropy) > _NEAR:
        notes = [
            f"{side.kind}: the teacher's lists are too short, or its scores too much alike, for --entropy "
            f"{config.entropy:g}: the mean is {reached:.3f}, at a temperature of {degrees:g}"
        ]
    records = []
    for query in kept:
        best = sorted(scores[query], key=lambda id: (-scores[query][id], id))
        positive = query if side.have_sources else best[0]
        ids = [positive, *(id for id in best if id != positive)]
        records.append(_Record(side.kind, query, ids, [round(scores[query][id] / degrees, 5) for id in ids]))
    return records, notes


def _shuffled(records: list[_Record], config: TrainConfig) -> list[_Record]:
    """The groups in random order, so that kinds mix; the records of a group, which share documents, stay together.

    Groups that a filter took a query from come last: behind one of them batches no longer end where groups do, and the
    documents of a group that two batches share are encoded twice.
    """
    groups: dict[tuple[str, ...], list[_Record]] = {}
    for record in records:
        groups.setdefault((record.kind, *sorted(record.documents)), []).append(record)
    several = list(groups.values())
    order = np.random.default_rng((config.seed, 1)).permutation(len(several)).tolist()
    order.sort(key=lambda number: len(several[number]) != config.group_size)
    return [record for number in order for record in several[number]]


def _sentence(counts: Mapping[str, Mapping[str, int | float]]) -> str:
    """The counts in one line."""
    return "; ".join(
        f"{kind}: " + ", ".join(f"{name} {value:,}" for name, value in some.items())
        for kind, some in counts.items()
    )
