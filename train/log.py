"""What people see of a run: the progress bar, metrics.jsonl and dev.jsonl, TensorBoard, wandb, and a plot."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import parse_json, write_jsonl
from sgpt_jax.runtime.progress import progress

from .recipes import TrainConfig

METRICS, DEV, PLOT = "metrics.jsonl", "dev.jsonl", "curve.png"


class Callback:
    """What is told of a run; a subclass has the methods that it wants.

    An error in one ends the run, and `resume` goes on from its last checkpoint.
    """

    def on_step(self, step: int, loss: float, lr: float, tokens_per_second: float) -> None:
        """After a step, counted from 0, whose loss has been read."""

    def on_dev(self, step: int, name: str, value: float) -> None:
        """After an evaluation on the dev data: the last step done, the metric, and its value."""


class RunLog:
    """Writes down a run; on other processes than the first it does nothing. A context manager.

    `metrics.jsonl` has a line a step, {"step", "loss", "lr"}, with `step` counted from 0; `dev.jsonl` has a line for
    each evaluation on the dev data, {"step", "dev"}, with `step` the last one done.

    Args:
        config: of the run.
        total: steps of the whole run.
        start: the first step to come; later lines of an interrupted run are dropped.
        callbacks: told of steps and evaluations.
        active: False on other processes.
    """

    def __init__(
        self, config: TrainConfig, total: int, start: int, callbacks: Sequence[Callback], active: bool
    ):
        self.callbacks = callbacks
        self.active, self.folder = active, epath.Path(config.output)
        if not active:
            return
        self.wandb: Any = None
        if config.wandb:
            import wandb

            options = dataclasses.asdict(config)
            try:
                wandb.init(project=config.wandb, config=options, dir=str(self.folder))
            except Exception as error:  # no key, no connection: whatever it raises
                raise InputError(f"--wandb {config.wandb}: {error}") from error
            self.wandb = wandb
        self.losses = _read_before(self.folder / METRICS, start)
        self.devs = _read_before(self.folder / DEV, start)
        write_jsonl(self.folder / METRICS, self.losses)
        write_jsonl(self.folder / DEV, self.devs)
        self._files = {name: (self.folder / name).open("a") for name in (METRICS, DEV)}
        self.board = _TensorBoard(self.folder / "tensorboard", start)
        self._clock = time.perf_counter()
        self.bar = progress(config.recipe, "step", total, initial=start)

    def start_clock(self) -> None:
        """Begins to measure the time of the next step: at the start, and after what is no step."""
        self._clock = time.perf_counter()

    def step(self, step: int, loss: float, rate: float, tokens: int) -> None:
        """Writes down a step whose result has just been fetched; it took the time since the fetch before.

        Args:
            step: counted from 0.
            loss: of the global batch.
            rate: the learning rate.
            tokens: of the global batch.
        """
        if not self.active:
            return
        now = time.perf_counter()
        speed = tokens / (now - self._clock)
        self._clock = now
        self._write(METRICS, self.losses, {"step": step, "loss": loss, "lr": rate})
        self._scalars(step, {"loss": loss, "lr": rate, "tokens_per_second": speed})
        self.bar.note = f"loss {loss:.4f}, lr {rate:.2e}, {speed:,.0f} tokens/s"
        self.bar.update()
        for callback in self.callbacks:
            callback.on_step(step, loss, rate, speed)

    def dev(self, step: int, name: str, value: float, details: Mapping[str, float]) -> None:
        """Writes down the dev metric after a step, and its details if it has any."""
        if self.active:
            self._write(
                DEV, self.devs, {"step": step, "dev": value, **({"details": details} if details else {})}
            )
            self._scalars(step, {"dev": value} | {f"dev/{name}": some for name, some in details.items()})
            more = ", ".join(f"{name} {some:.4f}" for name, some in details.items())
            self.say(f"step {step + 1}: dev {name} {value:.4f}" + (f" ({more})" if more else ""))
            for callback in self.callbacks:
                callback.on_dev(step, name, value)

    def say(self, message: str) -> None:
        """Prints a line above the progress bar."""
        if self.active:
            self.bar.say(message)

    def plot(self) -> None:
        """Draws loss and dev metric over the steps into `curve.png`."""
        if not self.active or not self.losses:
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(xlabel="step", ylabel="loss")
        steps, losses = zip(*((line["step"], line["loss"]) for line in self.losses), strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.3 if len(losses) > 50 else 1.0, linewidth=1)
        if len(losses) > 50:
            axes.plot(steps, _smooth(losses), color="tab:blue", linewidth=1.5)
        if self.devs:
            other = axes.twinx()
            other.set_ylabel("dev metric", color="tab:orange")
            other.plot(
                *zip(*((d["step"], d["dev"]) for d in self.devs), strict=True), "o-", color="tab:orange"
            )
        with (self.folder / PLOT).open("wb") as stream:
            figure.savefig(stream, format="png", dpi=120)

    def _write(self, name: str, records: list[dict], record: dict) -> None:
        records.append(record)
        self._files[name].write(json.dumps(record) + "\n")
        self._files[name].flush()

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        self.board.write(step, values)
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            self.bar.close()
            self.board.close()
            for stream in self._files.values():
                stream.close()
            if self.wandb is not None:
                self.wandb.finish(exit_code=0 if error is None else 1)


class _TensorBoard:
    """Writes scalars for TensorBoard, at once: tensorboardX's own writer has a thread, whose errors nobody hears of.

    Args:
        folder: of the event files.
        start: the first step to come; TensorBoard drops what earlier files have from there on.
    """

    def __init__(self, folder: epath.Path, start: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(f"{folder}/events")
        session = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(wall_time=time.time(), step=start, session_log=session))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            event = Event(wall_time=time.time(), step=step, summary=scalar(name, value))
            self._events.write_event(event)
        self._events.flush()

    def close(self) -> None:
        self._events.close()


def _read_before(path: epath.Path, start: int) -> list[dict]:
    """The records of a file before a step. The last line may be cut off: the process may have been killed."""
    records = []
    for line in path.read_text().splitlines() if start and path.exists() else []:
        try:
            record = parse_json(line)
        except ValueError:
            break
        if record["step"] < start:
            records.append(record)
    return records


def _smooth(values: tuple[float, ...]) -> list[float]:
    """The mean of each value and those around it, a tenth of all in the middle and fewer at the ends."""
    reach = len(values) // 20
    smooth = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        around = values[i - near : i + near + 1]
        smooth.append(sum(around) / len(around))
    return smooth
