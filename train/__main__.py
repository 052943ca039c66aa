"""The command line: ``python -m train nli|msmarco|pairs|mine --help``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from typing import Any

import jax

from sgpt_jax.errors import InputError
from sgpt_jax.runtime import compile_cache, processes
from train.loop import Diverged, train
from train.mine import add_mine_parser, mine
from train.recipes import ONLY, RECIPES, TrainConfig


def make_parser() -> argparse.ArgumentParser:
    """The parser: one subcommand a recipe, with an option for each field of `TrainConfig`; `mine`."""
    parser = argparse.ArgumentParser(prog="python -m train", description="Trains SGPT bi-encoders.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="nli|msmarco|pairs|mine")
    types = typing.get_type_hints(TrainConfig)
    for name, (recipe, description) in RECIPES.items():
        command = commands.add_parser(
            name, description=description, help=description.split(".")[0], formatter_class=_Formatter
        )
        for field in dataclasses.fields(TrainConfig):
            others = {option for other, only in ONLY.items() if other != name for option in only}
            if "help" in field.metadata and field.name not in others:
                _add_option(command, field, types[field.name], getattr(recipe, field.name))
        processes.add_arguments(command)
    add_mine_parser(commands, _Formatter)
    return parser


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=110)


def _add_option(command: argparse.ArgumentParser, field: dataclasses.Field, kind: Any, default: Any) -> None:
    flag = "--" + field.name.replace("_", "-")
    kinds = [part for part in (typing.get_args(kind) or (kind,)) if part is not type(None)]
    needed = default == "" and kinds == [str]
    if default is None or default == ():
        shown = field.metadata["shown"]
    elif isinstance(default, bool):
        shown = "on" if default else "off"
    else:
        shown = f"{default:g}" if isinstance(default, float) else str(default)
    text = field.metadata["help"] + ("" if needed else f" (default: {shown})")
    options: dict[str, Any] = {"default": default, "help": text}
    if kinds == [bool]:
        options["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(kind) is tuple:
        item = kinds[0]
        options |= {
            "type": lambda value: tuple(map(item, filter(None, value.split(",")))),
            "metavar": "A,B,...",
        }
    else:
        options |= {"type": kinds[0], "metavar": {str: "TEXT", int: "N", float: "X"}[kinds[0]]}
    if needed:
        options = {"required": True, "help": text, "metavar": "PATH"}
    command.add_argument(flag, **options)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    options = vars(make_parser().parse_args(arguments))
    command = options.pop("command")
    compile_cache.enable()
    try:
        if command == "mine":
            mine(**options)
        else:
            job = argparse.Namespace(**{name: options.pop(name) for name in processes.OPTIONS})
            config = dataclasses.replace(RECIPES[command][0], **options)
            if job.distributed or job.coordinator:
                # Processes that start two programs with communication in them at once, as CPUs would, can wait for
                # each other for ever. Accelerators run one program after the other anyway.
                jax.config.update("jax_cpu_enable_async_dispatch", False)
            with processes.session(job):
                train(config)
    except (InputError, Diverged) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
