"""A large index of short generated documents with a tiny random decoder: memory, time and exact search.

It measures what does not depend on the model: that host memory stays flat while the corpus streams by, how long the
device waits for the tokenizer, and that search in blocks is exact. OUT gets large-index.json and large-index.png; the
documents, the model and the index are made in a temporary folder and removed.

  python -m eval large-index --documents 1000000 --output OUT
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from tokenizers import pre_tokenizers, trainers
from tokenizers.models import BPE

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.cli.options import positive, seed
from sgpt_jax.decoder.sharding import device_mesh
from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import read_corpus
from sgpt_jax.files.lines import write_jsonl
from sgpt_jax.index.build import build_index
from sgpt_jax.index.columns import normalized
from sgpt_jax.index.search import Index
from sgpt_jax.reports import EncodeReport
from sgpt_jax.runtime.memory import peak_memory, resident_memory
from sgpt_jax.runtime.progress import progress

from .provenance import provenance
from .results import make_folder, write_result
from .speed.models import END, byte_level, write_random_model

WORDS = 20_000
QUERIES = 64
DEPTH = 10
WIDTH = 96
POINTS = 200  # of the curve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--output", required=True, type=epath.Path, metavar="OUT", help="folder for the results"
    )
    parser.add_argument(
        "--documents", type=positive, default=1_000_000, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="of documents and model (default: 0)"
    )
    parser.add_argument("--store", choices=("float32", "float16", "int8"), default="float32",
                        help="how vectors are kept (default: %(default)s)")  # fmt: skip
    parser.add_argument("--model", help="a model in place of the tiny random decoder")
    parser.add_argument("--mesh", metavar="SPEC", help="devices, such as data=2,fsdp=4,tensor=1")
    parser.add_argument("--width", type=positive, metavar="N",
                        help=f"of the tiny decoder, which has 2 layers (default: {WIDTH})")  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Generates, indexes, searches, and writes what it saw."""
    if args.model and args.width:
        raise InputError("--width is of the tiny decoder, which --model replaces")
    width = args.width or WIDTH
    make_folder(args.output)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        corpus = folder / "corpus.jsonl"
        texts = generate(args.documents, args.seed)
        write_jsonl(corpus, ({"_id": f"d{row}", "text": text} for row, text in enumerate(texts)))
        source = args.model or write_model(folder / "model", width, args.seed)
        model = BiEncoder.from_pretrained(source, mesh=device_mesh(args.mesh))
        result: dict[str, Any] = {
            "documents": args.documents,
            "corpus_bytes": corpus.stat().st_size,
            "seed": args.seed,
            "model": args.model or f"random: 2 layers, {width} wide",
            "store": args.store,
        }
        index, curve = build(folder / "index", corpus, model, args.store, result)
        result["search"] = search(index, model, args.store)
    result |= provenance()
    result["curve"] = curve
    write_result(args.output / "large-index.json", result)
    plot(args.output / "large-index.png", result)
    found = result["search"]
    memory = result["memory_mb"]
    print(
        f"{args.documents} documents in {result['seconds']} s: {result['documents_per_second']} documents/s, "
        f"{result['tokens_per_second']} tokens/s; {result['waited']:.1%} of the time spent waiting for the tokenizer; "
        f"memory from {memory['at a tenth']} MB at a tenth to {memory['at nine tenths']} MB at nine tenths; "
        f"{found['queries']} queries in {found['seconds']} s, {found['exact']:.1%} of the hits as by brute force"
    )


def generate(count: int, seed: int) -> Iterator[str]:
    """Texts of 5 to 20 made-up words whose frequencies fall as in a language (Zipf), the same for a seed."""
    draw = np.random.default_rng(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "is")]
    words = np.array(["".join(draw.choice(syllables, size)) for size in draw.integers(1, 5, WORDS)])
    shares = 1 / np.arange(2, WORDS + 2)
    steps = np.cumsum(shares / shares.sum())
    for start in range(0, count, 10_000):
        sizes = draw.integers(5, 21, min(10_000, count - start))
        chosen = np.minimum(np.searchsorted(steps, draw.random(sizes.sum())), WORDS - 1)
        for part in np.split(words[chosen], np.cumsum(sizes)[:-1]):
            yield " ".join(part)


def write_model(folder: Path, width: int, seed: int) -> Path:
    """A Llama with random weights and a tokenizer trained on generated text, as a folder."""
    if width % 32:
        raise InputError(f"--width must be a multiple of 32, not {width}")
    bpe = byte_level(BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(generate(20_000, seed), trainer)
    settings = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 32,
        "vocab_size": bpe.get_vocab_size(),
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    write_random_model(settings, bpe, folder, seed=seed)
    return folder


def build(
    folder: Path, corpus: Path, model: BiEncoder, store: Any, result: dict[str, Any]
) -> tuple[Index, list[dict[str, float]]]:
    """The index, built as `sgpt index` does, and the curve; the totals go into the result."""
    report, begin = EncodeReport(), time.perf_counter()
    curve: list[dict[str, float]] = []
    every = max(1, result["documents"] // POINTS)
    with progress("indexing", "doc", result["documents"]) as bar:

        def show(rows: int) -> None:
            bar.update(rows - bar.n)
            if not curve or rows - curve[-1]["documents"] >= every or rows == result["documents"]:
                anonymous, mapped = resident_memory() or (peak_memory(), 0)
                point = {"documents": rows, "seconds": time.perf_counter() - begin, "waited": report.waited}
                point |= {"anonymous_mb": anonymous / 1e6, "mapped_mb": mapped / 1e6}
                curve.append({name: round(value, 2) for name, value in point.items()})

        index = build_index(
            folder,
            read_corpus(corpus),
            lambda chunks: model.encode_chunks(chunks, side="document", report=report),
            dtype=store,
            on_progress=show,
        )
    seconds = time.perf_counter() - begin
    # Before the end, when the reader's table of ids is still there: the one thing that grows with the corpus.
    early, late = (
        next(point["anonymous_mb"] for point in curve if point["documents"] >= share * result["documents"])
        for share in (0.1, 0.9)
    )
    result |= {
        "seconds": round(seconds, 1),
        "documents_per_second": round(report.texts / seconds),
        "tokens_per_second": round(report.tokens / seconds),
        "tokens": report.tokens,
        "tokens_padded": report.tokens_padded,
        "waited": round(report.waited / seconds, 4),
        "memory_mb": {
            "at a tenth": early,
            "at nine tenths": late,
            "most": max(point["anonymous_mb"] for point in curve),
            "peak with mapped files": round(peak_memory() / 1e6, 1),
        },
        "index_bytes": index.info()["bytes"],
        "recall": index.info()["recall"],
    }
    return index, curve


def search(index: Index, model: BiEncoder, store: str) -> dict[str, Any]:
    """Documents spread over the index as queries: exact search in blocks, and numpy's over the same vectors."""
    rows = np.arange(min(QUERIES, len(index))) * len(index) // min(QUERIES, len(index))
    queries = model.encode_query(index.texts(rows))
    index.search(queries, DEPTH)  # compiles
    begin = time.perf_counter()
    scores, found = index.search(queries, DEPTH)
    seconds = time.perf_counter() - begin
    wanted = np.zeros((len(queries), 0), np.float32)
    step = 1 << 15
    for start in range(0, len(index), step):
        block = index.vectors(np.arange(start, min(start + step, len(index))))
        wanted = -np.sort(-np.concatenate([wanted, normalized(queries) @ block.T], axis=1), axis=1)[:, :DEPTH]
    return {
        "queries": len(queries),
        "k": DEPTH,
        "seconds": round(seconds, 3),
        "exact": float(
            np.mean(np.abs(scores - wanted) < 1e-4 if store == "int8" else np.abs(scores - wanted) < 1e-5)
        ),
        "itself_first": float(np.mean([row in hits for row, hits in zip(rows, found[:, :1], strict=True)])),
    }


def plot(path: epath.Path, result: dict[str, Any]) -> None:
    """Memory and time over documents."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    documents = [point["documents"] for point in result["curve"]]
    figure, (memory, speed) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    memory.plot(documents, [point["anonymous_mb"] for point in result["curve"]], label="the process's own")
    memory.plot(documents, [point["mapped_mb"] for point in result["curve"]], label="mapped files")
    memory.set(ylabel="memory in MB", ylim=(0, None), title=f"sgpt index: {result['documents']:,} documents")
    memory.legend()
    speed.plot(documents, [point["seconds"] for point in result["curve"]], label="elapsed")
    speed.plot(documents, [point["waited"] for point in result["curve"]], label="waiting for the tokenizer")
    speed.set(xlabel="documents", ylabel="seconds", ylim=(0, None))
    speed.legend()
    with tempfile.TemporaryDirectory() as scratch:
        figure.savefig(os.path.join(scratch, "plot.png"), dpi=120)
        path.write_bytes(Path(scratch, "plot.png").read_bytes())
    pyplot.close(figure)
