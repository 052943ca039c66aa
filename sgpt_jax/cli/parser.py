"""The command `sgpt`."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from typing import Any

from sgpt_jax.cli import commands
from sgpt_jax.decoder.pooling import POOLING_MODES
from sgpt_jax.errors import InputError
from sgpt_jax.runtime import compile_cache, processes
from sgpt_jax.text.pairs import DEFAULT_PROMPT


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command `sgpt`, one subcommand for each thing to do."""
    parser = argparse.ArgumentParser(prog="sgpt", description="Semantic search with GPT decoders.")
    subparsers = parser.add_subparsers(dest="command", required=True)

    def add(name: str, action: Any, text: str) -> argparse.ArgumentParser:
        command = subparsers.add_parser(name, help=text, description=text)
        command.set_defaults(action=action)
        return command

    command = add(
        "demo", commands.demo, "Search a few hundred real abstracts with a real decoder; needs nothing."
    )
    command.add_argument("--model", help="another model than SmolLM2-135M-Instruct")
    command.add_argument("--query", action="append", default=[], help="a free query; may be repeated")
    _add_mesh(command)

    command = add("embed", commands.embed, "Write the vectors of texts as a .npy file, float32 [n, E].")
    command.add_argument(
        "input", help="JSONL (its text and title), TSV or plain text, one text a line; - is stdin"
    )
    command.add_argument("-o", "--output", required=True, help="the .npy file")
    command.add_argument(
        "--side",
        choices=("query", "document"),
        help="what the texts are, for models with brackets or prompts",
    )
    command.add_argument("--normalize", action="store_true", help="scale vectors to length 1")
    _add_model(command)
    _add_reading(command)

    command = add(
        "index", commands.index, "Embed a corpus into an index; run it again after an interruption to go on."
    )
    command.add_argument(
        "corpus", help="BEIR's corpus.jsonl, TSV (id, text or id, title, text) or plain text"
    )
    command.add_argument("-o", "--output", required=True, help="the index, a folder")
    command.add_argument("--store", choices=("float32", "float16", "int8"), default="float32",
                         help="how vectors are kept (default: float32)")  # fmt: skip
    command.add_argument("--no-texts", action="store_true", help="keep ids and vectors only")
    command.add_argument("--chunk-size", type=int, default=1024,
                         help="documents between two moments of safety (default: 1024)")  # fmt: skip
    _add_model(command)
    _add_reading(command)
    processes.add_arguments(command)

    command = add("search", commands.search, "Search an index: exact, by cosine similarity.")
    command.add_argument("index", help="the index")
    command.add_argument("query", nargs="?", help="a query")
    command.add_argument(
        "--queries", help="a file of queries (JSONL, TSV or plain text), in place of one query"
    )
    command.add_argument("-k", type=int, help="results a query (default: 10, or what --rerank scores)")
    command.add_argument("-o", "--output", help="write a TREC run, in place of a listing")
    command.add_argument("--json", action="store_true", help="print JSON lines, in place of a listing")
    command.add_argument("--rerank", type=int, metavar="N", default=0,
                         help="let a cross-encoder re-rank the best N; its scores are shown then")  # fmt: skip
    command.add_argument("--cross-encoder", help="the decoder that re-ranks (default: the index's own model)")
    _add_run(command, "the index's own model")
    _add_reading(command)

    command = add(
        "rerank",
        commands.rerank,
        "Re-rank a run by the log-probability of the query after a prompt with the document. "
        "After an interruption, run it again to go on.",
    )
    command.add_argument("run", help="candidates: a TREC run, or JSON {query: {document: score}}")
    command.add_argument("--queries", required=True, help="queries: JSONL, TSV or plain text")
    command.add_argument("--corpus", required=True, help="documents: JSONL, TSV or plain text")
    command.add_argument("-o", "--output", required=True, help="BASE: BASE.trec and BASE.json are written")
    command.add_argument(
        "--depth", type=int, default=100, help="candidates of a query that are scored (default: 100)"
    )
    command.add_argument("--prompt", default=DEFAULT_PROMPT,
                         help="text around a document, with one {} for it; the default is the SGPT paper's for search, "
                         "'Question Body: {} Question Title:' suits duplicate questions")  # fmt: skip
    command.add_argument("--ignore-identical-ids", action="store_true",
                         help="drop candidates whose id is the query's (ArguAna, Quora)")  # fmt: skip
    command.add_argument(
        "--max-seq-length", type=int, help="tokens of a pair that are read (default: the model's limit)"
    )
    command.add_argument(
        "--batch-tokens", type=int, help="padded tokens computed at a time (default: by device)"
    )
    _add_run(command, None)
    _add_reading(command)

    command = add(
        "info",
        commands.info,
        "What a model or an index is: family, sizes, biases, memory; recall of the index.",
    )
    command.add_argument("source", help="a model (folder, hub id, .gguf file) or an index")

    command = add(
        "export",
        commands.export,
        "Write a model as a folder that transformers and sentence-transformers load, or an index as a FAISS or "
        "usearch file.",
    )
    command.add_argument("source", help="a model (folder, hub id, .gguf file) or an index")
    command.add_argument("-o", "--output", required=True,
                         help="a folder; of an index: FILE.faiss (exact) or FILE.usearch (approximate), beside which "
                         "FILE.*.ids.jsonl has the document ids")  # fmt: skip
    _add_model(command, exporting=True)
    return parser


def _add_run(command: argparse.ArgumentParser, default: str | None) -> None:
    command.add_argument(
        "--model",
        required=default is None,
        help="folder, hub id, or .gguf file" + (f" (default: {default})" if default else ""),
    )
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default=None if default else "float32",
                         help="of weights and matrix products (default: float32; of search, the index's)")  # fmt: skip
    _add_mesh(command)


def _add_mesh(command: argparse.ArgumentParser) -> None:
    command.add_argument("--mesh", help="devices of this process, such as data=2,fsdp=4,tensor=1 "
                         "(default: all accelerators on data; of CPUs the first)")  # fmt: skip


def _add_model(command: argparse.ArgumentParser, exporting: bool = False) -> None:
    if exporting:
        command.add_argument(
            "--dtype", choices=("float32", "bfloat16"), default="float32", help="of a model's files"
        )
    else:
        _add_run(command, None)
    command.add_argument(
        "--pooling", choices=POOLING_MODES, help="default: what the model folder says, or weightedmean"
    )
    command.add_argument("--brackets", action=argparse.BooleanOptionalAction, default=None,
                         help="[ ] around queries and { } around documents (default: as the model says)")  # fmt: skip
    command.add_argument(
        "--max-seq-length", type=int, help="tokens of a text that are read (default: the model's limit)"
    )
    command.add_argument("--biases", help="trained biases to apply, a biases.safetensors")


def _add_reading(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--format", choices=("jsonl", "tsv", "text"), help="of the input (default: by name and content)"
    )
    command.add_argument("--encoding-errors", choices=("strict", "replace"), default="strict",
                         help="invalid UTF-8: stop (default), or replace and count")  # fmt: skip
    command.add_argument("--skip-bad-lines", action="store_true", help="skip and count broken JSON lines")


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 1 for input that cannot be used, 130 when interrupted."""
    options = make_parser().parse_args(arguments)
    compile_cache.enable()
    os.environ.setdefault(
        "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
    )  # that there is no torch, which nothing here needs
    warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)  # type: ignore[assignment]
    try:
        with processes.session(options):
            options.action(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
