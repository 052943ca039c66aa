"""Loading checkpoints into decoders and exporting decoders as checkpoints, through the tables of `tables.py`."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from safetensors.numpy import save_file

from sgpt_jax.checkpoint import decoded_cache as converted
from sgpt_jax.checkpoint.tensors import TensorFiles
from sgpt_jax.decoder.config import DecoderConfig, compute_dtype
from sgpt_jax.decoder.model import Decoder, abstract_decoder, merge, split
from sgpt_jax.decoder.sharding import leaf_path, param_shardings
from sgpt_jax.errors import InputError
from sgpt_jax.families.registry import (
    BUFFERS,
    FAMILIES,
    Family,
    export_config,
    family_of,
    read_config,
)
from sgpt_jax.families.tables import Rule
from sgpt_jax.files.lines import write_json

MAX_SHARD_BYTES = 5_000_000_000


def load_checkpoint(files: TensorFiles, dtype: str = "float32", mesh: Mesh | None = None) -> Decoder:
    """The decoder of an opened checkpoint; see `load_decoder`."""
    config = read_config(files.config)
    loader = _Loader(config, family_of(files.config), dtype, mesh)
    place = converted.place(files, loader.dtype)
    if place is not None and loader.take_leaves(converted.load(place)):
        return loader.finish()
    for name, tensor in files.tensors():
        loader.take(name, tensor)
    decoder = loader.finish()
    if place is not None and mesh is None:
        converted.keep(place, loader.filled)
    return decoder


def active_rules(
    config: DecoderConfig, family: Family, leaves: Collection[str]
) -> dict[str, tuple[Rule, int]]:
    """The family's rules for the leaves that a decoder has: tensor name without prefix -> (rule, layer)."""
    found = {}
    for rule in family.rules:
        layers = range(config.num_layers) if "{i}" in rule.tensor else range(1)
        for layer in layers:
            if leaf_name(rule.leaves[0], layer) in leaves:
                found[leaf_name(rule.tensor, layer)] = (rule, layer)
    return found


def leaf_name(pattern: str, layer: int) -> str:
    """A name of the tables with its layer filled in."""
    return pattern.replace("{i}", str(layer))


class _Loader:
    """Takes tensors in any order, puts each on its devices at once, and reports everything that did not fit."""

    def __init__(self, config: DecoderConfig, family: Family, dtype: str, mesh: Mesh | None):
        self.config, self.family, self.mesh = config, family, mesh
        self.dtype = compute_dtype(dtype)
        self.graphdef, self.abstract = abstract_decoder(config, self.dtype)
        self.expected = {leaf_path(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(self.abstract)}
        self.rules = active_rules(config, family, self.expected)
        self.shardings: dict[str, Any] = {}
        if mesh is not None:
            shardings = param_shardings(self.abstract, config, mesh)
            self.shardings = {leaf_path(p): s for p, s in jax.tree_util.tree_leaves_with_path(shardings)}
        self.filled: dict[str, jax.Array] = {}
        self.origin: dict[str, str] = {}
        self.problems: list[str] = []

    def take(self, name: str, tensor: np.ndarray) -> None:
        key = self._key(name)
        if BUFFERS.fullmatch(key) and key not in self.rules:
            return
        if self.config.head == "tied" and key in ("lm_head.weight", "embed_out.weight"):
            return  # a copy of the embedding
        if key not in self.rules:
            self.problems.append(f"no place for {name} {list(tensor.shape)}")
            return
        if key in self.origin:
            self.problems.append(f"{name} and {self.origin[key]} are the same tensor")
            return
        self.origin[key] = name
        rule, layer = self.rules[key]
        try:
            parts = rule.layout.load(tensor, self.config)
        except ValueError:
            self.problems.append(f"{name} has the impossible shape {list(tensor.shape)}")
            return
        for pattern, part in zip(rule.leaves, parts, strict=True):
            leaf = leaf_name(pattern, layer)
            if part.shape != self.expected[leaf].shape:
                wanted = list(self.expected[leaf].shape)
                self.problems.append(f"{name} gives {leaf} {list(part.shape)}, the config wants {wanted}")
                continue
            self.filled[leaf] = self._place(leaf, part)

    def take_leaves(self, leaves: Mapping[str, np.ndarray]) -> bool:
        """Takes all leaves of a decoder, as `converted` keeps them; False, and nothing taken, when they do not fit."""
        missing = [leaf for leaf in self.expected if leaf not in leaves and not leaf.startswith("head/")]
        wrong = [
            leaf
            for leaf, values in leaves.items()
            if leaf not in self.expected
            or (values.shape, values.dtype) != (self.expected[leaf].shape, self.expected[leaf].dtype)
        ]
        if missing or wrong:
            return False
        for leaf, values in leaves.items():
            if (
                self.mesh is None
            ):  # nothing writes to such a file, so the arrays of a CPU may stay views of it
                self.filled[leaf] = jax.device_put(values, jax.local_devices()[0])
            else:
                self.filled[leaf] = self._place(leaf, values)
        return True

    def _key(self, name: str) -> str:
        for prefix in (self.family.base_prefix, *self.family.other_prefixes):
            if name.startswith(prefix):
                name = name.removeprefix(prefix)
                break
        for old, new in self.family.renames.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
        return name

    def _place(self, leaf: str, values: np.ndarray) -> jax.Array:
        if self.mesh is None:
            return jax.device_put(_own(values, self.dtype), jax.local_devices()[0])
        return jax.make_array_from_callback(
            values.shape, self.shardings[leaf], lambda index: _own(values[index], self.dtype)
        )

    def finish(self) -> Decoder:
        missing = [leaf for leaf in self.expected if leaf not in self.filled]
        if missing and all(leaf.startswith("head/") for leaf in missing):
            # Embedding checkpoints are saved without their head; vectors need none, and logits say so.
            self.config = _without_head(self.config)
            self.graphdef, self.abstract = abstract_decoder(self.config, self.dtype)
            missing = []
        # A leaf whose tensor came with a wrong shape is reported once.
        seen = [self.rules[key] for key in self.origin]
        reported = {leaf_name(pattern, layer) for rule, layer in seen for pattern in rule.leaves}
        self.problems += [f"nothing fills {leaf}" for leaf in missing if leaf not in reported]
        if self.problems:
            kind = next(name for name, family in FAMILIES.items() if family is self.family)
            raise InputError(
                f"the checkpoint does not fit its {kind} config:\n  " + "\n  ".join(sorted(self.problems))
            )
        params = jax.tree_util.tree_map_with_path(lambda path, _: self.filled[leaf_path(path)], self.abstract)
        return merge(self.graphdef, params)


def _own(values: np.ndarray, dtype: Any) -> np.ndarray:
    """A copy in the dtype, where a CPU's arrays may begin: JAX takes it as it is, without a second copy."""
    size = values.size * dtype.itemsize
    memory = np.empty(size + converted.ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % converted.ALIGNMENT
    copy = memory[start : start + size].view(dtype).reshape(values.shape)
    copy[...] = values
    return copy


def _without_head(config: DecoderConfig) -> DecoderConfig:
    return dataclasses.replace(config, head="none", head_bias=False)


def export_tensors(decoder: Decoder, hf: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """The decoder's tensors under the names that transformers gives them, one at a time, in the decoder's dtype."""
    family = family_of(hf)
    _, params = split(decoder)
    leaves = {leaf_path(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(params)}
    prefix = family.base_prefix if decoder.config.head != "none" else _model_prefix(family)
    for name, (rule, layer) in active_rules(decoder.config, family, leaves).items():
        parts = tuple(np.asarray(leaves[leaf_name(pattern, layer)]) for pattern in rule.leaves)
        values = np.ascontiguousarray(rule.layout.dump(parts, decoder.config))
        yield (name if rule.leaves[0].startswith("head/") else prefix + name), values


def _model_prefix(family: Family) -> str:
    """What stands before tensor names in a checkpoint without a head: OPT keeps the last part of its prefix."""
    return family.base_prefix.partition(".")[2]


def export_folder(decoder: Decoder, hf: Mapping[str, Any], folder: Any) -> None:
    """Writes config.json and model.safetensors (several with an index above 5 GB) as transformers reads them.

    Args:
        decoder: the decoder; its dtype is the files' dtype.
        hf: the Hugging Face config that it was read from.
        folder: created where it is not there.

    Raises:
        InputError: when transformers has no config for the decoder, as for biases added to some families.
    """
    folder = epath.Path(folder)
    config = export_config(hf, decoder.config)
    family = family_of(config)
    name = family.causal_lm
    if decoder.config.head == "none":
        for ending in ("ForCausalLM", "LMHeadModel"):
            name = name.removesuffix(ending)
        name += "Model"
    config |= {"architectures": [name], "dtype": decoder.dtype.name}
    config.pop("torch_dtype", None)  # the older spelling of dtype
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    size = total = 0
    pending: dict[str, np.ndarray] = {}

    def flush() -> None:
        save_file(pending, str(folder / f"shard-{len(shards)}.tmp"), metadata={"format": "pt"})
        pending.clear()

    for tensor_name, values in export_tensors(decoder, config):
        if pending and size + values.nbytes > MAX_SHARD_BYTES:
            flush()
            shards.append([])
            size = 0
        pending[tensor_name] = values
        shards[-1].append(tensor_name)
        size += values.nbytes
        total += values.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-1.tmp").rename(folder / "model.safetensors")
    else:
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            (folder / f"shard-{number}.tmp").rename(folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", config)


def count_parameters(params: Any) -> collections.Counter[str]:
    """Numbers of values by leaf name: kernel, bias, scale, embedding."""
    counts: collections.Counter[str] = collections.Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        counts[leaf_path(path).rsplit("/", 1)[-1]] += leaf.size
    return counts
