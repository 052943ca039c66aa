"""Loading checkpoints into decoders: tensors of files -> leaves -> arrays on their devices, one tensor at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sgpt_jax.checkpoint import decoded_cache
from sgpt_jax.checkpoint.fingerprint import leaves_sha256
from sgpt_jax.checkpoint.gguf import GgufFile
from sgpt_jax.checkpoint.quantise import quantise, scale_name
from sgpt_jax.checkpoint.tensors import TensorFiles, same_values
from sgpt_jax.decoder.build import Build
from sgpt_jax.decoder.config import DecoderConfig, compute_dtype
from sgpt_jax.decoder.flops import layer_weights
from sgpt_jax.decoder.model import Decoder, abstract_decoder, merge
from sgpt_jax.decoder.sharding import check_mesh, leaf_path, param_shardings
from sgpt_jax.errors import InputError
from sgpt_jax.families import family_of, read_config
from sgpt_jax.families.family import Family
from sgpt_jax.families.tables import BUFFERS, TABLES, active_rules, leaf_name

T = TypeVar("T")

# The ends of tensor names that quantised checkpoints and adapters have in place of weights.
_FOREIGN = {
    ".qweight": "quantised by GPTQ or AWQ",
    ".qzeros": "quantised by GPTQ or AWQ",
    ".SCB": "quantised by bitsandbytes (8 bits)",
    ".absmax": "quantised by bitsandbytes (4 bits)",
    ".weight_scale": "quantised (compressed-tensors or FP8)",
    ".weight_scale_inv": "quantised (FP8)",
    ".lora_A.weight": "a LoRA adapter without its base",
}


class _OwnHeadError(Exception):
    """A head that config.json ties to the embeddings is in the files, and is not what they are."""


def load_checkpoint(
    files: TensorFiles, dtype: str = "float32", mesh: Mesh | None = None, weights: str | None = None
) -> Decoder:
    """The decoder of an opened checkpoint; see `load_decoder`."""
    check_mesh(mesh)
    return _with_own_head(files, lambda: _load(files, dtype, mesh, weights))


def _with_own_head(files: TensorFiles, read: Callable[[], T]) -> T:
    """Reads files again, with the config's tie undone, where their head turns out to be another than the embeddings.

    transformers 5 does not tie these either, and says so. Merging an adapter of the head leaves such files.
    """
    try:
        return read()
    except _OwnHeadError:
        files.config = {**files.config, "tie_word_embeddings": False}
        if read_config(files.config).head == "tied":
            raise InputError(
                f"the checkpoint has a head that is not its embeddings, to which a {files.config['model_type']} ties it"
            ) from None
        return read()


def _load(files: TensorFiles, dtype: str, mesh: Mesh | None, weights: str | None) -> Decoder:
    target = _open(files, Build(compute_dtype(dtype), int8=is_int8(weights)), mesh)
    cached = decoded_cache.find(files, target.build.dtype, int8=target.build.int8)
    if cached is not None and target.is_whole(decoded := decoded_cache.load(cached)):
        return _build(target, dict(_place(decoded.items(), target, copy=False)))
    problems: list[str] = []
    leaves = _leaves(files.tensors(), target, problems)
    filled = dict(_place(_quantised(leaves, target), target, copy=True))
    decoder = _build(target, filled, problems)
    if cached is not None and mesh is None:
        decoded_cache.keep(cached, filled)
    return decoder


def checkpoint_sha256(files: TensorFiles) -> str:
    """`fingerprint.weights_sha256` of the checkpoint's own weights, whatever a decoder of them holds them as.

    It reads the checkpoint once more, as views of safetensors and .bin files; of a GGUF file it holds all weights for a
    moment, as bfloat16.

    Raises:
        InputError: the checkpoint does not fit its config.
    """
    return _with_own_head(files, lambda: _sha256(files))


def _sha256(files: TensorFiles) -> str:
    target = _open(files, Build(compute_dtype("bfloat16")), None)
    problems: list[str] = []
    views = not isinstance(files, GgufFile)
    leaves = {
        leaf: values if views else values.astype(target.build.dtype)
        for leaf, values in _leaves(files.tensors(), target, problems)
    }
    _refuse_misfits(target, problems)
    return leaves_sha256(leaves)


def is_int8(weights: str | None) -> bool:
    """Reads the option `weights`: "int8", or None for weights in the dtype.

    Raises:
        InputError: for anything else.
    """
    if weights not in (None, "int8"):
        raise InputError(f"weights must be int8 (or None: as the dtype), not {weights!r}")
    return weights == "int8"


def _open(files: TensorFiles, build: Build, mesh: Mesh | None) -> _Target:
    config = read_config(files.config)
    _check_size(config, files)
    return _Target(config, family_of(files.config), build, mesh)


def _check_size(config: DecoderConfig, files: TensorFiles) -> None:
    """Refuses a config that is far too large for its files before anything of its size is made."""
    wanted = config.num_layers * layer_weights(config) + config.vocab_size * config.hidden_dim
    if wanted > files.most_values + 1_000_000:
        raise InputError(
            f"the checkpoint does not fit its {files.config['model_type']} config: that describes {wanted:,} "
            f"parameters, the files can hold {files.most_values:,} values at most"
        )


class _Target:
    """What a checkpoint has to fill.

    Attributes:
        build: how the decoder is made.
        expected: leaf name -> its shape and dtype.
        scales: the leaves among them that no tensor fills: those of int8 leaves.
        rules: tensor name without prefix -> (rule, layer).
        tied: the tensors that must be the same, names without prefix: embeddings and head.
        shardings: leaf name -> where it lies; empty for the first device.
    """

    def __init__(self, config: DecoderConfig, family: Family, build: Build, mesh: Mesh | None):
        self.config, self.family, self.build = config, family, build
        self.structure, self.abstract = abstract_decoder(config, build)
        self.expected = _by_path(self.abstract)
        self.scales = {scale_name(leaf) for leaf, values in self.expected.items() if values.dtype == np.int8}
        self.rules = active_rules(config, family.rules, self.expected)
        self.heads = {rule.tensor for rule in family.rules if rule.leaves[0].startswith("head/")}
        self.tied = {family.tensor_of(leaf) for leaf in TABLES} if config.head == "tied" else set()
        self.shardings: dict[str, Any] = {}
        if mesh is not None:
            self.shardings = _by_path(param_shardings(self.abstract, config, mesh))

    def is_whole(self, leaves: Mapping[str, np.ndarray]) -> bool:
        """Tells whether these are all the leaves, but for a head, and nothing else."""
        missing = [leaf for leaf in self.expected if leaf not in leaves and not leaf.startswith("head/")]
        return not missing and all(
            leaf in self.expected
            and (values.shape, values.dtype) == (self.expected[leaf].shape, self.expected[leaf].dtype)
            for leaf, values in leaves.items()
        )

    def passes_over(self, key: str) -> bool:
        """Tells whether a tensor is a constant, or the copy of a tied head."""
        return key not in self.rules and (
            BUFFERS.fullmatch(key) is not None or (self.config.head == "tied" and key in self.heads)
        )


def _by_path(tree: Any) -> dict[str, Any]:
    return {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _leaves(
    tensors: Iterable[tuple[str, np.ndarray]], target: _Target, problems: list[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """The leaves that the tensors hold, as views of them; what does not fit goes into `problems`."""
    origin: dict[str, str] = {}
    unknown: dict[str, tuple[int, ...]] = {}
    tied: dict[str, np.ndarray] = {}
    for name, tensor in tensors:
        key = target.family.key(name)
        if key in target.tied:
            tied[key] = tensor
            if len(tied) == 2 and not same_values(*tied.values()):
                raise _OwnHeadError
        if target.passes_over(key):
            continue
        if key not in target.rules:
            _refuse_foreign(name)
            unknown[name] = tensor.shape
            continue
        if key in origin:
            problems.append(f"{name} and {origin[key]} are the same tensor")
            continue
        origin[key] = name
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            problems.append(f"{name} is quantised already: it holds {tensor.dtype.name}")
            continue
        rule, layer = target.rules[key]
        names = [leaf_name(pattern, layer) for pattern in rule.leaves]
        try:
            parts = rule.layout.load(tensor, target.config)
        except ValueError:
            problems.append(f"{name} has the impossible shape {list(tensor.shape)}")
            continue
        for leaf, part in zip(names, parts, strict=True):
            wanted = target.expected[leaf].shape
            if part.shape == wanted:
                yield leaf, part
            else:
                problems.append(f"{name} gives {leaf} {list(part.shape)}, the config wants {list(wanted)}")
    _refuse_prefix(unknown, target)
    problems += [f"no place for {name} {list(shape)}" for name, shape in unknown.items()]
    # A leaf whose tensor came with a wrong shape is reported once.
    seen = [target.rules[key] for key in origin]
    filled = {leaf_name(pattern, layer) for rule, layer in seen for pattern in rule.leaves}
    headless = not any(leaf.startswith("head/") for leaf in filled)
    missing = [leaf for leaf in target.expected if leaf not in filled | target.scales]
    problems += [f"nothing fills {leaf}" for leaf in missing if not (headless and leaf.startswith("head/"))]


def _refuse_foreign(name: str) -> None:
    for end, what in _FOREIGN.items():
        if name.endswith(end):
            raise InputError(f"the checkpoint is {what} (it has {name}), which is not supported")


def _refuse_prefix(unknown: Mapping[str, Any], target: _Target) -> None:
    """Names the prefix that a wrapper (DataParallel, torch.compile, a trainer) put before all names, in one line."""
    first = next(iter(unknown), "")
    dots = [at + 1 for at, character in enumerate(first) if character == "."]
    for prefix in (first[:dot] for dot in dots):
        keys = [target.family.key(name.removeprefix(prefix)) for name in unknown if name.startswith(prefix)]
        known = [key in target.rules for key in keys]
        if any(known) and all(known[i] or target.passes_over(key) for i, key in enumerate(keys)):
            raise InputError(
                f"the checkpoint has the prefix {prefix!r} before the names of {len(keys)} of its tensors, as a "
                "wrapped model has when it is saved: save the model itself"
            )


def _quantised(leaves: Iterable[tuple[str, np.ndarray]], target: _Target) -> Iterator[tuple[str, np.ndarray]]:
    """The leaves, with int8 ones in place of those that the decoder holds as int8, each followed by its scales."""
    for leaf, values in leaves:
        if scale_name(leaf) in target.scales and target.expected[leaf].dtype == np.int8:
            integers, scales = quantise(leaf, values)
            yield leaf, integers
            yield scale_name(leaf), scales
        else:
            yield leaf, values


def _place(
    leaves: Iterable[tuple[str, np.ndarray]], target: _Target, *, copy: bool
) -> Iterator[tuple[str, jax.Array]]:
    """Every leaf as an array in its dtype, on its devices; no more than one is on its way at a time.

    Args:
        leaves: leaf names and values.
        target: tells dtypes and shardings.
        copy: False lets the arrays of a CPU stay views of the values, for a file that nothing writes to.
    """
    device = jax.local_devices()[0]
    for leaf, values in leaves:
        dtype = target.expected[leaf].dtype
        if target.shardings:
            yield leaf, _spread(values, target.shardings[leaf], dtype)
        else:
            yield leaf, jax.device_put(_own(values, dtype) if copy else values, device)


def _spread(values: np.ndarray, sharding: Any, dtype: Any) -> jax.Array:
    return jax.make_array_from_callback(values.shape, sharding, lambda index: _own(values[index], dtype))


def _own(values: np.ndarray, dtype: Any) -> np.ndarray:
    """A copy in the dtype, where a CPU's arrays may begin: JAX takes it as it is, without a second copy."""
    size = values.size * dtype.itemsize
    memory = np.empty(size + decoded_cache.ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % decoded_cache.ALIGNMENT
    copy = memory[start : start + size].view(dtype).reshape(values.shape)
    copy[...] = values
    return copy


def _build(target: _Target, filled: Mapping[str, jax.Array], problems: Iterable[str] = ()) -> Decoder:
    """The decoder of the leaves; without a head where none of its leaves is there.

    Raises:
        InputError: there are problems; all are listed.
    """
    _refuse_misfits(target, problems)
    structure, abstract = target.structure, target.abstract
    if any(leaf not in filled for leaf in target.expected):
        # Embedding checkpoints are saved without their head; vectors need none, and logits say so.
        headless = dataclasses.replace(target.config, head="none", head_bias=False, head_transform=False)
        structure, abstract = abstract_decoder(headless, target.build)
    params = jax.tree_util.tree_map_with_path(lambda path, _: filled[leaf_path(path)], abstract)
    return merge(structure, params)


def _refuse_misfits(target: _Target, problems: Iterable[str]) -> None:
    if problems:
        kind = target.family.model_type
        raise InputError(
            f"the checkpoint does not fit its {kind} config:\n  " + "\n  ".join(sorted(problems))
        )
