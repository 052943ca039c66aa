"""A model and data for runs as a whole."""

import numpy as np
import pytest
from training import WORDS, write_model

from sgpt_jax.files.lines import write_jsonl


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model("gpt_neo", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    draw = np.random.default_rng(0)
    text = lambda: " ".join(draw.choice(WORDS, draw.integers(2, 8)))  # noqa: E731
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    write_jsonl(
        path, [{"query": text(), "positive": text(), "negatives": [text()] * (i % 3)} for i in range(30)]
    )
    return str(path)


@pytest.fixture(scope="module")
def sts(tmp_path_factory):
    draw = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("sts") / "dev.csv"
    rows = [("g", "f", "y", str(i), f"{draw.uniform(0, 5):.2f}", *draw.choice(WORDS, 2)) for i in range(20)]
    path.write_text("\n".join("\t".join(row) for row in rows) + "\n")
    return str(path)
