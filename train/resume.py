"""What a run was started with, noted in its folder: one that goes on has the same options and reads the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np
from etils import epath

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.checkpoint.bias_sets import BiasSet, bias_leaves
from sgpt_jax.checkpoint.fingerprint import module_facts, to_numpy
from sgpt_jax.decoder.model import split
from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import write_json

from .checks import idle_options
from .optimizer import trained_kinds
from .recipes import FREE, WITHOUT, TrainConfig
from .step import agree

RUN = "run"  # the key of a run's configuration in OUT/config.json, beside what transformers has there
INPUTS = "inputs"  # the key of the digests of what it reads, among its options
ADAPTER_RUN = "run.json"  # where that is of a run that leaves adapters

# Files of a model, which the end of a run would write over, or leave beside another one's.
_OF_A_MODEL = (
    "config.json", ADAPTER_RUN, "adapter_config.json", "modules.json", "*.safetensors", "pytorch_model*.bin", "*.gguf",
)  # fmt: skip


def check_output(config: TrainConfig) -> None:
    """Looks at what is in the folder of the run: nothing, or the run to resume, with the same options.

    Raises:
        InputError: there is a run already and `resume` is off, or it had other options; or there is a model, or
            checkpoints, of which no run is noted, and which would be lost, or taken for those of this one.
    """
    folder, theirs = epath.Path(config.output), _noted(config)
    if not theirs:
        if (
            config.resume
            and (folder / "metrics.jsonl").exists()
            and any((folder / "checkpoints").glob("[0-9]*"))
        ):
            return  # stopped where earlier versions had written the model, and not yet noted the run again
        if found := next((path.name for name in _OF_A_MODEL for path in folder.glob(name)), None):
            raise InputError(f"{folder}: holds a model ({found}), not a run: name another folder")
        for name in ("checkpoints", "best"):
            if any((folder / name).glob("*")):
                raise InputError(
                    f"{folder}: holds {name} of a run of which nothing else is left: name another folder"
                )
        return
    if not config.resume:
        raise InputError(f"{folder}: holds a run already; go on with --resume, or name another folder")
    ours = json.loads(json.dumps(dataclasses.asdict(config)))
    # What earlier versions took and passed over need not be said again.
    free = {*FREE, *idle_options(config)} - ({*WITHOUT["adapt"]} if config.recipe == "adapt" else set())
    other = [name for name, value in ours.items() if name not in free and theirs.get(name, value) != value]
    if other:
        differences = ", ".join(
            f"{name.replace('_', '-')} {theirs.get(name)!r}, now {ours[name]!r}" for name in other
        )
        raise InputError(f"{config.output}: this run was started with other options: {differences}")


def check_inputs(config: TrainConfig, inputs: dict[str, str]) -> None:
    """Looks whether a run that goes on reads what it read when it was started. All processes must call.

    Args:
        config: of the run.
        inputs: a digest of what each option names. One that is not noted, as in runs of earlier versions, may be any.

    Raises:
        InputError: the files of an option are others, by what this process reads or another one.
    """
    noted = _noted(config).get(INPUTS, {})
    changed = [
        f"--{name} {getattr(config, name)}"
        for name, value in inputs.items()
        if noted.get(name, value) != value
    ]
    if agree(bool(changed))[0]:
        what = " and ".join(changed) or "what another process reads"
        raise InputError(f"{config.output}: since this run was started, the content of {what} has changed")


def check_looks(
    config: TrainConfig, looks: list[float], before: dict[str, str] | None, now: dict[str, str] | None
) -> None:
    """Looks whether the dev metric is still of the same data: else the best of before would be compared with others.

    All processes must call.

    Args:
        config: of the run.
        looks: the metrics so far.
        before, now: what they looked at, and what the next ones will, see `train.dev.DevEvaluator.data`; None without
            any, or before it was noted.

    Raises:
        InputError: it is not, and there are metrics already.
    """
    differs = bool(looks) and (now is None or (before is not None and before["digest"] != now["digest"]))
    if not agree(differs)[0]:
        return
    then, source = ("other data" if each is None else each["source"] for each in (before, now))
    also = ", whose content has changed since" if then == source else f", not {source}"
    if now is None:
        also = ", which is missing now"
    raise InputError(f"{config.output}: the best checkpoint so far was chosen with --dev {then}{also}")


def model_digest(model: BiEncoder, base_sha256: str, bias_set: BiasSet | None) -> str:
    """A digest of the model that a run starts from, without the biases of a set. All processes must call.

    Args:
        model: before training.
        base_sha256: of its weights, in which no bias is.
        bias_set: whose biases it has, or None.
    """
    facts: list[Any] = [base_sha256, model.pooling, model.text.brackets, module_facts(model.modules)]
    facts += [model.text.prompt(side) for side in ("query", "document")]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name, leaf in sorted(bias_leaves(split(model.decoder)[1]).items()):
        if bias_set is None or name not in bias_set.values:
            digest.update(name.encode() + to_numpy(leaf).astype(np.float32).tobytes())
    return digest.hexdigest()


def run_note(config: TrainConfig, inputs: dict[str, str]) -> dict[str, Any]:
    """What is noted of a run, by its key in config.json."""
    return {RUN: dataclasses.asdict(config) | {INPUTS: inputs}}


def write_config(config: TrainConfig, inputs: dict[str, str]) -> None:
    """Writes the run's configuration into config.json, beside what the model may have there (transformers keeps it).

    Beside adapters it is a file of its own, since transformers takes a folder with a config.json for a whole model.
    """
    adapters = "lora" in trained_kinds(config.trainable) and not config.merge
    path = epath.Path(config.output) / (ADAPTER_RUN if adapters else "config.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    model = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, model | run_note(config, inputs))


def _noted(config: TrainConfig) -> dict[str, Any]:
    """The options that the run in the folder was started with, and its inputs; nothing where there is none."""
    for name in ("config.json", ADAPTER_RUN):
        try:
            if noted := json.loads((epath.Path(config.output) / name).read_text()).get(RUN):
                return dict(noted)
        except (OSError, ValueError, TypeError, AttributeError):
            continue
    return {}
