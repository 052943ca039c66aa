"""The command line: ``python -m train nli|msmarco|pairs|adapt|mine --help``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
import warnings
from typing import Any

from sgpt_jax import __version__
from sgpt_jax.cli.options import BI_ENCODER, MESH, PROCESSES, WEIGHTS, add_options, dtype, model
from sgpt_jax.runtime.command import run_command
from sgpt_jax.runtime.malloc import keep_freed_memory

from .recipes import RECIPES, TrainConfig, lacking


def make_parser() -> argparse.ArgumentParser:
    """The parser: one subcommand a recipe, with an option for each field of `TrainConfig`; `mine`."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", description="Trains SGPT bi-encoders.")
    parser.add_argument("--version", action="version", version=f"sgpt-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="nli|msmarco|pairs|adapt|mine")
    types = typing.get_type_hints(TrainConfig)
    for name, (recipe, description) in RECIPES.items():
        command = commands.add_parser(
            name, description=description, help=description.split(".")[0], formatter_class=_Formatter
        )
        others = lacking(name)
        for field in dataclasses.fields(TrainConfig):
            if "help" in field.metadata and field.name not in others:
                _add_option(command, field, types[field.name], getattr(recipe, field.name))
        add_options(command, PROCESSES)
    _add_mine_parser(commands)
    return parser


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=110)


def _add_mine_parser(commands: Any) -> None:
    """Adds the subcommand `mine`."""
    text = "Hard negatives for a retrieval data set, from BM25 or --model, as data for the recipe pairs."
    command = commands.add_parser("mine", description=text, help=text.rstrip("."), formatter_class=_Formatter)
    command.add_argument(
        "--data", required=True, metavar="FOLDER", help="data set in BEIR's format (required)"
    )
    command.add_argument("--output", required=True, metavar="FILE", help="JSONL file to write (required)")
    command.add_argument(
        "--split", default="train", metavar="NAME", help="judgements: qrels/NAME.tsv (default: train)"
    )
    command.add_argument(
        "--negatives", type=int, default=1, metavar="N", help="negatives of an example (default: 1)"
    )
    command.add_argument(
        "--depth",
        type=int,
        default=50,
        metavar="N",
        help="they are drawn from the N best documents (default: 50)",
    )
    command.add_argument(
        "--skip",
        type=int,
        default=0,
        metavar="N",
        help="leave out the N best, which may be relevant and unjudged (default: 0)",
    )
    command.add_argument(
        "--margin",
        type=float,
        metavar="X",
        help="a negative's score must be below the positive's by X (default: no matter)",
    )
    command.add_argument(
        "--min-score", type=float, metavar="X", help="a negative's least score (default: none)"
    )
    command.add_argument(
        "--max-score", type=float, metavar="X", help="a negative's highest score (default: none)"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")
    group = command.add_argument_group(
        "the bi-encoder whose similarity (cosine or dot product) ranks, in place of BM25"
    )
    add_options(group, model(required=False), dtype(), WEIGHTS, MESH, *BI_ENCODER)


def _add_option(command: argparse.ArgumentParser, field: dataclasses.Field, kind: Any, default: Any) -> None:
    kinds = [part for part in (typing.get_args(kind) or (kind,)) if part is not type(None)]
    text = field.metadata["help"]
    options: dict[str, Any] = {"default": default}
    if kinds == [bool]:
        options["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(kind) is tuple:
        item = kinds[0]
        options["type"] = lambda value: tuple(map(item, filter(None, value.split(","))))
        options["metavar"] = "A,B,..."
    else:
        options |= {"type": kinds[0], "metavar": {str: "TEXT", int: "N", float: "X"}[kinds[0]]}
    if field.metadata["bare"] is not None:
        options |= {"nargs": "?", "const": field.metadata["bare"]}
    if default == "" and kinds == [str]:
        options = {"required": True, "metavar": "PATH"}
    else:
        text += f" (default: {_shown(field, default)})"
    command.add_argument("--" + field.name.replace("_", "-"), help=text, **options)


def _shown(field: dataclasses.Field, default: Any) -> str:
    if default is None or default == ():
        return field.metadata["shown"]
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit code, see `run_command`."""
    options = make_parser().parse_args(arguments)
    keep_freed_memory()
    # What orbax had not begun when a disk was full. Here, since Python says it at the very end of the process.
    warnings.filterwarnings("ignore", r"coroutine '.*' was never awaited", RuntimeWarning)
    if getattr(options, "distributed", False) or getattr(options, "coordinator", None):
        import jax

        # Processes that start two programs with communication in them at once, as CPUs would, can wait for each
        # other for ever. Accelerators run one program after the other anyway.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    return run_command(lambda: _run(options), options)


def _run(options: argparse.Namespace) -> None:
    if options.command == "mine":
        from .mine import mine_command

        mine_command(options)
        return
    from .loop import run

    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in vars(options).items() if name in fields}
    run(dataclasses.replace(RECIPES[options.command][0], **given))


if __name__ == "__main__":
    sys.exit(main())
