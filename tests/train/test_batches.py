"""Batches: who is in them, on which process, and from where they go on; and BM25 mining."""

import json
import os

import decoders
import numpy as np
import pytest

from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import write_jsonl
from sgpt_jax.packing.rows import most_texts
from sgpt_jax.text.encoder import TextEncoder
from sgpt_jax.text.tokenizer import load_tokenizer
from train.__main__ import main
from train.batches import BatchPlan, PackedBatches, iterate
from train.data import Example, ListExamples, read_pairs
from train.mine import Limits, mine

DATA = os.environ.get("SGPT_DATA")


def examples(count, texts=10**6, seed=0):
    draw = np.random.default_rng(seed)
    pick = lambda: f"text {draw.integers(texts)}"  # noqa: E731
    return ListExamples([Example(pick(), pick(), (pick(),)) for _ in range(count)])


def plan(source, size, **options):
    return BatchPlan(source, size, **{"seed": 1, "shuffle": True, "no_duplicates": False, **options})


def test_every_example_once_an_epoch():
    for options in ({}, {"shuffle": False}, {"no_duplicates": True}):
        batches = plan(examples(23), 5, **options)
        places = np.concatenate([batches[step] for step in range(23)])  # 5 epochs
        assert sorted(places.tolist()) == list(range(5 * 23))
    assert plan(examples(23), 5, shuffle=False)[1].tolist() == [5, 6, 7, 8, 9]
    assert plan(examples(23), 5, shuffle=False).split(2 * 23 + 4) == (4, 2)


def test_the_plan_depends_on_the_seed_alone():
    one, two = (plan(examples(23, 30), 5, no_duplicates=True) for _ in range(2))
    late = two[9].tolist()  # asked for out of order
    assert [one[step].tolist() for step in range(10)] == [two[step].tolist() for step in range(10)]
    assert one[9].tolist() == late
    other = plan(examples(23, 30), 5, no_duplicates=True, seed=2)
    assert [other[step].tolist() for step in range(3)] != [one[step].tolist() for step in range(3)]


def test_no_text_twice_in_a_batch():
    source = examples(200, texts=300)
    free, strict = (plan(source, 16, no_duplicates=option) for option in (False, True))

    def repeats(batches, step):
        texts = [text for place in batches[step] for text in set(source.keys(*batches.split(place)))]
        return len(texts) - len(set(texts))

    assert sum(repeats(free, step) for step in range(12)) > 10
    assert all(repeats(strict, step) == 0 for step in range(12))
    # those that had to wait come soon: nothing is lost over the epochs
    places = np.concatenate([strict[step] for step in range(60)])
    counts = np.bincount(places[places < 200], minlength=200)
    assert counts.tolist() == [1] * 200


def test_impossible_batches():
    with pytest.raises(InputError, match="3 examples do not fill a batch of 4"):
        plan(examples(3), 4)
    same = ListExamples([Example("a", "b")] * 5)
    with pytest.raises(InputError, match="repeat too often"):
        plan(same, 2, no_duplicates=True)[0]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(decoders.write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def packed(source, tokenizer, size=6, *, length=32, brackets=False, batches=None, **options):
    encoder = TextEncoder(tokenizer, length, brackets)
    options = {"vocab_size": 384, "symmetric": False, "steps": 20, **options}
    return PackedBatches(batches or plan(source, size, no_duplicates=True), encoder, **options)


def text_at(batch, index, room):
    row, text = divmod(int(index), room)
    return batch["rows"].input_ids[row][batch["rows"].segments[row] == text + 1].tolist()


@pytest.mark.filterwarnings("ignore:.*were cut")
def test_arrays_of_a_batch(tokenizer):
    source = ListExamples(
        [
            Example("one", "two words", ("n1", "n2")),
            Example("Two Words ", "three"),
            Example("", "x" * 500, ("n3",)),
        ]
    )
    batches = packed(source, tokenizer, brackets=True, batches=plan(source, 3, shuffle=False), scores=False)
    batch = batches[0]
    room, encoder = most_texts(32), batches.encoder
    expected = {
        side: encoder.ids([getattr(e, name) for e in source.examples], side)
        for side, name in (("query", "query"), ("document", "positive"))
    }
    for column, side in enumerate(("query", "document")):
        assert [text_at(batch, p, room) for p in batch["indices"][column]] == expected[side]
    assert batch["negative_mask"].tolist() == [[True, True], [False, False], [True, False]]
    present = [text_at(batch, p, room) for p in batch["indices"][2][batch["negative_mask"]]]
    assert present == encoder.ids(["n1", "n2", "n3"], "document")
    assert len(expected["document"][2]) == 32  # cut, its bracket kept
    queries, positives, negatives = batch["ids"]
    assert queries[1].tolist() == positives[0].tolist()
    assert negatives.shape == (3, 2, 2)
    assert batch["examples"] == [0, 1, 2]
    assert batch["tokens"] == (batch["rows"].segments > 0).sum()
    symmetric = packed(
        source, tokenizer, brackets=True, batches=plan(source, 3, shuffle=False), symmetric=True
    )[0]
    assert text_at(symmetric, symmetric["indices"][0][0], room) == encoder.ids(["one"])[0]


def test_a_text_of_several_lists_is_tokenised_once(tokenizer):
    shared = ("n one", "n two", "p one")
    source = ListExamples([Example(f"q {n}", "p one", shared) for n in range(4)])
    batches = packed(source, tokenizer, batches=plan(source, 4, shuffle=False))
    seen: list[str] = []
    ids = batches.encoder.ids
    batches.encoder.ids = lambda texts, *side: seen.extend(texts) or ids(texts, *side)
    batch = batches[0]
    assert sorted(seen) == ["n one", "n two", "p one", "q 0", "q 1", "q 2", "q 3"]
    room = most_texts(32)
    expected = ids(list(shared), "document")
    for places in batch["indices"][2]:
        assert [text_at(batch, place, room) for place in places] == expected


def test_processes_agree_on_the_length_of_rows(tokenizer):
    """Whatever the longest text is that each of them sees."""
    source = ListExamples([Example("q" * 10, "x" * 900), Example("r" * 10, "y" * 500)])
    options = {"length": 1024, "batches": plan(source, 2, shuffle=False)}
    parts = [packed(source, tokenizer, process=(number, 2), **options)[0] for number in range(2)]
    assert {part["rows"].segments.shape[1] for part in parts} == {1024}


def test_processes_share_the_global_batch(tokenizer):
    source = examples(50)
    whole = packed(source, tokenizer)
    parts = [packed(source, tokenizer, process=(number, 3)) for number in range(3)]
    for step in range(4):
        mine_ = sorted(index for part in parts for index in part[step]["examples"])
        assert mine_ == sorted(whole[step]["examples"])
        assert all(len(part[step]["indices"][0]) == 2 for part in parts)


def test_iteration_goes_on_where_it_was(tokenizer):
    source = examples(50)
    iterator = iterate(packed(source, tokenizer))
    seen = [next(iterator)["examples"] for _ in range(5)]
    state = json.loads(json.dumps(iterator.get_state()))
    rest = [batch["examples"] for batch in iterator]
    assert len(seen) + len(rest) == 20
    again = iterate(packed(source, tokenizer))
    again.set_state(state)
    assert [batch["examples"] for batch in again] == rest


def test_scores_and_foreign_tokenizers(tokenizer):
    source = ListExamples([Example("a", "b", ("c",), (2.0, 1.0)), Example("d", "e", (), (3.0,))])
    batches = plan(source, 2, shuffle=False)
    values = packed(source, tokenizer, batches=batches, scores=True)[0]["scores"]
    assert values.tolist() == [[2.0, 1.0], [3.0, 0.0]]
    without = ListExamples([Example("a", "b"), Example("c", "d")])
    with pytest.raises(InputError, match="no `scores`"):
        packed(without, tokenizer, batches=plan(without, 2), scores=True)[0]
    with pytest.raises(InputError, match="does not belong"):
        packed(source, tokenizer, batches=batches, vocab_size=3)[0]


def test_mining(tmp_path):
    documents = {
        "1": "cats purr softly", "2": "cats hunt mice", "3": "dogs bark loudly", "4": "cats sleep all day",
        "5": "mice eat cheese", "6": "the moon rises",
    }  # fmt: skip
    queries = {"q": "do cats purr", "r": "when does the moon rise", "s": "unjudged", "t": "dogs bark"}
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": i, "text": t} for i, t in documents.items()])
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": i, "text": t} for i, t in queries.items()])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels/train.tsv").write_text("q\t1\t1\nr\t6\t2\nq\t4\t1\nt\t3\t0\n")
    found = set()
    for seed in range(4):
        mine(str(tmp_path), str(tmp_path / "out.jsonl"), "train", 1, Limits(2), seed)
        mined = read_pairs(str(tmp_path / "out.jsonl"))
        assert [(e.query, e.positive) for e in mined] == [
            (queries["q"], documents["1"]), (queries["q"], documents["4"]), (queries["r"], documents["6"]),
        ]  # fmt: skip
        assert (
            mined[0].negatives == mined[1].negatives == (documents["2"],)
        )  # the one other document with cats
        found.add(mined[2].negatives)
    assert len(found) > 1  # no words in common: any document but the relevant one
    with pytest.raises(InputError, match="--negatives"):
        mine(str(tmp_path), str(tmp_path / "out.jsonl"), "train", 3, Limits(2), 0)
    (tmp_path / "qrels/empty.tsv").write_text("t\t3\t0\n")
    with pytest.raises(InputError, match="no query"):
        mine(str(tmp_path), str(tmp_path / "out.jsonl"), "empty", 1, Limits(2), 0)


def test_mining_leaves_out_what_is_skipped(tmp_path, capsys):
    """Even where no other document shares a word with the query; and the data set itself is not written over."""
    documents = {"1": "cats purr", "2": "cats purr at mice", "3": "cats", "4": "dogs", "5": "the moon"}
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": i, "text": t} for i, t in documents.items()])
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "q", "text": "do cats purr"}])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels/train.tsv").write_text("q\t1\t1\n")
    for seed in range(4):
        mine(str(tmp_path), str(tmp_path / "out.jsonl"), "train", 2, Limits(skip=2), seed)
        (mined,) = read_pairs(str(tmp_path / "out.jsonl"))
        assert set(mined.negatives) == {"dogs", "the moon"}
    before = (tmp_path / "corpus.jsonl").read_bytes()
    assert main(["mine", "--data", str(tmp_path), "--output", str(tmp_path / "corpus.jsonl")]) == 1
    assert "is a file of --data" in capsys.readouterr().err
    assert (tmp_path / "corpus.jsonl").read_bytes() == before


def test_mining_ranks_as_evaluation_does(tmp_path):
    """Words are stemmed: "sleeping" finds "sleeps", and no document that shares nothing is drawn."""
    documents = {"1": "the cats", "2": "it sleeps", "3": "a dog", "4": "the moon"}
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": i, "text": t} for i, t in documents.items()])
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "q", "text": "cat sleeping"}])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels/train.tsv").write_text("q\t1\t1\n")
    for seed in range(3):
        mine(str(tmp_path), str(tmp_path / "out.jsonl"), "train", 1, Limits(2), seed)
        assert read_pairs(str(tmp_path / "out.jsonl")) == [
            Example("cat sleeping", "the cats", ("it sleeps",))
        ]


class ByAngle:
    """A bi-encoder of texts that are numbers: their cosine falls with their distance."""

    similarity_name = "cosine"

    def encode_query(self, texts, **_):
        return np.array([[np.cos(float(text)), np.sin(float(text))] for text in texts], np.float32)

    encode_document = encode_query


def mined_by_angle(folder, limits, negatives=2):
    mine(str(folder), str(folder / "out.jsonl"), "train", negatives, limits, 0, ByAngle())
    return [(e.positive, set(e.negatives)) for e in read_pairs(str(folder / "out.jsonl"))]


def test_mining_with_a_model(tmp_path, capsys):
    """Ranks, the positive's margin and limits of the score; what is judged relevant is never a negative."""
    documents = [0.5, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7]
    write_jsonl(
        tmp_path / "corpus.jsonl", [{"_id": f"d{n}", "text": str(t)} for n, t in enumerate(documents)]
    )
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "q", "text": "0"}])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels/train.tsv").write_text("q\td0\t1\nq\td2\t1\n")  # at 0.5 and 0.2
    assert mined_by_angle(tmp_path, Limits(2)) == [("0.5", {"0.1", "0.3"}), ("0.2", {"0.1", "0.3"})]
    assert mined_by_angle(tmp_path, Limits(3, skip=1)) == [("0.5", {"0.3", "0.4"}), ("0.2", {"0.3", "0.4"})]
    # Below the cosine of the positive by this much: cos 0.5 is 0.878, cos 0.2 0.980.
    found = dict(mined_by_angle(tmp_path, Limits(5, margin=0.05), negatives=5))
    assert found == {"0.5": {"0.6", "0.7"}, "0.2": {"0.4", "0.6", "0.7"}}
    assert "2 of them with fewer than 5 negatives" in capsys.readouterr().out
    limits = Limits(5, lowest=float(np.cos(0.65)), highest=float(np.cos(0.35)))
    assert dict(mined_by_angle(tmp_path, limits)) == {"0.5": {"0.4", "0.6"}, "0.2": {"0.4", "0.6"}}
    with pytest.raises(InputError, match="left as a negative"):
        mined_by_angle(tmp_path, Limits(5, lowest=0.9999))


def test_mining_by_words_with_a_margin(tmp_path):
    """A positive without the query's words scores 0, and nothing is below that."""
    documents = {"1": "cats purr", "2": "cats hunt mice", "3": "cats", "4": "dogs"}
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": i, "text": t} for i, t in documents.items()])
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "q", "text": "cats purr"}])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels/train.tsv").write_text("q\t1\t1\nq\t4\t1\n")
    mine(str(tmp_path), str(tmp_path / "out.jsonl"), "train", 2, Limits(3, margin=0.01), 0)
    mined = {e.positive: set(e.negatives) for e in read_pairs(str(tmp_path / "out.jsonl"))}
    assert mined == {"cats purr": {"cats", "cats hunt mice"}, "dogs": set()}
    assert main(["mine", "--data", str(tmp_path), "--output", str(tmp_path / "x"), "--brackets"]) == 1


class ByLength(ByAngle):
    """The same, but not of length 1, and with the dot product: long documents score high."""

    similarity_name = "dot"

    def encode_document(self, texts, normalize=False, **_):
        vectors = self.encode_query(texts)
        return (
            vectors if normalize else vectors * np.array([[10 * float(text)] for text in texts], np.float32)
        )


def test_mining_by_the_dot_product(tmp_path):
    """The positive is scored as the others are: 0.5 has 4.39, 0.4 has 3.68, and 0.7, with 5.35, is above it."""
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": str(n), "text": str(n)} for n in (0.1, 0.4, 0.5, 0.7)])
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "q", "text": "0"}])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels/train.tsv").write_text("q\t0.5\t1\n")
    mine(str(tmp_path), str(tmp_path / "out.jsonl"), "train", 3, Limits(3, margin=0.5), 0, ByLength())
    (mined,) = read_pairs(str(tmp_path / "out.jsonl"))
    assert set(mined.negatives) == {"0.1", "0.4"}


@pytest.mark.parametrize("by_score", [False, True])
@pytest.mark.parametrize("name", ["quora", "others"])
def test_mining_finds_no_copies(name, by_score, tmp_path):
    """Of the query or a positive, under whatever id; under the query's own id any text, where evaluation has it so."""
    documents = {
        "1": "do cats purr", "2": "cats purr", "3": "Cats purr ", "4": "DO cats purr", "5": "dogs purr", "6": "cats",
        "7": "cats purr at dogs",
    }  # fmt: skip
    folder = tmp_path / name
    (folder / "qrels").mkdir(parents=True)
    write_jsonl(folder / "corpus.jsonl", [{"_id": i, "text": t} for i, t in documents.items()])
    write_jsonl(folder / "queries.jsonl", [{"_id": "7", "text": "do cats purr"}])
    (folder / "qrels/train.tsv").write_text("7\t2\t1\n")
    limits = Limits(3, lowest=0.0) if by_score else Limits(3)
    mine(str(folder), str(tmp_path / "out.jsonl"), "train", 3, limits, 0)
    (mined,) = read_pairs(str(tmp_path / "out.jsonl"))
    kept = {"dogs purr", "cats"} | ({"cats purr at dogs"} if name == "others" else set())
    assert set(mined.negatives) == kept


@pytest.mark.skipif(not DATA, reason="SGPT_DATA does not name the folder with the real data sets")
def test_mining_scifact(tmp_path):
    mine(f"{DATA}/scifact", str(tmp_path / "out.jsonl"), "train", 2, Limits(30), 0)
    mined = read_pairs(str(tmp_path / "out.jsonl"))
    assert len(mined) == 919
    assert all(len(set(e.negatives) - {e.positive}) == 2 for e in mined)
