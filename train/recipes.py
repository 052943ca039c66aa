"""The recipes: every option of a run with its meaning, and the values of the released SGPT models."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from typing import Any

from etils import epath

NO_TEACHER = "none"  # in place of a teacher's name
ITSELF = ""  # in place of a generator's name: the model itself


def _option(default: Any, meaning: str, shown: str | None = None, bare: Any = None) -> Any:
    """A field that is also an option of the command line.

    `shown` explains a default that is worked out later; `bare` is what the option means without a value.
    """
    return dataclasses.field(default=default, metadata={"help": meaning, "shown": shown, "bare": bare})


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run, whole. Everything that a run depends on is here, and all of it is written beside its output."""

    recipe: str
    symmetric: bool
    """Queries and documents are the same kind of text: no brackets, no prompts by side."""
    warmup_share: float = 0.1
    """Warm-up steps as a share of all steps, where `warmup_steps` is not given."""

    model: str = _option("", "base model: a folder, a hub id, or a .gguf file (required)")
    data: str = _option("", "training data (required); see the recipe's description")
    corpus: str = _option("", "documents, of which nobody has to know what they answer (required)")
    queries: str | None = _option(
        None,
        "texts of real queries, one a line or in BEIR's format: their documents need not be known",
        "none",
    )
    split: str | None = _option(None, "split of the data", "train; of an SNLI folder all")
    output: str = _option("", "folder of the run: model, biases, metrics, checkpoints (required)")

    batch_size: int = _option(64, "examples a step, over all devices")
    chunk_size: int = _option(
        0,
        "GradCache: rows of max-seq-length tokens (each packed with as many texts as fit) that are encoded at a "
        "time, over all devices; 0 encodes the batch at once, which is a third less work and needs more memory",
    )
    max_seq_length: int = _option(300, "tokens of a text that are read, brackets included")
    brackets: bool | None = _option(
        None, "put [ ] around queries and { } around documents", "as the model folder says"
    )
    pooling: str | None = _option(
        None, "weightedmean, mean, lasttoken, cls, max or mean_sqrt_len_tokens", "as the model folder says"
    )
    negatives: int | None = _option(None, "hard negatives of an example that are used", "all")

    trainable: str = _option(
        "bias",
        "what trains: bias, lora (adapters beside the linear layers), lora,bias (both), all, or a regular expression "
        "for parameter paths",
    )
    lora_rank: int | None = _option(None, "rank of the adapters of --trainable lora", "8")
    lora_alpha: float | None = _option(None, "adapters are scaled by alpha / rank", "twice the rank")
    lora_targets: tuple[str, ...] = _option(
        (), "linear layers of a block that have adapters, of q,k,v,o,gate,up,down", "all of the model's"
    )
    merge: bool = _option(
        False, "leave the model with its adapters merged into its matrices, in place of the adapters"
    )
    add_biases: bool | None = _option(
        None,
        "give zero biases to all attention and MLP projections without one",
        "off; adapt: on where biases alone train",
    )
    biases: str | None = _option(
        None, "trained biases to start from, a biases.safetensors of the same base model", "the model's own"
    )
    lr: float = _option(2e-4, "peak learning rate")
    warmup_steps: int | None = _option(None, "steps of linear warm-up", "a tenth of all steps")
    epochs: float = _option(1.0, "passes over the data")
    steps: int | None = _option(None, "steps, in place of --epochs", "epochs x examples / batch-size")
    seed: int = _option(0, "of shuffling, drawing of triplets, and dropout")
    shuffle: bool = _option(True, "shuffle the examples in every epoch")
    avoid_duplicates: bool = _option(
        False, "no text twice in a batch: such an example waits for the next batch"
    )
    dropout: bool = _option(
        False, "use the dropout rates of the model's config (0 for GPT-Neo, GPT-J and BLOOM)"
    )
    dtype: str = _option("float32", "float32 or bfloat16, for frozen weights and matmuls")
    weights: str | None = _option(
        None,
        "int8 holds the matrices, which must be frozen, as int8, a scale for each output channel",
        "in --dtype",
    )

    scale: float = _option(20.0, "factor on the cosine, the inverse temperature")
    both_directions: bool = _option(False, "also find each positive's query among all queries")
    matryoshka: tuple[int, ...] = _option(
        (), "leading vector sizes that must work alone, such as 64,128,576", "none"
    )
    distill: str | None = _option(None, "fit given scores too: margin or kl", "off")
    distill_weight: float = _option(1.0, "factor on the distillation loss")
    near: float | None = _option(
        None,
        "of --distill: what scores above the positive's minus this is no negative of the contrastive loss",
        "every hard negative is one",
    )

    dev: str | None = _option(
        None,
        "what chooses the checkpoint: an STS file (tab-separated, as the STS benchmark, or another that eval sts "
        "reads; cosine Spearman) or a folder in BEIR's format (nDCG@10)",
        "the last step is taken",
    )
    dev_split: str = _option("dev", "judgements of a BEIR folder: qrels/NAME.tsv")
    eval_every: int | None = _option(None, "steps between evaluations", "a tenth of all steps")
    save_every: int = _option(100, "steps between checkpoints")
    keep_best: int = _option(1, "checkpoints kept, the best by evaluation")
    patience: int | None = _option(
        None, "evaluations in a row without a better one after which the run ends", "never"
    )

    mesh: str | None = _option(
        None,
        "devices of all processes together, such as data=2,fsdp=4,tensor=1",
        "all accelerators on data; of CPUs the first of one process, all of several",
    )
    wandb: str | None = _option(None, "also log to this Weights & Biases project", "off")
    resume: bool = _option(False, "go on from the newest checkpoint in --output, if there is one")

    systems: tuple[str, ...] = _option((), "mining systems whose negatives are used", "all")
    negatives_per_system: int = _option(5, "the most negatives that a mining system gives to a query")
    margin: float = _option(3.0, "cross-encoder score by which a negative must be below every positive")

    teacher: str | None = _option(
        None,
        "cross-encoder or re-ranker that scores candidates; none trains without scores",
        "the model itself",
    )
    pseudo: tuple[str, ...] = _option(
        ("title", "sentence"),
        "queries made of the corpus: title, sentence (taken out of the documents)",
        "none",
    )
    generate: str | None = _option(
        None,
        "a decoder also writes queries, one for each document that is drawn; best is one that follows instructions, of "
        "1B parameters or more. Without a value it is the model itself",
        "off",
        ITSELF,
    )
    pseudo_queries: int = _option(20_000, "queries of each kind that are drawn, at most")
    group_size: int = _option(
        8, "queries, found by BM25 for each other, whose documents are the candidates of each of them"
    )
    entropy: float = _option(
        1.0, "nats: the temperature of the teacher's scores makes this the mean entropy of its lists"
    )
    keep_rank: int = _option(3, "a query is kept if its source is among so many best of the teacher's")
    dev_queries: int = _option(
        100,
        "pseudo queries of each kind, at most a tenth, that are held out to choose the checkpoint (0: none)",
    )
    dev_documents: int = _option(1000, "documents, for each kind, among which their sources are searched")

    def settled(self) -> TrainConfig:
        """The same run with paths as text, without options that mean nothing in it, and with a default that depends on
        others."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        paths = {name: os.fspath(value) for name, value in values.items() if isinstance(value, os.PathLike)}
        config = dataclasses.replace(self, **paths)
        if config.teacher == NO_TEACHER:  # nothing fits scores where no teacher gives any
            usual = RECIPES["adapt"][0]  # values of the user's own stay, and are refused
            config = dataclasses.replace(
                config,
                distill=None if config.distill == usual.distill else config.distill,
                near=None if config.near == usual.near else config.near,
            )
        if config.add_biases is None:
            alone = config.recipe == "adapt" and config.trainable == "bias"
            config = dataclasses.replace(config, add_biases=alone)
        return config

    @property
    def data_name(self) -> str:
        """What the data are called in reports."""
        return epath.Path(self.corpus or self.data).name

    def total_steps(self, examples: int) -> int:
        """How many steps the run has."""
        if self.steps is not None:
            return self.steps
        return max(1, int(min(self.epochs * examples, sys.maxsize)) // self.batch_size)

    def warmup(self, total: int) -> int:
        """How many of `total` steps are warm-up."""
        return math.ceil(self.warmup_share * total) if self.warmup_steps is None else self.warmup_steps


# Options that only one recipe has.
ONLY: dict[str, tuple[str, ...]] = {
    "msmarco": ("systems", "negatives_per_system", "margin"),
    "adapt": (
        "corpus", "queries", "teacher", "pseudo", "generate", "pseudo_queries", "group_size", "entropy", "keep_rank",
        "dev_queries", "dev_documents",
    ),
}  # fmt: skip

# Options that a recipe has not: its data have no splits, or it makes its own, in an order of its own.
WITHOUT: dict[str, tuple[str, ...]] = {
    "msmarco": ("split",),
    "adapt": ("data", "split", "dev", "dev_split", "shuffle", "avoid_duplicates", "negatives"),
}


def lacking(recipe: str) -> set[str]:
    """The options that a recipe has not."""
    others = {option for other, only in ONLY.items() if other != recipe for option in only}
    return others.union(WITHOUT.get(recipe, ()))


# Options that may differ between a run and its continuation.
FREE = (
    "output", "resume", "save_every", "keep_best", "eval_every", "dev", "dev_split", "wandb", "mesh", "chunk_size",
    "patience",
)  # fmt: skip

NLI = TrainConfig(
    recipe="nli",
    symmetric=True,
    brackets=False,
    pooling="weightedmean",
    max_seq_length=75,
    batch_size=1024,
    chunk_size=128,
    lr=3.2e-4,
    # The repository's "one epoch" shows each of its 8 processes all the data: 8 passes.
    epochs=8,
    avoid_duplicates=True,
)

MSMARCO = TrainConfig(
    recipe="msmarco",
    symmetric=False,
    brackets=True,
    pooling="weightedmean",
    max_seq_length=300,
    batch_size=256,
    chunk_size=32,
    lr=4e-4,
    warmup_steps=1000,
    epochs=10,
    negatives=1,
)

PAIRS = TrainConfig(recipe="pairs", symmetric=False)

ADAPT = TrainConfig(
    recipe="adapt",
    symmetric=False,
    brackets=True,
    max_seq_length=128,
    batch_size=32,
    lr=1.5e-3,
    shuffle=False,
    distill="kl",
    near=1.0,
    patience=3,
)

RECIPES: dict[str, tuple[TrainConfig, str]] = {
    "nli": (
        NLI,
        "Symmetric models from natural language inference. --data: AllNLI.tsv.gz of sbert.net, a folder with s1.*, "
        "s2.* and labels.* files, a Parquet file, a prepared TFDS folder, tfds:NAME, or a data set of the Hugging Face "
        "hub, such as hf:sentence-transformers/all-nli:pair-class:train. Defaults: SGPT-*-weightedmean-nli-bitfit.",
    ),
    "msmarco": (
        MSMARCO,
        "Search models from MS MARCO. --data: a folder with collection.tsv, queries.train.tsv, "
        "msmarco-hard-negatives.jsonl.gz and cross-encoder-ms-marco-MiniLM-L-6-v2-scores.pkl.gz. "
        "Defaults: SGPT-*-weightedmean-msmarco-specb-bitfit.",
    ),
    "pairs": (
        PAIRS,
        "Your own pairs. --data: JSONL with query, positive and perhaps negatives and scores, TSV, CSV or Parquet with "
        "these columns, a prepared TFDS folder with these features, tfds:NAME, or a data set of the Hugging Face hub, "
        "such as hf:sentence-transformers/all-nli:triplet:train.",
    ),
    "adapt": (
        ADAPT,
        "A search model for a corpus without labels. Titles, sentences and what --generate writes stand for queries, "
        "BM25 finds their candidates, a cross-encoder (the model itself, untrained) orders these, and the biases learn "
        "that order. "
        "--corpus: JSONL in BEIR's format, a JSON array, CSV, TSV or one text a line. OUT/adapt holds what was made "
        "of it; a run that was interrupted in these stages goes on where it was.",
    ),
}
