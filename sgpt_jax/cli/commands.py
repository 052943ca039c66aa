"""What the subcommands of `sgpt` do. `cli.py` has their options."""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from sgpt_jax import rerank as reranking
from sgpt_jax.bi_encoder import BiEncoder, EncodeReport
from sgpt_jax.checkpoint.export import count_parameters
from sgpt_jax.checkpoint.tensors import open_checkpoint
from sgpt_jax.cli import demo as demonstration
from sgpt_jax.cross_encoder import CrossEncoder
from sgpt_jax.decoder.config import compute_dtype
from sgpt_jax.decoder.model import abstract_decoder
from sgpt_jax.decoder.sharding import device_mesh
from sgpt_jax.errors import InputError
from sgpt_jax.families import read_config
from sgpt_jax.files.corpora import read_corpus, read_queries, read_texts
from sgpt_jax.files.lines import ReadReport
from sgpt_jax.files.runs import read_run, write_run
from sgpt_jax.folder.settings import read_settings
from sgpt_jax.folder.source import resolve
from sgpt_jax.index.build import build_index
from sgpt_jax.index.export import export_index
from sgpt_jax.index.files import MANIFEST
from sgpt_jax.index.search import Index
from sgpt_jax.runtime import processes

EMBED_CHUNK = 4096


def _reading(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "format": options.format,
        "errors": options.encoding_errors,
        "skip_bad_lines": options.skip_bad_lines,
        "report": ReadReport(),
    }


def _load(settings: dict[str, Any], mesh: str | None) -> BiEncoder:
    return BiEncoder.from_pretrained(
        settings["model"],
        **{name: settings[name] for name in ("pooling", "brackets", "max_seq_length", "dtype", "biases")},
        mesh=device_mesh(mesh),
    )


def demo(options: argparse.Namespace) -> None:
    demonstration.run(options.model, options.query, device_mesh(options.mesh))


def embed(options: argparse.Namespace) -> None:
    model = _load(vars(options), options.mesh)
    reading = _reading(options)
    encode = {None: model.encode, "query": model.encode_query, "document": model.encode_document}[
        options.side
    ]
    part = f"{options.output}.part"
    count = 0
    try:
        with open(part, "wb") as stream, _bar("embedding", "text") as bar:
            for chunk in _chunks(read_texts(options.input, **reading), EMBED_CHUNK):
                stream.write(encode(chunk, normalize=options.normalize, show_progress=False).tobytes())
                count += len(chunk)
                bar.update(len(chunk))
        _finish_npy(part, options.output, (count, model.dimension))
    finally:
        if os.path.exists(part):
            os.remove(part)
    print(f"{count} vectors of {model.dimension} numbers: {options.output} ({reading['report']})")


def _finish_npy(part: str, output: str, shape: tuple[int, int]) -> None:
    """Makes a .npy file of raw float32 rows, under its name only when it is whole."""
    whole = f"{output}.tmp"
    with open(whole, "wb") as target, open(part, "rb") as source:
        np.lib.format.write_array_header_1_0(target, {"descr": "<f4", "fortran_order": False, "shape": shape})
        while block := source.read(1 << 24):
            target.write(block)
    os.replace(whole, output)


def _chunks(items: Iterator[str], size: int) -> Iterator[list[str]]:
    chunk: list[str] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _bar(description: str, unit: str, total: int | None = None) -> tqdm:
    return tqdm(desc=description, unit=unit, total=total, delay=1, disable=None)


def index(options: argparse.Namespace) -> None:
    model = _load(vars(options), options.mesh)
    # What the vectors depend on; a build that goes on must have the same.
    metadata = {
        "model": _absolute(options.model),
        "pooling": model.pooling,
        "brackets": model.text.brackets,
        "max_seq_length": model.text.max_seq_length,
        "dtype": options.dtype,
        "biases": options.biases and _absolute(options.biases),
    }
    reading = _reading(options)
    report = EncodeReport()
    with _bar("indexing", "doc") as bar:

        def progress(rows: int) -> None:
            bar.update(rows - bar.n)

        index = build_index(
            options.output,
            read_corpus(options.corpus, **reading),
            encode_chunks=lambda chunks: model.encode_chunks(chunks, side="document", report=report),
            dtype=options.store,
            chunk_size=options.chunk_size,
            store_texts=not options.no_texts,
            metadata=metadata,
            on_progress=progress,
        )
    work = _work(report)
    if not processes.first():
        return
    print(
        f"{options.output}: {len(index)} documents, {index.info()['bytes'] / 1e6:.1f} MB ({reading['report']})"
    )
    print(work)


def _work(report: EncodeReport) -> str:
    """What encoding took, of all processes together."""
    numbers = [report.texts, report.tokens, report.seconds, report.waited, peak_memory(), report.cut]
    columns = list(zip(*processes.gather(numbers), strict=True))
    texts, tokens, waited = sum(columns[0]), sum(columns[1]), sum(columns[3])
    seconds = max(columns[2])
    if not texts:
        return "nothing was left to encode"
    cut = f", {sum(columns[5])} of them cut as they were too long" if sum(columns[5]) else ""
    several = f", {processes.count()} processes" if processes.count() > 1 else ""
    return (
        f"{texts} encoded{cut} in {seconds:.1f} s{several}: {texts / seconds:,.0f} documents/s, "
        f"{tokens / seconds:,.0f} tokens/s; {waited / sum(columns[2]):.1%} of the time "
        f"spent waiting for the tokenizer; peak memory {max(columns[4]) / 1e6:,.0f} MB"
    )


def peak_memory() -> int:
    """The most bytes of memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _absolute(source: str) -> str:
    return os.path.abspath(source) if os.path.exists(source) else source


def search(options: argparse.Namespace) -> None:
    if (options.query is None) == (options.queries is None):
        raise InputError("give either a query or --queries FILE")
    k = options.k or min(10, options.rerank or 10)
    if 0 < options.rerank < k:
        raise InputError(f"-k {k} asks for more documents than --rerank {options.rerank} scores")
    index = Index.open(options.index)
    reading = _reading(options)
    queries = (
        {"query": options.query} if options.queries is None else read_queries(options.queries, **reading)
    )
    settings = dict(index.metadata)
    settings["model"] = options.model or settings["model"]
    settings["dtype"] = options.dtype or settings["dtype"]
    model = _load(settings, options.mesh)
    vectors = model.encode_query(list(queries.values()))
    scores, rows = index.search(vectors, max(k, options.rerank))
    run = {
        query: dict(zip(index.ids(found), map(float, values), strict=True))
        for query, found, values in zip(queries, rows, scores, strict=True)
    }
    places = {
        query: dict(zip(run[query], found, strict=True)) for query, found in zip(queries, rows, strict=True)
    }
    if options.rerank:
        run = _reranked(options, index, settings, queries, run, places)
    run = {query: dict(list(hits.items())[:k]) for query, hits in run.items()}
    if options.output:
        write_run(options.output, run)
        return
    for query, text in queries.items():
        found = [places[query][id] for id in run[query]]
        texts = index.texts(found) if index.manifest.store_texts else [""] * len(found)
        hits = [(id, score, content) for (id, score), content in zip(run[query].items(), texts, strict=True)]
        if options.json:
            print(json.dumps({"_id": query, "query": text, "hits": [
                {"_id": id, "score": score, "text": content} for id, score, content in hits
            ]}, ensure_ascii=False))  # fmt: skip
            continue
        print(text if options.queries is None else f"{query}: {text}")
        for place, (id, score, content) in enumerate(hits, 1):
            print(f"{place:>4}  {score:.4f}  {id}  {textwrap.shorten(content, 90, placeholder=' ...')}")


def _reranked(
    options: argparse.Namespace,
    index: Index,
    settings: dict[str, Any],
    queries: dict[str, str],
    run: dict[str, dict[str, float]],
    places: dict[str, dict[str, Any]],
) -> dict[str, dict[str, float]]:
    """The run with its first documents in the order of the cross-encoder, best first, with its scores."""
    mesh = device_mesh(options.mesh)
    source = options.cross_encoder or settings["model"]
    model = CrossEncoder.from_pretrained(source, dtype=settings["dtype"], mesh=mesh)
    pairs = [(query, id) for query, hits in run.items() for id in list(hits)[: options.rerank]]
    texts = index.texts([places[query][id] for query, id in pairs])
    scores = model.predict([(queries[query], text) for (query, _), text in zip(pairs, texts, strict=True)])
    found: dict[str, dict[str, float]] = {query: {} for query in run}
    for (query, id), score in sorted(
        zip(pairs, scores, strict=True), key=lambda item: (item[1], item[0][1]), reverse=True
    ):
        found[query][id] = float(score)
    return found


def rerank(options: argparse.Namespace) -> None:
    reading = _reading(options)
    queries = read_queries(options.queries, **reading)
    run = read_run(options.run, errors=options.encoding_errors)
    model = CrossEncoder.from_pretrained(
        options.model,
        prompt=options.prompt,
        max_seq_length=options.max_seq_length,
        dtype=options.dtype,
        mesh=device_mesh(options.mesh),
    )
    report = reranking.rerank(
        model,
        run,
        queries,
        read_corpus(options.corpus, **reading),
        options.output,
        depth=options.depth,
        ignore_identical_ids=options.ignore_identical_ids,
        batch_tokens=options.batch_tokens,
    )
    print(
        f"{report.pairs} pairs of {report.queries} queries ({report.resumed} scored before), "
        f"{report.pairs_per_second:.1f} pairs a second; "
        f"{report.scores.tokens_saved} of {report.scores.tokens_alone} tokens saved by sharing documents"
    )


def info(options: argparse.Namespace) -> None:
    if os.path.exists(os.path.join(options.source, MANIFEST)):
        _index_info(Index.open(options.source))
    else:
        _model_info(options.source)


def _index_info(index: Index) -> None:
    facts = index.info()
    print(
        f"index of {facts['documents']:,} documents, {facts['dimension']} numbers each, as {facts['dtype']}"
    )
    print(
        f"similarity {facts['similarity']}; {facts['bytes'] / 1e6:.1f} MB, vectors {facts['vector_bytes'] / 1e6:.1f} MB"
    )
    if facts["recall"]:
        kept = ", ".join(
            f"{name} {value:.4f}" for name, value in facts["recall"].items() if name != "queries"
        )
        print(f"against float32, over {facts['recall']['queries']} documents as queries: {kept}")
    for name, value in facts["metadata"].items():
        print(f"{name}: {value}")


def _model_info(source: str) -> None:
    resolved = resolve(source)
    files = open_checkpoint(resolved.path)
    config = read_config(files.config)
    settings = read_settings(resolved.path, resolved.name)
    _, params = abstract_decoder(config, compute_dtype("float32"))
    counts = count_parameters(params)
    total = counts.total()
    print(f"{resolved.name}: {files.config['model_type']}, {config.num_layers} layers, {config.embed_dim} wide, "
          f"{config.num_heads} heads ({config.num_kv_heads} key/value), vocabulary {config.vocab_size:,}, "
          f"positions {config.max_positions or 'unlimited'} ({config.positions})")  # fmt: skip
    print(f"{total:,} parameters, of which {counts['bias']:,} in biases ({counts['bias'] / total:.4%})"
          + ("" if counts["bias"] else ": none to train; python -m train ... --add-biases gives it some"))  # fmt: skip
    print(f"memory for weights: {4 * total / 1e9:.2f} GB in float32, {2 * total / 1e9:.2f} GB in bfloat16")
    print(f"pooling {settings.pooling or 'weightedmean'}, brackets {'on' if settings.brackets else 'off'}, "
          f"max_seq_length {settings.max_seq_length or config.max_positions or 'unlimited'}")  # fmt: skip


def export(options: argparse.Namespace) -> None:
    if os.path.exists(os.path.join(options.source, MANIFEST)):
        ids = export_index(Index.open(options.source), options.output)
        print(f"{options.output}: row numbers are its keys; {ids} has the document of each row, one a line")
        return
    options.model = options.source
    model = _load(vars(options), None)
    model.save_pretrained(options.output)
    print(f"{options.output}: {model.name}, {model.decoder.dtype.name}")
