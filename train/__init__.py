"""Training programs: ``python -m train <recipe>``, or from Python `run` with a configuration, such as
``train.run(dataclasses.replace(train.PAIRS, model="M", data="pairs.jsonl", output="out", steps=100))``.

Where pip installed the project, the package is `sgpt_jax.train`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .log import Callback
    from .loop import run
    from .recipes import ADAPT, MSMARCO, NLI, PAIRS, TrainConfig

__all__ = ["ADAPT", "MSMARCO", "NLI", "PAIRS", "Callback", "TrainConfig", "run"]


def __getattr__(name: str) -> Any:
    # `--help` must not wait for JAX.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = {"run": "loop", "Callback": "log"}.get(name, "recipes")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
