"""Builds the tokenizer that a GGUF file describes, with the `tokenizers` library alone (no torch).

A GGUF file has no tokenizer.json: it lists the vocabulary, the merges or scores and the special tokens, and names the
pre-tokenizer. The rules for each name are those of the model's own tokenizer.json, as llama.cpp follows them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from sgpt_jax.checkpoint.gguf_reader import open_gguf
from sgpt_jax.errors import InputError
from sgpt_jax.families.reading import short
from sgpt_jax.runtime.transformers import import_transformers

if TYPE_CHECKING:  # transformers takes most of a second to import
    from transformers import PreTrainedTokenizerFast

# Values of tokenizer.ggml.token_type.
_CONTROL, _USER_DEFINED = 3, 4

# What the fields hold, and the entries of those that are lists.
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("model", "pre", "chat_template"), (str,)),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id"), (int,)),
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_space_prefix"), (bool,)),
}
_ENTRIES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("tokens", "merges"), (str,)),
    "scores": (float, int),
    "token_type": (int,),
}

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def _gpt2_pieces() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm_pieces() -> Any:
    # Every digit stands alone, before (not inside) the GPT-2 rule: " 12" is " ", "1", "2".
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_pieces()])


def _split_pieces(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# tokenizer.ggml.pre -> the rule that cuts a text into pieces before the merges.
_PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "default": _gpt2_pieces,
    "gpt-2": _gpt2_pieces,
    "smollm": _smollm_pieces,
    "qwen2": lambda: _split_pieces(_QWEN2_SPLIT),
    "llama-bpe": lambda: _split_pieces(_LLAMA3_SPLIT),
}


def load_gguf_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a `.gguf` file: byte-level BPE ("gpt2") or sentencepiece BPE ("llama").

    Token ids are the positions in the file's token list. Control tokens become special tokens and user-defined ones
    plain added tokens, so both stay whole when their text occurs in an input. BOS and EOS are added where the file
    says so; where it says nothing, as llama.cpp does (BOS for "llama" and "llama-bpe", none otherwise).

    Raises InputError when the file is no GGUF file, holds no tokenizer, or one of a kind not listed here.
    """
    path = Path(path)
    meta = _read_metadata(path)
    tokens = meta.get("tokens")
    if not tokens:
        raise InputError(f"{path}: this GGUF file holds no tokenizer (tokenizer.ggml.tokens)")
    if len(set(tokens)) != len(tokens):
        raise InputError(f"{path}: tokenizer.ggml.tokens lists a token twice")
    kind = meta.get("model")
    pre = meta.get("pre")
    if kind == "gpt2":
        backend = _byte_level(path, meta, tokens, pre)
    elif kind == "llama":
        backend = _sentencepiece(path, meta, tokens)
    else:
        raise InputError(
            f"{path}: tokenizer.ggml.model {kind!r} is not supported (supported: 'gpt2', 'llama'); "
            "use the model's folder with its tokenizer.json instead"
        )
    types = meta.get("token_type", [])
    control = [t for t, kind_of in zip(tokens, types, strict=False) if kind_of == _CONTROL]
    user = [t for t, kind_of in zip(tokens, types, strict=False) if kind_of == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in user])

    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    special = {
        f"{short}_token": _token_at(path, tokens, meta[f"{name}_token_id"], f"{name}_token_id")
        for name, short in names.items()
        if f"{name}_token_id" in meta
    }
    add_bos = meta.get("add_bos_token", kind == "llama" or pre == "llama-bpe")
    add_eos = meta.get("add_eos_token", False)
    backend.post_processor = _template(special, tokens, add_bos, add_eos)
    tokenizer = import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, padding_side="right", **special
    )
    tokenizer.chat_template = meta.get("chat_template")
    return tokenizer


def _read_metadata(path: Path) -> dict[str, Any]:
    """All `tokenizer.ggml.*` fields by their last name, and the chat template.

    Raises:
        InputError: one is of another type.
    """
    fields = {
        name.removeprefix("tokenizer.ggml."): value
        for name, value in open_gguf(path).metadata.items()
        if name.startswith("tokenizer.ggml.") or name == "tokenizer.chat_template"
    }
    if "tokenizer.chat_template" in fields:
        fields["chat_template"] = fields.pop("tokenizer.chat_template")
    for name, value in fields.items():
        # The entries of a GGUF file's list are of one type.
        good = (
            isinstance(value, list) and all(type(entry) in _ENTRIES[name] for entry in value[:1])
            if name in _ENTRIES
            else name not in _TYPES or type(value) in _TYPES[name]
        )
        if not good:
            key = "tokenizer.chat_template" if name == "chat_template" else f"tokenizer.ggml.{name}"
            raise InputError(f"{path}: {key} is of another type than it should be: {short(value)}")
    return fields


def _byte_level(path: Path, meta: dict[str, Any], tokens: list[str], pre: str | None) -> Tokenizer:
    if pre is None:
        warnings.warn(f"{path}: no tokenizer.ggml.pre; texts are split by the GPT-2 rule", stacklevel=4)
    elif pre not in _PRE_TOKENIZERS:
        raise InputError(
            f"{path}: tokenizer.ggml.pre {pre!r} is not supported (supported: {', '.join(_PRE_TOKENIZERS)}); "
            "use the model's folder with its tokenizer.json instead"
        )
    if "merges" not in meta:
        raise InputError(f"{path}: a 'gpt2' tokenizer needs tokenizer.ggml.merges")
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = []
    for merge in meta["merges"]:
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise InputError(
                f"{path}: tokenizer.ggml.merges joins tokens that the file does not have: {merge!r}"
            )
        merges.append((left, right))
    # Llama 3 takes a piece that is in the vocabulary whole, even where the merges do not lead to it.
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, fuse_unk=False, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()  # as the Qwen2 tokenizer itself
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre or "default"]()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(path: Path, meta: dict[str, Any], tokens: list[str]) -> Tokenizer:
    scores = meta.get("scores")
    if scores is None or len(scores) != len(tokens):
        raise InputError(f"{path}: a 'llama' tokenizer needs one tokenizer.ggml.scores entry for each token")
    unknown = meta.get("unknown_token_id")
    model = BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=_merges_from_scores(tokens, scores),
        unk_token=None if unknown is None else _token_at(path, tokens, unknown, "unknown_token_id"),
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    strip: list[Any] = []
    if meta.get("add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
        strip.append(decoders.Strip(content=" ", left=1))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges_from_scores(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, best score of the joined token first.

    sentencepiece BPE joins the neighbours whose union has the best score; this is the same rule as a list of merges.
    """
    known = set(tokens)
    found = [
        (-score, token[:cut], token[cut:])
        for token, score in zip(tokens, scores, strict=True)
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]
    found.sort(key=lambda merge: merge[0])
    return [(left, right) for _, left, right in found]


def _token_at(path: Path, tokens: list[str], index: int, name: str) -> str:
    if not 0 <= index < len(tokens):
        raise InputError(f"{path}: tokenizer.ggml.{name} is {index}, but there are {len(tokens)} tokens")
    return tokens[index]


def _template(special: dict[str, str], tokens: list[str], add_bos: bool, add_eos: bool) -> Any:
    before = [special["bos_token"]] if add_bos and "bos_token" in special else []
    after = [special["eos_token"]] if add_eos and "eos_token" in special else []
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{t}:1" for t in after)],
        special_tokens=[(token, tokens.index(token)) for token in {*before, *after}],
    )
