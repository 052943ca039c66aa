"""From nothing to an answer: commands in processes of their own, with compiled programs and files in their caches."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.corpus_index import index_corpus
from sgpt_jax.files.beir import DataSet

from .benchmark import Benchmark, Run

DOCUMENTS = 60
QUERY = "what lowers the risk of heart disease"

_SGPT = "import sys; from sgpt_jax.cli.parser import main; sys.exit(main(sys.argv[1:]))"
_PEER = """
import sys
from sentence_transformers import SentenceTransformer
print(SentenceTransformer(sys.argv[1], device="cpu").encode(sys.argv[2]).shape)
"""


def start_benchmark(model: BiEncoder, data: DataSet, folder: str, *, alone: bool) -> Benchmark:
    """Seconds to an answer: a search in a small index, beside a query's vector by sentence-transformers.

    Args:
        model: the bi-encoder, which makes the index.
        data: has the documents, of which the first 60 are taken.
        folder: an empty one.
        alone: leave sentence-transformers out.
    """
    root = Path(folder) / "start"
    root.mkdir()
    if not model.source:  # random weights
        model.save_pretrained(root / "made")
        model = BiEncoder.from_pretrained(root / "made", dtype=model.decoder.dtype.name)
    index_corpus(root / "index", list(islice(data.documents(), DOCUMENTS)), model, show_progress=False)
    runs = {
        "ours": _command(_SGPT, "search", root / "index", QUERY),
        "ours, import": _command("import sgpt_jax"),
        "ours, --help": _command(_SGPT, "--help"),
    }
    benchmark = Benchmark(
        work={"answers": 1},
        unit="answers",
        runs=runs,
        flops={"": 0.0},
        dtype=model.decoder.dtype.name,
        compare=_nothing,
    )
    if alone:
        return benchmark
    if importlib.util.find_spec("sentence_transformers"):
        model.save_pretrained(root / "model")
        runs["sentence-transformers"] = _command(_PEER, root / "model", QUERY)
    else:
        benchmark.left_out["sentence-transformers"] = "is not installed"
    return benchmark


def _command(code: str, *arguments: Any) -> Run:
    def run() -> None:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    return run


def _nothing(found: Mapping[str, Any]) -> dict[str, Any]:
    return {}
