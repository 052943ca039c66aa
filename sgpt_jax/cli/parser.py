"""The command `sgpt`: its subcommands and their options. `commands.py` has what they do."""

from __future__ import annotations

import argparse
import importlib

from sgpt_jax import __version__
from sgpt_jax.cli.options import (
    ADAPTER,
    BATCH_TOKENS,
    BI_ENCODER,
    MAX_SEQ_LENGTH,
    MESH,
    PROCESSES,
    READING,
    WEIGHTS,
    Group,
    Option,
    add_options,
    dtype,
    model,
    option,
    positive,
)
from sgpt_jax.runtime.command import run_command

INDEX_MODEL = "the index's own model"

RESIDENT = option(
    "--resident",
    choices=("float32", "bfloat16", "int8"),
    metavar="DTYPE",
    help="hold the vectors on all devices as float32, bfloat16 or int8, with the results of the stored ones; pays for "
    "many queries",
)

# subcommand -> (what it does, its options). The function of that name in commands.py does it.
COMMANDS: dict[str, tuple[str, tuple[Option | Group, ...]]] = {
    "demo": (
        "Search a few hundred real abstracts with a real decoder; needs nothing.",
        (
            option("--model", help="another model than SmolLM2-135M-Instruct"),
            option("--query", action="append", default=[], help="a free query; may be repeated"),
            MESH,
        ),
    ),
    "embed": (
        "Write the vectors of texts as a .npy file, float32 [n, E].",
        (
            option(
                "input", help="JSONL (its text and title), TSV or plain text, one text a line; - is stdin"
            ),
            option("-o", "--output", required=True, help="the .npy file"),
            option(
                "--side",
                choices=("query", "document"),
                help="what the texts are, for models with brackets or prompts",
            ),
            option("--normalize", action="store_true", help="scale vectors to length 1"),
            model(),
            dtype(),
            WEIGHTS,
            MESH,
            *BI_ENCODER,
            *READING,
        ),
    ),
    "index": (
        "Embed a corpus into an index; run it again after an interruption, or when the corpus has grown, to go on. "
        "An index that grows can be searched meanwhile.",
        (
            option(
                "corpus",
                nargs="*",
                help="BEIR's corpus.jsonl, CSV, TSV (id, text or id, title, text), plain text, Parquet, or a data set "
                "of the Hugging Face hub (hf:PATH, hf:PATH:SPLIT, hf:PATH:CONFIG:SPLIT); several files, or folders of "
                "them, follow each other; of a folder in BEIR's layout the corpus alone is read",
            ),
            option("-o", "--output", required=True, help="the index, a folder"),
            option(
                "--add",
                action="store_true",
                help="the corpus has what is new or has changed: what is in the index with the same text is passed "
                "over, what is there with another text is replaced; needs ids, so no plain text",
            ),
            option(
                "--remove",
                action="extend",
                nargs="+",
                metavar="ID",
                help="remove the documents with these ids; @FILE stands for the ids of a file: one a line, or in "
                "records like the corpus's",
            ),
            option(
                "--compact",
                action="store_true",
                help="write what is left into full files, without encoding it again, and free the space of the rest",
            ),
            option(
                "--store",
                choices=("float32", "float16", "int8"),
                help="how vectors are stored (default: as in the index, or float32)",
            ),
            option("--no-texts", action="store_true", help="store ids and vectors only"),
            option(
                "--chunk-size",
                type=positive,
                metavar="N",
                help="documents after which the index on disk is complete so far (default: as in the index, or 1024)",
            ),
            model(required=False, default=f"{INDEX_MODEL}, if it is there"),
            dtype(default=None, of="of weights and matmuls (default: the index's, or float32)"),
            WEIGHTS,
            MESH,
            *BI_ENCODER,
            *READING,
            PROCESSES,
        ),
    ),
    "search": (
        "Search an index: exact, by the model's similarity (cosine or dot product).",
        (
            option("index", help="the index"),
            option("query", nargs="?", help="a query"),
            option("--queries", help="a file of queries (JSONL, TSV or plain text), in place of one query"),
            option("-k", type=positive, help="results a query (default: 10, or what --rerank scores)"),
            option("-o", "--output", help="write a TREC run, in place of a listing"),
            option("--json", action="store_true", help="print JSON lines, in place of a listing"),
            option(
                "--rerank",
                type=positive,
                metavar="N",
                default=0,
                help="let a cross-encoder re-rank the best N; its scores are shown then",
            ),
            RESIDENT,
            option(
                "--hybrid",
                action="store_true",
                help="search by words too (BM25 over the index's texts, all of which are read), and join the first "
                "1,000 of the two rankings by their scores, each scaled to 0..1; the mean is shown then",
            ),
            option(
                "--cross-encoder", help=f"the decoder or re-ranker that re-ranks (default: {INDEX_MODEL})"
            ),
            model(required=False, default=INDEX_MODEL),
            dtype(default=None, of="of weights and matmuls (default: the index's)"),
            WEIGHTS,
            MESH,
            Group("the bi-encoder, in place of what the index was made with", BI_ENCODER),
            *READING,
            PROCESSES,
        ),
    ),
    "rerank": (
        "Re-rank a run by the log-probability of the query after a prompt with the document, or as a re-ranker's "
        "folder says. After an interruption, run it again to go on.",
        (
            option("run", help="candidates: a TREC run, or JSON {query: {document: score}}"),
            option("--queries", required=True, help="queries: JSONL, TSV or plain text"),
            option("--corpus", required=True, help="documents: JSONL, TSV or plain text"),
            option("-o", "--output", required=True, help="BASE: BASE.trec and BASE.json are written"),
            option(
                "--depth",
                type=positive,
                default=100,
                metavar="N",
                help="candidates of a query that are scored (default: 100)",
            ),
            option(
                "--prompt",
                help="text around a document, with one {} for it; the default is the SGPT paper's for search, "
                "'Question Body: {} Question Title:' suits duplicate questions. Of a re-ranker an instruction, or the "
                "name of one of its folder's; the default is as the folder says",
            ),
            option(
                "--ignore-identical-ids",
                action="store_true",
                help="drop candidates whose id is the query's (ArguAna, Quora)",
            ),
            MAX_SEQ_LENGTH,
            ADAPTER,
            BATCH_TOKENS,
            model(),
            dtype(),
            WEIGHTS,
            MESH,
            *READING,
        ),
    ),
    "serve": (
        "Serve embeddings, re-ranking and a search page over HTTP; without a model or an index, the demonstration's.",
        (
            option("--index", help="the index that is searched"),
            RESIDENT,
            option("--cross-encoder", help="the decoder that re-ranks (default: no re-ranking)"),
            option("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)"),
            option("--port", type=int, default=8000, help="default: 8000; 0 takes a free one"),
            option(
                "--api-key-file",
                metavar="FILE",
                help="holds the key that callers must send; so does the environment variable SGPT_API_KEY",
            ),
            option(
                "--cors-origin",
                action="append",
                default=[],
                metavar="ORIGIN",
                help="let web pages of this origin call, such as https://example.org; may be repeated (default: none)",
            ),
            option(
                "--max-queue-tokens",
                type=positive,
                metavar="N",
                help="tokens that may wait; above them callers get 429 (default: by device)",
            ),
            option(
                "--drain",
                type=positive,
                default=8,
                metavar="SECONDS",
                help="how long requests may go on after SIGTERM (default: 8)",
            ),
            model(required=False, default=f"{INDEX_MODEL}, or the demonstration's"),
            dtype(default=None, of="of weights and matmuls (default: the index's, or float32)"),
            WEIGHTS,
            MESH,
            *BI_ENCODER,
            # Refused with a reason, where argparse would only not know them.
            *(
                option(*each.flags, dest="several_hosts", nargs="?", const=True, help=argparse.SUPPRESS)
                for each in PROCESSES.options
            ),
        ),
    ),
    "info": (
        "What a model or an index is: family, sizes, biases, memory; recall of the index.",
        (
            option("source", help="a model (folder, hub id, .gguf file) or an index"),
            option("--verify", action="store_true", help="read the whole index and check all its checksums"),
        ),
    ),
    "export": (
        "Write a model as a folder that transformers and sentence-transformers load, or an index as a FAISS or "
        "usearch file.",
        (
            option("source", help="a model (folder, hub id, .gguf file) or an index"),
            option(
                "-o",
                "--output",
                required=True,
                help="a folder; of an index: FILE.faiss (exact) or FILE.usearch (approximate), beside which "
                "FILE.*.ids.jsonl has the document ids",
            ),
            dtype(default=None, of="of a model's files (default: float32)"),
            WEIGHTS,
            *BI_ENCODER,
        ),
    ),
}


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command `sgpt`, one subcommand for each thing to do."""
    parser = argparse.ArgumentParser(prog="sgpt", description="Semantic search with GPT decoders.")
    parser.add_argument("--version", action="version", version=f"sgpt-jax {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (text, options) in COMMANDS.items():
        add_options(subparsers.add_parser(name, help=text, description=text), *options)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit code, see `run_command`."""
    options = make_parser().parse_args(arguments)

    def action() -> None:
        getattr(importlib.import_module("sgpt_jax.cli.commands"), options.command)(options)

    return run_command(action, options)
