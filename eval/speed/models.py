"""What benchmarks need: texts of mixed length, models with or without a checkpoint, and the same weights in torch."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from etils import epath
from flax import nnx
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.checkpoint.export import export_folder
from sgpt_jax.checkpoint.weights import is_int8
from sgpt_jax.decoder.build import Build
from sgpt_jax.decoder.config import compute_dtype
from sgpt_jax.decoder.model import Decoder
from sgpt_jax.errors import InputError
from sgpt_jax.families import read_config
from sgpt_jax.files.beir import DataSet
from sgpt_jax.files.lines import parse_json, read_lines
from sgpt_jax.load import token_limit
from sgpt_jax.text.encoder import TextEncoder
from sgpt_jax.text.tokenizer import save_tokenizer

from ..beir import CACHE
from ..datasets import obtain
from ..plan.models import MODELS
from .benchmark import threads

END = "<|endoftext|>"
INT8 = "ours, int8 weights"  # the name of that run


def random_model(
    shape: str, tokenizer: str, dtype: str, max_seq_length: int | None, weights: str | None = None
) -> BiEncoder:
    """A model of a published shape with random weights.

    Args:
        shape: a name of `eval.plan.models.MODELS`.
        tokenizer: a folder with GPT-2's vocab.json and merges.txt, gzipped or not.
        dtype: of the weights.
        max_seq_length: tokens of a text that are read; None is the shape's limit.
        weights: "int8" for other weights, which take as long, in int8.

    Raises:
        InputError: the tokenizer's files are not there.
    """
    config = read_config(MODELS[shape])
    build = Build(compute_dtype(dtype), int8=is_int8(weights), rngs=nnx.Rngs(0))
    text = TextEncoder(_finished(_gpt2_bpe(tokenizer)), token_limit(config, max_seq_length))
    return BiEncoder(Decoder(config, build), MODELS[shape], text, "weightedmean", name=shape)


def write_random_model(hf: dict[str, Any], bpe: Tokenizer, folder: Any, *, seed: int = 0) -> None:
    """Writes a model folder with random weights.

    Args:
        hf: its Hugging Face config.
        bpe: a byte-level tokenizer, to which the token `END` is added.
        folder: where.
        seed: of the weights.
    """
    decoder = Decoder(read_config(hf), Build(compute_dtype("float32"), rngs=nnx.Rngs(seed)))
    export_folder(decoder, hf, folder)
    save_tokenizer(_finished(bpe), folder)


def _finished(bpe: Tokenizer) -> Any:
    """The tokenizer with the token `END`, as transformers has it."""
    from transformers import PreTrainedTokenizerFast

    bpe.add_special_tokens([AddedToken(END, normalized=False, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)


def byte_level(bpe: BPE) -> Tokenizer:
    """A tokenizer like GPT-2's: no space before the text, and every byte has a token."""
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _gpt2_bpe(folder: str) -> Tokenizer:
    def lines(name: str) -> list[str]:
        path = epath.Path(folder) / name
        return [line for _, line in read_lines(path if path.exists() else path.with_name(f"{name}.gz"))]

    vocab = parse_json("\n".join(lines("vocab.json")))
    pairs = [line.split(" ") for line in lines("merges.txt") if not line.startswith("#version")]
    return byte_level(BPE(vocab=vocab, merges=[(left, right) for left, right in pairs]))


def open_data(folder: str | None) -> DataSet:
    """A BEIR folder, or the set of that name, its test queries read.

    Raises:
        InputError: none is given, or it cannot be had.
    """
    if not folder:
        raise InputError("no texts: give --data a BEIR folder, or set SGPT_DATA to what holds scifact")
    return DataSet("", obtain(folder, CACHE), "test").load()


def mixed_texts(data: DataSet, count: int) -> list[str]:
    """`count` texts of mixed length: four documents, one query, and so on, each in the order of its file."""
    queries = list(data.queries.values())
    documents = (document.text for document in data.documents())
    texts: list[str] = []
    for place, document in enumerate(islice(documents, count)):
        texts.append(document)
        if place % 4 == 3:
            texts.append(queries[place // 4 % len(queries)])
    if len(texts) < count:
        raise InputError(f"{data.folder}: has {len(texts)} texts, not {count}")
    return texts[:count]


@contextlib.contextmanager
def exported(model: BiEncoder) -> Iterator[str]:
    """The model as a folder that torch's libraries read, while it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        yield folder


def pooled(t: Any, hidden: Any, mask: Any, pooling: str) -> Any:
    """`sgpt_jax.pool` for rows padded on the right, by torch (`t`): hidden [B, T, E] and mask [B, T] to [B, E]."""
    places = t.arange(mask.shape[1], device=mask.device)
    last = mask.sum(1, keepdim=True) - 1
    weights = {
        "weightedmean": mask * (places + 1),
        "mean": mask,
        "lasttoken": (places == last).long().expand_as(mask),
        "cls": (places == 0).long().expand_as(mask),
    }[pooling][..., None].float()
    return (hidden * weights).sum(1) / weights.sum(1)


class Torch:
    """Torch as the peers use it: on a GPU if there is one, with all cores otherwise.

    Raises:
        ModuleNotFoundError: it is not installed.
    """

    def __init__(self, dtype: str) -> None:
        import torch

        torch.set_num_threads(threads())
        self.torch: Any = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = getattr(torch, dtype)
        self.attention = ""

    def load(self, kind: str, folder: str | Path) -> Any:
        """A model of transformers by one of its Auto classes, with the fastest attention that it has."""
        import transformers

        return self.best_attention(
            lambda attention: (
                getattr(transformers, kind)
                .from_pretrained(folder, dtype=self.dtype, attn_implementation=attention)
                .to(self.device)
                .eval()
            )
        )

    def best_attention(self, load: Any) -> Any:
        """`load(implementation)` for the first implementation that works; `attention` then has its name."""
        from transformers.utils import is_flash_attn_2_available

        half = self.dtype != self.torch.float32
        flash = (
            ["flash_attention_2"] if self.device == "cuda" and half and is_flash_attn_2_available() else []
        )
        for self.attention in [*flash, "sdpa"]:
            try:
                return load(self.attention)
            except (ValueError, ImportError):  # this decoder has no such implementation
                continue
        self.attention = "eager"
        return load("eager")

    def facts(self) -> dict[str, Any]:
        """What the result says about it."""
        return {
            "torch": {
                "version": self.torch.__version__,
                "device": self.device,
                "threads": self.torch.get_num_threads(),
                "attention": self.attention,
            }
        }
