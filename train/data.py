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
from sgpt_jax.files.columns import DOCUMENT, EXAMPLE, Named
from sgpt_jax.files.corpora import join_title, read_text
from sgpt_jax.files.hub_tables import is_table, label_names, read_rows
from sgpt_jax.files.lines import display_name, fix_surrogates, line_error, read_lines
from sgpt_jax.files.tables import read_table


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

    def with_negatives(self, most: int | None) -> Example:
        """The example with its first negatives, and their scores; None keeps all."""
        if most is None or len(self.negatives) <= most:
            return self
        scores = None if self.scores is None else self.scores[: 1 + most]
        return self._replace(negatives=self.negatives[:most], scores=scores)


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

    def digest(self) -> str:
        """Tells these examples, in this order, from any others."""
        ...


def text_key(text: str) -> int:
    """A 64-bit identity of a text, without regard to case and outer white space (as the SGPT repository compares)."""
    digest = hashlib.blake2b(text.strip().lower().encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def texts_digest(texts: Iterable[str]) -> str:
    """A digest of texts in their order, 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(f"{len(text)}:{text}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def examples_digest(examples: Iterable[Example]) -> str:
    """A digest of examples in their order, scores included."""
    return texts_digest(
        text
        for query, positive, negatives, scores in examples
        for text in (query, positive, *negatives, str(scores))
    )


class ListExamples:
    """Examples in memory, the same in every epoch.

    Args:
        examples: all of them.
        negatives: use at most that many of an example's negatives; None uses all.
    """

    def __init__(self, examples: Iterable[Example], negatives: int | None = None):
        self.examples = [example.with_negatives(negatives) for example in examples]
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

    def digest(self) -> str:
        return examples_digest(self.examples)


def read_pairs(source: str, split: str | None = None) -> list[Example]:
    """Reads pairs and triplets.

    Records name their fields as the table in `sgpt_jax.files.columns` has it: `query`, `positive` and `negatives`, or
    other usual spellings. Positive and negatives are a text, or a list of texts or of passages ({"title", "text"}).
    Each positive makes an example, with all the negatives. `scores` are a teacher's, of the one positive and then of
    each negative; `pos_scores` and `neg_scores` are the same for several positives.

    Args:
        source: JSON lines, a JSON array, CSV, Parquet, or TSV (quotes are plain characters; without a header the
            columns are query, positive and any number of negatives, of which empty cells are none); or a TFDS source
            (see `open_tfds`) with such features.
        split: of a TFDS source; "train" by default.

    Raises:
        InputError: naming file and line.
    """
    examples: list[Example] = []
    if is_tfds(source):
        for features in open_tfds(source, split):
            values = {name: _decoded(value) for name, value in features.items()}
            try:
                examples += examples_of(EXAMPLE.of_object(values))
            except ValueError as error:
                raise InputError(f"{source}: {error} (features: {', '.join(values)})") from None
        return examples
    if epath.Path(source).is_dir():
        raise InputError(
            f"{source}: is a folder, but not a prepared TFDS data set: dataset_info.json is missing"
        )
    for line, row in read_table(source, EXAMPLE, plain="tsv"):
        if isinstance(row, dict):
            try:
                examples += examples_of(row)
            except ValueError as error:
                raise line_error(source, line, str(error)) from None
        elif len(row) < 2:
            raise line_error(source, line, "a query and a positive are needed, with a tab between them")
        else:
            examples.append(Example(row[0], row[1], tuple(filter(None, row[2:]))))
    if not examples:
        raise InputError(f"{display_name(source)}: holds no examples")
    return examples


def examples_of(row: Named) -> list[Example]:
    """The examples of a record.

    Raises:
        ValueError: a field is missing or not what it should be.
    """
    if row.get("label", ("", None))[1] is not None:
        raise ValueError("`label`: pairs are all positive; labelled ones are for the recipe nli")
    queries, positives, negatives = (_texts(row, field) for field in ("query", "positive", "negatives"))
    if len(queries) != 1 or isinstance(row["query"][1], list):
        raise ValueError("`query` is missing" if not queries else f"`{row['query'][0]}` must be one text")
    if not positives:
        raise ValueError("`positive` is missing")
    scores = _scores(row, len(positives), len(negatives))
    return [
        Example(queries[0], positive, negatives, some)
        for positive, some in zip(positives, scores, strict=True)
    ]


def _texts(row: Named, field: str) -> tuple[str, ...]:
    """The texts of a field: one, a list, or a list of passages with titles."""
    key, value = row.get(field, (field, None))
    if value is None:
        return ()
    texts = []
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, dict):
            text = join_title(*read_text(DOCUMENT.of_object(text)))
        if not isinstance(text, str):
            raise ValueError(f"`{key}`: not a text: {text!r:.60}")
        texts.append(fix_surrogates(text))
    return tuple(texts)


def _scores(row: Named, positives: int, negatives: int) -> list[tuple[float, ...] | None]:
    """A teacher's scores for the example of each positive: its own, then those of the negatives."""
    if row.get("scores", ("", None))[1] is not None:
        if "positive scores" in row or "negative scores" in row:
            raise ValueError("`scores` and `pos_scores` or `neg_scores` mean the same thing")
        values = _numbers(row, "scores", 1 + negatives)
        if positives != 1:
            raise ValueError("`scores` are for one positive; `pos_scores` and `neg_scores` for several")
        return [values]
    if "positive scores" not in row and "negative scores" not in row:
        return [None] * positives
    first = _numbers(row, "positive scores", positives)
    return [(score, *_numbers(row, "negative scores", negatives)) for score in first]


def _numbers(row: Named, field: str, count: int) -> tuple[float, ...]:
    key, value = row.get(field, (field, None))
    value = [] if value is None else value
    numbers = isinstance(value, list) and all(
        isinstance(score, int | float) and not isinstance(score, bool) and np.isfinite(score)
        for score in value
    )
    if not numbers or len(value) != count:
        what = "the positive's, then one for each negative" if field == "scores" else "one for each text"
        raise ValueError(f"`{key}` must be a list of {count} numbers: {what}")
    return tuple(float(score) for score in value)


def _decoded(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray | list):
        return [_decoded(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def is_tfds(source: str) -> bool:
    """Tells whether a source is meant for `open_tfds`.

    Raises:
        InputError: it is a folder of `datasets`, which has a file of the same name.
    """
    if any((epath.Path(source) / name).exists() for name in ("state.json", "dataset_dict.json")):
        raise InputError(f"{source}: a folder of `datasets.save_to_disk` is read as hf:{source}")
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
            TFDS source, a Parquet file or a data set of the hub with the features premise, hypothesis and label,
            such as "tfds:snli" or "hf:sentence-transformers/all-nli:pair-class:train".
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
    elif is_table(source):
        yield from _read_nli_table(source, split)
    elif folder.is_dir():
        yield from _read_senteval(folder, split)
    else:
        yield from _read_allnli(source, split or "train")


def _read_nli_table(source: str, split: str | None) -> Iterator[tuple[str, str, str]]:
    names = label_names(source, "label", split) or list(NLI_LABELS)
    if not set(NLI_LABELS) <= set(names):
        raise InputError(f"{source}: the labels are {', '.join(names)}, not {', '.join(NLI_LABELS)}")
    for number, row in read_rows(source, split):
        first, second, label = (row.get(name) for name in ("premise", "hypothesis", "label"))
        if not (isinstance(first, str) and isinstance(second, str) and isinstance(label, int | str)):
            raise InputError(
                f"{source}, row {number}: premise, hypothesis and label are needed ({', '.join(row)})"
            )
        if isinstance(label, str):
            yield first, second, label
        elif 0 <= label < len(names):  # -1: the annotators did not agree
            yield first, second, names[label]


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
        first, second, label, its_split = (cells[column] for column in order)
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
