"""What a program needs by arithmetic: bytes of a device, FLOPs, and the least time that its parts can take."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from sgpt_jax.decoder.attention import GPU_QUERY_BLOCK, QUERY_BLOCK
from sgpt_jax.decoder.build import Build
from sgpt_jax.decoder.config import DecoderConfig, compute_dtype
from sgpt_jax.decoder.flops import forward_flops, layer_weights
from sgpt_jax.decoder.log_probs import HEAD_ENTRIES, HEAD_TARGETS, head_targets
from sgpt_jax.decoder.sharding import AXES
from sgpt_jax.packing.rows import most_texts

from .devices import Chip
from .programs import Work, abstract_params, abstract_state, at_depth

Sizes = tuple[int, int, int]
"""Sizes of the mesh axes data, fsdp and tensor."""

# Targets of a row of the cross-encoder, to count what its head computes: a short query.
QUERY_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
        parameters: all weights, the language-model head included; master copies of what trains.
        optimizer: its moments.
        gradients: of what trains, and its copies in the compute dtype.
        activations: what a chunk's backward pass keeps, or the widest place of a forward pass.
        temporaries: weights gathered from other devices, vectors, logits.
    """

    parameters: float
    optimizer: float
    gradients: float
    activations: float
    temporaries: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(dataclasses.astuple(self))

    @property
    def resident(self) -> float:
        """What is there between two programs too."""
        return self.parameters + self.optimizer


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a program by its parts: products at the peak rate, memory traffic, exchange between devices.

    Parts overlap at best, so the program takes at least the largest of them.
    """

    compute: float
    memory: float
    exchange: float

    @property
    def step(self) -> float:
        """The least that the program can take."""
        return max(self.compute, self.memory, self.exchange)


def computed_scores(length: int, block: int = QUERY_BLOCK) -> int:
    """Scores of a head over a row, as `sgpt_jax.decoder.attention.attend` computes them: `block` queries at a time.

    By default as on TPUs and CPUs; those that a GPU's longer blocks add are masked, and not counted as work.
    """
    return sum(min(block, length - start) * min(start + block, length) for start in range(0, length, block))


def chunks_of(work: Work) -> int:
    """How many chunks a training step encodes one after the other."""
    return -(-work.rows // work.chunk) if 0 < work.chunk < work.rows else 1


def flops(config: DecoderConfig, work: Work, *, loops_once: bool = False) -> float:
    """FLOPs of the whole program over all devices.

    Training: the backward pass of weights costs one product for the inputs and, where weights train, another; that of
    attention two for each. With chunks everything is encoded once more (GradCache).

    Args:
        config: the decoder's.
        work: the program.
        loops_once: count a loop's body once, as XLA does: one chunk, one block of the head.
    """
    again = chunks_of(work) > 1
    rows = work.chunk if loops_once and again else work.rows
    # What the program computes: masked scores too, unlike the useful work that `sgpt_jax.decoder.flops` counts.
    weights = float(forward_flops(config, [work.length] * rows)[0])
    width = config.num_heads * config.head_dim
    attention = 4.0 * rows * computed_scores(work.length) * width * config.num_layers
    if work.task == "encode":
        return weights + attention
    if work.task == "score":
        targets = work.rows * QUERY_TOKENS * config.vocab_size
        if loops_once:  # one block of targets and of the vocabulary
            targets = head_targets() * min(HEAD_ENTRIES, config.vocab_size)
        return weights + attention + 2.0 * targets * config.hidden_dim
    trained = _trained_share(config, work)
    passes = 2 + again
    total = weights * (passes + trained) + attention * (passes + 1)
    pooling = 2.0 * rows * work.length * most_texts(work.length) * config.hidden_dim
    return total + pooling * passes


def memory(config: DecoderConfig, work: Work, sizes: Sizes, *, gpu: bool = False) -> Memory:
    """Bytes of a device. Parameters and optimizer are exact; the rest is a model of what XLA keeps.

    Args:
        config: the decoder's.
        work: the program.
        sizes: of the mesh.
        gpu: of GPUs, where training keeps the scores of more queries at a time (XLA's attention, not cuDNN's).
    """
    mesh_ways, tensor = sizes[0] * sizes[1], sizes[2]
    item = compute_dtype(work.dtype).itemsize
    rows = (work.chunk if work.task == "train" and chunks_of(work) > 1 else work.rows) / mesh_ways
    tokens = rows * work.length
    width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    block = GPU_QUERY_BLOCK if gpu and work.task == "train" else QUERY_BLOCK
    scores = config.num_heads * computed_scores(work.length, block) / work.length  # a token
    gathered = 0.0
    if sizes[1] > 1 or work.build.int8:  # a layer or the table of tokens, gathered or multiplied out
        gathered = item * max(layer_weights(config), config.vocab_size * config.hidden_dim) / tensor
    masks = rows * work.length**2 * len(set(config.windows or (None,)))
    if work.task != "train":
        parameters, _, _ = device_bytes(config, "", work.build, sizes)
        at_once = scores * min(block, work.length) / work.length
        attention = item * (3 * width + 2 * kv_width) + 4 * width + 10 * at_once * 2
        mlp = (item + 4) * config.mlp_dim * (2 if config.gated else 1)
        widest = attention + mlp if config.parallel else max(attention, mlp)
        activations = tokens * (12 * config.embed_dim + widest / tensor) + masks
        if work.task == "score":
            gathered += 3 * 4 * HEAD_TARGETS * min(HEAD_ENTRIES, config.vocab_size)
        return Memory(parameters, 0, 0, activations, gathered)
    parameters, optimizer, trainable = device_bytes(config, work.trainable, work.build, sizes)
    # In the compute dtype: q, k, v (again behind norms of their own), what attention gives, what up and gate give, what
    # is normed; attention's weights in both dtypes, its sums in float32.
    projected = 2 * width + 2 * kv_width + config.mlp_dim * (2 if config.gated else 1)
    if config.qk_norm != "none":
        projected += width + kv_width
    kept = (item * projected + 4 * width + (4 + item) * scores) / tensor
    norms = (1 if config.shared_norm else 2) * (2 if config.norm_at == "both" else 1)
    kept += item * norms * config.embed_dim
    # What the linear layers take, and as much as the compiler keeps of norms that train.
    if work.trainable != "bias":
        kept += item * (config.mlp_dim / tensor + 4 * config.embed_dim)
    activations = tokens * kept * config.num_layers + masks
    vectors = 4 * work.rows * most_texts(work.length) * config.hidden_dim / mesh_ways
    once_more = tokens * 4 * (2 * config.mlp_dim / tensor + 4 * config.embed_dim)
    gradients = trainable * (4 + 2 * item)
    return Memory(parameters, optimizer, gradients, activations, gathered + 2 * vectors + once_more)


def times(config: DecoderConfig, work: Work, sizes: Sizes, chip: Chip) -> Times:
    """The roofline of a program on a mesh of chips.

    Args:
        config: the decoder's.
        work: the program.
        sizes: of the mesh.
        chip: published peaks.
    """
    count, ways, tensor = math.prod(sizes), sizes[0] * sizes[1], sizes[2]
    item = compute_dtype(work.dtype).itemsize
    peak = chip.flops if work.dtype == "bfloat16" else chip.flops / (6 if chip.kind == "tpu" else 16)
    chunks = chunks_of(work) if work.task == "train" else 1
    passes = (2 + (chunks > 1) if work.task == "train" else 1) * chunks
    weights = (1 if work.build.int8 else item) * layer_weights(config) * config.num_layers / tensor
    tokens = work.rows * work.length / ways  # of a device, all chunks
    width = config.num_heads * config.head_dim
    a_token = item * (8 * config.embed_dim + (6 * width + 4 * config.mlp_dim) / tensor)
    a_token += (12 + 2 * item) * config.num_heads * computed_scores(work.length) / work.length / tensor
    traffic = passes * weights * (3 if sizes[1] > 1 else 1)
    traffic += passes / chunks * tokens * a_token * config.num_layers
    exchange = passes * weights * (sizes[1] - 1) / sizes[1]
    # Two sums over the tensor axis a layer (one where the block is parallel), each sent about twice.
    sums = (
        passes / chunks * tokens * config.embed_dim * item * config.num_layers * (1 if config.parallel else 2)
    )
    exchange += 2 * sums * (tensor - 1) / tensor
    if work.task == "train":
        trained = _trained_share(config, work) * weights
        traffic += chunks * 2 * trained
        exchange += chunks * trained * (1 if sizes[1] > 1 else 2) * (ways - 1) / ways
        _, optimizer, _ = device_bytes(config, work.trainable, work.build, sizes)
        traffic += 4 * optimizer
    return Times(flops(config, work) / count / peak, traffic / chip.bandwidth, exchange / chip.exchange)


@functools.lru_cache(maxsize=512)
def _state(config: DecoderConfig, trainable: str, build: Build, sizes: Sizes) -> tuple[Any, Any, Any]:
    """(params, state, frozen) with their places on a mesh without devices; the last two None for "" as trainable."""
    mesh: Any = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    sharding_log = logging.getLogger("sgpt_jax.decoder.sharding")
    level = sharding_log.level
    # The search tries many meshes; the compiler's turn repeats the message for the one that is taken.
    sharding_log.setLevel(logging.ERROR)
    try:
        _, params = abstract_params(config, build, mesh)
    finally:
        sharding_log.setLevel(level)
    if not trainable:
        return params, None, None
    work = Work(task="train", rows=1, length=1, trainable=trainable)  # of which only `trainable` counts here
    state, frozen, _ = abstract_state(params, work, mesh)
    return params, state, frozen


@functools.lru_cache(maxsize=512)
def device_bytes(
    config: DecoderConfig, trainable: str, build: Build, sizes: Sizes
) -> tuple[float, float, float]:
    """(bytes of parameters, bytes of moments, number of trainable parameters) of a device; "" trains nothing.

    Exact: all layers have the same shapes, so one and two of them tell the rest.
    """
    counts = []
    for layers in (1, 2):
        params, state, frozen = _state(at_depth(config, layers), trainable, build, sizes)
        if state is None:
            counts.append((_bytes(params), 0.0, 0.0))
        else:
            masters = _bytes(state.trainable)
            counts.append((masters + _bytes(frozen), _bytes(state.moments), masters / 4))
    one, two = counts
    parameters, moments, trained = (
        a + (config.num_layers - 1) * (b - a) for a, b in zip(one, two, strict=True)
    )
    return parameters, moments, trained


def _trained_share(config: DecoderConfig, work: Work) -> float:
    """Which share of the layers' matrices trains."""
    if work.trainable == "bias":
        return 0.0
    _, state, _ = _state(at_depth(config, 1), work.trainable, work.build, (1, 1, 1))
    blocks = jax.tree_util.tree_leaves_with_path(state.trainable["blocks"])
    trained = sum(leaf.size for path, leaf in blocks if getattr(path[-1], "key", None) == "kernel")
    return trained / layer_weights(config)


def _bytes(tree: Any) -> float:
    """What a device holds of a tree of placed leaves."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )
