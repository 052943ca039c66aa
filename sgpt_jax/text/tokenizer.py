"""Tokenizers of model folders and .gguf files: loading and saving."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etils import epath

from sgpt_jax.checkpoint.gguf_tokenizer import load_gguf_tokenizer
from sgpt_jax.checkpoint.untrusted import read_object
from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import write_json
from sgpt_jax.runtime.transformers import import_transformers

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
    if not has_tokenizer(path):
        # transformers would make an empty tokenizer of the model's class and say nothing.
        raise InputError(
            f"{path}: no tokenizer in this folder (tokenizer.json, tokenizer.model, or vocab.json and merges.txt)"
        )
    fast = import_transformers().PreTrainedTokenizerFast
    try:
        tokenizer = _tokenizer_class(path).from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more special for a broken file
        raise InputError(f"{path}: the tokenizer in this folder cannot be loaded: {error}") from error
    if not isinstance(tokenizer, fast):
        raise InputError(
            f"{path}: {type(tokenizer).__name__} is not a fast tokenizer (tokenizer.json is missing)"
        )
    _follow_flags(path, tokenizer)
    return tokenizer


def has_tokenizer(path: Path) -> bool:
    """Tells whether a model folder has the files of a tokenizer."""
    return any(all((path / name).is_file() for name in names) for names in _TOKENIZER_FILES)


def _follow_flags(path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Compares add_bos_token and add_eos_token of tokenizer_config.json with what the tokenizer does.

    tokenizer.json decides, as in transformers 5; a warning says where the flags want something else. gte-Qwen2's
    folders name a tokenizer class of their own that obeys add_eos_token; as it is not run, its end token is added here.
    """
    file = path / "tokenizer_config.json"
    settings = read_object(file) if file.is_file() else {}
    before, after = special_ids(tokenizer)
    classes = settings.get("auto_map")
    named = str(classes.get("AutoTokenizer")) if isinstance(classes, dict) else ""
    ends = settings.get("add_eos_token") is True and tokenizer.eos_token_id is not None
    if "tokenization_qwen.Qwen2Tokenizer" in named and ends and tokenizer.eos_token_id not in after:
        _surround(tokenizer, before, [*after, tokenizer.eos_token_id])
        return
    wrong = []
    for what, ids, token in (("bos", before, tokenizer.bos_token_id), ("eos", after, tokenizer.eos_token_id)):
        flag = settings.get(f"add_{what}_token")
        if isinstance(flag, bool) and token is not None and flag != bool(ids):
            does = "adds none" if flag else f"adds {tokenizer.convert_ids_to_tokens(ids)}"
            wrong.append(f"add_{what}_token is {json.dumps(flag)}, but tokenizer.json {does}")
    if wrong:
        warnings.warn(
            f"{file}: {', and '.join(wrong)}; tokenizer.json decides, as in transformers 5. With lasttoken pooling the "
            "vector is that of the last token, so check which one the model was trained with (`sgpt info` shows it)",
            stacklevel=3,
        )


def special_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer itself puts before and after a text.

    Raises:
        InputError: it changes the text's own ids as well.
    """
    backend = tokenizer.backend_tokenizer
    # A tokenizer.json may carry padding and truncation, which act on every call to the backend.
    backend.no_padding()
    backend.no_truncation()
    bare, full = (backend.encode("a", add_special_tokens=added).ids for added in (False, True))
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise InputError("this tokenizer changes the ids of a text when it adds its special tokens")


def _surround(tokenizer: PreTrainedTokenizerFast, before: list[int], after: list[int]) -> None:
    """Lets the tokenizer put these ids around every text."""
    from tokenizers.processors import TemplateProcessing

    names = {index: tokenizer.convert_ids_to_tokens(index) for index in (*before, *after)}
    first, last = ([names[index] for index in ids] for ids in (before, after))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[
            *first,
            "$A",
            *last,
            *(f"{token}:1" for token in first),
            "$B:1",
            *(f"{token}:1" for token in last),
        ],
        special_tokens=[(token, index) for index, token in names.items()],
    )


def _tokenizer_class(path: Path) -> Any:
    """AutoTokenizer, or where that is sure the class it chooses: AutoTokenizer imports torch if it is installed."""
    transformers = import_transformers()
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
