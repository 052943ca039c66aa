"""What a run leaves behind: the model folder with its card, and the bias set."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.checkpoint.bias_sets import BiasSet, bias_leaves, save_bias_set
from sgpt_jax.checkpoint.fingerprint import to_numpy
from sgpt_jax.checkpoint.lora import WEIGHTS as ADAPTERS
from sgpt_jax.checkpoint.lora import is_adapter, save_adapter
from sgpt_jax.decoder.build import Lora
from sgpt_jax.decoder.model import merge, split
from sgpt_jax.decoder.sharding import leaf_path
from sgpt_jax.errors import InputError
from sgpt_jax.families import export_config
from sgpt_jax.saving import save_settings

from .recipes import TrainConfig

BIASES = "biases.safetensors"

# What a model card says of adapters that were trained over int8 weights.
OVER_INT8 = (
    "The adapters were trained over int8 weights of the base model, one scale for each output channel. Over its own "
    "weights the vectors are slightly others."
)

# And of adapters over a model that is no plain folder of weights.
ONLY_HERE = (
    "PEFT and sentence-transformers do not load these adapters, whose base is an adapter itself or a .gguf file: with "
    "sgpt-jax they are loaded over it."
)


@dataclasses.dataclass(frozen=True)
class Record:
    """What there is to say about a run."""

    config: TrainConfig
    examples: int
    steps: int
    warmup_steps: int
    chosen_step: int
    dev_metric: str | None
    dev: float | None
    base_sha256: str
    started_from: str | None = None
    plain_base: bool = True  # a folder of weights, and no adapter or .gguf file


def export(model: BiEncoder, trainable: Any, record: Record, folder: epath.Path, *, write: bool) -> list[str]:
    """Writes the bias set, if biases are all that was trained, and the model folder, if transformers has such a model.

    Of adapters, the folder that PEFT loads; with `merge` in the run's options a model folder that holds them merged.

    Args:
        model: with the trained parameters in place.
        trainable: float32 master copies of what was trained.
        record: of the run.
        folder: where to.
        write: False on all processes but the first; every process must call.

    Returns:
        Lines that say what was written, and what could not be.

    Raises:
        InputError: neither of the two is possible.
    """
    if jax.process_count() > 1:
        structure, params = split(model.decoder)
        model = dataclasses.replace(model, decoder=merge(structure, jax.tree.map(to_numpy, params)))
    trained = {
        leaf_path(path): to_numpy(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(trainable)
    }
    biases = {name: trained[name] for name in bias_leaves(trainable)}
    only_biases = len(biases) == len(trained)
    if not write:
        return []
    messages = []
    if only_biases:
        save_bias_set(folder / BIASES, BiasSet(biases, bias_header(model, record)))
        messages.append(f"biases: {folder / BIASES}")
    apart = model.decoder.build.lora is not None and not record.config.merge
    training, results = _training_rows(record, model.decoder.build.lora), _result_rows(record)
    if apart:
        base = record.config.model
        base = str(epath.Path(base).resolve()) if epath.Path(base).exists() else base
        header = bias_header(model, record)
        save_adapter(folder, model.decoder, model.hf_config, trained, base=base, header=header)
        only_here = not record.plain_base
        note = " ".join([OVER_INT8] * bool(model.decoder.build.int8) + [ONLY_HERE] * only_here)
        save_settings(model, folder, training=training, results=results, note=note, only_here=only_here)
        return [f"adapters: {folder / ADAPTERS}"]
    structure, params = split(model.decoder)
    # Merged in float32, whatever dtype the adapters were trained in.
    masters = jax.tree_util.tree_map_with_path(
        lambda path, leaf: trained[leaf_path(path)] if is_adapter(path) else leaf, params
    )
    model = dataclasses.replace(model, decoder=merge(structure, masters))
    try:
        export_config(model.hf_config, model.decoder.config)
    except InputError as error:
        if not only_biases:
            raise
        return [*messages, f"no model folder: {error}"]
    model.save_pretrained(folder, training=training, results=results)
    return [*messages, f"model: {folder}"]


def bias_header(model: BiEncoder, record: Record) -> Mapping[str, Any]:
    """The header of the bias set: where it belongs, how vectors are made with it, and how it was trained."""
    config = record.config
    training = {
        name: getattr(config, name)
        for name in (
            "recipe",
            "batch_size",
            "max_seq_length",
            "lr",
            "seed",
            "scale",
            "both_directions",
            "dtype",
        )
    }
    training |= {
        "data": config.data_name,
        "examples": record.examples,
        "steps": record.steps,
        "warmup_steps": record.warmup_steps,
        "chosen_step": record.chosen_step,
    }
    if record.started_from is not None:
        training["started_from"] = record.started_from
    if record.dev is not None:
        training |= {"dev_metric": record.dev_metric, "dev": round(record.dev, 6)}
    return {
        "base_model": model.name,
        "base_sha256": record.base_sha256,
        **({"weights": config.weights} if config.weights else {}),
        "pooling": model.pooling,
        "brackets": model.text.brackets,
        "max_seq_length": model.text.max_seq_length,
        "training": training,
    }


def _training_rows(record: Record, lora: Lora | None) -> dict[str, object]:
    config = record.config
    return {
        "data": f"{config.data_name}, {record.examples:,} examples",
        "trained parameters": config.trainable
        + (", zero biases added first" if config.add_biases else "")
        + (f", which began as {record.started_from}" if record.started_from else "")
        + (f"; rank {lora.rank}, alpha {lora.alpha:g}, of {', '.join(lora.targets)}" if lora else ""),
        "loss": _describe_loss(config),
        "batch size": config.batch_size,
        "steps": f"{record.steps:,}, of them {record.warmup_steps:,} warm-up; the model after {record.chosen_step:,}",
        "optimizer": "AdamW (0.9, 0.999, 1e-6), gradient norm clipped to 1, linear decay to 0",
        "learning rate": config.lr,
        "dtype": config.dtype + (f", {config.weights} weights" if config.weights else ""),
        "seed": config.seed,
    }


def _result_rows(record: Record) -> dict[str, object]:
    if record.dev is None:
        return {}
    dev = epath.Path(record.config.dev).name if record.config.dev else "held-out pseudo queries"
    return {f"{dev} (chose the checkpoint), {record.dev_metric}": f"{record.dev:.4f}"}


def _describe_loss(config: TrainConfig) -> str:
    text = f"in-batch and hard negatives, {config.scale:g} x cosine"
    if config.both_directions:
        text += ", both directions"
    if config.matryoshka:
        text += f", Matryoshka sizes {json.dumps(config.matryoshka)}"
    if config.distill:
        text += f", distillation ({config.distill}, weight {config.distill_weight:g})"
    if config.near is not None:
        text += f", no negatives above the positive's score minus {config.near:g}"
    return text
