"""Pseudo queries that a decoder writes, each for one document of the corpus."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np
from etils import epath

from sgpt_jax.bm25 import Bm25
from sgpt_jax.decoder.generation import Sampling
from sgpt_jax.decoder.sharding import device_mesh
from sgpt_jax.errors import InputError
from sgpt_jax.families import read_config
from sgpt_jax.files.corpora import Document
from sgpt_jax.files.lines import write_json, write_jsonl
from sgpt_jax.folder.source import resolve
from sgpt_jax.generate import check_writer, generate, query_prompt
from sgpt_jax.load import load_parts, open_model, token_limit
from sgpt_jax.runtime.progress import progress
from sgpt_jax.text.encoder import TextEncoder

from .pseudo import PseudoQueries, checked
from .recipes import ITSELF, TrainConfig

KIND = "generated"
# One query for each document, so that it may be near the most probable one. A decoder of 135M parameters leaves the
# point at higher temperatures, and repeats itself at 0.
SAMPLING = Sampling(temperature=0.3, top_k=50, top_p=0.95)
NEW_TOKENS = 32
INSTRUCTION = "Write one short search query for this document."
# Queries of several kinds, since nobody said which kind will be asked: a question, a claim, key words.
EXAMPLES = (
    (
        "A heron stands still in the shallows for many minutes, until a fish or a frog comes within reach of its bill. "
        "Standing birds caught more than twice as many as those that walked.",
        "how do herons catch fish",
    ),
    (
        "We followed 412 bakers for six years. Those who worked at night had a higher blood pressure than their "
        "colleagues of the day shift, also when age and weight were taken into account.",
        "Night work raises blood pressure.",
    ),
    (
        "Wood glue holds after half an hour, but reaches its full strength only overnight. Clamps should stay on as "
        "long as that, and longer in the cold.",
        "wood glue drying time",
    ),
)
# A query is kept if BM25 finds its source among so many best: what a decoder made up leads elsewhere.
FOUND = 10
# Documents after which what was written for them is on disk.
_PART = 256


def generator_of(config: TrainConfig) -> str:
    """The source of the decoder that writes."""
    return config.model if config.generate in (None, ITSELF) else str(config.generate)


def check_generator(source: str) -> None:
    """Looks, before anything is written, whether the decoder can write.

    Raises:
        InputError: it cannot, or it is not there.
    """
    try:
        check_writer(read_config(open_model(resolve(source)).files.config))
    except InputError as problem:
        raise InputError(f"--generate: {source}: {problem}") from None


def settings(config: TrainConfig) -> dict[str, Any]:
    """What the queries depend on besides the corpus and the seed."""
    own: dict[str, Any] = {"source": generator_of(config), "instruction": INSTRUCTION, "examples": EXAMPLES}
    own |= {"sampling": dataclasses.asdict(SAMPLING), "new_tokens": NEW_TOKENS}
    return own | {name: getattr(config, name) for name in ("dtype", "weights", "max_seq_length")}


def generated(config: TrainConfig, folder: epath.Path, documents: list[Document]) -> PseudoQueries:
    """A query for each document that is drawn, if it passes the rules, and if BM25 finds its source by it.

    What the decoder wrote is on disk, first by parts in generated.partial, then whole in generated.jsonl: a start after
    an interruption writes the parts that are missing. The query of a document depends on the seed and its id alone.

    Raises:
        InputError: generated.jsonl is damaged.
    """
    draw = np.random.default_rng((config.seed, *KIND.encode()))
    full = [document for document in documents if document.text.strip()]
    # As many as are used at the most, with those that are held out.
    count = min(len(full), config.pseudo_queries + config.dev_queries)
    chosen = [full[number] for number in sorted(draw.permutation(len(full))[:count].tolist())]
    written = _written(config, folder, chosen)
    cut = [record["_id"] for record in written if not record["finished"]]
    texts = {record["_id"]: _cleaned(record["text"]) for record in written} | dict.fromkeys(cut, "")
    side = checked(
        KIND,
        {one.id: (texts[one.id], one.text) for one in chosen},
        "empty or not finished",
        others={one.id: one.text for one in full},
        known=[query for _, query in EXAMPLES],
    )
    index = Bm25(Document(id, text) for id, text in side.documents.items())
    queries = {id: text for id, text in side.queries.items() if id in index.candidates(text, FOUND)}
    missed = len(side.queries) - len(queries)
    return PseudoQueries(
        KIND, queries, side.documents, side.counts | {f"not among BM25's {FOUND} best": missed}
    )


def _cleaned(text: str) -> str:
    """What was written without what small decoders put around it: quotes, and the name of what was asked for."""
    label, _, rest = text.partition(":")
    if label.lower().strip("* ") in ("query", "search query", "relevant query"):
        text = rest
    return text.strip("\"'`*“” ")


def _written(config: TrainConfig, folder: epath.Path, documents: list[Document]) -> list[dict[str, Any]]:
    """What the decoder writes for each document: {"_id", "text", "log_prob", "finished"}."""
    whole, partial = folder / f"{KIND}.jsonl", folder / f"{KIND}.partial"
    if not whole.exists():
        partial.mkdir(exist_ok=True)
        parts = [documents[start : start + _PART] for start in range(0, len(documents), _PART)]
        files = [partial / f"{number:06d}.json" for number in range(len(parts))]
        left = [(part, file) for part, file in zip(parts, files, strict=True) if not file.exists()]
        if left:
            _write_parts(config, left)
        write_jsonl(whole, [record for file in files for record in json.loads(file.read_text())])
        partial.rmtree()
    try:
        # Not `splitlines`: a query may hold other characters that it takes for the end of a line.
        found = [json.loads(line) for line in whole.read_text("utf-8").split("\n") if line]
        if [record["_id"] for record in found] == [document.id for document in documents]:
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{whole}: damaged; remove it to have the queries written again")


def _write_parts(config: TrainConfig, parts: list[tuple[list[Document], epath.Path]]) -> None:
    mesh = device_mesh(config.mesh)
    loaded = load_parts(open_model(resolve(generator_of(config))), config.dtype, mesh, config.weights)
    text = TextEncoder(loaded.tokenizer, token_limit(loaded.decoder.config, None))
    prompt = query_prompt(loaded.tokenizer, EXAMPLES, INSTRUCTION)
    with progress("writing queries", "document", sum(len(part) for part, _ in parts)) as bar:
        for part, file in parts:
            found = generate(
                loaded.decoder,
                text,
                prompt,
                [document.text for document in part],
                sampling=SAMPLING,
                max_new_tokens=NEW_TOKENS,
                max_document_tokens=config.max_seq_length,
                seeds=[_seed(config.seed, document.id) for document in part],
                mesh=mesh,
                show_progress=False,
            )
            records = [
                {
                    "_id": document.id,
                    "text": one.text,
                    "log_prob": round(one.log_prob, 4),
                    "finished": one.finished,
                }
                for document, one in zip(part, found, strict=True)
            ]
            write_json(file, records)
            bar.update(len(part))


def _seed(seed: int, id: str) -> int:
    """A document's own."""
    digest = hashlib.blake2b(f"{seed}:{id}".encode("utf-8", "surrogatepass"), digest_size=4)
    return int.from_bytes(digest.digest(), "little")
