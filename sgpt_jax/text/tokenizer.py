"""Tokenizers of model folders and .gguf files: loading and saving."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etils import epath

from sgpt_jax.checkpoint.gguf_tokenizer import load_gguf_tokenizer
from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import write_json

if TYPE_CHECKING:  # transformers takes most of a second to import
    from transformers import PreTrainedTokenizerFast

# Any of these sets is a tokenizer.
_TOKENIZER_FILES = [("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt")]


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder, or of a `.gguf` file (built from its metadata). Local files only.

    Raises InputError when there is no tokenizer there, or none of the fast kind.
    """
    path = Path(path)
    if path.suffix.lower() == ".gguf":
        return load_gguf_tokenizer(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such model folder")
    if not any(all((path / name).is_file() for name in names) for names in _TOKENIZER_FILES):
        # transformers would make an empty tokenizer of the model's class and say nothing.
        raise InputError(
            f"{path}: no tokenizer in this folder (tokenizer.json, tokenizer.model, or vocab.json and merges.txt)"
        )
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = _tokenizer_class(path).from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more special for a broken file
        raise InputError(f"{path}: the tokenizer in this folder cannot be loaded: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(
            f"{path}: {type(tokenizer).__name__} is not a fast tokenizer (tokenizer.json is missing)"
        )
    return tokenizer


def _tokenizer_class(path: Path) -> Any:
    """AutoTokenizer, or where that is sure the class it chooses: AutoTokenizer imports torch if it is installed."""
    import transformers

    try:
        settings, config = (
            json.loads((path / name).read_text(encoding="utf-8"))
            for name in ("tokenizer_config.json", "config.json")
        )
        plain = (
            settings["tokenizer_class"] in ("PreTrainedTokenizerFast", "TokenizersBackend")
            and "auto_map" not in settings
            and config["model_type"] != "qwen2"  # always gets a class of its own
            and (path / "tokenizer.json").is_file()
        )
    except (OSError, ValueError, KeyError, TypeError):
        plain = False
    return transformers.PreTrainedTokenizerFast if plain else transformers.AutoTokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | os.PathLike[str]) -> None:
    """Saves the tokenizer so that AutoTokenizer loads it, in transformers 4 as well as 5.

    Version 5 writes the class name "TokenizersBackend", which version 4 does not know; both know its older name. A
    tokenizer without a pad token gets the end-of-text token for it, as in the released SGPT folders:
    sentence-transformers cannot batch texts without one.
    """
    root = epath.Path(folder)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        settings = Path(scratch) / "tokenizer_config.json"
        config = json.loads(settings.read_text(encoding="utf-8"))
        if config.get("tokenizer_class") == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if tokenizer.pad_token is None and tokenizer.eos_token is not None:
            config["pad_token"] = tokenizer.eos_token
        write_json(settings, config)
        for path in sorted(p for p in Path(scratch).rglob("*") if p.is_file()):
            target = root / path.relative_to(scratch)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
