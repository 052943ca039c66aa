"""The training run, from start to end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.checkpoint.bias_sets import add_zero_biases, is_bias, weights_sha256
from sgpt_jax.decoder.config import compute_dtype
from sgpt_jax.decoder.model import merge, split
from sgpt_jax.decoder.sharding import device_mesh, make_mesh, num_shards
from sgpt_jax.errors import InputError
from sgpt_jax.families.registry import export_config
from sgpt_jax.files.lines import write_json
from train.batches import BatchPlan, PackedBatches, iterate
from train.checkpoints import Checkpoints
from train.dev import make_judge
from train.export import Record, export
from train.optimizer import (
    describe_split,
    join_params,
    linear_schedule,
    make_optimizer,
    split_params,
    trainable_mask,
)
from train.recipes import FREE, TrainConfig, check, open_examples
from train.report import RunLog
from train.step import agree, init_state, jit_step, make_step, place_batch

RUN = "run"  # the key of a run's configuration in OUT/config.json, beside what transformers has there


class Diverged(RuntimeError):
    """Loss or gradient became NaN or infinite."""


def train(config: TrainConfig) -> bool:
    """Trains as `config` says, and writes everything to `config.output`.

    That is: the trained model as a folder of sentence-transformers, `biases.safetensors` if biases are all that was
    trained, `metrics.jsonl`, `dev.jsonl`, `curve.png`, `tensorboard/`, `checkpoints/`, `best/`, and the run's whole
    configuration under "run" in config.json, which is the model's too.

    Returns:
        True when the run is complete; False when SIGTERM ended it early, with its state saved for `--resume`.

    Raises:
        InputError: an option or a file does not fit.
        Diverged: NaN or infinite loss; the checkpoints before it are kept.
    """
    check(config)
    first = jax.process_index() == 0
    output = epath.Path(config.output)
    if first:
        check_output(config)

    # Model
    mesh = make_mesh(config.mesh) if jax.process_count() > 1 else device_mesh(config.mesh)
    ways = num_shards(mesh)
    if config.batch_size % ways or config.batch_size % jax.process_count():
        raise InputError(f"--batch-size {config.batch_size} cannot be split over {ways} devices (--mesh)")
    examples = open_examples(config)
    model = BiEncoder.from_pretrained(
        config.model,
        pooling=config.pooling,
        brackets=config.brackets,
        max_seq_length=config.max_seq_length,
        dtype=config.dtype,
        mesh=mesh,
    )
    if config.add_biases:
        model = dataclasses.replace(model, decoder=add_zero_biases(model.decoder))
    if any(size > model.dimension for size in config.matryoshka):
        raise InputError(
            f"--matryoshka {config.matryoshka}: the model's vectors have {model.dimension} numbers"
        )
    graphdef, params = split(model.decoder)
    sha256 = weights_sha256(params)
    mask = trainable_mask(params, config.trainable)
    trainable, frozen = split_params(params, mask)
    _check_export(model, mask)
    del params
    dtype = compute_dtype(config.dtype)

    # Step
    total = config.total_steps(len(examples))
    warmup = (
        config.warmup_steps if config.warmup_steps is not None else math.ceil(config.warmup_share * total)
    )
    rate = linear_schedule(config.lr, warmup, total)
    optimizer = make_optimizer(mask, rate)
    state = init_state(trainable, optimizer, config.seed, mesh)
    chunk_rows = -(-config.chunk_size // ways) * ways
    step_function = make_step(
        graphdef,
        pooling=model.pooling,
        loss=config.loss(),
        optimizer=optimizer,
        dtype=dtype,
        chunk_rows=chunk_rows,
        dropout=config.dropout,
    )
    run_step = jit_step(step_function, state, mesh)

    # Data
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
    )
    iterator = iterate(batches)
    batches[0]  # examples that make no batch are refused before anything is written
    judge = make_judge(config.dev, config.dev_split) if config.dev else None
    eval_every = config.eval_every or max(1, total // 10)

    # Where to go on
    if first:
        write_config(config)
    checkpoints = Checkpoints(output, config.keep_best)
    start = 0
    if config.resume and (found := checkpoints.restore(state)) is not None:
        start, state, position = found
        iterator.set_state(position)

    def model_of(trainable: Any) -> BiEncoder:
        return dataclasses.replace(model, decoder=merge(graphdef, join_params(trainable, frozen, dtype)))

    with contextlib.ExitStack() as stack:
        stack.callback(checkpoints.close)
        log = stack.enter_context(RunLog(config, total, start, active=first))
        stopping = stack.enter_context(_on_sigterm())
        stack.enter_context(_quiet_truncation())
        log.say(describe_split(trainable, frozen))
        del trainable  # the first step gives its memory to the second
        log.say(_describe_data(len(examples), examples.negatives, total, warmup, start))
        running: _Running | None = None
        for step in range(start, total):
            batch = next(iterator)
            (rows,) = agree(len(batch["rows"].segments))
            arrays = place_batch(batch, rows=rows, chunk_rows=chunk_rows, pad_id=model.text.pad_id, mesh=mesh)
            state, loss, norm = run_step(state, frozen, arrays)
            # The step before is looked at while this one runs.
            _note(log, running)
            running = _Running(
                step,
                loss,
                norm,
                float(f"{rate(step):.7g}"),
                batch["tokens"] * jax.process_count(),
                batch["examples"],
            )
            done = step + 1
            stop = bool(agree(stopping.is_set())[0])
            look = judge is not None and (done % eval_every == 0 or done == total)
            save = stop or done % config.save_every == 0 or done == total
            if look or save:
                _note(log, running)  # nothing is saved after a step that went wrong
                running = None
            if judge is not None and look:
                value = judge(model_of(state.trainable))
                log.dev(step, judge.name, value)
                checkpoints.save_best(done, state.trainable, value)
            if save:
                checkpoints.save(done, state, iterator.get_state())
            if stop:
                checkpoints.wait()
                log.say(f"stopped by SIGTERM after {done} of {total} steps; saved: go on with --resume")
                return False

        # Out
        best = checkpoints.restore_best(state.trainable) if judge is not None else None
        chosen, final, dev = best if best is not None else (total, state.trainable, None)
        record = Record(
            config=config,
            examples=len(examples),
            steps=total,
            warmup_steps=warmup,
            chosen_step=chosen,
            dev_metric=judge.name if judge else None,
            dev=dev,
            base_sha256=sha256,
        )
        messages = export(model_of(final), final, record, output, write=first)
        if first:
            write_config(config)
            log.plot()
        for message in messages:
            log.say(message)
    return True


def check_output(config: TrainConfig) -> None:
    """Looks at what is in the folder of the run: nothing, or the run to resume, with the same options.

    Raises:
        InputError: there is a run already and `resume` is off, or it had other options.
    """
    output = epath.Path(config.output)
    path = output / "config.json"
    ours = json.loads(json.dumps(dataclasses.asdict(config)))
    try:
        theirs = json.loads(path.read_text()).get(RUN) if path.exists() else None
    except (ValueError, AttributeError):
        theirs = None
    if path.exists() and not config.resume:
        raise InputError(
            f"{output}: holds a run or a model already; go on with --resume, or name another folder"
        )
    if config.resume and theirs is not None:
        other = [
            name for name, value in ours.items() if name not in FREE and theirs.get(name, value) != value
        ]
        if other:
            raise InputError(
                f"{output}: this run was started with other options: "
                + ", ".join(
                    f"{name.replace('_', '-')} {theirs.get(name)!r}, now {ours[name]!r}" for name in other
                )
            )


def _check_export(model: BiEncoder, mask: Any) -> None:
    """Refuses at the start what could not be saved at the end.

    Raises:
        InputError: transformers has no config for the model, and more than biases is to be trained.
    """
    trained = jax.tree_util.tree_leaves_with_path(mask)
    if not all(is_bias(path) for path, trains in trained if trains):
        export_config(model.hf_config, model.decoder.config)


def write_config(config: TrainConfig) -> None:
    """Writes the run's configuration into config.json, beside what the model may have there (transformers keeps it)."""
    path = epath.Path(config.output) / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    model = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, model | {RUN: dataclasses.asdict(config)})


def _describe_data(examples: int, negatives: int, total: int, warmup: int, start: int) -> str:
    text = f"{examples:,} examples with up to {negatives} hard negatives; {total:,} steps, {warmup:,} of them warm-up"
    return text + (f"; going on after step {start:,}" if start else "")


@dataclasses.dataclass
class _Running:
    """A step that was started and not looked at yet."""

    step: int
    loss: jax.Array
    norm: jax.Array
    rate: float
    tokens: int
    examples: list[int]
    since: float = dataclasses.field(default_factory=time.perf_counter)


def _note(log: RunLog, running: _Running | None) -> None:
    """Waits for a step and writes it down.

    Raises:
        Diverged: it gave no finite numbers.
    """
    if running is None:
        return
    loss, norm = float(running.loss), float(running.norm)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise Diverged(
            f"step {running.step}: loss {loss}, gradient norm {norm}. Training stopped; the checkpoints before it are "
            f"kept. The batch's examples, counted from 0 in the order of the data: {running.examples}"
        )
    log.step(running.step, loss, running.rate, running.tokens, running.since)


@contextlib.contextmanager
def _on_sigterm() -> Iterator[threading.Event]:
    """Turns SIGTERM, by which preemptible machines announce their end, into an event."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _quiet_truncation() -> Iterator[None]:
    """Silences the warning that texts were cut, which every batch would repeat."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*and were cut")
        yield
