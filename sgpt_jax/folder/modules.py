"""The modules of a sentence-transformers folder: modules.json, Pooling, Dense and Normalize, read and written."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from safetensors.numpy import save

from sgpt_jax.checkpoint.tensors import TorchFiles, map_safetensors
from sgpt_jax.checkpoint.untrusted import inside, read_json, read_object
from sgpt_jax.decoder.modules import ACTIVATIONS, Dense, Modules, Normalize
from sgpt_jax.decoder.pooling import POOLING_MODES, pooling_modes
from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import atomic_write, write_json

# The flags by which older versions of sentence-transformers say the pooling, in the order in which several are joined.
_OLD_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# The order in which older versions wrote them.
_WRITTEN = (
    "cls_token",
    "mean_tokens",
    "max_tokens",
    "mean_sqrt_len_tokens",
    "weightedmean_tokens",
    "lasttoken",
)
# torch's modules of activations; where each class lies changes nothing.
_TORCH = {"Identity": "torch.nn.modules.linear.Identity"}


def read_modules(path: Path) -> tuple[str, bool, Modules]:
    """What modules.json and the files that it names say.

    Returns:
        the pooling, whether it covers the prompt, and the modules behind it.

    Raises:
        InputError: files are missing or broken, or there is a module that is not supported.
    """
    pooling: tuple[str, bool] | None = None
    modules: list[Dense | Normalize] = []
    for index, module in enumerate(_list(path)):
        kind = module["type"].rpartition(".")[2]
        ours = module["type"].startswith("sentence_transformers.")
        if not ours or kind not in ("Transformer", "Pooling", "Dense", "Normalize"):
            raise InputError(
                f"{path / 'modules.json'}: module {index} is {module['type']}, which is not supported: without it the "
                "vectors would be wrong (supported: Transformer, then Pooling, then Dense and Normalize)"
            )
        if (kind == "Transformer") != (index == 0) or (kind == "Pooling") != (index == 1):
            raise InputError(
                f"{path / 'modules.json'}: module {index} is {module['type']}; a Transformer comes first, one Pooling "
                "second, and Dense and Normalize behind them"
            )
        if kind == "Transformer" and module["path"]:
            raise InputError(
                f"{path}: the decoder lies in {module['path']}; move its files to the top folder"
            )
        if kind == "Pooling":
            pooling = _read_pooling(path / module["path"] / "config.json")
        elif kind == "Dense":
            modules.append(_read_dense(path / module["path"]))
        elif kind == "Normalize":
            file = path / module["path"] / "config.json"
            _check_features(file, read_object(file) if file.is_file() else {})
            modules.append(Normalize())
    if pooling is None:
        raise InputError(f"{path / 'modules.json'}: no Pooling module, so there are no text vectors")
    return *pooling, tuple(modules)


def check_decoder_is_on_top(path: Path) -> None:
    """Says of a folder without a config.json what modules.json has in its place, if there is one.

    Raises:
        InputError: the decoder lies below, or there are several.
    """
    if (path / "config.json").exists() or not (path / "modules.json").is_file():
        return
    first = _list(path)[0]
    if first["type"].rpartition(".")[2] != "Transformer":
        raise InputError(f"{path / 'modules.json'}: module 0 is {first['type']}, which is not supported")
    if first["path"]:
        raise InputError(f"{path}: the decoder lies in {first['path']}; move its files to the top folder")


def _list(path: Path) -> list[dict[str, str]]:
    file = path / "modules.json"
    modules = read_json(file)
    good = isinstance(modules, list) and all(
        isinstance(m, dict) and isinstance(m.get("type"), str) and isinstance(m.get("path"), str)
        for m in modules
    )
    if not good or not modules:
        raise InputError(f"{file}: expected a list of modules with type and path")
    for module in modules:
        inside(epath.Path(path), module["path"], file.name)
    return modules


def _read_pooling(file: Path) -> tuple[str, bool]:
    config = _named(file)
    if "pooling_mode" in config:
        modes = config["pooling_mode"]
        modes = [modes] if isinstance(modes, str) else modes
        if not isinstance(modes, list) or not modes or not all(isinstance(mode, str) for mode in modes):
            raise InputError(f"{file}: pooling_mode is {modes!r}, expected names")
    else:
        modes = [mode for key, mode in _OLD_POOLING.items() if config.get(key)] or ["mean"]
    if unknown := [mode for mode in modes if mode not in POOLING_MODES]:
        raise InputError(
            f"{file}: pooling {', '.join(map(repr, unknown))} is not supported (supported: {', '.join(POOLING_MODES)})"
        )
    return "+".join(modes), bool(config.get("include_prompt", True))


def _named(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise InputError(
            f"{file.parent.parent}: modules.json names {file.parent.name}, but {file} is not there"
        )
    return read_object(file)


def _read_dense(folder: Path) -> Dense:
    file = folder / "config.json"
    config = _named(file)
    _check_features(file, config)
    tensors = dict(_dense_tensors(folder))
    sizes = (config.get("out_features"), config.get("in_features"))
    weight, bias, residual = (tensors.get(key) for key in ("linear.weight", "linear.bias", "residual.weight"))
    wanted: dict[str, Any] = {"linear.weight": sizes}
    if config.get("bias", True):
        wanted["linear.bias"] = sizes[:1]
    if config.get("use_residual") and sizes[0] != sizes[1]:
        wanted["residual.weight"] = sizes
    found = {key: values.shape for key, values in tensors.items()}
    if found != wanted:
        raise InputError(f"{folder}: the weights are {found}, the config wants {wanted}")
    return Dense(weight, bias, residual, bool(config.get("use_residual")), _activation(file, config))


def _check_features(file: Path, config: dict[str, Any]) -> None:
    """Refuses a module on anything but the text's vector."""
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise InputError(
                f"{file}: {key} is {config[key]!r}; only layers on the text's vector are supported"
            )


def _dense_tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    if (folder / "model.safetensors").is_file():
        found = iter(map_safetensors(folder / "model.safetensors").items())
    elif (folder / "pytorch_model.bin").is_file():
        found = TorchFiles({}, [epath.Path(folder / "pytorch_model.bin")]).tensors()
    else:
        raise InputError(f"{folder}: no model.safetensors or pytorch_model.bin, which modules.json asks for")
    for name, values in found:
        yield name, np.array(values, np.float32)


def _activation(file: Path, config: dict[str, Any]) -> str:
    if "activation_function" not in config:
        return "Tanh"
    stated = config["activation_function"]
    if isinstance(stated, str) and not stated.startswith("torch."):
        # As sentence-transformers does where it runs no code of a folder.
        warnings.warn(f"{file}: activation_function {stated} is code of its own; Tanh is used", stacklevel=2)
        return "Tanh"
    name = stated.rpartition(".")[2] if isinstance(stated, str) else ""
    if name not in ACTIVATIONS:
        raise InputError(
            f"{file}: activation_function {stated!r} is not supported (supported: {', '.join(ACTIVATIONS)})"
        )
    return name


def write_modules(
    root: epath.Path, dimension: int, pooling: str, include_prompt: bool, modules: Modules
) -> None:
    """Writes modules.json and what it names, as sentence-transformers from 2.3 on reads it.

    Args:
        root: the model folder.
        dimension: E of the hidden states.
        pooling, include_prompt, modules: see `read_modules`.

    Raises:
        InputError: unknown pooling; nothing is written then.
    """
    try:
        modes = pooling_modes(pooling)
    except ValueError as problem:
        raise InputError(str(problem)) from None
    kinds = ["Transformer", "Pooling", *(type(module).__name__ for module in modules)]
    paths = ["", *(f"{index}_{kind}" for index, kind in enumerate(kinds) if index)]
    for path in paths:
        (root / path).mkdir(parents=True, exist_ok=True)
    listed = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(zip(paths, kinds, strict=True))
    ]
    write_json(root / "modules.json", listed)
    write_json(root / paths[1] / "config.json", _pooling_config(dimension, modes, include_prompt))
    for path, module in zip(paths[2:], modules, strict=True):
        if isinstance(module, Dense):
            _write_dense(root / path, module)


def _pooling_config(dimension: int, modes: list[str], include_prompt: bool) -> dict[str, Any]:
    """In the old spelling, which all versions read, unless it has no words for the order of the modes."""
    rest = {} if include_prompt else {"include_prompt": False}
    if modes != [mode for mode in _OLD_POOLING.values() if mode in modes]:
        return {"embedding_dimension": dimension, "pooling_mode": modes} | rest
    flags = {f"pooling_mode_{key}": _OLD_POOLING[f"pooling_mode_{key}"] in modes for key in _WRITTEN}
    return {"word_embedding_dimension": dimension} | flags | rest


def _write_dense(folder: epath.Path, layer: Dense) -> None:
    tensors = {
        "linear.weight": layer.weight,
        "linear.bias": layer.bias,
        "residual.weight": layer.residual_weight,
    }
    arrays = {
        key: np.ascontiguousarray(values, np.float32) for key, values in tensors.items() if values is not None
    }
    outside, inside_ = arrays["linear.weight"].shape
    config = {
        "in_features": inside_,
        "out_features": outside,
        "bias": layer.bias is not None,
        "activation_function": _TORCH.get(
            layer.activation, f"torch.nn.modules.activation.{layer.activation}"
        ),
    }
    write_json(folder / "config.json", config | ({"use_residual": True} if layer.residual else {}))
    with atomic_write(folder / "model.safetensors") as stream:
        stream.write(save(arrays, metadata={"format": "pt"}))


def describe_modules(pooling: str, include_prompt: bool, modules: Modules) -> str:
    """How hidden states become a vector, for people: the pooling and what follows."""
    parts = [f"{pooling} pooling" + ("" if include_prompt else " without the prompt")]
    for module in modules:
        if isinstance(module, Normalize):
            parts.append("length 1")
        else:
            outside, inside_ = module.weight.shape
            more = " with residual" if module.residual else ""
            parts.append(f"Dense {inside_} to {outside} ({module.activation}{more})")
    return ", ".join(parts)
