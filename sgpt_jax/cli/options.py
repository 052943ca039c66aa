"""The options that several commands have, written once: of `sgpt`, `python -m train` and `python -m eval`.

Nothing here imports JAX, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from sgpt_jax.files.lines import MAX_LINE_BYTES


@dataclasses.dataclass(frozen=True)
class Option:
    """One option: the flags, and the settings that `ArgumentParser.add_argument` takes."""

    flags: tuple[str, ...]
    settings: dict[str, Any]

    def add_to(self, parser: Any) -> None:
        """Adds it to a parser or to a group of one."""
        parser.add_argument(*self.flags, **self.settings)


@dataclasses.dataclass(frozen=True)
class Group:
    """Options that stand under a title of their own in `--help`."""

    title: str
    options: tuple[Option, ...]
    description: str | None = None

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Adds them to a parser."""
        add_options(parser.add_argument_group(self.title, self.description), *self.options)


def option(*flags: str, **settings: Any) -> Option:
    """An option, written like a call of `ArgumentParser.add_argument`."""
    return Option(flags, settings)


def add_options(parser: Any, *options: Option | Group) -> None:
    """Adds options and groups to a parser, in their order."""
    for each in options:
        each.add_to(parser)


def positive(text: str) -> int:
    """The type of an option that is a whole number above 0."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text!r}")
    return int(text)


def seed(text: str) -> int:
    """The type of an option that is a seed of random numbers."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0, not {text!r}")
    return int(text)


SOURCE = "folder, hub id, or .gguf file"

# As sgpt_jax.decoder.pooling.POOLING_MODES, which cannot be imported without JAX.
POOLING = ("weightedmean", "mean", "lasttoken", "cls", "max", "mean_sqrt_len_tokens")


def model(*, required: bool = True, default: str | None = None) -> Option:
    """`--model`; `default` is what it says of its default."""
    return option("--model", required=required, help=SOURCE + (f" (default: {default})" if default else ""))


def dtype(
    *, default: str | None = "float32", of: str = "of weights and matmuls (default: float32)"
) -> Option:
    """`--dtype`; `of` is what it says of itself."""
    return option("--dtype", choices=("float32", "bfloat16"), default=default, help=of)


WEIGHTS = option(
    "--weights",
    choices=("int8",),
    help="int8 holds the matrices as int8, a scale for each output channel: a quarter of float32's memory, half of "
    "bfloat16's (default: in --dtype)",
)
MESH = option(
    "--mesh",
    metavar="SPEC",
    help="devices of this process, such as data=2,fsdp=4,tensor=1 "
    "(default: all accelerators on data; of CPUs the first)",
)
BATCH_TOKENS = option(
    "--batch-tokens",
    type=positive,
    metavar="N",
    help="tokens computed at a time, padding included (default: by device)",
)
MAX_SEQ_LENGTH = option(
    "--max-seq-length",
    type=positive,
    metavar="N",
    help="tokens of a text that are read, brackets included (default: the model's limit)",
)


def pooling(text: str) -> str:
    """The type of an option that is a pooling mode, or several joined by +."""
    for mode in text.split("+"):
        if mode not in POOLING:
            raise argparse.ArgumentTypeError(f"{mode!r} is none of {', '.join(POOLING)}")
    return text


ADAPTER = option(
    "--adapter",
    action="append",
    metavar="A",
    help="LoRA adapter to merge into the model (folder in peft's layout, or hub id); may be repeated",
)

# How a bi-encoder makes vectors: what the model folder says, unless these say otherwise.
BI_ENCODER = (
    option(
        "--pooling",
        type=pooling,
        metavar="MODE[+MODE]",
        help=f"{', '.join(POOLING)}, or several (default: what the model folder says, or weightedmean)",
    ),
    option(
        "--brackets",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="[ ] around queries and { } around documents (default: as the model folder says)",
    ),
    MAX_SEQ_LENGTH,
    option(
        "--query-prompt",
        metavar="P",
        help="text before every query, or the name of one of the model's prompts (default: as the model folder says)",
    ),
    option("--document-prompt", metavar="P", help="the same for documents"),
    option(
        "--truncate-dim",
        type=positive,
        metavar="N",
        help="keep the first N dimensions of the vectors (default: as the model folder says, or all)",
    ),
    option("--biases", metavar="FILE", help="trained biases to apply, a biases.safetensors"),
    ADAPTER,
    option(
        "--bidirectional",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether tokens see those after them (default: as the model folder says, or not)",
    ),
)

# How files of texts are read.
FORMAT = option(
    "--format", choices=("jsonl", "tsv", "csv", "text"), help="of the input (default: by name and content)"
)
ENCODING_ERRORS = option(
    "--encoding-errors",
    choices=("strict", "replace"),
    default="strict",
    help="invalid UTF-8: stop (default), or replace and count",
)
SKIP_BAD_LINES = option("--skip-bad-lines", action="store_true", help="skip and count lines of broken JSON")
MAX_RECORD_BYTES = option(
    "--max-record-bytes",
    type=positive,
    default=MAX_LINE_BYTES,
    metavar="N",
    help="the longest line or CSV record that is read (default: %(default)s)",
)
READING = (FORMAT, ENCODING_ERRORS, SKIP_BAD_LINES, MAX_RECORD_BYTES)

# What `sgpt_jax.runtime.processes.session` reads.
PROCESSES = Group(
    "several processes",
    (
        option(
            "--distributed",
            action="store_true",
            help="one of several, found out from the TPU pod, Slurm or Open MPI that runs it",
        ),
        option("--coordinator", metavar="HOST:PORT", help="one of several: where process 0 listens"),
        option("--processes", type=int, metavar="N", help="with --coordinator: how many there are"),
        option("--process", type=int, metavar="I", help="with --coordinator: which this is, from 0"),
    ),
    "start the same command once for each, on file systems that all of them see",
)
