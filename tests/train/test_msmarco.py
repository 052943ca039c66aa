"""MS MARCO with mined negatives: which are taken, in which order, and what is refused."""

import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from training import write_msmarco

from sgpt_jax.errors import InputError
from train.msmarco import COLLECTION, SCORES, TextTable, open_msmarco, read_scores

DATA = os.environ.get("SGPT_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="SGPT_DATA does not name the folder with the real data sets")


def write(path, *lines):
    path.write_bytes("\n".join(lines).encode() + b"\n")
    return str(path)


RECORDS = [
    {"qid": 3, "pos": [1, 2], "neg": {"bm25": [10, 11, 12, 13], "dense": [12, 14, 15], "other": [39]}},
    {"qid": 7, "pos": [4], "neg": {"bm25": [20], "other": [21], "dense": [22]}},
    {"qid": 5, "pos": [], "neg": {"bm25": [23], "dense": []}},
    {"qid": 5, "pos": [6], "neg": {"bm25": [24], "dense": [], "other": []}},
]
# the positives of query 3 score 9 and 8, so its negatives may score 5 at the most
CE = {
    3: {1: 9.0, 2: 8, 10: 5.5, 11: 5.0, 12: 1.0, 13: -2.0, 14: 4, 15: 3.0, 39: 0.0},
    7: {4: 5.0, 20: 1.0, 21: 1.0, 22: -1.0},
    5: {6: 2.0, 23: 0.0, 24: 0.5},
}


@pytest.mark.parametrize("compress", [False, True])
def test_msmarco_selection(compress, tmp_path):
    folder = write_msmarco(tmp_path / "m", RECORDS, CE, compress)
    data = open_msmarco(folder, per_system=2, systems=("bm25", "dense"), keep_scores=True)
    # 10 is too near the positives; dense gives two new ones beside 12, which bm25 gave; query 5 keeps none
    assert [(query, sorted(negatives)) for query, _, negatives in data.records] == [
        (3, [11, 12, 14, 15]), (7, [20, 22]),
    ]  # fmt: skip
    first = data.get(0, 0)
    assert first.query == "query three"
    assert first.positive == "passage 1"
    assert first.scores == (9.0, CE[3][int(first.negatives[0].split()[1])])
    assert data.get(1, 3).query == "query seven"
    everything = open_msmarco(folder, per_system=1)
    assert [sorted(negatives) for _, _, negatives in everything.records] == [[11, 12, 39], [20, 21, 22]]
    assert everything.get(0, 0).scores is None


def test_msmarco_rotation(tmp_path):
    data = open_msmarco(write_msmarco(tmp_path / "m", RECORDS, CE), systems=("bm25", "dense"), negatives=2)
    rounds = [data.get(0, epoch) for epoch in range(4)]
    assert [example.positive for example in rounds] == ["passage 1", "passage 2"] * 2
    order = [f"passage {key}" for key in data.records[0][2]]
    assert len(order) == 5
    assert [name for example in rounds for name in example.negatives] == (order * 2)[:8]
    assert data.keys(0, 0)[1:] == (1, *data.records[0][2][:2])
    assert data.keys(0, 0)[0] not in range(40)
    # one seed, one order; another seed, another order
    same, other = (open_msmarco(tmp_path / "m", systems=("bm25", "dense"), seed=seed) for seed in (0, 1))
    assert same.records == data.records
    assert [sorted(r[2]) for r in other.records] == [sorted(r[2]) for r in same.records]


def test_msmarco_digest(tmp_path):
    """It knows the texts, the records, and the teacher's scores where they are used."""
    folder = Path(write_msmarco(tmp_path / "m", RECORDS, CE))

    def digests():
        return [open_msmarco(str(folder), keep_scores=keep).digest() for keep in (False, True)]

    first = digests()
    assert digests() == first
    (folder / SCORES).write_bytes(gzip.compress(pickle.dumps(CE | {7: {**CE[7], 21: 1.5}})))
    scored = digests()
    assert scored[0] == first[0] and scored[1] != first[1]
    texts = (folder / COLLECTION).read_text()
    (folder / COLLECTION).write_text(texts.replace("passage 38", "passage 83"))
    assert len({*first, *scored, *digests()}) == 5


def test_msmarco_errors(tmp_path):
    with pytest.raises(InputError, match=r"queries\.train\.tsv is missing"):
        folder = tmp_path / "none"
        folder.mkdir()
        write(folder / COLLECTION, "1\ta")
        open_msmarco(str(folder))
    for number, (records, scores, message) in enumerate(
        [
            ([{"qid": 3}], CE, "line 1"),
            ([RECORDS[1], {**RECORDS[0], "qid": 8}], {**CE, 8: CE[3]}, "line 2: query 8 has no text"),
            ([{**RECORDS[0], "pos": [99]}], {3: {**CE[3], 99: 9.0}}, "passage 99 has no text"),
            (RECORDS, {3: {1: 9.0}}, "no cross-encoder score, for 2"),
            (RECORDS[2:3], CE, "no query has both"),
        ]
    ):
        with pytest.raises(InputError, match=message):
            open_msmarco(write_msmarco(tmp_path / str(number), records, scores))


def test_a_system_that_nobody_has_is_refused(tmp_path):
    folder = write_msmarco(tmp_path / "m", RECORDS, CE)
    with pytest.raises(InputError, match=r"--systems dnese: .* has negatives of bm25, dense, other"):
        open_msmarco(folder, systems=("bm25", "dnese"))


@pytest.mark.parametrize("content", [b"", b"\n\n", gzip.compress(b"", mtime=0)])
def test_a_table_without_texts(content, tmp_path):
    (tmp_path / "t.tsv").write_bytes(content)
    with pytest.raises(InputError, match=r"t\.tsv: holds no texts"):
        TextTable(tmp_path / "t.tsv")


def test_text_table_refuses_other_files(tmp_path):
    for line, message in (("x\ttext", "line 2: not an integer id"), ("no tab", "line 2: an id, a tab")):
        with pytest.raises(InputError, match=message):
            TextTable(Path(write(tmp_path / "t.tsv", "1\ta", line)))
    table = TextTable(Path(write(tmp_path / "t.tsv", "5\ta\tb", "2\té")))
    assert (table[5], table[2], 5 in table, 3 in table) == ("a\tb", "é", True, False)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/sgpt_jax_was_here",))


@pytest.mark.parametrize(
    "value",
    [
        Evil(),
        {1: {2: Evil()}},
        {1: {2: np.float32(1)}},
        {"1": {2: 1.0}},
        {1: {2: "3"}},
        {1: [2]},
        [1],
        {1: {2: True}},
    ],
)
def test_pickles_with_anything_else_are_refused(value, tmp_path):
    path = tmp_path / "scores.pkl"
    path.write_bytes(pickle.dumps(value))
    with pytest.raises(InputError, match=r"scores\.pkl"):
        read_scores(path)


def test_pickle_of_scores(tmp_path):
    path = tmp_path / "scores.pkl"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(CE, protocol))
        assert read_scores(path) == CE
    path.write_bytes(gzip.compress(pickle.dumps(CE))[:-20])
    with pytest.raises(InputError, match="cannot be read"):
        read_scores(path)


@needs_data
def test_msmarco_texts_are_found():
    table = TextTable(Path(f"{DATA}/msmarco_tiny/collection.tsv.gz"))
    assert len(table.ids) == 2_311
    with gzip.open(f"{DATA}/msmarco_tiny/train_triplets.tsv.gz", "rt") as lines:
        for line in lines:
            _, positive, negative = map(int, line.split("\t"))
            assert table[positive]
            assert table[negative]
