"""What a model folder says of how to use it, in the layout of sentence-transformers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from etils import epath

from sgpt_jax.checkpoint.untrusted import inside, read_json, read_object
from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import write_json

# Our names of the pooling modes, and sentence-transformers' keys for them, in its order. None: not supported.
_POOLING_KEYS: dict[str, str | None] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": None,
    "pooling_mode_mean_sqrt_len_tokens": None,
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_POOLING_MODES = [mode for mode in _POOLING_KEYS.values() if mode]

# model_max_length of tokenizers without a limit is about 1e30.
_NO_LIMIT = 10**9


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """What a model folder says about how to use it; None where it says nothing.

    `prompts` has the texts that go before every text: keys "query", "document", and "default" (neither of the two).
    """

    pooling: str | None = None
    brackets: bool | None = None
    max_seq_length: int | None = None
    normalize: bool | None = None
    prompts: Mapping[str, str] | None = None


def read_settings(path: str | os.PathLike[str], name: str = "") -> ModelSettings:
    """What a model folder says, in the layout of sentence-transformers (any version up to 6) and our own key.

    "specb" in the folder's name, in `name` (the hub id) or in config.json's `_name_or_path` means brackets, unless
    `sgpt_brackets` is recorded. A folder with config.json alone, and a .gguf file, say nothing.

    Raises InputError for broken files and for what would give other vectors than sentence-transformers does: Dense
    and other modules, pooling modes other than cls, mean, weightedmean and lasttoken, several modes at once,
    lower-casing, prompts left out of the pooling.
    """
    path = Path(path)
    saved = _read_object(path / "config_sentence_transformers.json")
    brackets = saved.get("sgpt_brackets")
    if brackets is None and "specb" in " ".join(_names(path, name)).lower():
        brackets = True
    if not (path / "modules.json").is_file():
        return ModelSettings(brackets=brackets)

    _refuse_unlike(path, saved)
    pooling = None
    normalize = False
    prompts = _prompts(saved)
    for index, module in enumerate(_read_modules(path)):
        kind = module["type"].rpartition(".")[2]
        known = module["type"].startswith("sentence_transformers.") and kind in (
            "Transformer",
            "Pooling",
            "Normalize",
        )
        if not known or (kind == "Transformer") != (index == 0):
            raise InputError(
                f"{path / 'modules.json'}: module {index} is {module['type']}; this project supports a Transformer "
                "followed by Pooling and Normalize, and would give wrong vectors without the rest"
            )
        if kind == "Transformer" and module["path"]:
            raise InputError(
                f"{path}: the decoder lies in {module['path']}; move its files to the top folder"
            )
        if kind == "Pooling":
            pooling = _read_pooling(path / module["path"] / "config.json", pooling, prompts)
        normalize = normalize or kind == "Normalize"
    return ModelSettings(pooling, brackets, _read_limit(path), normalize, prompts)


def _names(path: Path, name: str) -> list[str]:
    """All the names that a model goes by, the one in the hub's cache (models--org--name/snapshots/commit) included."""
    full = path.absolute()
    cached = full.parent.parent.name if full.parent.name == "snapshots" else ""
    return [name, full.name, cached, str(_read_object(path / "config.json").get("_name_or_path", ""))]


def _refuse_unlike(path: Path, saved: dict[str, Any]) -> None:
    file = path / "config_sentence_transformers.json"
    if saved.get("model_type", "SentenceTransformer") != "SentenceTransformer":
        raise InputError(f"{file}: a {saved['model_type']} model is no bi-encoder")
    if saved.get("truncate_dim") is not None:
        raise InputError(f"{file}: truncate_dim (shortened vectors) is not supported")


def _read_modules(path: Path) -> list[dict[str, str]]:
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


def _read_pooling(file: Path, earlier: str | None, prompts: Mapping[str, str] | None) -> str:
    config = _read_object(file)
    if earlier is not None:
        raise InputError(f"{file}: a second Pooling module is not supported")
    if prompts and config.get("include_prompt", True) is False:
        raise InputError(
            f"{file}: leaving the prompt out of the pooling (include_prompt false) is not supported"
        )
    if "pooling_mode" in config:
        modes = config["pooling_mode"]
        modes = [modes] if isinstance(modes, str) else modes or []
        if not isinstance(modes, list):
            raise InputError(f"{file}: pooling_mode is {modes!r}, expected a name")
    else:
        modes = [mode or key for key, mode in _POOLING_KEYS.items() if config.get(key)] or ["mean"]
    unsupported = [mode for mode in modes if mode not in _POOLING_MODES]
    if unsupported or len(modes) != 1:
        what = (
            f"pooling {', '.join(map(repr, unsupported))} is"
            if unsupported
            else "joining several pooling modes is"
        )
        raise InputError(f"{file}: {what} not supported (supported: one of {', '.join(_POOLING_MODES)})")
    return modes[0]


def _read_limit(path: Path) -> int | None:
    config = _read_object(path / "sentence_bert_config.json")
    if config.get("do_lower_case"):
        raise InputError(f"{path / 'sentence_bert_config.json'}: do_lower_case is not supported")
    # sentence-transformers 6 no longer writes max_seq_length: the tokenizer's own limit has it.
    limit = config.get("max_seq_length")
    if limit is None:
        limit = _read_object(path / "tokenizer_config.json").get("model_max_length")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or limit < 1):
        raise InputError(f"{path}: max_seq_length is {limit!r}, not a positive number")
    return None if limit is None or limit >= _NO_LIMIT else int(limit)


def _prompts(saved: dict[str, Any]) -> dict[str, str] | None:
    """The prompts that sentence-transformers uses in encode_query, encode_document and encode."""
    named = saved.get("prompts") or {}
    if not isinstance(named, dict) or not all(
        text is None or isinstance(text, str) for text in named.values()
    ):
        raise InputError("config_sentence_transformers.json: prompts must be an object of texts by name")
    if saved.get("default_prompt_name") is not None and not isinstance(saved["default_prompt_name"], str):
        raise InputError("config_sentence_transformers.json: default_prompt_name must be a name")
    document = next((named[key] for key in ("document", "passage", "corpus") if key in named), None)
    found = {
        "query": named.get("query"),
        "document": document,
        "default": named.get(saved.get("default_prompt_name")),
    }
    return {key: prompt for key, prompt in found.items() if prompt} or None


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object, or {} when there is no such file."""
    return read_object(file) if file.is_file() else {}


def write_settings(folder: str | os.PathLike[str], settings: ModelSettings, embed_dim: int) -> None:
    """Writes the files by which sentence-transformers (2.3 to 6) and `read_settings` know how to use the model.

    They are modules.json, 1_Pooling/config.json, sentence_bert_config.json and config_sentence_transformers.json. The
    last also has `sgpt_brackets`, which sentence-transformers passes over: it adds no brackets by itself.

    Raises InputError for an unknown pooling mode.
    """
    if settings.pooling not in _POOLING_MODES:
        raise InputError(f"pooling must be one of {', '.join(_POOLING_MODES)}, not {settings.pooling!r}")
    root = epath.Path(folder)
    paths = {"Transformer": "", "Pooling": "1_Pooling"} | (
        {"Normalize": "2_Normalize"} if settings.normalize else {}
    )
    for path in paths.values():
        (root / path).mkdir(parents=True, exist_ok=True)
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(paths.items())
    ]
    pooling: dict[str, Any] = {"word_embedding_dimension": embed_dim}
    pooling |= {key: mode == settings.pooling for key, mode in _POOLING_KEYS.items()}
    prompts = dict(settings.prompts or {})
    write_json(root / "modules.json", modules)
    write_json(root / "1_Pooling" / "config.json", pooling)
    limit = {} if settings.max_seq_length is None else {"max_seq_length": settings.max_seq_length}
    write_json(root / "sentence_bert_config.json", limit | {"do_lower_case": False})
    write_json(
        root / "config_sentence_transformers.json",
        {
            "__version__": {"sgpt_jax": metadata.version("sgpt-jax")},
            "model_type": "SentenceTransformer",
            "prompts": {"query": "", "document": ""} | prompts,
            "default_prompt_name": "default" if "default" in prompts else None,
            "similarity_fn_name": "cosine",
            "sgpt_brackets": bool(settings.brackets),
        },
    )
