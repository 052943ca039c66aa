"""Everything before the first step: model, data, step and checkpoints set up."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import jax
import optax
from etils import epath
from jax.sharding import Mesh

from sgpt_jax import load
from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.checkpoint.bias_sets import BiasSet, add_zero_biases, is_bias, load_bias_set
from sgpt_jax.checkpoint.lora import add_lora
from sgpt_jax.decoder.config import compute_dtype
from sgpt_jax.decoder.model import merge, split
from sgpt_jax.decoder.modules import Dense
from sgpt_jax.decoder.sharding import device_mesh, leaf_path, make_mesh, num_shards
from sgpt_jax.errors import InputError
from sgpt_jax.families import export_config
from sgpt_jax.files.hub_tables import is_hub
from sgpt_jax.folder.source import resolve

from .adaptation import adaptation
from .batches import BatchPlan, PackedBatches, iterate
from .checkpoints import Checkpoints
from .checks import check_processes, loss_config
from .data import ExampleSource, ListExamples, nli_triplets, read_nli, read_pairs
from .dev import DevEvaluator, make_evaluator
from .export import BIASES
from .hub import HubExamples
from .msmarco import open_msmarco
from .optimizer import (
    describe_split,
    join_params,
    linear_schedule,
    lora_of,
    make_optimizer,
    split_params,
    trainable_mask,
)
from .recipes import TrainConfig
from .resume import check_inputs, check_looks, check_output, model_digest
from .step import TrainState, init_state, jit_step, make_step

# Keys of a checkpoint's facts, beside the position in the data: the dev metrics so far, and what they looked at.
LOOKS, LOOKED_AT = "looks", "looked_at"
_STEPS = 2**31  # that an int32 counts


@dataclasses.dataclass
class Run:
    """A run that is ready to go.

    Attributes:
        config: its options.
        mesh: the devices, or None for the first one.
        model: the bi-encoder before training.
        base_sha256: of the weights before training.
        inputs: a digest of what each option names, see `train.resume`.
        started_from: the bias set it began with, by name and hash, or None.
        plain_base: whether the model is a folder of weights, and no adapter or .gguf file.
        structure: the decoder's structure.
        frozen: the parameters that do not train, None in place of the others.
        state: what the steps change.
        run_step: the jitted step, see `train.step.make_step`.
        chunk_rows: rows encoded at a time, see `train.grad_cache.encode_in_chunks`.
        rate: the learning rate by step.
        examples: how many there are.
        batches: the iterator over batches; its position is part of a checkpoint.
        evaluate: the dev metric, or None.
        eval_every: steps between its evaluations.
        checkpoints: of the run.
        start: steps done already.
        total: steps of the whole run.
        warmup: how many of these are warm-up.
        notes: what the user should know before the first step.
        looks: the dev metrics so far.
        looked_at: what they looked at, see `DevEvaluator.data`; None before any.
    """

    config: TrainConfig
    mesh: Mesh | None
    model: BiEncoder
    base_sha256: str
    inputs: dict[str, str]
    started_from: str | None
    plain_base: bool
    structure: Any
    frozen: Any
    state: TrainState
    run_step: jax.stages.Wrapped
    chunk_rows: int
    rate: optax.Schedule
    examples: int
    batches: Any
    evaluate: DevEvaluator | None
    eval_every: int
    checkpoints: Checkpoints
    start: int
    total: int
    warmup: int
    notes: list[str]
    looks: list[float]
    looked_at: dict[str, str] | None

    @property
    def exhausted(self) -> bool:
        """Whether the last `patience` evaluations were no better than those before them."""
        patience = self.config.patience
        if patience is None or len(self.looks) <= patience:
            return False
        return max(self.looks[-patience:]) <= max(self.looks[:-patience])

    def trained_model(self, trainable: Any) -> BiEncoder:
        """The bi-encoder with these trained parameters."""
        params = join_params(trainable, self.frozen, compute_dtype(self.config.dtype))
        return dataclasses.replace(self.model, decoder=merge(self.structure, params))


def prepare(config: TrainConfig) -> Run:
    """Sets a run up, or finds where it stopped. Nothing is written before everything else has succeeded.

    Raises:
        InputError: an option or a file does not fit.
    """
    first = jax.process_index() == 0
    if first:
        check_output(config)
    mesh = make_mesh(config.mesh) if jax.process_count() > 1 else device_mesh(config.mesh)
    shards = num_shards(mesh)
    if config.batch_size % shards or config.batch_size % jax.process_count():
        raise InputError(f"--batch-size {config.batch_size} cannot be split over {shards} devices (--mesh)")
    bias_set = load_bias_set(config.biases) if config.biases else None
    examples, evaluate, notes = _open_data(config)
    if config.distill and not examples.negatives:
        raise InputError(
            f"{config.corpus or config.data}: no example has a hard negative, whose score --distill {config.distill} "
            "could fit"
        )
    model = _load_model(config, mesh)
    structure, params = split(model.decoder)
    opened = load.open_model(resolve(config.model))
    base_sha256 = load.base_sha256(opened.files, model.decoder)
    plain_base = not opened.adapters and opened.settings.is_dir()
    started_from = _started_from(config)
    inputs = {
        "model": model_digest(model, base_sha256, bias_set),
        "corpus" if config.recipe == "adapt" else "data": examples.digest(),
        **({"biases": started_from} if started_from else {}),
    }
    check_processes(config, inputs | ({"dev": evaluate.data["digest"]} if evaluate else {}))
    mask = trainable_mask(params, config.trainable)
    notes += _check_export(model, mask, config, plain_base)
    trainable, frozen = split_params(params, mask)
    if bias_set is not None:
        notes += _check_start(model, mask, config, bias_set)
        trainable = _begin_with(bias_set, trainable)
    notes.append(describe_split(trainable, frozen))
    if any(isinstance(module, Dense) for module in model.modules):
        notes.append(
            "the Dense modules behind the pooling stay as they are; vectors are compared behind them"
        )

    total = config.total_steps(len(examples))
    if total >= _STEPS:
        raise InputError(f"--steps or --epochs: a run has fewer than {_STEPS:,} steps")
    warmup = config.warmup(total)
    rate = linear_schedule(config.lr, warmup, total)
    optimizer = make_optimizer(mask, rate)
    state = init_state(trainable, optimizer, config.seed, mesh)
    chunk_rows = -(-config.chunk_size // shards) * shards
    step = make_step(
        structure,
        pooling=model.pooling,
        modules=model.modules,
        loss=loss_config(config),
        optimizer=optimizer,
        dtype=compute_dtype(config.dtype),
        chunk_rows=chunk_rows,
        dropout=config.dropout,
    )
    batches = _open_batches(config, examples, model, total)
    check_inputs(config, inputs)
    checkpoints = Checkpoints(epath.Path(config.output), config.keep_best)
    start, looks, looked_at = 0, [], None
    if config.resume and (found := checkpoints.restore(state)) is not None:
        start, state, position = found
        looks, looked_at = position.pop(LOOKS, []), position.pop(LOOKED_AT, None)
        batches.set_state(position)
    now = None if evaluate is None else evaluate.data
    check_looks(config, looks, looked_at, now)
    if config.resume:
        checkpoints.drop_best_after(start)
    notes += _describe_steps(examples, total, warmup, start)
    return Run(
        config, mesh, model, base_sha256, inputs, started_from, plain_base, structure, frozen, state,
        jit_step(step, structure, state, mesh), chunk_rows, rate, len(examples), batches, evaluate,
        config.eval_every or max(1, total // 10), checkpoints, start, total, warmup, notes, looks, now,
    )  # fmt: skip


def _open_data(config: TrainConfig) -> tuple[ExampleSource, DevEvaluator | None, list[str]]:
    """The examples, what looks at the model between steps, and notes on both."""
    if config.recipe == "adapt":
        made = adaptation(config)
        return made.examples, made.evaluator, made.notes
    evaluate = make_evaluator(config.dev, config.dev_split) if config.dev else None
    return open_examples(config), evaluate, []


def open_examples(config: TrainConfig) -> ExampleSource:
    """The examples of a run.

    Raises:
        InputError: the data are not there or not as they should be.
    """
    if config.recipe == "msmarco":
        return open_msmarco(
            config.data,
            negatives=1 if config.negatives is None else config.negatives,
            per_system=config.negatives_per_system,
            systems=config.systems,
            margin=config.margin,
            seed=config.seed,
            keep_scores=config.distill is not None,
        )
    if config.recipe == "pairs" and is_hub(config.data):
        return HubExamples(config.data, config.split, config.negatives)
    if config.recipe == "nli":
        examples = nli_triplets(read_nli(config.data, config.split), config.seed)
    else:
        examples = read_pairs(config.data, config.split)
    return ListExamples(examples, config.negatives)


def _load_model(config: TrainConfig, mesh: Mesh | None) -> BiEncoder:
    model = BiEncoder.from_pretrained(
        config.model,
        pooling=config.pooling,
        brackets=config.brackets,
        max_seq_length=config.max_seq_length,
        dtype=config.dtype,
        mesh=mesh,
        biases=config.biases,
        weights=config.weights,
    )
    decoder = add_zero_biases(model.decoder) if config.add_biases else model.decoder
    lora = lora_of(decoder.config, config.trainable, config.lora_rank, config.lora_alpha, config.lora_targets)
    if lora is not None:
        decoder = add_lora(decoder, lora, config.seed)
    model = dataclasses.replace(model, decoder=decoder)
    # Training sees whole vectors, however many dimensions the folder says to keep.
    dimension = dataclasses.replace(model, truncate_dim=None).dimension
    if any(size > dimension for size in config.matryoshka):
        raise InputError(f"--matryoshka {config.matryoshka}: the model's vectors have dimension {dimension}")
    return model


def _check_export(model: BiEncoder, mask: Any, config: TrainConfig, plain_base: bool) -> list[str]:
    """Says at the start what could not be saved at the end, or not be loaded by others.

    Raises:
        InputError: transformers has no config for the model, and more than biases is to be trained; or adapters are to
            be left beside biases that the base does not have.
    """
    if model.decoder.build.lora is not None and not config.merge:
        if config.add_biases:
            raise InputError(
                "a folder of adapters has no room for biases that the base model lacks (--add-biases): leave the "
                "merged model (--merge), or train one of the two"
            )
        if plain_base:
            return []
        return [
            "PEFT and sentence-transformers will not load the adapters of this run, whose base is an adapter itself or "
            "a .gguf file: --merge leaves a whole model that they load"
        ]
    try:
        export_config(model.hf_config, model.decoder.config)
    except InputError as error:
        trained = jax.tree_util.tree_leaves_with_path(mask)
        if not all(is_bias(path) for path, trains in trained if trains):
            raise
        return [
            f"this run will leave {BIASES}, which --biases applies to the base model, and no model folder: {error}"
        ]
    return []


def _check_start(model: BiEncoder, mask: Any, config: TrainConfig, bias_set: BiasSet) -> list[str]:
    """Says what a run makes otherwise than the bias set that it starts from.

    Raises:
        InputError: biases of the set would stay as they are; then neither a bias set nor adapters would hold them.
    """
    trained = {leaf_path(path) for path, trains in jax.tree_util.tree_leaves_with_path(mask) if trains}
    if fixed := sorted(set(bias_set.values) - trained):
        raise InputError(
            f"--biases has {len(fixed)} biases that --trainable {config.trainable!r} does not train, such as "
            f"{fixed[0]}: add bias to it"
        )
    now = {"pooling": model.pooling, "brackets": model.text.brackets}
    return [
        f"the biases to start from were trained with {key} {bias_set.header[key]}, and go on with {value}"
        for key, value in now.items()
        if bias_set.header.get(key) not in (None, value)
    ]


def _begin_with(bias_set: BiasSet, trainable: Any) -> Any:
    """The trainable parameters with the set's own float32, whatever dtype the model computes in, where each lies."""

    def placed(path: Any, leaf: jax.Array) -> jax.Array:
        values = bias_set.values.get(leaf_path(path))
        if values is None:
            return leaf
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: values[index])

    return jax.tree_util.tree_map_with_path(placed, trainable)


def _started_from(config: TrainConfig) -> str | None:
    if not config.biases:
        return None
    path = epath.Path(config.biases)
    return f"{path.name}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def _open_batches(config: TrainConfig, examples: ExampleSource, model: BiEncoder, total: int) -> Any:
    """The iterator over packed batches; the first batch is made at once, so that no bad examples start a run."""
    plan = BatchPlan(
        examples,
        config.batch_size,
        seed=config.seed,
        shuffle=config.shuffle,
        no_duplicates=config.avoid_duplicates,
    )
    batches = PackedBatches(
        plan,
        model.text,
        vocab_size=model.decoder.config.vocab_size,
        symmetric=config.symmetric,
        steps=total,
        process=(jax.process_index(), jax.process_count()),
        scores=config.distill is not None,
        include_prompt=model.include_prompt,
    )
    batches[0]
    return iterate(batches)


def _describe_steps(examples: ExampleSource, total: int, warmup: int, start: int) -> list[str]:
    text = f"{len(examples):,} examples with up to {examples.negatives} hard negatives; {total:,} steps, "
    text += f"{warmup:,} of them warm-up" + (f"; going on after step {start:,}" if start else "")
    if total > 1 or not warmup:
        return [text]
    return [
        text,
        "the only step is warm-up, at learning rate 0, and trains nothing: give more --steps, or --warmup-steps 0",
    ]
