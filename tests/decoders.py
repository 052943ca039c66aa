"""Tiny random decoders of every family, rebuilt without torch.

Only names, shapes and config.json contents are stored (`fixtures/decoders/variants.json`); the numbers come
from numpy's legacy `RandomState`, whose streams never change. `fixtures/decoders/make.py` loads the very same
checkpoints into transformers and records what torch gives for them (`fixtures/decoders/expected.npz`).
The decoders of 2026 (`NEW_VARIANTS`) have their own script and files there, named `..._2026`.
"""

import json
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from etils import epath

from sgpt_jax.checkpoint.tensors import open_checkpoint
from sgpt_jax.checkpoint.weights import load_checkpoint
from sgpt_jax.decoder.model import merge, split

FIXTURES = Path(__file__).parent / "fixtures"
SPECS: dict[str, dict[str, Any]] = json.loads((FIXTURES / "decoders/variants.json").read_text("utf-8"))
VARIANTS = tuple(SPECS)
NEW_SPECS: dict[str, dict[str, Any]] = json.loads(
    (FIXTURES / "decoders/variants_2026.json").read_text("utf-8")
)
NEW_VARIANTS = tuple(NEW_SPECS)
# StableLM with a norm of its own for every head, whose weights are a tensor each, is refused.
REFUSED_VARIANTS = ("stablelm_parallel",)
SUPPORTED_NEW_VARIANTS = tuple(name for name in NEW_VARIANTS if name not in REFUSED_VARIANTS)
SPECS |= NEW_SPECS

VOCAB_SIZE = 384  # 256 bytes, 124 merges, then the special tokens below
EOS, BOS = "<|endoftext|>", "<s>"
EOS_ID, BOS_ID = 380, 381
PLACEHOLDERS = {"[SOS]": 382, "{SOS}": 383}  # what the released bracket models add to their vocabulary

_PREFIX = {"gpt_neox": "gpt_neox."}
_PREFIX |= dict.fromkeys(("gpt2", "gpt_neo", "gptj", "bloom", "falcon", "mpt"), "transformer.")
_HEADS = ("lm_head.", "embed_out.", "decoder.")
_TIED = dict.fromkeys(("gpt2", "gpt_neo", "mpt"), "transformer.wte.weight")
_TIED |= dict.fromkeys(("bloom", "falcon"), "transformer.word_embeddings.weight")
_TIED |= {
    "opt": "model.decoder.embed_tokens.weight",
    "modernbert-decoder": "model.embeddings.tok_embeddings.weight",
}
_MULTIMODAL = {  # model type of the text part: model type, architecture and vision part of the whole
    "gemma3_text": ("gemma3", "Gemma3ForConditionalGeneration", "siglip_vision_model"),
    "ministral3": ("mistral3", "Mistral3ForConditionalGeneration", "pixtral"),
}
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def config(variant: str, spelling: str = "new") -> dict[str, Any]:
    """The config.json of a variant: as transformers 5 writes it ("new") or as in older folders ("old")."""
    return json.loads(json.dumps(SPECS[variant]["config" if spelling == "new" else "old_config"]))


def tensors(variant: str) -> dict[str, np.ndarray]:
    """All float32 tensors of a variant under the names that transformers saves for its ForCausalLM class."""
    return {
        name: random_tensor(variant, name, tuple(shape)) for name, shape in SPECS[variant]["tensors"].items()
    }


def expected(variant: str) -> dict[str, np.ndarray]:
    """What torch gives for a variant, in float32.

    input_ids, attention_mask [B, T] (right padded, rows of different length, random ids in the padding);
    hidden [B, T, E] after the final norm (AutoModel's last_hidden_state; zero in the padding);
    logits [B, V] of the ForCausalLM class at the last valid place of each row.
    Of `NEW_VARIANTS` also long_ids [1, L], one row without padding, L > 256, and long_hidden [2, E] at its last
    two positions.
    """
    stored = _expected("expected_2026" if variant in NEW_SPECS else "expected")
    names = ["input_ids", "attention_mask", f"{variant}/hidden", f"{variant}/logits"]
    if variant in NEW_SPECS:
        names += ["long_ids", f"{variant}/long_hidden"]
    return {name.rpartition("/")[2]: stored[name] for name in names}


def write_checkpoint(
    variant: str,
    folder: str | Path,
    *,
    dtype: str = "float32",
    prefix: bool | None = None,
    shards: int = 1,
    fmt: str = "safetensors",
    with_buffers: bool = False,
    model_class: str = "causal",
    spelling: str = "new",
) -> Path:
    """Writes config.json and the weights of a variant as transformers would.

    Args:
        variant: one of `VARIANTS` or `NEW_VARIANTS`.
        folder: created when missing.
        dtype: float32, float16 or bfloat16; goes into config.json too.
        prefix: whether names carry `transformer.`, `model.` or `gpt_neox.`; None follows `model_class`.
        shards: number of files; more than one adds the index JSON.
        fmt: "safetensors", or "bin" (pytorch_model.bin; needs torch).
        with_buffers: add what old checkpoints also hold: mask and rotary buffers, and a copy of a tied head.
        model_class: "causal" (with the head) or "base" (as AutoModel saves it: no head).
        spelling: of config.json, see `config`.
    Returns: the folder as a Path.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = config(variant, spelling)
    settings["dtype" if spelling == "new" else "torch_dtype"] = dtype
    if model_class == "base":
        settings["architectures"] = [settings["architectures"][0].replace("ForCausalLM", "Model")]
        settings["architectures"] = [settings["architectures"][0].replace("LMHeadModel", "Model")]
        settings["architectures"] = [settings["architectures"][0].replace("ForMaskedLM", "Model")]
    (folder / "config.json").write_text(json.dumps(settings, indent=2), "utf-8")

    arrays: dict[str, Any] = {k: v.astype(_DTYPES[dtype]) for k, v in tensors(variant).items()}
    if with_buffers:
        arrays |= _buffers(variant, arrays)
    if model_class == "base":
        arrays = {name: value for name, value in arrays.items() if not name.startswith(_HEADS)}
    if not (model_class == "causal" if prefix is None else prefix):
        start = _PREFIX.get(settings["model_type"], "model.")
        arrays = {name.removeprefix(start): value for name, value in arrays.items()}

    stem, end = ("model", "safetensors") if fmt == "safetensors" else ("pytorch_model", "bin")
    if shards == 1:
        write_arrays(arrays, folder / f"{stem}.{end}")
        return folder
    weight_map: dict[str, str] = {}
    names = list(arrays)
    for i in range(shards):
        part = names[i::shards]
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}.{end}"
        write_arrays({name: arrays[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(a.nbytes for a in arrays.values())}, "weight_map": weight_map}
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index, indent=2), "utf-8")
    return folder


def write_multimodal(variant: str, folder: str | Path, *, layout: str = "inner") -> Path:
    """Writes a variant as the text part of a folder that also sees pictures (only a stub of that part is there).

    Args:
        variant: of the model types in `_MULTIMODAL`.
        folder: created when missing.
        layout: of the names: "inner" is language_model.model.layers... (as Hub folders, and transformers 5.24 on
            saving), "outer" is model.language_model.layers... (transformers 4.52 and later).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = config(variant)
    family, architecture, vision = _MULTIMODAL[text["model_type"]]
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision_config = sizes | {"model_type": vision, "image_size": 28, "patch_size": 14}
    settings = {"architectures": [architecture], "model_type": family, "dtype": "float32"}
    settings |= {"text_config": text, "vision_config": vision_config, "image_token_index": 379}
    settings["tie_word_embeddings"] = text["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(settings, indent=2), "utf-8")
    start = "language_model." if layout == "inner" else ""
    arrays = {}
    for name, value in tensors(variant).items():
        new = name if layout == "inner" else name.replace("model.", "model.language_model.", 1)
        arrays[start + new] = value
    arrays[("" if layout == "inner" else "model.") + "vision_tower.stub.weight"] = np.ones((2, 2), np.float32)
    write_arrays(arrays, folder / "model.safetensors")
    return folder


def write_tokenizer(folder: str | Path, bos: bool = False, placeholders: bool = False) -> Path:
    """Writes the byte-level BPE tokenizer that serves all variants (tokenizer.json, tokenizer_config.json).

    Args:
        folder: created when missing.
        bos: the tokenizer puts `<s>` in front of every text, as Llama's does.
        placeholders: `[SOS]` and `{SOS}` are added tokens, as in the released bracket models.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = bpe()
    added = {EOS: EOS_ID, BOS: BOS_ID} | (PLACEHOLDERS if placeholders else {})
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    first = [{"SpecialToken": {"id": BOS, "type_id": 0}}] if bos else []
    template = {
        "type": "TemplateProcessing",
        "single": [*first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [*first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {BOS: {"id": BOS, "ids": [BOS_ID], "tokens": [BOS]}} if bos else {},
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, "special": token not in PLACEHOLDERS, **flags}
            for token, i in added.items()
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": template if bos else byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }
    settings = {"bos_token": BOS if bos else EOS, "eos_token": EOS, "unk_token": EOS, "model_max_length": 192}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=1), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), "utf-8")
    return folder


@lru_cache
def bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary (token -> id, no special tokens) and merges of the tokenizer, in GPT-2's byte alphabet."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    alphabet = [chr(b) for b in printable] + [chr(256 + n) for n in range(len(others))]
    lines = (FIXTURES / "decoders/merges.txt").read_text("utf-8").splitlines()
    merges = [(left, right) for left, right in (line.split(" ") for line in lines)]
    tokens = alphabet + [left + right for left, right in merges]
    return {token: i for i, token in enumerate(tokens)}, merges


def seed_from(variant: str, name: str) -> int:
    """Seed of one tensor, the same on every machine."""
    return zlib.crc32(f"{variant}/{name}".encode())


@lru_cache
def _expected(file: str) -> Mapping[str, np.ndarray]:
    with np.load(FIXTURES / f"decoders/{file}.npz") as stored:
        return dict(stored)


def random_tensor(variant: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Normal numbers: softmax and activations are far from linear, no norm and no bias is trivial."""
    values = np.random.RandomState(seed_from(variant, name)).standard_normal(shape)
    if len(shape) == 1 or "norm" in name:  # Cohere's norms of queries and keys have a row for each head
        is_scale = name.endswith(".weight") and not variant.startswith("gemma")  # Gemma adds the one itself
        return (0.3 * values + is_scale).astype(np.float32)
    std = 0.7 if any(part in name for part in ("wte", "wpe", "embed_", "word_emb")) else 0.3
    return (std * values).astype(np.float32)


def _buffers(variant: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors that are no parameters but lie in old checkpoints of a family."""
    settings = config(variant)
    family = settings["model_type"]
    causal: Any = np.tril(np.ones((1, 1, 8, 8), np.uint8))
    masked = np.float32(-1e9).reshape(())
    inv_freq = np.ones(4, np.float32)
    per_layer: dict[str, Any] = {
        "gpt2": {"attn.bias": causal, "attn.masked_bias": masked},
        "gpt_neo": {"attn.attention.bias": causal, "attn.attention.masked_bias": masked},
        "gptj": {"attn.bias": causal, "attn.masked_bias": masked},
        "gpt_neox": {"attention.bias": causal, "attention.masked_bias": masked},
    }.get(family, {"self_attn.rotary_emb.inv_freq": inv_freq})
    if family in ("bloom", "opt", "mpt", "falcon"):
        per_layer = {}
    if family == "gpt_neox":
        per_layer["attention.rotary_emb.inv_freq"] = inv_freq
    layers = sorted({".".join(n.split(".")[:3]) for n in arrays if n.split(".")[1] in ("h", "layers")})
    extra = {f"{layer}.{name}": value for layer in layers for name, value in per_layer.items()}
    if settings["tie_word_embeddings"]:
        head = "decoder.weight" if family == "modernbert-decoder" else "lm_head.weight"
        extra[head] = arrays[_TIED.get(family, "model.embed_tokens.weight")]
    return extra


def write_arrays(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    if path.suffix == ".bin":
        import torch

        def to_torch(a: np.ndarray) -> "torch.Tensor":
            wide = torch.from_numpy(np.array(a, np.float32 if a.dtype == ml_dtypes.bfloat16 else a.dtype))
            return wide.to(torch.bfloat16) if a.dtype == ml_dtypes.bfloat16 else wide

        torch.save({name: to_torch(a) for name, a in arrays.items()}, path)
        return
    kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, a in arrays.items():
        end = at + a.nbytes
        header[name] = {"dtype": kinds[a.dtype.name], "shape": list(a.shape), "data_offsets": [at, end]}
        at = end
    start = json.dumps(header).encode()
    start += b" " * (-len(start) % 8)
    data = b"".join(a.tobytes() for a in arrays.values())
    path.write_bytes(len(start).to_bytes(8, "little") + start + data)


forward = jax.jit(lambda structure, params, ids, mask: merge(structure, params)(ids, mask), static_argnums=0)


def load(folder, dtype="float32"):
    return load_checkpoint(open_checkpoint(epath.Path(folder)), dtype)


def hidden_states(decoder, ids, mask):
    return np.asarray(forward(*split(decoder), ids, mask), np.float32)


def relative_error(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()
