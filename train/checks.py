"""Options that make no sense, mean nothing, or are not the same in all processes: refused before they cost anything."""

from __future__ import annotations

import dataclasses
import math

from etils import epath

from sgpt_jax.decoder.config import compute_dtype
from sgpt_jax.errors import InputError
from sgpt_jax.files.hub_tables import is_hub
from sgpt_jax.files.parquet import is_parquet
from sgpt_jax.runtime import processes

from .data import is_tfds
from .losses import LossConfig
from .optimizer import trained_kinds
from .recipes import NO_TEACHER, RECIPES, TrainConfig, lacking

_SEEDS = 2**63  # that JAX takes


def check(config: TrainConfig) -> None:
    """Refuses options that make no sense, before anything is loaded.

    Raises:
        InputError: naming the option.
    """
    if config.recipe not in RECIPES:
        raise InputError(f"the recipe must be one of {', '.join(RECIPES)}, not {config.recipe!r}")
    for name in ("model", "corpus" if config.recipe == "adapt" else "data", "output", "trainable"):
        if not getattr(config, name):
            raise InputError(f"--{name} is needed")
    if "://" in config.output:
        raise InputError(
            f"{config.output}: logs and checkpoints grow step by step and must be in a local folder"
        )
    at_least = {
        "batch_size": 1, "chunk_size": 0, "max_seq_length": 1, "negatives": 0, "warmup_steps": 0, "steps": 1,
        "eval_every": 1, "save_every": 1, "keep_best": 1, "negatives_per_system": 1, "seed": 0, "lora_rank": 1,
        "patience": 1, "pseudo_queries": 1, "group_size": 2, "keep_rank": 1, "dev_queries": 0, "dev_documents": 1,
    }  # fmt: skip
    for name, least in at_least.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    if config.seed >= _SEEDS:
        raise InputError(f"--seed must be below {_SEEDS}, not {config.seed}")
    for name in ("epochs", "lr", "scale"):
        if not 0 < getattr(config, name) < math.inf:
            raise InputError(f"--{name} must be positive and finite, not {getattr(config, name)}")
    if not 0 <= config.distill_weight < math.inf:
        raise InputError(f"--distill-weight must be 0 or more and finite, not {config.distill_weight}")
    for name in ("near", "margin", "lora_alpha"):
        if (value := getattr(config, name)) is not None and math.isnan(value):
            raise InputError(f"--{name.replace('_', '-')} must be a number, not {value}")
    compute_dtype(config.dtype)
    _check_all_count(config)
    loss_config(config)
    if config.biases and "lora" in trained_kinds(config.trainable) and not config.merge:
        raise InputError(
            "a folder of adapters is applied to the base model, whose biases are not those of --biases: leave the "
            "merged model (--merge)"
        )
    if config.wandb:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise InputError("--wandb needs the package wandb: pip install wandb") from None


def _check_all_count(config: TrainConfig) -> None:
    """Refuses options that would be passed over.

    Raises:
        InputError: naming the option.
    """
    default = RECIPES[config.recipe][0]
    for name, reason in idle_options(config).items():
        if getattr(config, name) not in (getattr(default, name), None):
            raise InputError(f"--{name.replace('_', '-')} {reason}")


def idle_options(config: TrainConfig) -> dict[str, str]:
    """The options that mean nothing beside the others, and why."""
    idle = dict.fromkeys(lacking(config.recipe), f"is no option of the recipe {config.recipe}")
    adapts = config.recipe == "adapt"
    if not (config.dev_queries if adapts else config.dev):
        need = f"is about evaluations, which need {'--dev-queries' if adapts else '--dev'}"
        idle |= dict.fromkeys(("eval_every", "keep_best", "patience", "dev_documents"), need)
    if not (config.dev and epath.Path(config.dev).is_dir()):
        idle["dev_split"] = "is for a folder in BEIR's format as --dev"
    has_files = config.recipe == "pairs" or (config.recipe == "nli" and is_parquet(config.data))
    if has_files and not (is_hub(config.data) or is_tfds(config.data)):
        idle["split"] = "is for data sets of TFDS and of the hub: a file has no splits"
    if adapts and config.teacher == NO_TEACHER:
        scored = ("distill", "near", "entropy", "keep_rank")
        idle |= dict.fromkeys(scored, "is about a teacher's scores, which --teacher none goes without")
    if not config.distill:
        idle["distill_weight"] = "is for --distill"
    if "lora" not in trained_kinds(config.trainable):
        idle |= dict.fromkeys(("lora_rank", "lora_alpha", "lora_targets", "merge"), "is for --trainable lora")
    return idle


def check_processes(config: TrainConfig, contents: dict[str, str]) -> None:
    """Refuses processes that would train together with other options, or read other files, wherever these lie.

    Args:
        config: of the run.
        contents: a digest of what an option names.
    """
    options = {
        f"--{name.replace('_', '-')}": value
        for name, value in dataclasses.asdict(config).items()
        if name not in contents and name != "output"
    }
    processes.check_alike(options | {f"the content of --{name}": digest for name, digest in contents.items()})


def loss_config(config: TrainConfig) -> LossConfig:
    """The loss part of the options.

    Raises:
        InputError: for a value that is not possible.
    """
    try:
        return LossConfig(
            config.scale,
            config.both_directions,
            config.matryoshka,
            config.distill,
            config.distill_weight,
            config.near,
        )
    except ValueError as error:
        raise InputError(str(error)) from None
