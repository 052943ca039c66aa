"""From a source to a decoder, and what else the encoders need of it."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from jax.sharding import Mesh

from sgpt_jax.checkpoint.adapters import CONFIG, AdaptedFiles, Adapter, read_adapter
from sgpt_jax.checkpoint.fingerprint import weights_sha256
from sgpt_jax.checkpoint.score_head import WithoutScoreHead
from sgpt_jax.checkpoint.tensors import TensorFiles, open_checkpoint
from sgpt_jax.checkpoint.untrusted import read_object
from sgpt_jax.checkpoint.weights import checkpoint_sha256, load_checkpoint
from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.decoder.model import Decoder, split
from sgpt_jax.errors import InputError, whole
from sgpt_jax.families import read_config
from sgpt_jax.families.own_code import describe, own_code_of, without_own_code
from sgpt_jax.folder.modules import check_decoder_is_on_top
from sgpt_jax.folder.source import Source, resolve
from sgpt_jax.runtime.forks import check_fork
from sgpt_jax.text.tokenizer import has_tokenizer, load_tokenizer

if TYPE_CHECKING:  # transformers takes most of a second to import
    from transformers import PreTrainedTokenizerFast

# Tokens that are read where positions are unlimited: what the released ALiBi decoders were trained on.
UNLIMITED_DEFAULT = 2048

# Adapters over adapters, at the most: a chain that is longer names itself.
_LONGEST_CHAIN = 8


def load_decoder(
    source: Any, dtype: str = "float32", mesh: Mesh | None = None, *, weights: str | None = None
) -> Decoder:
    """The decoder of a checkpoint, in evaluation form.

    Args:
        source: a folder as transformers or peft writes it, a hub id ("org/name" or "org/name@revision"), or a .gguf
            file.
        dtype: "float32" or "bfloat16", for weights and matmuls.
        mesh: spread the weights over it by the tables of `sharding.py`; None uses the first device.
        weights: "int8" holds the matrices as int8, with a float32 scale for each output channel (of embedding and head:
            for each row); None holds them in the dtype.

    Returns:
        `decoder(input_ids, attention_mask)` gives hidden states [B, T, E] after the final norm,
        `decoder.logits(hidden)` float32 logits [B, T, V].

    Raises:
        InputError: when the source is not there, or its config or its tensors do not fit; all misfits are listed.
    """
    check_fork()
    return load_checkpoint(open_model(resolve(source)).files, dtype, mesh, weights)


@dataclass(frozen=True)
class Opened:
    """A model whose files are found and whose weights are not read yet.

    Attributes:
        files: config and tensors, with all adapters merged in.
        settings: the folder (or .gguf file) that says how to use it.
        tokenizer: the folder (or .gguf file) with its tokenizer.
        base: the checkpoint's folder (or .gguf file), under all adapters.
        adapters: the adapters' folders, in the order in which they are merged.
    """

    files: TensorFiles
    settings: Path
    tokenizer: Path
    base: Path
    adapters: tuple[Path, ...] = ()


def open_model(
    source: Source, adapter: Any = None, *, bidirectional: bool | None = None, depth: int = 0
) -> Opened:
    """Opens a model: a checkpoint, or a LoRA adapter with the base that it names, and further adapters over it.

    Args:
        source: a model, or the folder of an adapter.
        adapter: folders or hub ids of adapters to merge into it: one, or several in their order.
        bidirectional: whether tokens see those after them; None does what the folder says.
        depth: how many adapters lie over it.

    Raises:
        InputError: something is missing or cannot be merged.
    """
    path = Path(source.path)
    if path.is_dir() and (path / CONFIG).is_file():
        opened = _over_its_base(path, depth)
    else:
        check_decoder_is_on_top(path)
        opened = Opened(open_checkpoint(epath.Path(path)), path, path, path)
    for each in _listed(adapter):
        folder = Path(resolve(each).path)
        opened = _merged(opened, folder)
    if bidirectional is not None:
        opened.files.config = _with_mask(opened.files.config, bidirectional)
    return opened


def _with_mask(hf: Mapping[str, Any], bidirectional: bool) -> dict[str, Any]:
    """A config with another mask. Who asks for one knows what code of the folder's own does to it.

    Raises:
        InputError: the family has no other mask.
    """
    changed = {key: value for key, value in hf.items() if key != "auto_map"} | {
        "is_causal": not bidirectional
    }
    if read_config(changed).bidirectional != bidirectional:
        raise InputError(
            f"a {hf.get('model_type')} whose config.json makes attention bidirectional cannot be made causal"
        )
    return changed


def _listed(adapter: Any) -> Sequence[Any]:
    if adapter is None:
        return ()
    return [adapter] if isinstance(adapter, str | os.PathLike) else list(adapter)


def _over_its_base(path: Path, depth: int) -> Opened:
    """A folder with an adapter, over the base that its adapter_config.json names."""
    adapter = read_adapter(path)
    if not adapter.base:
        raise InputError(
            f"{path / CONFIG} names no base model: give the base as the model, and this folder as its adapter"
        )
    if depth >= _LONGEST_CHAIN:
        raise InputError(f"{path / CONFIG}: {depth} adapters, each over another: a circle?")
    base = adapter.base
    if adapter.revision and not os.path.exists(base):
        base = f"{base}@{adapter.revision}"
    try:
        found = resolve(base)
    except InputError as problem:
        raise InputError(
            f"{path / CONFIG} names the base {base}, which is not found ({problem}): give the base as the model, and "
            "this folder as its adapter"
        ) from None
    if Path(found.path).resolve() == path.resolve():
        opened = Opened(open_checkpoint(epath.Path(path)), path, path, path)
    else:
        opened = open_model(found, depth=depth + 1)
    merged = _merged(opened, path)
    settings = path if (path / "modules.json").is_file() else merged.settings
    tokenizer = path if has_tokenizer(path) else opened.tokenizer
    return dataclasses.replace(merged, settings=settings, tokenizer=tokenizer)


def _merged(opened: Opened, folder: Path) -> Opened:
    """A model with one more adapter. LLM2Vec's folders have a config.json besides, which names code of their own."""
    adapter = read_adapter(folder)
    _check_base(adapter, opened.files)
    files = AdaptedFiles(opened.files, adapter)
    settings = opened.settings
    stated = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    if settings != folder and (code := own_code_of(stated)) is not None:
        warnings.warn(f"{folder}: {describe(code)}", stacklevel=2)
        files.config = without_own_code(files.config, code)
        settings = folder
    return dataclasses.replace(opened, files=files, settings=settings, adapters=(*opened.adapters, folder))


def _check_base(adapter: Adapter, base: TensorFiles) -> None:
    """Looks whether an adapter that says which weights it was trained over gets these.

    Raises:
        InputError: they are others.
    """
    wanted, name = adapter.header.get("base_sha256"), adapter.header.get("base_model", "another model")
    if wanted is not None and (actual := checkpoint_sha256(base)) != wanted:
        raise InputError(
            f"{adapter.path}: this adapter belongs to {name}, whose weights have sha256 {str(wanted)[:16]}..., but "
            f"this model's have {actual[:16]}..."
        )
    if adapter.header.get("weights") == "int8":
        warnings.warn(
            f"{adapter.path}: this adapter was trained over int8 weights of {name}, and is merged into others here: "
            "train with --merge for the model that it was trained in",
            stacklevel=2,
        )


@dataclass(frozen=True)
class Parts:
    """What an encoder is made of.

    Attributes:
        decoder: the decoder.
        tokenizer: its tokenizer.
        hf_config: the Hugging Face config that it was read from.
        score_head: a classifier's head, float32 [E], where it was asked for.
    """

    decoder: Decoder
    tokenizer: PreTrainedTokenizerFast
    hf_config: Mapping[str, Any]
    score_head: np.ndarray | None = None


def load_parts(
    opened: Opened, dtype: str, mesh: Mesh | None, weights: str | None = None, *, score_head: bool = False
) -> Parts:
    """The decoder and the tokenizer of an opened model, see `load_decoder` and `open_model`; with `score_head` also the
    head of a classifier.
    """
    classifier = WithoutScoreHead(opened.files) if score_head else None
    with ThreadPoolExecutor(1) as thread:
        # Mostly Python, and importing transformers; reading weights is mostly not.
        tokenizer = thread.submit(load_tokenizer, opened.tokenizer)
        decoder = load_checkpoint(classifier or opened.files, dtype, mesh, weights)
        head = classifier.head() if classifier else None
        return Parts(decoder, tokenizer.result(), (classifier or opened.files).config, head)


def base_sha256(files: TensorFiles, decoder: Decoder) -> str:
    """The hash of the weights that a decoder was loaded with, int8 or not: what a bias set names its base by.

    Args:
        files: what the decoder came from; read again where its weights became int8.
        decoder: the decoder, with or without biases and adapters of its own.
    """
    if decoder.build.int8:
        return checkpoint_sha256(files)
    return weights_sha256(split(decoder)[1])


def token_limit(config: DecoderConfig, asked: int | None, stated: int | None = None) -> int:
    """How many tokens of an input are read.

    Args:
        config: the decoder's.
        asked: what the user asks for, or None.
        stated: what the model folder states, or None; the decoder's own limit bounds it.

    Raises:
        InputError: when more is asked for than the decoder has positions.
    """
    limit = config.max_positions
    if asked is not None:
        asked = whole("max_seq_length", asked)
        if limit is not None and asked > limit:
            raise InputError(f"max_seq_length {asked}, but the model has {limit} positions")
        return asked
    if stated is not None:
        return stated if limit is None else min(stated, limit)
    return UNLIMITED_DEFAULT if limit is None else limit
