"""What a model folder says of how to use it, in the layout of sentence-transformers."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from etils import epath

from sgpt_jax.checkpoint.gguf import embedding_facts
from sgpt_jax.checkpoint.untrusted import read_object
from sgpt_jax.decoder.modules import Modules, Normalize
from sgpt_jax.errors import InputError
from sgpt_jax.families.own_code import own_code_of
from sgpt_jax.files.lines import write_json
from sgpt_jax.folder.modules import read_modules, write_modules

SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")

# model_max_length of tokenizers without a limit is about 1e30.
_NO_LIMIT = 10**9

_BERT = "sentence_bert_config.json"
_SAVED = "config_sentence_transformers.json"

# Keys of sentence_bert_config.json that make other vectors when they are set, and the values that do not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "do_lower_case": (False,),
    "transformer_task": ("feature-extraction",),
    "module_output_name": ("token_embeddings",),
    "query_length": (),
    "document_length": (),
    "query_expansion": (),
}
# What is handed on to transformers there: keys that change no vector.
_ARGUMENTS = (
    "model_args",
    "tokenizer_args",
    "config_args",
    "model_kwargs",
    "processor_kwargs",
    "config_kwargs",
)
_HARMLESS_ARGUMENTS = frozenset(
    (
        *(
            "torch_dtype",
            "dtype",
            "attn_implementation",
            "device_map",
            "low_cpu_mem_usage",
            "use_safetensors",
        ),
        *("trust_remote_code", "revision", "cache_dir", "token", "local_files_only", "use_cache", "use_fast"),
        *("padding_side", "model_max_length", "fix_mistral_regex"),
    )
)
_BERT_KEYS = frozenset(
    (*_PLAIN, *_ARGUMENTS, "max_seq_length", "modality_config", "processing_kwargs", "unpad_inputs")
)
_SAVED_KEYS = frozenset(
    (
        *(
            "__version__",
            "model_type",
            "prompts",
            "default_prompt_name",
            "similarity_fn_name",
            "truncate_dim",
        ),
        *("requirements", "sgpt_brackets", "activation_fn", "keep_in_fp32_modules"),
    )
)


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """What a model folder says about how to use it; None where it says nothing.

    Attributes:
        pooling: see `sgpt_jax.pool`.
        brackets: SGPT's, see `TextEncoder`.
        max_seq_length: tokens of a text that are read.
        modules: what follows the pooling.
        prompts: texts that go before every text, by name.
        default_prompt_name: the one for texts that are neither query nor document.
        include_prompt: whether the prompt's tokens are pooled.
        truncate_dim: how many dimensions of a vector are kept.
        similarity: one of `SIMILARITIES`.
    """

    pooling: str | None = None
    brackets: bool | None = None
    max_seq_length: int | None = None
    modules: Modules = ()
    prompts: Mapping[str, str] | None = None
    default_prompt_name: str | None = None
    include_prompt: bool = True
    truncate_dim: int | None = None
    similarity: str | None = None


def read_settings(path: str | os.PathLike[str], name: str = "") -> ModelSettings:
    """What a model folder says, in the layout of sentence-transformers (any version up to 6) and our own key.

    "specb" in the folder's name, in `name` (the hub id) or in config.json's `_name_or_path` means brackets, unless
    `sgpt_brackets` is recorded. A folder with config.json alone says nothing, unless its own code is known
    (`families/own_code.py`); a .gguf file may say its pooling.

    Raises InputError for broken files and for what would give other vectors than sentence-transformers does.
    """
    path = Path(path)
    if path.is_file():
        pooling, modules = embedding_facts(path)
        brackets = True if "specb" in f"{name} {path.name}".lower() else None
        return ModelSettings(pooling, brackets, modules=modules)
    saved = _read_object(path / _SAVED)
    brackets = saved.get("sgpt_brackets")
    if brackets is None and "specb" in " ".join(_names(path, name)).lower():
        brackets = True
    if not (path / "modules.json").is_file():
        return _without_modules(path, brackets)
    if saved.get("model_type", "SentenceTransformer") != "SentenceTransformer":
        raise InputError(f"{path / _SAVED}: a {saved['model_type']} model is no bi-encoder")
    pooling, include_prompt, modules = read_modules(path)
    prompts, default = _prompts(path / _SAVED, saved)
    return ModelSettings(
        pooling,
        brackets,
        _read_limit(path),
        modules,
        prompts,
        default,
        include_prompt,
        _truncate_dim(path / _SAVED, saved),
        _similarity(path / _SAVED, saved),
    )


def _without_modules(path: Path, brackets: bool | None) -> ModelSettings:
    code = own_code_of(_read_object(path / "config.json"))
    if code is None or code.pooling is None:
        return ModelSettings(brackets=brackets)
    return ModelSettings(
        code.pooling,
        brackets,
        modules=(Normalize(),) if code.normalize else (),
        prompts=dict(code.prompts) or None,
        include_prompt=code.include_prompt,
    )


def _names(path: Path, name: str) -> list[str]:
    """All the names that a model goes by, the one in the hub's cache (models--org--name/snapshots/commit) included."""
    full = path.absolute()
    cached = full.parent.parent.name if full.parent.name == "snapshots" else ""
    return [name, full.name, cached, str(_read_object(path / "config.json").get("_name_or_path", ""))]


def _read_limit(path: Path) -> int | None:
    file = path / _BERT
    config = _read_object(file)
    handed = _check_transformer(file, config)
    tokenizer = _read_object(path / "tokenizer_config.json")
    # In sentence-transformers' order; version 6 no longer writes max_seq_length. max_len is transformers' old spelling.
    stated = (
        handed,
        config.get("max_seq_length"),
        tokenizer.get("model_max_length"),
        tokenizer.get("max_len"),
    )
    limit = next((value for value in stated if value is not None), None)
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or limit < 1):
        raise InputError(f"{path}: max_seq_length is {limit!r}, not a positive number")
    return None if limit is None or limit >= _NO_LIMIT else int(limit)


def _check_transformer(file: Path, config: dict[str, Any]) -> Any:
    """Refuses what would read texts otherwise; returns the limit that is handed on to the tokenizer, or None."""
    for key, neutral in _PLAIN.items():
        if config.get(key) is not None and config[key] not in neutral:
            raise InputError(f"{file}: {key} {config[key]!r} is not supported")
    modality = config.get("modality_config") or {}
    text = modality.get("text", {}) if isinstance(modality, dict) else None
    if not isinstance(text, dict):
        raise InputError(f"{file}: modality_config must be an object of objects")
    if "message" in modality:
        raise InputError(
            f'{file}: "message" in modality_config sends every text through a chat template, which is not supported '
            "for vectors"
        )
    output = text.get("method_output_name")
    if text.get("method", "forward") != "forward" or output not in (
        None,
        "last_hidden_state",
        ["last_hidden_state"],
    ):
        raise InputError(f"{file}: modality_config takes {text}; only the last hidden states are supported")
    if processing := {key: value for key, value in (config.get("processing_kwargs") or {}).items() if value}:
        raise InputError(f"{file}: processing_kwargs {processing} is not supported")
    handed = {key: config.get(key) or {} for key in _ARGUMENTS}
    others = {key: value for arguments in handed.values() for key, value in arguments.items()}
    if unknown := sorted(others.keys() - _HARMLESS_ARGUMENTS):
        raise InputError(f"{file}: {', '.join(unknown)} among the arguments of transformers is not supported")
    if unknown := sorted(config.keys() - _BERT_KEYS):
        warnings.warn(f"{file}: ignored what is not known here: {', '.join(unknown)}", stacklevel=2)
    return others.get("model_max_length")


def _prompts(file: Path, saved: dict[str, Any]) -> tuple[dict[str, str] | None, str | None]:
    """All named prompts, and the name of the default one."""
    named, default = saved.get("prompts") or {}, saved.get("default_prompt_name")
    if not isinstance(named, dict) or not all(
        text is None or isinstance(text, str) for text in named.values()
    ):
        raise InputError(f"{file}: prompts must be an object of texts by name")
    named = {key: text or "" for key, text in named.items()}
    if default is not None and not (isinstance(default, str) and default in {"query", "document", *named}):
        raise InputError(
            f"{file}: default_prompt_name {default!r} is none of the prompts ({', '.join(named)})"
        )
    if unknown := sorted(saved.keys() - _SAVED_KEYS):
        warnings.warn(f"{file}: ignored what is not known here: {', '.join(unknown)}", stacklevel=2)
    return named or None, default


def _truncate_dim(file: Path, saved: dict[str, Any]) -> int | None:
    size = saved.get("truncate_dim")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise InputError(f"{file}: truncate_dim is {size!r}, not a positive number")
    return size


def _similarity(file: Path, saved: dict[str, Any]) -> str | None:
    name = saved.get("similarity_fn_name")
    if name is not None and name not in SIMILARITIES:
        raise InputError(f"{file}: similarity_fn_name {name!r} is not supported ({', '.join(SIMILARITIES)})")
    return name


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object, or {} when there is no such file."""
    return read_object(file) if file.is_file() else {}


def write_settings(folder: str | os.PathLike[str], settings: ModelSettings, embed_dim: int) -> None:
    """Writes the files by which sentence-transformers (2.3 to 6) and `read_settings` know how to use the model.

    They are modules.json with what it names, sentence_bert_config.json and config_sentence_transformers.json. The
    last also has `sgpt_brackets`, which sentence-transformers passes over: it adds no brackets by itself.

    Args:
        folder: created where it is not there.
        settings: what to say; pooling must be there.
        embed_dim: E of the hidden states.

    Raises InputError for an unknown pooling mode.
    """
    root = epath.Path(folder)
    write_modules(root, embed_dim, settings.pooling or "", settings.include_prompt, settings.modules)
    limit = {} if settings.max_seq_length is None else {"max_seq_length": settings.max_seq_length}
    write_json(root / _BERT, limit | {"do_lower_case": False})
    shortened = {} if settings.truncate_dim is None else {"truncate_dim": settings.truncate_dim}
    write_json(
        root / _SAVED,
        {
            "__version__": {"sgpt_jax": metadata.version("sgpt-jax")},
            "model_type": "SentenceTransformer",
            "prompts": {"query": "", "document": ""} | dict(settings.prompts or {}),
            "default_prompt_name": settings.default_prompt_name,
            "similarity_fn_name": settings.similarity or "cosine",
        }
        | shortened
        | {"sgpt_brackets": bool(settings.brackets)},
    )
