"""The training run: prepare, fit, finish."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from etils import epath

from sgpt_jax.decoder.sharding import num_shards
from sgpt_jax.errors import InputError
from sgpt_jax.index.locks import only_writer
from sgpt_jax.runtime.platform import by_platform

from .checks import check
from .export import Record, export
from .log import Callback, RunLog
from .prepare import LOOKED_AT, LOOKS, Run, prepare
from .programs import StepPrograms
from .recipes import TrainConfig
from .resume import run_note, write_config
from .step import agree, place_batch


class Diverged(InputError):
    """Loss or gradient became NaN or infinite: the options do not fit the data."""


def run(config: TrainConfig, callbacks: Sequence[Callback] = ()) -> bool:
    """Trains as `config` says, and writes everything to `config.output`. `python -m train` is this function.

    That is: the trained model as a folder of sentence-transformers, `biases.safetensors` if biases are all that was
    trained, `metrics.jsonl`, `dev.jsonl`, `curve.png`, `tensorboard/`, `checkpoints/`, `best/`, and the run's whole
    configuration under "run" in config.json, which is the model's too. Of adapters: the folder that PEFT loads, with
    the configuration in run.json.

    Args:
        config: the run, such as `dataclasses.replace(PAIRS, model=..., data=..., output=...)`.
        callbacks: told of every step and every evaluation, on the first of several processes.

    Returns:
        True when the run is complete; False when SIGTERM ended it early, with its state saved for `--resume`.

    Raises:
        InputError: an option or a file does not fit.
        Diverged: NaN or infinite loss; the checkpoints before it are kept.
    """
    config = config.settled()
    check(config)
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        if first:
            stack.enter_context(only_writer(Path(config.output), "run"))
        prepared = prepare(config)
        stack.callback(prepared.checkpoints.close)
        log = stack.enter_context(
            RunLog(prepared.config, prepared.total, prepared.start, callbacks, active=first)
        )
        if first:
            write_config(config, prepared.inputs)
        for note in prepared.notes:
            log.say(note)
        complete = fit(prepared, log)
        if complete:
            finish(prepared, log)
    return complete


def fit(run: Run, log: RunLog) -> bool:
    """Runs the steps that are left; False when SIGTERM ended it early, with the state saved."""
    config, total = run.config, run.total
    # On an accelerator one step runs while the host reads the loss of the step before. A CPU has no such overlap.
    in_flight = by_platform(cpu=0, accelerator=1)
    started: collections.deque[_Started] = collections.deque()
    programs = StepPrograms(run.run_step, run.chunk_rows, num_shards(run.mesh), log.say)
    with _on_sigterm() as stopping, _quiet_truncation():
        log.start_clock()
        for step in range(run.start, total):
            if run.exhausted:
                break
            started.append(_start(run, programs, step))
            done = step + 1
            stop = bool(agree(stopping.is_set())[0])
            evaluate = run.evaluate is not None and (done % run.eval_every == 0 or done == total)
            save = stop or done % config.save_every == 0 or done == total
            # All losses are read before an evaluation or a save: none may follow a step that diverged.
            while len(started) > (0 if evaluate or save else in_flight):
                _log_step(started.popleft(), log)
            if run.evaluate is not None and evaluate:
                value = run.evaluate(run.trained_model(run.state.trainable))
                log.dev(step, run.evaluate.name, value, run.evaluate.details)
                run.checkpoints.save_best(done, run.state.trainable, value)
                run.looks.append(value)
                if run.exhausted:
                    log.say(f"{config.patience} evaluations in a row were no better: the run ends")
                    save = True
            if save:
                position = run.batches.get_state() | {LOOKS: run.looks, LOOKED_AT: run.looked_at}
                run.checkpoints.save(done, run.state, position)
            if evaluate or save:
                log.start_clock()
            if stop:
                run.checkpoints.wait()
                log.say(f"stopped by SIGTERM after {done} of {total} steps; saved: go on with --resume")
                return False
    return True


def finish(run: Run, log: RunLog) -> None:
    """Exports the best parameters by dev metric, or the last ones, and draws the curve."""
    first = jax.process_index() == 0
    best = None if run.evaluate is None else run.checkpoints.restore_best(run.state.trainable)
    step, trainable, dev = (run.total, run.state.trainable, None) if best is None else best
    record = Record(
        config=run.config,
        examples=run.examples,
        steps=int(run.state.step),
        warmup_steps=run.warmup,
        chosen_step=step,
        dev_metric=run.evaluate.name if run.evaluate else None,
        dev=dev,
        base_sha256=run.base_sha256,
        started_from=run.started_from,
        plain_base=run.plain_base,
    )
    output = epath.Path(run.config.output)
    model = run.trained_model(trainable)
    # The note of the run is in every config.json that is ever there: --resume knows by it what may be written over.
    model = dataclasses.replace(model, hf_config={**model.hf_config, **run_note(run.config, run.inputs)})
    messages = export(model, trainable, record, output, write=first)
    if first:
        log.plot()
    for message in messages:
        log.say(message)


@dataclasses.dataclass(frozen=True)
class _Started:
    """A step that was started, and whose results were not fetched yet."""

    step: int
    loss: jax.Array
    norm: jax.Array
    rate: float
    tokens: int
    examples: list[int]


def _start(run: Run, programs: StepPrograms, step: int) -> _Started:
    """Starts a step on the devices with the next batch."""
    batch = next(run.batches)
    (rows,) = agree(len(batch["rows"].segments))
    arrays = place_batch(
        batch, rows=rows, chunk_rows=run.chunk_rows, pad_id=run.model.text.pad_id, mesh=run.mesh
    )
    run.state, loss, norm = programs(run.state, run.frozen, arrays)
    rate = float(f"{run.rate(step):.7g}")
    return _Started(step, loss, norm, rate, batch["tokens"] * jax.process_count(), batch["examples"])


def _log_step(started: _Started, log: RunLog) -> None:
    """Waits for a step and writes it down.

    Raises:
        Diverged: its loss or its gradient is not finite.
    """
    loss, norm = float(started.loss), float(started.norm)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise Diverged(
            f"step {started.step}: loss {loss}, gradient norm {norm}. Training stopped; the checkpoints before it are "
            f"kept. The batch's examples, counted from 0 in the order of the data: {started.examples}"
        )
    log.step(started.step, loss, started.rate, started.tokens)


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
