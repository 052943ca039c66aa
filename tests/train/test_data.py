"""Examples from files, and what is refused."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from sgpt_jax.errors import InputError
from train.data import Example, ListExamples, nli_triplets, read_nli, read_pairs, text_key

DATA = os.environ.get("SGPT_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="SGPT_DATA does not name the folder with the real data sets")


def write(path, *lines):
    path.write_bytes("\n".join(lines).encode() + b"\n")
    return str(path)


# Pairs


def test_pairs_from_jsonl(tmp_path):
    rows = [
        {"query": "a", "positive": "b"},
        {"query": "c\u2028", "positive": "d", "negatives": ["e", "f"], "scores": [3, 1.5, -2]},
        {"query": "g", "positive": "", "negatives": None, "other": 1}
        | dict.fromkeys(("context", "sentence", "answer_a", "n_answers", "document_b"), "h"),
    ]
    path = write(tmp_path / "x", "\ufeff" + json.dumps(rows[0]) + "\r", "", *map(json.dumps, rows[1:]))
    expected = [
        Example("a", "b"),
        Example("c\u2028", "d", ("e", "f"), (3.0, 1.5, -2.0)),
        Example("g", ""),
    ]
    assert read_pairs(path) == expected
    packed = tmp_path / "packed"
    packed.write_bytes(gzip.compress(Path(path).read_bytes()))
    assert read_pairs(str(packed)) == expected


def test_pairs_from_tsv(tmp_path):
    path = write(tmp_path / "x.tsv", 'a "quoted"\tb', "c\td\te\tf")
    assert read_pairs(path) == [Example('a "quoted"', "b"), Example("c", "d", ("e", "f"))]
    path = write(tmp_path / "y.tsv", "a\tb\tn\t", "c\td\t\t")  # as a spreadsheet fills up its lines
    assert read_pairs(path) == [Example("a", "b", ("n",)), Example("c", "d")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "a"}', "`positive` is missing"),
        ('{"query": 3, "positive": "b"}', "`query`: not a text"),
        ('{"query": "a", "positive": "b", "negatives": 5}', "`negatives`: not a text: 5"),
        ('{"query": "a", "positive": "b", "negatives": [null]}', "`negatives`: not a text: None"),
        ('{"query": "a", "positive": "b", "negatives": ["c"], "scores": [1]}', "`scores`"),
        ('{"query": "a", "positive": "b", "scores": [true]}', "`scores`"),
        ('{"query": "a", "positive": "b", "scores": [NaN]}', "`scores`"),
        ('{"query": "a", ', "broken JSON"),
        ("[1]", "JSON object"),
    ],
)
def test_bad_pairs_name_the_line(line, message, tmp_path):
    path = write(tmp_path / "x.jsonl", '{"query": "a", "positive": "b"}', "", line)
    with pytest.raises(InputError, match=rf"x.jsonl, line 3: .*{message}"):
        read_pairs(path)


def test_spellings_of_training_data(tmp_path):
    expected = [Example("a", "b", ("c", "d"))]
    for query in ("query", "anchor", "question", "sentence1"):
        for positive in ("positive", "pos", "answer", "document", "sentence2"):
            for negatives in ("negatives", "negative", "neg", "hard_negatives", "hard_negative"):
                record = {query: "a", positive: ["b"], negatives: ["c", "d"], "id": 5, "pos_id": ["x"]}
                assert read_pairs(write(tmp_path / "x.jsonl", json.dumps(record))) == expected
    one = {"query": "a", "positive": "b", "negative": "c"}
    assert read_pairs(write(tmp_path / "x.jsonl", json.dumps(one))) == [Example("a", "b", ("c",))]
    assert read_pairs(write(tmp_path / "x.json", json.dumps([one, one]))) == [Example("a", "b", ("c",))] * 2


def test_passages_and_several_positives(tmp_path):
    record = {
        "query_id": "7",
        "query": "a",
        "positive_passages": [
            {"docid": "1", "title": "T", "text": "b"},
            {"docid": "2", "title": "", "text": "c"},
        ],
        "negative_passages": [{"docid": "3", "text": "d"}],
    }
    path = write(tmp_path / "x.jsonl", json.dumps(record))
    assert read_pairs(path) == [Example("a", "T b", ("d",)), Example("a", "c", ("d",))]
    scored = {"query": "a", "pos": ["b", "c"], "neg": ["d", "e"], "pos_scores": [4, 3], "neg_scores": [2, 1]}
    assert read_pairs(write(tmp_path / "y.jsonl", json.dumps(scored))) == [
        Example("a", "b", ("d", "e"), (4.0, 2.0, 1.0)), Example("a", "c", ("d", "e"), (3.0, 2.0, 1.0)),
    ]  # fmt: skip


def test_pairs_from_csv_and_headers(tmp_path):
    expected = [Example('a, "b"', "c", ("d", "e")), Example("f", "g", ("h",))]
    rows = ["query,positive,negative,negative", '"a, ""b""",c,d,e', "f,g,h,"]
    assert read_pairs(write(tmp_path / "x.csv", *rows)) == expected
    rows = ["negative\tanchor\tpositive\tnegative\tsource", 'd\ta, "b"\tc\te\tx', "h\tf\tg\t\tx"]
    assert read_pairs(write(tmp_path / "x.tsv", *rows)) == expected
    for name, lines, message in (
        ("y.csv", ["a,b"], "line 1: a CSV file needs a header that names `query` and `positive`"),
        ("y.tsv", ["query\tanswer\tneg_text", "a\tb\tc"], "line 1: `neg_text` is not a known key"),
        ("z.tsv", ["query\tnegative", "a\tb"], "line 1: query, negative looks like a header, but names no"),
        ("w.tsv", ["query\tpositive", "a\tb\tc"], "line 2: 2 columns are needed, not 3"),
    ):
        with pytest.raises(InputError, match=message):
            read_pairs(write(tmp_path / name, *lines))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"Negatives": ["c"]}, "`Negatives` is not a known key; `negatives`"),
        ({"negatve": ["c"]}, "`negatve` is not a known key; `negatives`"),
        ({"Negattives": ["c"]}, "`Negattives` is not a known key; `negatives`"),
        ({"questoin": "c"}, "`questoin` is not a known key; `question`"),
        ({"neg_texts": ["c"]}, "`neg_texts` is not a known key; `negatives`"),
        ({"hardNegatives": ["c"]}, "`hardNegatives` is not a known key; `hard_negatives`"),
        ({"negative_text_1": "c"}, "`negative_text_1` is not a known key; `negatives`"),
        ({"negative": "b", "negative_1": "c"}, "`negative` and `negative_1` mean the same thing"),
        ({"positives": ["c"]}, "`positives` is not a known key; `positive`"),
        ({"score": 1.0}, "`score` is not a known key; `scores`"),
        ({"pos": "c"}, "`positive` and `pos` mean the same thing, and differ"),
        ({"neg": "c", "hard_negatives": ["d"]}, "`neg` and `hard_negatives` mean the same thing, and differ"),
        ({"label": 0}, "`label`: pairs are all positive"),
        ({"neg": ["c"], "pos_scores": [1]}, "`negative scores` must be a list of 1 numbers"),
        ({"pos_scores": [1, 2]}, "`pos_scores` must be a list of 1 numbers"),
        ({"scores": [1], "pos_scores": [1]}, "`scores` and `pos_scores` or `neg_scores` mean the same"),
        ({"negative_passages": [{"docid": 1}]}, "the record has no `text`"),
    ],
)
def test_training_keys_that_are_refused(more, message, tmp_path):
    path = write(
        tmp_path / "x.jsonl",
        '{"query": "a", "positive": "b"}',
        json.dumps({"query": "a", "positive": "b"} | more),
    )
    with pytest.raises(InputError, match=rf"x\.jsonl, line 2: {message}"):
        read_pairs(path)


def test_no_pairs(tmp_path):
    for name, lines, message in (("one.tsv", ["only one column"], "line 1"), ("empty", [""], "no examples")):
        with pytest.raises(InputError, match=message):
            read_pairs(write(tmp_path / name, *lines))
    with pytest.raises(InputError, match=r"dataset_info\.json"):
        read_pairs(str(tmp_path))
    with pytest.raises(InputError, match="cannot be opened"):
        read_pairs(str(tmp_path / "missing"))


def test_fewer_negatives():
    examples = [Example("a", "b", ("c", "d", "e"), (4.0, 3.0, 2.0, 1.0)), Example("f", "g")]
    assert ListExamples(examples).negatives == 3
    few = ListExamples(examples, 2)
    assert few.negatives == 2
    assert few.get(0, 5) == Example("a", "b", ("c", "d"), (4.0, 3.0, 2.0))
    assert few.get(1, 0) == examples[1]


# Natural language inference

NLI = [
    ("a", "b", "entailment"),
    ("a", "c", "contradiction"),
    (" a ", "d", "contradiction"),
    ("e", "b", "entailment"),
    ("f", "b", "contradiction"),
    ("g", "h", "neutral"),
    ("g", "i", "-"),
    ("g", "j", "entailment"),
]


def test_triplets_have_both_orders():
    """a entails b and contradicts c, d; b is entailed by a, e and contradicts f, in the other order of the pairs."""
    seen, unlike = Counter(), 0
    for seed in range(50):
        triplets = nli_triplets(NLI, seed)
        unlike += triplets[0].negatives != triplets[1].negatives
        assert triplets == nli_triplets(NLI, seed)
        assert len(triplets) == 4  # two for each of the anchors a and b
        for number, (query, positive, negatives, _) in enumerate(triplets):
            anchor, entailed = (query, positive) if number % 2 == 0 else (positive, query)
            assert anchor == "ab"[number // 2]
            assert entailed in {"a": "b", "b": "ae"}[anchor]
            assert len(negatives) == 1
            assert negatives[0] in {"a": "cd", "b": "f"}[anchor]
            seen[number, entailed, negatives] += 1
    assert len(seen) == 2 + 2 + 2 + 2  # every draw occurs, of each triplet by itself
    assert 10 < unlike < 40  # the two of an anchor are drawn apart
    with pytest.raises(InputError, match="no triplets"):
        nli_triplets(NLI[:1], 0)


def test_senteval_folder(tmp_path):
    for split in ("dev", "test"):
        for part, place in (("s1", 0), ("s2", 1), ("labels", 2)):
            text = "\n".join(f"{split} {row[place]}" if place < 2 else row[place] for row in NLI)
            (tmp_path / f"{part}.{split}.gz").write_bytes(gzip.compress(text.encode()))
    assert len(list(read_nli(str(tmp_path)))) == 2 * len(NLI)
    assert next(iter(read_nli(str(tmp_path), "test"))) == ("test a", "test b", "entailment")
    with pytest.raises(InputError, match=r"no s1\.train"):
        list(read_nli(str(tmp_path), "train"))
    (tmp_path / "s2.dev.gz").write_bytes(b"one line")
    with pytest.raises(InputError, match="different numbers of lines"):
        list(read_nli(str(tmp_path)))


def test_allnli_file(tmp_path):
    path = write(
        tmp_path / "AllNLI.tsv",
        "split\tdataset\tfilename\tsentence1\tsentence2\tlabel",
        "train\tSNLI\tx\tone\ttwo\tentailment",
        'dev\tSNLI\tx\tthree\t"four\tneutral',
    )
    assert list(read_nli(path)) == [("one", "two", "entailment")]
    assert list(read_nli(path, "dev")) == [("three", '"four', "neutral")]
    with pytest.raises(InputError, match="line 1"):
        list(read_nli(write(tmp_path / "other.tsv", "a\tb\tc")))
    with pytest.raises(InputError, match="line 2: 6 columns"):
        list(read_nli(write(tmp_path / "short.tsv", Path(path).read_text().split("\n")[0], "a\tb")))


@needs_data
def test_snli_gives_the_known_number_of_triplets():
    triplets = nli_triplets(read_nli(f"{DATA}/snli"), 0)
    assert 11_500 < len(triplets) < 13_000
    assert all(len(t.negatives) == 1 and t.query and t.positive for t in triplets)


# TFDS


def make_tfds(folder, name, features, rows):
    import tensorflow_datasets as tfds

    class Rows(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, disable_shuffling=True, features=tfds.features.FeaturesDict(features(tfds))
            )

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(rows)

    Rows.name = name
    builder = Rows(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare(file_format="array_record")
    return str(builder.data_path)


def test_tfds_nli(tmp_path):
    names = ["entailment", "neutral", "contradiction"]
    rows = [
        {"premise": a, "hypothesis": b, "label": names.index(label)} for a, b, label in NLI if label in names
    ]
    rows.append({"premise": "x", "hypothesis": "y", "label": -1})
    folder = make_tfds(
        tmp_path,
        "nli_rows",
        lambda tfds: {
            "premise": tfds.features.Text(),
            "hypothesis": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=names),
        },
        rows,
    )
    assert list(read_nli(folder)) == [row for row in NLI if row[2] in names]
    assert list(read_nli(folder, "train[:2]")) == NLI[:2]
    with pytest.raises(InputError, match="nowhere"):
        list(read_nli(folder, "nowhere"))


def test_a_folder_of_datasets_is_no_tfds_folder(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(InputError, match=f"is read as hf:{tmp_path}"):
        read_pairs(str(tmp_path))


def test_tfds_pairs(tmp_path):
    folder = make_tfds(
        tmp_path,
        "pair_rows",
        lambda tfds: {
            "query": tfds.features.Text(),
            "positive": tfds.features.Text(),
            "negatives": tfds.features.Sequence(tfds.features.Text()),
        },
        [
            {"query": "å", "positive": "b", "negatives": ["c", "d"]},
            {"query": "e", "positive": "f", "negatives": []},
        ],
    )
    assert read_pairs(folder) == [Example("å", "b", ("c", "d")), Example("e", "f")]
    triplets = make_tfds(
        tmp_path,
        "triplet_rows",
        lambda tfds: dict.fromkeys(("query", "positive", "negative"), tfds.features.Text()),
        [{"query": "a", "positive": "b", "negative": "c"}],
    )
    assert read_pairs(triplets) == [Example("a", "b", ("c",))]


def test_tfds_without_tensorflow():
    import subprocess
    import sys

    code = "import sys; import train.loop, tensorflow_datasets; assert 'tensorflow' not in sys.modules; print('ok')"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert result.stdout == "ok\n", result.stderr


def test_text_key():
    assert text_key(" Ab c\n") == text_key("aB C")
    keys = {text_key(str(number)) for number in range(10_000)}
    assert len(keys) == 10_000
    assert min(keys) < 0 < max(keys) < 2**63
