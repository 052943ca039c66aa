"""The numbers that choose a checkpoint."""

import numpy as np
import pytest

pytest.importorskip("pytrec_eval", reason="the eval extra is not installed")

from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import write_jsonl
from train.dev import make_evaluator


class Vectors:
    """A model that knows its texts' vectors by heart."""

    similarity_name = "cosine"

    def __init__(self, table):
        self.table = table

    def encode(self, texts, *, show_progress, normalize=False, batch_tokens=None):
        rows = np.array([self.table[text] for text in texts], np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    encode_query = encode_document = encode


def test_sts(tmp_path):
    path = tmp_path / "dev.csv"
    angles = {"a": 0.0, "b": 0.1, "c": 1.0, "d": 2.5, 'e "': 0.7}
    model = Vectors({text: [np.cos(x), np.sin(x)] for text, x in angles.items()})
    pairs = [("a", "b", 5.0), ("a", "c", 2.0), ("a", "d", 1.0), ("a", 'e "', 3.0)]
    lines = [f"g\tf\ty\t{n}\t{score}\t{x}\t{y}\tmore" for n, (x, y, score) in enumerate(pairs)]
    path.write_text("\n".join(lines))
    evaluator = make_evaluator(str(path), "")
    assert evaluator.name == "cosine Spearman"
    assert evaluator(model) == pytest.approx(1.0)
    # scores 5, 2, 1, 9 for cosines ranked 4, 2, 1, 3: d is 0.1, 0, 0, 1 in ranks -> 1 - 6 * 2 / (4 * 15)
    path.write_text("\n".join([*lines[:3], lines[3].replace("3.0", "9.0")]))
    assert make_evaluator(str(path), "")(model) == pytest.approx(0.8)
    for text, message in (
        ("a\tb\tc", "line 1"),
        ("g\tf\ty\t0\tx\ta\tb", "line 1"),
        (lines[0], "holds 1 pairs"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            make_evaluator(str(path), "")


def test_retrieval(tmp_path):
    """Linear gains over log2 of the rank plus one; a query without a relevant document counts 0."""
    documents = {f"d{n}": f"text {n}" for n in range(14)}
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": i, "text": t} for i, t in documents.items()])
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": f"q{n}", "text": f"query {n}"} for n in range(3)])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels/dev.tsv").write_text("q0\td1\t2\nq0\td3\t1\nq0\td13\t1\nq1\td0\t0\nq9\td0\t1\n")
    # documents by angle: d0 is nearest to the queries, then d1, ...
    table = {text: [np.cos(n / 20), np.sin(n / 20)] for n, text in enumerate(documents.values())}
    model = Vectors(table | {f"query {n}": [1.0, 0.0] for n in range(3)})
    evaluator = make_evaluator(str(tmp_path), "dev")
    assert evaluator.name == "nDCG@10"
    gain = 2 / np.log2(3) + 1 / np.log2(5)
    ideal = 2 / np.log2(2) + 1 / np.log2(3) + 1 / np.log2(4)
    assert evaluator(model) == pytest.approx((gain / ideal + 0) / 2, rel=1e-6)
    (tmp_path / "qrels/none.tsv").write_text("q9\td0\t1\n")
    with pytest.raises(InputError, match="judges no query"):
        make_evaluator(str(tmp_path), "none")
    with pytest.raises(InputError, match=r"holds no missing\.tsv"):
        make_evaluator(str(tmp_path), "missing")
