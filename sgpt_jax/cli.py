"""The command `sgpt`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from sgpt_jax import compile_cache, demo
from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.decoder import abstract_decoder
from sgpt_jax.index import Index
from sgpt_jax.index_build import build_index
from sgpt_jax.io import InputError, ReadReport, read_corpus, read_queries, read_texts, write_run
from sgpt_jax.pooling import POOLING_MODES
from sgpt_jax.sharding import make_mesh

EMBED_CHUNK = 4096


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command `sgpt`, one subcommand for each thing to do."""
    parser = argparse.ArgumentParser(prog="sgpt", description="Semantic search with GPT decoders.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    command = add("demo", _demo, "Search a few hundred real abstracts with a real decoder; needs nothing.")
    command.add_argument("--model", help="another model than SmolLM2-135M-Instruct")
    command.add_argument("--query", action="append", default=[], help="a free query; may be repeated")

    command = add("embed", _embed, "Write the vectors of texts as a .npy file, float32 [n, E].")
    command.add_argument("input", help="JSONL (its text and title), TSV or plain text, one text a line; - is stdin")
    command.add_argument("-o", "--output", required=True, help="the .npy file")
    command.add_argument(
        "--side", choices=("query", "document"), help="what the texts are, for models with brackets or prompts"
    )
    command.add_argument("--normalize", action="store_true", help="scale vectors to length 1")
    _add_model(command)
    _add_reading(command)

    command = add("index", _index, "Embed a corpus into an index; run it again after an interruption to go on.")
    command.add_argument("corpus", help="BEIR's corpus.jsonl, TSV (id, text or id, title, text) or plain text")
    command.add_argument("-o", "--output", required=True, help="the index, a folder")
    command.add_argument("--store", choices=("float32", "float16", "int8"), default="float32",
                         help="how vectors are kept (default: float32)")  # fmt: skip
    command.add_argument("--no-texts", action="store_true", help="keep ids and vectors only")
    command.add_argument("--chunk-size", type=int, default=1024,
                         help="documents between two moments of safety (default: 1024)")  # fmt: skip
    _add_model(command)
    _add_reading(command)

    command = add("search", _search, "Search an index: exact, by cosine similarity.")
    command.add_argument("index", help="the index")
    command.add_argument("query", nargs="?", help="a query")
    command.add_argument("--queries", help="a file of queries (JSONL, TSV or plain text), in place of one query")
    command.add_argument("-k", type=int, default=10, help="results a query (default: 10)")
    command.add_argument("-o", "--output", help="write a TREC run, in place of a listing")
    command.add_argument("--json", action="store_true", help="print JSON lines, in place of a listing")
    command.add_argument("--rerank", type=int, metavar="N", help="re-rank the best N by the cross-encoder")
    command.add_argument("--cross-encoder", help="the decoder that re-ranks (default: the index's own)")
    _add_run(command, "the index's own model")
    _add_reading(command)

    command = add("info", _info, "What a model or an index is: family, sizes, biases, memory; recall of the index.")
    command.add_argument("source", help="a model (folder, hub id, .gguf file) or an index")

    command = add("export", _export, "Write a model as a folder that transformers and sentence-transformers load.")
    command.add_argument("-o", "--output", required=True, help="the folder")
    _add_model(command, positional=True)
    return parser


def _add_run(command: argparse.ArgumentParser, default: str | None) -> None:
    command.add_argument(
        "--model", required=default is None, help="folder, hub id, or .gguf file" + (f" (default: {default})" if default else "")
    )
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default=None if default else "float32",
                         help="of weights and matrix products (default: float32, for search as in the index)")  # fmt: skip
    command.add_argument("--mesh", help="devices, such as data=2,fsdp=4,tensor=1 (default: the first device)")


def _add_model(command: argparse.ArgumentParser, positional: bool = False) -> None:
    if positional:
        command.add_argument("model", help="folder, hub id, or .gguf file")
        command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the files")
        command.add_argument("--mesh", help=argparse.SUPPRESS)
    else:
        _add_run(command, None)
    command.add_argument("--pooling", choices=POOLING_MODES, help="default: what the model folder says, or weightedmean")
    command.add_argument("--brackets", action=argparse.BooleanOptionalAction, default=None,
                         help="put [ ] around queries and { } around documents (default: what the model folder says)")  # fmt: skip
    command.add_argument("--max-seq-length", type=int, help="tokens of a text that are read (default: the model's limit)")
    command.add_argument("--biases", help="trained biases to apply, a biases.safetensors")


def _add_reading(command: argparse.ArgumentParser) -> None:
    command.add_argument("--format", choices=("jsonl", "tsv", "text"), help="of the input (default: by name and content)")
    command.add_argument("--encoding-errors", choices=("strict", "replace"), default="strict",
                         help="invalid UTF-8: stop (default), or replace and count")  # fmt: skip
    command.add_argument("--skip-bad-lines", action="store_true", help="skip and count broken JSON lines")


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
        mesh=make_mesh(mesh) if mesh else None,
    )


def _demo(options: argparse.Namespace) -> None:
    demo.run(options.model, options.query)


def _embed(options: argparse.Namespace) -> None:
    model = _load(vars(options), options.mesh)
    reading = _reading(options)
    encode = {None: model.encode, "query": model.encode_query, "document": model.encode_document}[options.side]
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


def _index(options: argparse.Namespace) -> None:
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
    with _bar("indexing", "doc") as bar:

        def progress(rows: int) -> None:
            bar.update(rows - bar.n)

        index = build_index(
            options.output,
            read_corpus(options.corpus, **reading),
            lambda texts: model.encode_document(texts, show_progress=False),
            dtype=options.store,
            chunk_size=options.chunk_size,
            store_texts=not options.no_texts,
            metadata=metadata,
            on_progress=progress,
        )
    print(f"{options.output}: {len(index)} documents, {index.info()['bytes'] / 1e6:.1f} MB ({reading['report']})")


def _absolute(source: str) -> str:
    return os.path.abspath(source) if os.path.exists(source) else source


def _search(options: argparse.Namespace) -> None:
    if (options.query is None) == (options.queries is None):
        raise InputError("give either a query or --queries FILE")
    index = Index.open(options.index)
    reading = _reading(options)
    queries = {"query": options.query} if options.queries is None else read_queries(options.queries, **reading)
    settings = dict(index.metadata)
    settings["model"] = options.model or settings["model"]
    settings["dtype"] = options.dtype or settings["dtype"]
    model = _load(settings, options.mesh)
    vectors = model.encode_query(list(queries.values()))
    depth = max(options.k, options.rerank or 0)
    scores, rows = index.search(vectors, depth)
    names = [index.ids(found) for found in rows]
    run = {
        query: dict(zip(ids, map(float, found), strict=True))
        for query, ids, found in zip(queries, names, scores, strict=True)
    }
    if options.output:
        write_run(options.output, run)
        return
    for number, (query, text) in enumerate(queries.items()):
        found = rows[number][: options.k]
        texts = index.texts(found) if index.manifest.store_texts else [""] * len(found)
        if options.json:
            hits = [
                {"_id": id, "score": score, "text": content}
                for (id, score), content in zip(list(run[query].items())[: options.k], texts, strict=True)
            ]
            print(json.dumps({"_id": query, "query": text, "hits": hits}, ensure_ascii=False))
            continue
        print(text if options.queries is None else f"{query}: {text}")
        for place, ((id, score), content) in enumerate(zip(list(run[query].items()), texts, strict=False), 1):
            print(f"{place:>4}  {score:.4f}  {id}  {textwrap.shorten(content, 90, placeholder=' ...')}")


def _info(options: argparse.Namespace) -> None:
    if os.path.exists(os.path.join(options.source, "manifest.json")):
        _index_info(Index.open(options.source))
    else:
        _model_info(options.source)


def _index_info(index: Index) -> None:
    facts = index.info()
    print(f"index of {facts['documents']:,} documents, {facts['dimension']} numbers each, as {facts['dtype']}")
    print(f"similarity {facts['similarity']}; {facts['bytes'] / 1e6:.1f} MB, vectors {facts['vector_bytes'] / 1e6:.1f} MB")
    if facts["recall"]:
        kept = ", ".join(f"{name} {value:.4f}" for name, value in facts["recall"].items() if name != "queries")
        print(f"against float32, over {facts['recall']['queries']} documents as queries: {kept}")
    for name, value in facts["metadata"].items():
        print(f"{name}: {value}")


def _model_info(source: str) -> None:
    from sgpt_jax import hub
    from sgpt_jax.config import compute_dtype
    from sgpt_jax.families import read_config
    from sgpt_jax.tensor_files import open_checkpoint
    from sgpt_jax.weights import count_parameters

    resolved = hub.resolve(source)
    files = open_checkpoint(resolved.path)
    config = read_config(files.config)
    settings = hub.read_settings(resolved.path, resolved.name)
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


def _export(options: argparse.Namespace) -> None:
    model = _load(vars(options), None)
    model.save_pretrained(options.output)
    print(f"{options.output}: {model.name}, {model.decoder.dtype.name}")


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 1 for input that cannot be used, 130 when interrupted."""
    options = make_parser().parse_args(arguments)
    compile_cache.enable()
    warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)  # type: ignore[assignment]
    try:
        options.run(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
