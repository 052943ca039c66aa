"""LoRA adapters in peft's layout, merged in float32 into the tensors of their base as these are read.

W' = W + s B A (Hu et al., arXiv 2106.09685), with s = lora_alpha / r, or lora_alpha / sqrt(r) for rank-stabilised ones
(arXiv 2312.03732). What peft can store and this cannot merge is refused by its name.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath
from safetensors import safe_open

from sgpt_jax.checkpoint.tensors import TensorFiles, TorchFiles, map_safetensors, same_values
from sgpt_jax.checkpoint.untrusted import read_object
from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.errors import InputError
from sgpt_jax.families import family_of, read_config
from sgpt_jax.families.reading import short
from sgpt_jax.families.tables import TABLES

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Among the metadata of an adapter that this project trained: where it belongs, as in a bias set.
HEADER = "sgpt_jax_adapter"

# Keys that say nothing about the merged weights, or are read elsewhere.
_HARMLESS = frozenset(
    (
        *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
        *("peft_version", "runtime_config", "lora_dropout", "target_modules", "exclude_modules", "bias", "r"),
        *(
            "layers_to_transform",
            "layers_pattern",
            "modules_to_save",
            "megatron_core",
            "eva_config",
            "lora_alpha",
        ),
        *("rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_rslora", "lora_bias", "init_lora_weights"),
        *("corda_config", "lora_ga_config", "ensure_weight_tying", "loftq_config", "qalora_group_size"),
    )
)
# Starts that also changed the base's weights, which are not in the adapter (peft's names of them).
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_EMBEDDINGS = {"lora_embedding_A": "A", "lora_embedding_B": "B"}
_PART = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.(weight|bias))?")


@dataclasses.dataclass
class _Delta:
    """What an adapter adds to one tensor: scale * B A, of an embedding its transpose."""

    scale: float
    down: np.ndarray | None = None  # A
    up: np.ndarray | None = None  # B
    embedding: bool = False


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        path: its folder.
        base: name or path of the model that it belongs to; empty where it names none.
        revision: of the base on the hub, or None.
        config: as in adapter_config.json.
        tensors: as in its file, without the prefix that peft adds.
        header: of an adapter that this project trained, as of a bias set: `base_sha256` and so on; else empty.
    """

    path: epath.Path
    base: str
    revision: str | None
    config: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    header: Mapping[str, Any]


def read_adapter(path: Any) -> Adapter:
    """Reads the folder of an adapter.

    Raises:
        InputError: it is none, is damaged, or is of a kind that cannot be merged.
    """
    path = epath.Path(path)
    config = read_object(path / CONFIG)
    _check(config, f"{path / CONFIG}")
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not all(isinstance(value, str | None) for value in (base, revision)):
        raise InputError(f"{path / CONFIG}: base_model_name_or_path and revision must be names")
    tensors = {
        re.sub(r"^base_model\.model\.", "", name).replace(".base_layer.", "."): values
        for name, values in _read_tensors(path)
    }
    return Adapter(path, base or "", revision, config, tensors, _header(path / WEIGHTS))


def _header(path: epath.Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    with safe_open(os.fspath(path), "numpy") as opened:
        text = (opened.metadata() or {}).get(HEADER, "{}")
    try:
        header = json.loads(text)
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise InputError(f"{path}: its metadata {HEADER} is not a JSON object")
    return header


def _read_tensors(path: epath.Path) -> Iterator[tuple[str, np.ndarray]]:
    if (path / WEIGHTS).exists():
        yield from map_safetensors(path / WEIGHTS).items()
    elif (path / "adapter_model.bin").exists():
        yield from TorchFiles({}, [path / "adapter_model.bin"]).tensors()
    else:
        raise InputError(f"{path}: {CONFIG}, but no {WEIGHTS} or adapter_model.bin")


def _check(config: Mapping[str, Any], what: str) -> None:
    """Refuses by name what cannot be merged as a plain LoRA adapter."""
    if (kind := config.get("peft_type")) != "LORA":
        raise InputError(f"{what}: peft_type is {short(kind)}; only LORA adapters can be merged here")
    for key, value in config.items():
        if value and key not in _HARMLESS:
            raise InputError(f"{what}: {key} is {short(value)}, which cannot be merged here")
    start = config.get("init_lora_weights")
    if (isinstance(start, str) and start.lower().startswith(_CHANGED_BASE)) or config.get("loftq_config"):
        raise InputError(
            f"{what}: init_lora_weights is {short(start)}: that changed the weights of the base, which are not in the "
            "adapter; peft converts it when it saves with path_initial_model_for_weight_conversion"
        )
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise InputError(f"{what}: bias is {short(config['bias'])}, expected none, all or lora_only")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        good = isinstance(patterns, dict) and all(_number(value) for value in patterns.values())
        if not good:
            raise InputError(f"{what}: {key} is {short(patterns)}, expected numbers above 0 by pattern")
    for key in ("r", "lora_alpha"):
        if not _number(config.get(key, 8)):
            raise InputError(f"{what}: {key} is {short(config.get(key))}, expected a number above 0")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9


class AdaptedFiles:
    """A checkpoint with an adapter merged into it, tensor by tensor; see `TensorFiles`.

    Raises:
        InputError: the adapter holds something that cannot be merged. That it belongs to another base is found when
            the tensors are read.
    """

    def __init__(self, base: TensorFiles, adapter: Adapter):
        self.base, self.adapter = base, adapter
        self.what = f"adapter {adapter.path.name}"
        self.config = dict(base.config)
        files = [adapter.path / name for name in (CONFIG, WEIGHTS, "adapter_model.bin")]
        # Kept decoded weights are those of this adapter alone.
        self.encoded = [*base.encoded, *(file for file in files if file.exists())] if base.encoded else []
        self.most_values = base.most_values + sum(values.size for values in adapter.tensors.values())
        self.family = family_of(base.config)
        self.table, self.head = (self.family.tensor_of(leaf) for leaf in TABLES)
        self.deltas, self.replaced = self._parts()
        for key, values in self.replaced.items():
            if key in (self.table, self.head):
                self.config["vocab_size"] = int(values.shape[0])
        own = _read(base.config)
        self.ties = own.head == "tied"
        self.unties = self.ties and self._unties(own.vocab_size)
        if self.unties:
            self.config["tie_word_embeddings"] = False
            if _read(self.config).head == "tied":
                raise InputError(
                    f"{self.what}: it has a head of its own, which a {self.family.model_type} ties to its embeddings"
                )

    def _parts(self) -> tuple[dict[str, _Delta], dict[str, np.ndarray]]:
        """What is added to tensors and what replaces them, by their names in the family's table."""
        deltas: dict[str, _Delta] = {}
        replaced: dict[str, np.ndarray] = {}
        for name, values in self.adapter.tensors.items():
            match = _PART.fullmatch(name)
            if match is None:
                if "lora_" in name or "trainable_tokens" in name:
                    kind = "DoRA" if "lora_magnitude_vector" in name else name.rpartition(".")[2]
                    raise InputError(f"{self.what}: {name} ({kind}) cannot be merged here")
                replaced[self._key(name)] = values
                continue
            module, part, kind = match.groups()
            embedding = part in _EMBEDDINGS
            key = self._key(f"{module}.{kind if kind == 'bias' else 'weight'}")
            delta = deltas.setdefault(key, _Delta(self._scale(module, values, part), embedding=embedding))
            if part.endswith("A"):
                delta.down = values
            else:
                delta.up = values
        for key, delta in deltas.items():
            whole = delta.up is not None and (delta.down is not None or key.endswith(".bias"))
            if not whole or (delta.down is not None and delta.down.shape[0] != delta.up.shape[-1]):  # type: ignore[union-attr]
                raise InputError(f"{self.what}: lora_A and lora_B of {key} do not belong together")
        return deltas, replaced

    def _key(self, name: str) -> str:
        # A text decoder that is part of a larger model is a checkpoint of its own here, see `TextPart`.
        _, found, inner = name.rpartition("language_model.")
        return self.family.key(inner if found else name)

    def _scale(self, module: str, values: np.ndarray, part: str) -> float:
        config = self.adapter.config
        rank = int(_of_pattern(config.get("rank_pattern"), module, config.get("r", 8)))
        alpha = _of_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
        stored = values.shape[0] if part.endswith("A") else values.shape[-1]
        if values.ndim == 2 and stored != rank:
            raise InputError(f"{self.what}: {module} has rank {stored}, but {CONFIG} says {rank}")
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def _unties(self, vocab_size: int) -> bool:
        """Whether a head that the base ties becomes another tensor than the embeddings, as it does in peft.

        peft trains one of the two apart from the other, unless it was told to keep them tied. LoRA over the embeddings
        alone changes both once it is merged, and so do embeddings for more than the base's `vocab_size`.
        """
        table, head = self.replaced.get(self.table or ""), self.replaced.get(self.head or "")
        if self.adapter.config.get("ensure_weight_tying"):
            return False
        if self.head in self.deltas or (head is not None and table is None):
            return True
        if table is None or self.table in self.deltas:
            return False
        return len(table) == vocab_size if head is None else not same_values(table, head)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """The base's tensors with the adapter in them, and then what only the adapter has (a classifier's head).

        Raises:
            InputError: the adapter does not fit the base.
        """
        left = self.deltas.keys() | self.replaced.keys()
        tables: dict[str, np.ndarray] = {}
        for name, values in self.base.tensors():
            key = self.family.key(name)
            left -= {key}
            if key in (self.table, self.head):
                tables[key] = values
            if key != self.head or not self.ties:
                yield name, self._adapted(key, values)
        if self.ties and self.head is not None and self.table in tables:
            # A copy of the embeddings stays tied to them, whatever the adapter does to these.
            own = self.head in tables and not same_values(tables[self.head], tables[self.table])
            if self.unties or own:
                yield self.head, self._adapted(self.head, tables.get(self.head, tables[self.table]))
            left -= {self.head}
        heads = {key for key in left if key.startswith(("score.", "classifier.")) and key in self.replaced}
        if left - heads:
            names = sorted(left - heads)
            raise InputError(
                f"{self.what} belongs to another base than this {self.config['model_type']}: that has no "
                f"{', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            )
        for key in sorted(heads):
            yield key, self.replaced[key]

    def _adapted(self, key: str, values: np.ndarray) -> np.ndarray:
        """A tensor of the base with the adapter in it."""
        if key in self.replaced:
            values = self._replacement(key, values)
        return self._merged(key, values, self.deltas[key]) if key in self.deltas else values

    def _replacement(self, key: str, values: np.ndarray) -> np.ndarray:
        new = self.replaced[key]
        is_table = key in (self.table, self.head)
        same = new.shape[1:] == values.shape[1:] if is_table else new.shape == values.shape
        if not same:
            raise self._misfit(key, new.shape, values.shape)
        return new

    def _merged(self, key: str, values: np.ndarray, delta: _Delta) -> np.ndarray:
        assert delta.up is not None
        update = delta.up.astype(np.float32)
        if delta.down is not None:
            update = update @ delta.down.astype(np.float32)
        # peft goes by the kind of layer, whatever fan_in_fan_out says: GPT-2's Conv1D, all but its head, is [in, out].
        conv = update.ndim == 2 and self.family.model_type == "gpt2" and key != self.head
        if delta.embedding or conv:
            update = update.T
        if update.shape != values.shape:
            raise self._misfit(key, update.shape, values.shape)
        return values.astype(np.float32) + np.float32(delta.scale) * update

    def _misfit(self, key: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> InputError:
        return InputError(
            f"{self.what} belongs to another base: it changes {key} of {list(ours)}, which is {list(theirs)} here"
        )


def _read(config: Mapping[str, Any]) -> DecoderConfig:
    """The config of a base, whose code of its own is looked at where the decoder is made: the user may allow it."""
    return read_config({key: value for key, value in config.items() if key != "auto_map"})


def _of_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches a module, by peft's rule."""
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as problem:
            raise InputError(f"{CONFIG}: {pattern!r} is no pattern: {problem}") from None
    return default
