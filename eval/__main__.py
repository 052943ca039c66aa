"""Evaluation programs: ``python -m eval TASK ...``; where pip installed the project, ``python -m sgpt_jax.eval``."""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Sequence

from sgpt_jax import __version__
from sgpt_jax.runtime.command import run_command
from sgpt_jax.runtime.malloc import keep_freed_memory

# task -> (its module, with add_arguments(parser) and main(args); what it does)
TASKS = {
    "beir": (".beir", "retrieval and re-ranking on BEIR data sets"),
    "prompts": (".prompt_study", "several cross-encoder prompts on one first stage, in one table"),
    "sts": (".sts", "semantic textual similarity on STS-Benchmark files"),
    "useb": (".useb", "the Unsupervised Sentence Embedding Benchmark"),
    "mteb": (".mteb", "mteb's own evaluator, on a BEIR folder or mteb's tasks by name"),
    "plan": (".plan.command", "what a run would need, before a machine is rented"),
    "large-index": (".large_index", "memory and time of a large index of generated documents"),
    "speed": (".speed.command", "this project beside torch, sentence-transformers and FAISS"),
    "curves": (".curves", "the losses and dev metrics of training runs in one figure"),
    "report": (".report", "one Markdown table and one plot of many results"),
    "significance": (".significance", "paired t-test and bootstrap between two runs"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one task; returns its exit code, see `run_command`. argparse exits with 2 on wrong usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", description=__doc__)
    parser.add_argument("--version", action="version", version=f"sgpt-jax {__version__}")
    tasks = parser.add_subparsers(dest="program", metavar="TASK", required=True)
    module = None
    for name, (path, summary) in TASKS.items():
        task = tasks.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if arguments[:1] == [name]:  # the others' dependencies are not needed
            try:
                module = importlib.import_module(path, __package__)
            except ModuleNotFoundError as error:
                if str(error.name).split(".")[0] in ("eval", "sgpt_jax"):
                    raise
                extra = "mteb" if name == "mteb" else "eval"
                print(f"error: {name} needs {error.name}: pip install 'sgpt-jax[{extra}]'", file=sys.stderr)
                return 1
            task.description = module.__doc__
            module.add_arguments(task)
    options = parser.parse_args(arguments)
    assert module is not None  # argparse has left otherwise
    if options.program == "speed" and options.part in (None, "train"):
        keep_freed_memory()  # as `python -m train` does
    # These two measure compiling, or compile for machines that are not here.
    cache = options.program not in ("speed", "plan")
    return run_command(functools.partial(module.main, options), options, cache_programs=cache)


if __name__ == "__main__":
    sys.exit(main())
