"""Training examples from files: pairs and triplets, natural language inference, and prepared TFDS folders.

An example is a query, one positive, and any number of hard negatives. MS MARCO is in `train.msmarco`; how
examples become batches is in `train.batches`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from etils import epath

from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import display_name, fix_surrogates, line_error, parse_json, read_lines


class Example(NamedTuple):
    """What one row of a batch is made of.

    Attributes:
        query: the text that searches (in symmetric data: the anchor).
        positive: a text that it must find.
        negatives: texts that it must not find.
        scores: a teacher's scores of the positive and of each negative, for distillation; None where there
            are none.
    """

    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    scores: tuple[float, ...] | None = None


class ExampleSource(Protocol):
    """Examples by number. What an example holds may change from epoch to epoch (rotating negatives)."""

    negatives: int  # the most that an example has

    def __len__(self) -> int: ...

    def get(self, index: int, epoch: int) -> Example:
        """The example with its texts."""
        ...

    def keys(self, index: int, epoch: int) -> tuple[int, ...]:
        """Identities of the example's texts, cheaper than the texts; two examples that share one share a text."""
        ...


def text_key(text: str) -> int:
    """A 64-bit identity of a text, without regard to case and outer white space (as the SGPT repository compares)."""
    digest = hashlib.blake2b(text.strip().lower().encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class ListExamples:
    """Examples in memory, the same in every epoch.

    Args:
        examples: all of them.
        negatives: use at most that many of an example's negatives; None uses all.
    """

    def __init__(self, examples: Iterable[Example], negatives: int | None = None):
        self.examples = [
            example._replace(
                negatives=example.negatives[:negatives],
                scores=None if example.scores is None else example.scores[: 1 + negatives],
            )
            if negatives is not None and len(example.negatives) > negatives
            else example
            for example in examples
        ]
        self.negatives = max((len(example.negatives) for example in self.examples), default=0)
        self._keys: dict[int, tuple[int, ...]] = {}

    def __len__(self) -> int:
        return len(self.examples)

    def get(self, index: int, epoch: int) -> Example:
        return self.examples[index]

    def keys(self, index: int, epoch: int) -> tuple[int, ...]:
        if index not in self._keys:
            query, positive, negatives, _ = self.examples[index]
            self._keys[index] = tuple(text_key(text) for text in (query, positive, *negatives))
        return self._keys[index]


def read_pairs(source: str, split: str | None = None) -> list[Example]:
    """Reads pairs and triplets.

    Args:
        source: a JSONL file with `query`, `positive`, `negatives` (a list, may be missing) and perhaps
            `scores` (of the positive, then of each negative); a TSV file with the columns query, positive and
            any number of negatives (quotes are plain characters); or a TFDS source (see `open_tfds`) with the
            features of the JSONL file, or `negative` in place of `negatives`.
        split: of a TFDS source; "train" by default.

    Raises:
        InputError: naming file and line.
    """
    if is_tfds(source):
        return [_tfds_example(source, row) for row in open_tfds(source, split)]
    if epath.Path(source).is_dir():
        raise InputError(
            f"{source}: is a folder, but not a prepared TFDS data set: dataset_info.json is missing"
        )
    examples: list[Example] = []
    is_json = False
    for line, text in read_lines(source):
        is_json = text.lstrip().startswith("{") if not examples else is_json
        if is_json:
            examples.append(_json_example(source, line, text))
            continue
        cells = text.split("\t")
        if len(cells) < 2:
            raise line_error(source, line, "a query and a positive are needed, with a tab between them")
        examples.append(Example(cells[0], cells[1], tuple(cells[2:])))
    if not examples:
        raise InputError(f"{display_name(source)}: holds no examples")
    return examples


def _json_example(path: str, line: int, text: str) -> Example:
    try:
        row = parse_json(text)
    except ValueError as error:
        raise line_error(path, line, f"broken JSON: {error}") from None
    if not isinstance(row, dict):
        raise line_error(path, line, f"a JSON object is needed, not {text[:40]!r}")
    try:
        return _make_example(row)
    except ValueError as error:
        raise line_error(path, line, str(error)) from None


def _make_example(row: dict[str, Any]) -> Example:
    negatives = row.get("negatives")
    negatives = [] if negatives is None else negatives
    if not isinstance(negatives, list):
        raise ValueError(f"`negatives` must be a list of texts, not {negatives!r:.60}")
    texts = []
    for name, value in [
        ("query", row.get("query")),
        ("positive", row.get("positive")),
        *(("negatives", text) for text in negatives),
    ]:
        if not isinstance(value, str):
            raise ValueError(
                f"`{name}` is missing" if value is None else f"`{name}`: not a text: {value!r:.60}"
            )
        texts.append(fix_surrogates(value))
    scores = row.get("scores")
    if scores is not None:
        numbers = isinstance(scores, list) and all(
            isinstance(score, int | float) and not isinstance(score, bool) and np.isfinite(score)
            for score in scores
        )
        if not numbers or len(scores) != 1 + len(negatives):
            raise ValueError("`scores` must be a list of numbers: the positive's, then one for each negative")
        scores = tuple(float(score) for score in scores)
    return Example(texts[0], texts[1], tuple(texts[2:]), scores)


def _tfds_example(source: str, row: dict[str, Any]) -> Example:
    row = {name: _decoded(value) for name, value in row.items()}
    if "negatives" not in row and "negative" in row:
        row["negatives"] = [row["negative"]]
    try:
        return _make_example(row)
    except ValueError as error:
        raise InputError(f"{source}: {error} (features: {', '.join(row)})") from None


def _decoded(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray | list):
        return [_decoded(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def is_tfds(source: str) -> bool:
    """Tells whether a source is meant for `open_tfds`."""
    return source.startswith("tfds:") or (epath.Path(source) / "dataset_info.json").exists()


def open_tfds(source: str, split: str | None = None) -> Sequence[dict[str, Any]]:
    """A random-access view of a tensorflow-datasets split; TensorFlow is neither needed nor imported.

    Args:
        source: a prepared folder that holds dataset_info.json (written with file_format="array_record"), or
            "tfds:NAME" for a data set of the TFDS catalogue, which is downloaded and prepared when it is not
            there.
        split: "train" by default; sub-splits such as "train[:10%]" work.

    Raises:
        InputError: no such data set or split, or a folder in another file format.
    """
    import tensorflow_datasets as tfds

    split = split or "train"
    try:
        if source.startswith("tfds:"):
            builder = tfds.builder(source.removeprefix("tfds:"), file_format="array_record")
            builder.download_and_prepare(file_format="array_record")
        else:
            builder = tfds.builder_from_directory(source)
        return builder.as_data_source(split=split)
    except Exception as error:  # TFDS raises whatever the layer below it raises
        raise InputError(f"{source}, split {split!r}: {type(error).__name__}: {error}") from error


# The order of the labels in TFDS's and Hugging Face's SNLI and MultiNLI.
NLI_LABELS = ("entailment", "neutral", "contradiction")


def read_nli(source: str, split: str | None = None) -> Iterator[tuple[str, str, str]]:
    """Yields (premise, hypothesis, label) of natural language inference data.

    Args:
        source: the file AllNLI.tsv.gz of sbert.net (columns split, sentence1, sentence2, label); a folder
            with `s1.NAME`, `s2.NAME` and `labels.NAME` (one text a line, gzip or not; SentEval's form); or a
            TFDS source with the features premise, hypothesis and label, such as "tfds:snli".
        split: which split; by default train, and of a SentEval folder every one that is there.

    Raises:
        InputError: naming file and line.
    """
    folder = epath.Path(source)
    if is_tfds(source):
        for row in open_tfds(source, split):
            label = int(row["label"])  # -1: the annotators did not agree
            if 0 <= label < len(NLI_LABELS):
                yield _decoded(row["premise"]), _decoded(row["hypothesis"]), NLI_LABELS[label]
    elif folder.is_dir():
        yield from _read_senteval(folder, split)
    else:
        yield from _read_allnli(source, split or "train")


def _read_senteval(folder: epath.Path, split: str | None) -> Iterator[tuple[str, str, str]]:
    found = sorted(path.name.removeprefix("s1.") for path in folder.glob("s1.*"))
    chosen = [name for name in found if split is None or name.removesuffix(".gz") == split]
    if not chosen:
        raise InputError(f"{folder}: no s1.{split or 'NAME'} in it (found: {', '.join(found) or 'none'})")
    for name in chosen:
        paths = [folder / f"{part}.{name}" for part in ("s1", "s2", "labels")]
        columns = [[text for _, text in read_lines(path)] for path in paths]
        if len({len(column) for column in columns}) > 1:
            counts = ", ".join(
                f"{path.name} {len(column)}" for path, column in zip(paths, columns, strict=True)
            )
            raise InputError(f"{folder}: the files have different numbers of lines: {counts}")
        yield from zip(*columns, strict=True)


def _read_allnli(path: str, split: str) -> Iterator[tuple[str, str, str]]:
    order: list[int] | None = None
    columns = 0
    for line, text in read_lines(path):
        cells = text.split("\t")
        if order is None:
            columns = len(cells)
            try:
                order = [cells.index(name) for name in ("sentence1", "sentence2", "label", "split")]
            except ValueError:
                raise line_error(
                    path, line, "the columns split, sentence1, sentence2, label are needed"
                ) from None
            continue
        if len(cells) != columns:
            raise line_error(path, line, f"{columns} columns are needed, not {len(cells)}")
        first, second, label, its_split = (cells[place] for place in order)
        if its_split == split:
            yield first, second, label


def nli_triplets(rows: Iterable[tuple[str, str, str]], seed: int) -> list[Example]:
    """Triplets with a contradiction as hard negative, made as the SGPT repository makes them of AllNLI.

    Every pair counts in both orders. An anchor that has at least one entailment and one contradiction gives
    two triplets, each from draws of its own: (anchor, entailment, contradiction) and (entailment, anchor,
    contradiction).

    Args:
        rows: (premise, hypothesis, label); labels other than the three of NLI are passed over.
        seed: of the draws (the repository has none).

    Raises:
        InputError: no triplet can be made.
    """
    # Dictionaries as ordered sets: the draws must not depend on Python's hash seed.
    anchors: dict[str, dict[str, dict[str, None]]] = {}
    for first, second, label in rows:
        if label not in NLI_LABELS:
            continue
        first, second = first.strip(), second.strip()
        for anchor, other in ((first, second), (second, first)):
            anchors.setdefault(anchor, {name: {} for name in NLI_LABELS})[label][other] = None
    draw = np.random.default_rng(seed)
    triplets = []
    for anchor, texts in anchors.items():
        entailed, contradicted = list(texts["entailment"]), list(texts["contradiction"])
        if not entailed or not contradicted:
            continue
        picks = [draw.integers(len(options)) for options in (entailed, contradicted) * 2]
        triplets.append(Example(anchor, entailed[picks[0]], (contradicted[picks[1]],)))
        triplets.append(Example(entailed[picks[2]], anchor, (contradicted[picks[3]],)))
    if not triplets:
        raise InputError("no text has both an entailed and a contradicted partner, so there are no triplets")
    return triplets
