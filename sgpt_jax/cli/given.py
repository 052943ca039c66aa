"""What the options of several commands say about files and models."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

from sgpt_jax.bi_encoder import BI_ENCODER_SETTINGS
from sgpt_jax.cli.options import READING, add_options
from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import ReadReport


def reading_of(options: argparse.Namespace) -> dict[str, Any]:
    """How files are read, with a report to be filled: arguments of `read_corpus`."""
    return {
        "format": options.format,
        "errors": options.encoding_errors,
        "skip_bad_lines": options.skip_bad_lines,
        "max_bytes": options.max_record_bytes,
        "report": ReadReport(),
    }


def refuse_reading(options: argparse.Namespace) -> None:
    """Raises InputError when an option of READING is given to a command that reads no file."""
    parser = argparse.ArgumentParser()
    add_options(parser, *READING)
    usual = vars(parser.parse_args([]))
    names = [name for name, value in usual.items() if vars(options)[name] != value]
    if names:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise InputError(f"{flags}: for a file that is read, and there is none")


def given(metadata: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The settings of a bi-encoder that an index was made with, or that the options name."""
    return dict(metadata) | {
        name: value for name in BI_ENCODER_SETTINGS if (value := vars(options).get(name)) is not None
    }


def flags_given(options: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """The flags of those options that are given, for errors; an option that is not is None."""
    return [f"--{name.replace('_', '-')}" for name in names if vars(options)[name] is not None]
