"""What the subcommands of `sgpt` do. `parser.py` has their options."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import jax
import numpy as np

from sgpt_jax import demo as demonstration
from sgpt_jax import hybrid
from sgpt_jax import rerank as reranking
from sgpt_jax.bi_encoder import BI_ENCODER_SETTINGS, BiEncoder
from sgpt_jax.checkpoint.export import count_parameters
from sgpt_jax.cli.given import flags_given, given, reading_of, refuse_reading
from sgpt_jax.cli.indexing import index as index
from sgpt_jax.cross_encoder import CrossEncoder
from sgpt_jax.decoder.build import Build
from sgpt_jax.decoder.config import DecoderConfig, compute_dtype
from sgpt_jax.decoder.model import abstract_decoder
from sgpt_jax.decoder.sharding import device_mesh
from sgpt_jax.errors import InputError
from sgpt_jax.families import read_config
from sgpt_jax.files.corpora import read_corpus, read_queries, read_texts
from sgpt_jax.files.lines import atomic_write, check_no_input
from sgpt_jax.files.runs import check_trec_ids, read_run, trec_lines
from sgpt_jax.folder.modules import describe_modules
from sgpt_jax.folder.scoring import read_scoring
from sgpt_jax.folder.settings import read_settings
from sgpt_jax.folder.source import resolve
from sgpt_jax.index.export import export_index
from sgpt_jax.index.files import MANIFEST
from sgpt_jax.index.hits import Hit
from sgpt_jax.index.search import Index
from sgpt_jax.load import Opened, open_model, token_limit
from sgpt_jax.metrics import cut
from sgpt_jax.reports import EncodeReport
from sgpt_jax.rerank_job import base_of, rerank_job
from sgpt_jax.runtime import processes
from sgpt_jax.runtime.command import printable
from sgpt_jax.runtime.progress import progress
from sgpt_jax.text.encoder import TextEncoder
from sgpt_jax.text.tokenizer import load_tokenizer

EMBED_CHUNK = 4096
SAMPLE = "A short text."


def demo(options: argparse.Namespace) -> None:
    """Searches the abstracts that ship with the package."""
    demonstration.run(options.model, options.query, device_mesh(options.mesh))


def embed(options: argparse.Namespace) -> None:
    """Writes the vectors of a file of texts, in constant memory."""
    for name, of in (
        ("brackets", ("query", "document")), ("query_prompt", ("query",)), ("document_prompt", ("document",))
    ):  # fmt: skip
        if options.side not in of and vars(options)[name]:
            raise InputError(f"--{name.replace('_', '-')} is for --side {' or '.join(of)}")
    check_no_input(options.output, options.input)
    with atomic_write(options.output) as stream:
        if not stream.seekable():
            raise InputError(f"{options.output}: must be a file: its header is written last")
        model = BiEncoder.from_settings(vars(options), device_mesh(options.mesh))
        sides = [side for side in ("query", "document") if model.text.prompts.get(side)]
        if options.side is None and (model.text.brackets or sides):
            what = "brackets" if model.text.brackets else f"a prompt for each {' and '.join(sides)}"
            default = model.text.default_prompt_name
            how = f"with its default prompt, {default}" if default else "as they are"
            note = f"the model has {what}; without --side, texts are embedded {how}"
            print(f"note: {note}", file=sys.stderr)
        reading = reading_of(options)
        count = 0
        _write_npy_header(stream, (count, model.dimension))
        texts = read_texts(options.input, **reading)
        report = EncodeReport()
        chunks = iter(lambda: list(itertools.islice(texts, EMBED_CHUNK)), [])
        with progress("embedding", "text") as bar:
            for vectors in model.encode_chunks(
                chunks, side=options.side, normalize=options.normalize, report=report, on_batch=bar.update
            ):
                stream.write(vectors.tobytes())
                count += len(vectors)
        stream.seek(0)
        _write_npy_header(stream, (count, model.dimension))
    cut = f", {report.cut} of them cut as they were too long" if report.cut else ""
    print(f"{count} vectors of dimension {model.dimension}: {options.output} ({reading['report']}{cut})")


def _write_npy_header(stream: BinaryIO, shape: tuple[int, int]) -> None:
    """The header of a .npy file of float32; NumPy pads it to the same length for any number of rows."""
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})


def search(options: argparse.Namespace) -> None:
    """Answers one query or a file of them, and prints the documents or writes a run."""
    if (options.query is None) == (options.queries is None):
        raise InputError("give either a query or --queries FILE")
    if options.queries is None:
        refuse_reading(options)
    k = options.k or min(10, options.rerank or 10)
    if 0 < options.rerank < k:
        raise InputError(f"-k {k} asks for more documents than --rerank {options.rerank} scores")
    if options.hybrid and max(k, options.rerank) > hybrid.DEPTH:
        raise InputError(f"--hybrid joins the best {hybrid.DEPTH} of each ranking: ask for no more documents")
    if options.cross_encoder and not options.rerank:
        raise InputError("--cross-encoder is for --rerank N")
    if options.json and options.output:
        raise InputError("--json prints what -o writes as a run: give one of them")
    if options.output:
        check_no_input(options.output, options.queries)
    mesh = device_mesh(options.mesh)
    index = Index.open(options.index, mesh=mesh, resident=options.resident)
    queries = (
        {"query": options.query}
        if options.queries is None
        else read_queries(options.queries, **reading_of(options))
    )
    settings = _index_settings(index, options)
    # What would fail after all the work fails here.
    writes = options.output and processes.first()
    with atomic_write(options.output) if writes else contextlib.nullcontext() as stream:
        if options.output:
            check_trec_ids(dict.fromkeys(queries, ()))
        words = hybrid.bm25_of(index) if options.hybrid else None
        model = BiEncoder.from_settings(settings, mesh)
        wanted = max(k, options.rerank)
        run, rows = _found(index, model, queries, hybrid.DEPTH if words else wanted)
        if not processes.first():
            return
        if words:
            run = hybrid.fuse(run, words[0].search(queries, hybrid.DEPTH), wanted)
            rows = dict.fromkeys(queries, words[1])
        if options.output:
            check_trec_ids(run)
        if options.rerank:
            run = _reranked(options, index, settings, queries, run, rows)
        run = {query: dict(list(hits.items())[:k]) for query, hits in run.items()}
        if stream is not None:
            stream.writelines(trec_lines(run))
            return
    for query, hits in run.items():
        shown = index.hits(np.array(list(hits.values())), [rows[query][id] for id in hits])
        if options.json:
            _print_json(query, queries[query], shown)
        else:
            title = queries[query] if options.queries is None else f"{query}: {queries[query]}"
            _print_listing(title, shown)


def _found(
    index: Index, model: BiEncoder, queries: dict[str, str], k: int
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, int]]]:
    """The k best documents of each query, best first: their scores, and their rows in the index.

    Of several processes each embeds its share of the queries, and asks for it.

    Raises:
        InputError: the model is not the one that made the index.
    """
    names = processes.share(list(queries))
    vectors = np.zeros((0, index.dimension), np.float32)
    with ThreadPoolExecutor(1) as beside:
        # The weights' hash takes as long as embedding a query: both at once. Of many, none is embedded in vain.
        checked = beside.submit(lambda: index.check_model(model.fingerprint()))
        if len(names) > 1:
            checked.result()
        try:
            if names:
                vectors = model.encode_query([queries[name] for name in names])
        finally:
            checked.result()  # which comes first if both fail
    found: list[Any] = []
    for name, values, query_rows in zip(names, *index.search(vectors, k), strict=True):
        found.append([name, index.ids(query_rows), values.tolist(), query_rows.tolist()])
    run, rows = {}, {}
    for share in processes.gather(found):
        for name, ids, values, query_rows in share:
            run[name] = dict(zip(ids, values, strict=True))
            rows[name] = dict(zip(ids, query_rows, strict=True))
    return run, rows


def _index_settings(index: Index, options: argparse.Namespace) -> dict[str, Any]:
    """What `BiEncoder.from_settings` needs for the model that an index was made with, or that the options name."""
    settings = given(index.metadata, options)
    if "model" not in settings:
        raise InputError(f"{options.index}: does not say which model it was made with; give it as --model")
    return settings


def _print_json(query: str, text: str, hits: list[Hit]) -> None:
    found = [
        {"_id": hit.id, "score": hit.score, "title": hit.title, "snippet": hit.snippet, "text": hit.text}
        for hit in hits
    ]
    print(json.dumps({"_id": query, "query": text, "hits": found}, ensure_ascii=False))


def _print_listing(title: str, hits: list[Hit]) -> None:
    print(printable(title))
    for rank, hit in enumerate(hits, 1):
        shortened = textwrap.shorten(hit.text, 90, placeholder=" ...")
        print(f"{rank:>4}  {hit.score:.4f}  {printable(hit.id)}  {printable(shortened)}")


def _reranked(
    options: argparse.Namespace,
    index: Index,
    settings: dict[str, Any],
    queries: dict[str, str],
    run: dict[str, dict[str, float]],
    rows: dict[str, dict[str, int]],
) -> dict[str, dict[str, float]]:
    """The run's first documents in the order of the cross-encoder, best first, with its scores."""
    source = options.cross_encoder or settings["model"]
    model = CrossEncoder.from_pretrained(
        source,
        dtype=settings.get("dtype", "float32"),
        mesh=device_mesh(options.mesh),
        weights=settings.get("weights"),
    )
    shallow, _ = cut(run, options.rerank)
    row_of = {id: rows[query][id] for query, hits in shallow.items() for id in hits}
    texts = dict(zip(row_of, index.texts(list(row_of.values())), strict=True))
    scored, _ = cut(reranking.rerank(model, queries, shallow, texts), None)
    return scored


def rerank(options: argparse.Namespace) -> None:
    """Re-ranks a run, or goes on with it."""
    for ending in (".trec", ".json"):
        check_no_input(base_of(options.output) + ending, options.run, options.queries, options.corpus)
    reading = reading_of(options)
    queries = read_queries(options.queries, **reading)
    run = read_run(options.run, errors=options.encoding_errors)
    model = CrossEncoder.from_pretrained(
        options.model,
        prompt=options.prompt,
        max_seq_length=options.max_seq_length,
        dtype=options.dtype,
        mesh=device_mesh(options.mesh),
        weights=options.weights,
        adapter=options.adapter,
    )
    report = rerank_job(
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


def serve(options: argparse.Namespace) -> None:
    try:
        from sgpt_jax.serve.server import serve as run
    except ModuleNotFoundError as error:
        raise InputError(f"sgpt serve needs {error.name}: pip install 'sgpt-jax[serve]'") from None
    run(options)


def info(options: argparse.Namespace) -> None:
    """Prints what a model or an index is."""
    if os.path.exists(os.path.join(options.source, MANIFEST)):
        index = Index.open(options.source)
        if options.verify:
            index.verify()
        _index_info(index)
        if options.verify:
            print("verified: every file fits its checksum")
    elif options.verify:
        raise InputError(f"{options.source}: --verify is for an index, which has checksums")
    else:
        _model_info(options.source)


def _index_info(index: Index) -> None:
    facts = index.info()
    print(f"index of {facts['documents']:,} documents, dimension {facts['dimension']}, as {facts['dtype']}")
    removed = f"{facts['removed']:,} removed documents still take space (sgpt index --compact)"
    print(f"{facts['shards']:,} shards; {removed}" if facts["removed"] else f"{facts['shards']:,} shards")
    megabytes, vectors = facts["bytes"] / 1e6, facts["vector_bytes"] / 1e6
    print(f"similarity {facts['similarity']}; {megabytes:.1f} MB, vectors {vectors:.1f} MB")
    if facts["recall"]:
        names = [name for name in facts["recall"] if name != "queries"]
        kept = ", ".join(f"{name} {facts['recall'][name]:.4f}" for name in names)
        print(
            f"against float32, when it was built, over {facts['recall']['queries']} documents as queries: {kept}"
        )
    for name, value in facts["metadata"].items():
        print(printable(f"{name}: {value}"))
    print(f"fingerprint of model and settings: {facts['fingerprint'] or 'unknown'}")


def _model_info(source: str) -> None:
    resolved = resolve(source)
    opened = open_model(resolved)
    hf, config = opened.files.config, read_config(opened.files.config)
    _, params = abstract_decoder(config, Build(compute_dtype("float32")))
    counts = count_parameters(params)
    total, biases = counts.total(), counts["bias"]
    untrainable = "" if biases else ": none to train; python -m train ... --add-biases gives it some"
    windows = sorted({window for window in config.windows if window})
    masks = ["bidirectional" if config.bidirectional else "causal"]
    if windows:
        reach = "either side" if config.bidirectional else "back"
        masks.append(
            f"windows of {', '.join(map(str, windows))} tokens {reach}, itself included, in "
            f"{sum(w is not None for w in config.windows)} of {config.num_layers} layers"
        )
    lines = [
        f"{resolved.name}: {hf['model_type']}, {config.num_layers} layers, "
        f"dimension {config.embed_dim}, {config.num_heads} heads ({config.num_kv_heads} key/value), "
        f"vocabulary {config.vocab_size:,}, positions {config.max_positions or 'unlimited'} ({config.positions})",
        f"attention: {', '.join(masks)}",
        f"{total:,} parameters, of which {biases:,} in biases ({biases / total:.4%}){untrainable}",
        f"memory for weights: {4 * total / 1e9:.2f} GB in float32, {2 * total / 1e9:.2f} GB in bfloat16, "
        f"{_int8_bytes(config) / 1e9:.2f} GB with int8 matrices and bfloat16",
        *(f"adapter: {adapter}" for adapter in opened.adapters),
    ]
    lines += _use_info(opened, resolved.name, config) + _scoring_info(opened, resolved.name, config)
    print(printable("\n".join(lines), keep="\n"))


def _use_info(opened: Opened, name: str, config: DecoderConfig) -> list[str]:
    """How a model folder wants to be used."""
    try:
        settings = read_settings(opened.settings, name)
    except InputError as problem:  # a re-ranker's folder says nothing of vectors
        return [f"vectors: none ({problem})"]
    pooling = settings.pooling or "weightedmean"
    limit = token_limit(config, None, settings.max_seq_length)
    made = describe_modules(pooling, settings.include_prompt, settings.modules)
    kept = f", cut to {settings.truncate_dim} dimensions" if settings.truncate_dim else ""
    lines = [
        f"vectors: {made}{kept}; similarity {settings.similarity or 'cosine'}",
        f"texts: brackets {'on' if settings.brackets else 'off'}, max_seq_length {limit}",
    ]
    lines += [f"prompt {key}: {text!r}" for key, text in (settings.prompts or {}).items() if text]
    if settings.default_prompt_name:
        lines.append(f"prompt of other texts: {settings.default_prompt_name}")
    try:
        tokenizer = load_tokenizer(opened.tokenizer)
    except InputError as problem:
        return [*lines, f"tokenizer: none ({problem})"]
    (ids,) = TextEncoder(tokenizer, max(limit, 16)).ids([SAMPLE], prompt="")
    tokens = tokenizer.convert_ids_to_tokens(ids)
    ends = f"begins with {tokens[0]!r} ({ids[0]}) and ends with {tokens[-1]!r} ({ids[-1]})"
    return [*lines, f"{SAMPLE!r} has {len(ids)} tokens, {ends}"]


def _scoring_info(opened: Opened, name: str, config: DecoderConfig) -> list[str]:
    """How a cross-encoder scores pairs with the model."""
    try:
        scoring = read_scoring(opened.settings, name, opened.adapters)
    except InputError as problem:
        return [f"pairs: none ({problem})"]
    if scoring is None and config.bidirectional:
        return ["pairs: none (tokens see those behind them, so there are no log-probabilities)"]
    if scoring is None:
        return ["pairs: log-probability of the query after a prompt with the document"]
    named = [f"instruction {key}: {text!r}" for key, text in scoring.prompts.items() if text]
    return [f"pairs: {scoring.describe()}", *named]


def _int8_bytes(config: DecoderConfig) -> int:
    _, params = abstract_decoder(config, Build(compute_dtype("bfloat16"), int8=True))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def export(options: argparse.Namespace) -> None:
    """Writes a model folder, or an index for another library."""
    if os.path.exists(os.path.join(options.source, MANIFEST)):
        if unused := flags_given(options, [name for name in BI_ENCODER_SETTINGS if name != "model"]):
            raise InputError(f"{', '.join(unused)}: not for an index, whose vectors are made")
        ids = export_index(Index.open(options.source), options.output)
        print(f"{options.output}: its keys count from 0; {ids} has the document of each, one a line")
        return
    if os.path.exists(options.source) and os.path.realpath(options.source) == os.path.realpath(
        options.output
    ):
        raise InputError(f"{options.output}: is the model itself, which the output would replace")
    model = BiEncoder.from_settings(vars(options) | {"model": options.source})
    model.save_pretrained(options.output)
    copy = ", the dequantised copy of its int8 weights" if model.decoder.build.int8 else ""
    print(f"{options.output}: {printable(model.name)}, {model.decoder.dtype.name}{copy}")
