"""Reading checkpoints one tensor at a time, under Hugging Face names: safetensors, torch .bin, and GGUF files."""

from __future__ import annotations

import json
import mmap
import os
import warnings
from collections.abc import Iterator
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from sgpt_jax.checkpoint.gguf import GgufFile
from sgpt_jax.checkpoint.untrusted import check_content, inside, read_object
from sgpt_jax.errors import InputError
from sgpt_jax.families.keys import REFUSED
from sgpt_jax.families.own_code import describe, own_code_of, without_own_code
from sgpt_jax.families.reading import short

# The dtypes that tensors may have: NumPy's name -> the name in safetensors files.
SAFETENSORS_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_DTYPES = {
    name: np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    for dtype, name in SAFETENSORS_DTYPES.items()
}


class TensorFiles(Protocol):
    """A checkpoint: its config in Hugging Face terms, its tensors one by one.

    Attributes:
        config: as in config.json.
        encoded: the files whose tensors take time to decode; none for safetensors.
        most_values: how many values the files can hold at most, by their sizes in bytes.
    """

    config: dict[str, Any]
    encoded: list[epath.Path]
    most_values: int

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and values of every tensor, read when its turn comes; the arrays may be views of the file."""
        ...


def open_checkpoint(path: epath.Path) -> TensorFiles:
    """Opens a .gguf file, or a folder with config.json and safetensors or .bin weights.

    Raises:
        InputError: when the path holds no checkpoint, naming what is missing.
    """
    path = epath.Path(path)
    if path.suffix.lower() == ".gguf":
        return GgufFile(path)
    config = read_object(path / "config.json")
    code = own_code_of(config)
    for index, single in (
        ("model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ):
        # In transformers' order: who saves into a folder of shards leaves their index there.
        if (path / single).exists():
            files = [path / single]
        elif (path / index).exists():
            files = _shards(path, index)
        else:
            continue
        opened = (SafetensorsFiles if single.endswith("safetensors") else TorchFiles)(config, files)
        found = TextPart(opened) if "text_config" in config else opened
        if code is not None:
            warnings.warn(f"{path}: {describe(code)}", stacklevel=2)
            found.config = without_own_code(found.config, code)
        return found
    raise InputError(f"{path}: no model.safetensors, pytorch_model.bin or index of either")


def _shards(path: epath.Path, index: str) -> list[epath.Path]:
    """The files that an index names."""
    weight_map = read_object(path / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path / index}: no weight_map that names files")
    files = list({str(name): inside(path, name, index) for name in weight_map.values()}.values())
    if missing := sorted(file.name for file in files if not file.exists()):
        raise InputError(f"{path / index}: the index names files that are not there: {', '.join(missing)}")
    return sorted(files)


class TextPart:
    """The text decoder of a vision-language checkpoint, as a checkpoint of its own.

    What the outer config says of weights and code holds for the text decoder, too.

    Raises:
        InputError: the whole is of another kind, or its outer config says what only text_config can.
    """

    MODEL_TYPES = ("gemma3", "mistral3")

    def __init__(self, whole: TensorFiles):
        outer, text = whole.config, whole.config["text_config"]
        if not isinstance(text, dict):
            raise InputError("config.json: text_config must be an object")
        if outer.get("model_type") not in self.MODEL_TYPES:
            raise InputError(
                f"config.json: a {outer.get('model_type')} with a text_config is not supported: only "
                f"{', '.join(self.MODEL_TYPES)}"
            )
        for key, (neutral, _) in REFUSED.items():
            value = outer.get(key)
            if key not in ("text_config", "vision_config") and value is not None and value not in neutral:
                raise InputError(
                    f"config.json: {key} ({short(value)}) has no effect beside text_config: say it there"
                )
        both = {key: outer[key] for key in ("auto_map", "quantization_config") if key in outer}
        # transformers ties the head by the key of the outer config, whose default is true.
        tied = outer.get("tie_word_embeddings")
        self.config = {**both, **text, "tie_word_embeddings": True if tied is None else tied}
        self.whole, self.encoded, self.most_values = whole, whole.encoded, whole.most_values

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """The text decoder's tensors, under the names that it has alone."""
        # Both spellings, language_model.model.X and model.language_model.X, become model.X.
        for name, tensor in self.whole.tensors():
            inner = name.removeprefix("language_model.")
            if "language_model." in name:
                yield inner.replace("model.language_model.", "model.", 1), tensor
            elif name.startswith(("lm_head.", "score.")):
                yield name, tensor


class SafetensorsFiles:
    """One safetensors file or the shards of an index."""

    def __init__(self, config: dict[str, Any], files: list[epath.Path]):
        self.config, self.files = config, files
        self.most_values = sum(file.stat().length for file in files)
        self.encoded: list[epath.Path] = []

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        for file in self.files:
            yield from map_safetensors(file).items()


def map_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, as read-only views of the memory-mapped file.

    Raises:
        InputError: the file is damaged, or a tensor has a dtype that is not in `SAFETENSORS_DTYPES`.
    """
    check_content(path)
    try:
        with safe_open(os.fspath(path), "numpy"):  # checks that header and size are what they should be
            pass
    except SafetensorError as problem:
        raise InputError(f"{path}: damaged safetensors file: {problem}") from None
    with open(path, "rb") as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__":
            continue
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise InputError(f"{path}: {name} has the dtype {entry['dtype']}, which is not supported")
        first, end = entry["data_offsets"]
        content = np.frombuffer(data, np.uint8)[start + first : start + end]
        tensors[name] = content.view(dtype).reshape(entry["shape"])
    return tensors


def same_values(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two tensors are equal, bit by bit; compared some rows at a time, as embeddings are large."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    bits = np.dtype(f"u{one.itemsize}")
    one, other = (np.ascontiguousarray(values).view(bits) for values in (one, other))
    return all(np.array_equal(one[i : i + 4096], other[i : i + 4096]) for i in range(0, len(one), 4096))


class TorchFiles:
    """torch .bin files, memory-mapped and restricted to tensors."""

    def __init__(self, config: dict[str, Any], files: list[epath.Path]):
        self.config, self.files = config, files
        self.most_values = sum(file.stat().length for file in files)
        self.encoded = files

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        try:
            import torch
        except ImportError:
            raise InputError(
                f"{self.files[0]}: reading .bin weights needs torch (pip install 'sgpt-jax[torch]'); "
                "safetensors weights do not"
            ) from None
        for file in self.files:
            check_content(file)
            try:
                state = torch.load(str(file), map_location="cpu", weights_only=True, mmap=True)
            except Exception as problem:
                raise InputError(f"{file}: not a torch file that holds tensors alone: {problem}") from None
            if not isinstance(state, dict):
                raise InputError(f"{file}: holds a {type(state).__name__}, not tensors by name")
            for name in list(state):
                tensor = state.pop(name)
                if not isinstance(tensor, torch.Tensor):
                    raise InputError(f"{file}: {name} is a {type(tensor).__name__}, not a tensor")
                tensor = tensor.detach()
                if tensor.dtype == torch.bfloat16:
                    yield name, tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
                else:
                    try:
                        values = tensor.numpy()
                    except TypeError:  # NumPy lacks the dtype
                        raise InputError(
                            f"{file}: {name} has the dtype {tensor.dtype}, which is not supported"
                        ) from None
                    yield name, values
