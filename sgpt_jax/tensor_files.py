"""Reading checkpoints one tensor at a time, under Hugging Face names: safetensors, torch .bin, and GGUF files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from sgpt_jax.gguf_file import GgufFile
from sgpt_jax.io import InputError


class TensorFiles(Protocol):
    """A checkpoint: its config in Hugging Face terms, its tensors one by one."""

    config: dict[str, Any]

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and values of every tensor; each array is the caller's own and read when its turn comes."""
        ...


def open_checkpoint(path: epath.Path) -> TensorFiles:
    """Opens a .gguf file, or a folder with config.json and safetensors or .bin weights.

    Raises:
        InputError: when the path holds no checkpoint, naming what is missing.
    """
    if path.suffix == ".gguf":
        return GgufFile(path)
    config = _read_json(path / "config.json")
    for index, single in (
        ("model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ):
        if (path / index).exists():
            weight_map = _read_json(path / index).get("weight_map") or {}
            files = [path / name for name in sorted(set(weight_map.values()))]
        elif (path / single).exists():
            files = [path / single]
        else:
            continue
        missing = [file.name for file in files if not file.exists()]
        if missing or not files:
            raise InputError(
                f"{path / index}: the index names files that are not there: {', '.join(missing)}"
            )
        return (
            SafetensorsFiles(config, files) if single.endswith("safetensors") else TorchFiles(config, files)
        )
    raise InputError(f"{path}: no model.safetensors, pytorch_model.bin or index of either")


def _read_json(path: epath.Path) -> dict[str, Any]:
    if not path.exists():
        raise InputError(f"{path.parent}: no {path.name}")
    try:
        value = json.loads(path.read_text())
    except ValueError as problem:
        raise InputError(f"{path}: not valid JSON: {problem}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value


class SafetensorsFiles:
    """One safetensors file or the shards of an index."""

    def __init__(self, config: dict[str, Any], files: list[epath.Path]):
        self.config, self.files = config, files

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        for file in self.files:
            try:
                with safe_open(str(file), "numpy") as opened:
                    for name in opened.keys():  # noqa: SIM118  not a dict
                        yield name, opened.get_tensor(name)
            except SafetensorError as problem:
                raise InputError(f"{file}: damaged safetensors file: {problem}") from None


class TorchFiles:
    """torch .bin files, memory-mapped and restricted to tensors."""

    def __init__(self, config: dict[str, Any], files: list[epath.Path]):
        self.config, self.files = config, files

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        try:
            import torch
        except ImportError:
            raise InputError(
                f"{self.files[0]}: reading .bin weights needs torch (pip install 'sgpt-jax[torch]'); "
                "safetensors weights do not"
            ) from None
        for file in self.files:
            try:
                state = torch.load(str(file), map_location="cpu", weights_only=True, mmap=True)
            except Exception as problem:
                raise InputError(f"{file}: not a torch file that holds tensors alone: {problem}") from None
            for name in list(state):
                tensor = state.pop(name)
                if tensor.dtype == torch.bfloat16:
                    yield name, tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
                else:
                    yield name, tensor.numpy()
