"""Made-up data for the evaluation's tests, the same in every process: runs, USEB folders, models without weights."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures/eval"
USEB_FORUMS = ("android", "gis")
SENTENCES = (
    "the cat sat, dogs bark loud, rain falls down, a cat and a dog, snow is cold, the sun is hot, cats purr, "
    "birds fly high, fish swim deep, rain and snow"
)
COMPUTER_WORDS = "apt boot card disk file grub home kernel lan mount net port root shell tar user"
EVERYDAY_WORDS = "a man woman dog plays guitar runs the street red ball with and eats"


def hard_case(seed: int = 0) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, float]]]:
    """Judgements and a run with all that metrics stumble over.

    Ties (few distinct scores, also scores that differ in float64 only), grades from -2 to 3, judged documents that
    were not found, a query without hits, documents with the query's own id, more hits than some cuts and fewer than
    others, infinite scores. Every query has a relevant document; ``q2`` has no hit.
    """
    random = np.random.RandomState(seed)
    qrels, run = {}, {}
    for number in range(12):
        query = f"q{number}"
        documents = [f"d{index}" for index in random.permutation(150)]
        grades = random.choice([-2, -1, 0, 1, 2, 3], size=25).tolist()
        qrels[query] = dict(zip(documents[:25], [2, *grades[1:]], strict=True))
        hits = documents[5 : 5 + random.randint(3, 140)]
        levels = [float("-inf"), -1.5, 0.0, 0.25, 1.0, 1.0 + 1e-12, 7.5, float("inf")]
        chances = [0.1, 0.2, 0.2, 0.2, 0.1, 0.1, 0.08, 0.02]
        scores = random.choice(levels, size=len(hits), p=chances)
        good = [qrels[query].get(document, 0) > 0 for document in hits]
        scores[good] = random.choice(levels[4:], size=sum(good))
        run[query] = dict(zip(hits, scores.tolist(), strict=True))
        if number % 3 == 0:
            run[query][query] = 3.0
    del run["q2"]
    return qrels, run


def write_beir(
    folder: Path, corpus: Sequence[dict], queries: Sequence[dict], qrels: str, split: str = "test"
) -> Path:
    """A BEIR folder of JSON records and the text of a judgements file."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, records in (("corpus", corpus), ("queries", queries)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, "utf-8", newline="\n")
    (folder / f"qrels/{split}.tsv").write_text(qrels, "utf-8", newline="\n")
    return folder


def small_beir(folder: Path, split: str = "test") -> Path:
    """Ten short documents and three queries."""
    corpus = [
        {"_id": f"d{i}", "title": f"title {i}", "text": text} for i, text in enumerate(SENTENCES.split(", "))
    ]
    queries = [{"_id": f"q{i}", "text": text} for i, text in enumerate(("cat", "dog bark", "rain snow"))]
    judged = "query-id\tcorpus-id\tscore\nq0\td0\t1\nq0\td6\t2\nq1\td1\t1\nq2\td9\t2\nq2\td2\t1\n"
    return write_beir(folder, corpus, queries, judged, split)


def hash_vector(text: str, dimension: int = 16) -> np.ndarray:
    """A random float32 vector that depends on the text alone; texts that share words are alike."""
    vector = np.zeros(dimension, np.float64)
    for part in (text, *text.split()):
        seed = int.from_bytes(hashlib.sha256(part.encode()).digest()[:4], "little")
        vector += np.random.RandomState(seed).standard_normal(dimension)
    return vector.astype(np.float32)


class HashEncoder:
    """A bi-encoder without weights, with the methods that evaluations call."""

    def __init__(self, dimension: int = 16, similarity_name: str = "cosine") -> None:
        self.dimension, self.similarity_name = dimension, similarity_name
        self.sizes: list[int] = []

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        self.sizes.append(len(texts))
        return np.stack([hash_vector(text, self.dimension) for text in texts])

    encode_query = encode_document = encode


class WordOverlap:
    """A cross-encoder without weights: the share of the query's words that the document has."""

    def __init__(self) -> None:
        self.pairs: list[tuple[str, str]] = []

    def predict(self, pairs: Sequence[tuple[str, str]], **options: Any) -> np.ndarray:
        self.pairs += pairs
        return np.array(
            [
                len(set(query.split()) & set(document.split())) / len(query.split())
                for query, document in pairs
            ],
            np.float32,
        )


def write_useb(folder: Path) -> Path:
    """USEB's data-eval folder in its published layout, small."""
    random = np.random.RandomState(3)
    words = np.array(COMPUTER_WORDS.split())

    def text() -> str:
        return " ".join(random.choice(words, random.randint(2, 6)))

    ask, cqa, para, sci = (folder / name for name in ("askubuntu", "cqadupstack", "twitterpara", "scidocs"))
    for part in (ask, cqa, para, sci):
        part.mkdir(parents=True)
    ids = [str(number) for number in range(100, 140)]
    (ask / "text_tokenized.txt").write_text("".join(f"{id}\t{text()} \t{text()}\n" for id in ids))
    for name in ("dev", "test"):
        lines = []
        for number, question in enumerate(ids[:8]):
            found = random.permutation(ids[8:])[:20].tolist()
            similar = "" if number == 5 else " ".join(found[: random.randint(1, 4)])
            scores = " ".join(str(score) for score in random.choice([1.5, 3.25, 9.0], 20))
            lines.append(f"{question}\t{similar}\t{' '.join(found)}\t{scores}\n")
        (ask / f"{name}.txt").write_text("".join(lines))
    # all different: USEB's top 100 takes any of equal ones
    corpus = {
        forum: {f"{forum}{number}": f"{text()} {number}" for number in range(130)} for forum in USEB_FORUMS
    }
    split = {
        kind: {
            forum: {
                f"{forum}{number}": [f"{forum}{other}" for other in random.permutation(range(10, 130))[:3]]
                for number in range(10)
            }
            for forum in USEB_FORUMS
        }
        for kind in ("valid", "test")
    }
    (cqa / "corpus.json").write_text(json.dumps(corpus))
    (cqa / "retrieval_split.json").write_text(json.dumps(split))
    labels = random.randint(0, 7, 60)
    labels[:4] = [6, 0, 3, 5]
    url = [f"{text()}\t{text()}\t({label}, 6)\thttp://x/{label}\n" for label in labels]
    (para / "Twitter_URL_Corpus_test.txt").write_text("".join(url))
    pit = [f"7\ttopic\t{text()}\t{text()}\t{label % 6}\ttag\ttag\n" for label in labels]
    (para / "test.data").write_text("".join(pit))
    (para / "test.label").write_text("".join(f"{label % 6}\n" for label in labels))
    papers = {
        f"p{number}": {"title": text() if number % 11 else None, "abstract": text()} for number in range(60)
    }
    judged = {
        kind: {
            relation: {
                f"p{number}": {
                    f"p{other}": int(place < 3) for place, other in enumerate(random.permutation(60)[:12])
                }
                for number in range(8)
            }
            for relation in ("cite", "cocite", "coview", "coread")
        }
        for kind in ("valid", "test")
    }
    (sci / "data.json").write_text(json.dumps({"corpus": papers, **judged}))
    return folder


def sts_pairs() -> list[tuple[float, str, str]]:
    """Gold scores and sentence pairs, with equal scores among them."""
    random = np.random.RandomState(5)
    words = np.array(EVERYDAY_WORDS.split())
    sentences = [" ".join(random.choice(words, random.randint(3, 8))) for _ in range(60)]
    scores = random.choice([0.0, 1.2, 2.5, 3.8, 5.0], 30).tolist()
    return list(zip(scores, sentences[0::2], sentences[1::2], strict=True))


class Ready:
    """A loaded model in the place of `eval.models.LazyModel`; `loads` counts how often it is asked for."""

    def __init__(self, model: Any, **identity: Any) -> None:
        self.identity = {"revision": "made up", **identity}
        self.source = "org/fake"
        self.loads = 0
        self._model = model

    @property
    def model(self) -> Any:
        self.loads += 1
        return self._model

    def describe(self) -> dict[str, Any]:
        return {"source": self.source, **self.identity, "parameters": 1000}
