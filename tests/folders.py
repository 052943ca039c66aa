"""Tiny model folders in the layouts in which embedders, re-rankers and adapters are published, built without torch.

`folder_tables.py` says what they hold. The decoders are variants of `decoders.py`; modules, heads and adapters come
from the same random streams. What sentence-transformers, peft or the formula of a model's maker give for `QUERIES`,
`DOCUMENTS` and `PAIRS` lies in `fixtures/folders/expected.npz`, made by `fixtures/folders/make.py`.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import decoders
import numpy as np
from adapters import write_adapter
from folder_tables import EMBEDDERS, RERANKERS, STYLES, Fields, Folder

FIXTURES = Path(__file__).parent / "fixtures/folders"
FOLDERS = EMBEDDERS | RERANKERS

QUERIES = ["which plants live on a mountain?", "no bacteria in the cell", "fish"]
DOCUMENTS = [
    "The cell wall of the plant is made of sugar.",
    "A river in the mountains brings cold water to the village, and fish are searched for in it.",
    "Bacteria divide; yes, they do.",
]
LONG_DOCUMENT = " ".join(
    f"{n} plants live on the mountain, and {n} more in the river." for n in range(12, 40)
)
PAIRS = [
    (QUERIES[0], DOCUMENTS[0]),
    (QUERIES[0], DOCUMENTS[1]),
    (QUERIES[1], DOCUMENTS[2]),
    (QUERIES[2], DOCUMENTS[1]),
    (QUERIES[1], LONG_DOCUMENT),
]

FIRST_SPECIAL = 380
# Instead of the last six merges of the tiny tokenizer: ids 374 to 379, words whose logits re-rankers read.
WORDS = [("y", "es"), ("n", "o"), ("Y", "es"), ("N", "o"), ("s", "t"), ("r", "e")]

_OLD_TYPES = dict.fromkeys(("Transformer", "Pooling", "Dense", "Normalize"), "sentence_transformers.models")
_NEW_TYPES = {
    "Transformer": "sentence_transformers.base.modules.transformer",
    "Dense": "sentence_transformers.base.modules.dense",
    "Normalize": "sentence_transformers.base.modules.normalize",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling",
    "LogitScore": "sentence_transformers.cross_encoder.modules.logit_score",
}


def expected(name: str) -> dict[str, np.ndarray]:
    """What the reference gives for a folder or an adapter; the docstring of `fixtures/folders/make.py` lists it."""
    return {key.partition("/")[2]: value for key, value in _expected().items() if key.startswith(f"{name}/")}


def write_folder(name: str, folder: str | Path) -> Path:
    """Writes one of `FOLDERS`; float32 weights, config.json in the spelling of its time."""
    spec, folder = FOLDERS[name], Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = decoders.config(spec.variant, spec.spelling)
    config |= spec.config | {"architectures": [spec.architecture]}
    if spec.architecture.endswith("ForSequenceClassification"):
        config["num_labels"] = 1
    removed = [key for key, value in spec.config.items() if value is None]
    dump(folder / "config.json", {k: v for k, v in config.items() if k not in removed})
    decoders.write_arrays(decoder_tensors(name), folder / "model.safetensors")
    write_tokenizer(spec, folder)
    if spec.settings:
        dump(folder / "config_sentence_transformers.json", {"__version__": {}} | spec.settings)
    if spec.transformer:
        dump(folder / "sentence_bert_config.json", spec.transformer)
    if spec.layout:
        write_modules(name, folder)
    return folder


def decoder_tensors(name: str) -> dict[str, np.ndarray]:
    """The decoder's tensors as its architecture saves them; a classifier's `score.weight` [1, E] among them."""
    spec = FOLDERS[name]
    arrays = decoders.tensors(spec.variant)
    tied = spec.config.get("tie_word_embeddings", False)
    if tied or not spec.architecture.endswith("ForCausalLM"):
        arrays = {k: v for k, v in arrays.items() if not k.startswith("lm_head.")}
    if spec.bare:
        arrays = {k.removeprefix("model.").removeprefix("transformer."): v for k, v in arrays.items()}
    if spec.architecture.endswith("ForSequenceClassification"):
        arrays["score.weight"] = decoders.random_tensor(
            name, "score.weight", (1, decoders.config(spec.variant)["hidden_size"])
        )
    return arrays


def write_tokenizer(spec: Folder, folder: Path) -> None:
    """The tokenizer with a folder's special tokens, post-processor and chat template."""
    decoders.write_tokenizer(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    ids = {token: FIRST_SPECIAL + i for i, token in enumerate(STYLES[spec.style])}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"] = [{"id": i, "content": t, "special": True, **flags} for t, i in ids.items()]
    vocab, merges = decoders.bpe()
    merges = [*merges[: -len(WORDS)], *WORDS]
    tokens = [*list(vocab)[: -len(WORDS)], *(left + right for left, right in WORDS)]
    tokenizer["model"] |= {"vocab": {t: i for i, t in enumerate(tokens)}, "merges": [list(m) for m in merges]}
    if spec.before or spec.after:
        tokenizer["post_processor"] = template(spec.before, spec.after, ids)
    dump(folder / "tokenizer.json", tokenizer)
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    dump(folder / "tokenizer_config.json", names | spec.tokenizer)
    if spec.chat_template:
        (folder / "chat_template.jinja").write_text(spec.chat_template, "utf-8")


def template(before: tuple[str, ...], after: tuple[str, ...], ids: Mapping[str, int]) -> Fields:
    """The post-processor that puts tokens around a text; of a pair, around each text, as Llama's does."""

    def around(name: str, kind: int) -> list[Fields]:
        first, last = (
            [{"SpecialToken": {"id": token, "type_id": kind}} for token in t] for t in (before, after)
        )
        return [*first, {"Sequence": {"id": name, "type_id": kind}}, *last]

    special = {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in {*before, *after}}
    single, pair = around("A", 0), around("A", 0) + around("B", 1)
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def write_modules(name: str, folder: Path) -> None:
    """modules.json and the folder of each module."""
    spec = FOLDERS[name]
    types = _OLD_TYPES if spec.layout == "old" else _NEW_TYPES
    listed = [{"idx": 0, "name": "0", "path": "", "type": f"{types['Transformer']}.Transformer"}]
    for index, (kind, config) in enumerate(spec.modules, 1):
        path = f"{index}_{kind}"
        listed.append({"idx": index, "name": str(index), "path": path, "type": f"{types[kind]}.{kind}"})
        (folder / path).mkdir(exist_ok=True)
        if config:
            dump(folder / path / "config.json", config)
        if kind == "Dense":
            decoders.write_arrays(dense_tensors(name, path, config), folder / path / "model.safetensors")
    dump(folder / "modules.json", listed)


def dense_tensors(name: str, path: str, config: Fields) -> dict[str, np.ndarray]:
    inside, outside = config["in_features"], config["out_features"]
    shapes: dict[str, tuple[int, ...]] = {"linear.weight": (outside, inside)}
    if config.get("bias", True):
        shapes["linear.bias"] = (outside,)
    if config.get("use_residual") and inside != outside:
        shapes["residual.weight"] = (outside, inside)
    return {key: decoders.random_tensor(name, f"{path}/{key}", shape) for key, shape in shapes.items()}


def write_adapter_embedder(folder: str | Path) -> Path:
    """e5_mistral as an adapter: modules.json and the tokenizer beside it, the decoder in `base/` below it."""
    folder = write_folder("e5_mistral", folder)
    (folder / "base").mkdir(exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        (folder / file).rename(folder / "base" / file)
    return write_adapter("e5_lora", folder, folder / "base")


def dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), "utf-8")


@lru_cache
def _expected() -> Mapping[str, np.ndarray]:
    with np.load(FIXTURES / "expected.npz") as stored:
        return dict(stored)
