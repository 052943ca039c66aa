"""The same work done by several programs, timed in turn: seconds and their spread, memory, share of the peak rate."""

from __future__ import annotations

import dataclasses
import os
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from sgpt_jax.decoder.config import compute_dtype
from sgpt_jax.decoder.matmul import project
from sgpt_jax.runtime.memory import resident_memory
from sgpt_jax.runtime.platform import by_platform

from ..plan.devices import CHIPS

Run = Callable[[], Any]

# The peak rate: how many matmuls of square matrices of which size. Fewer would not bring a GPU to its steady clock.
CPU_MATMULS, ACCELERATOR_MATMULS = (4, 2048), (50, 8192)

# Words of JAX's name of a device, and the chip's name in `CHIPS`; the first that fits counts.
_KINDS = {
    "H100": "h100",
    "H200": "h200",
    "A100": "a100",
    "L40S": "l40s",
    "L4": "l4",
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


@dataclasses.dataclass
class Benchmark:
    """The same work, to be done by several programs.

    Attributes:
        work: how much it is, by name, for people: {"texts": 500, "tokens": 123456}.
        unit: of `work`, the one that speed is counted in.
        runs: what does the work, by name; "ours" is the one that others are compared with. Each returns its results.
        flops: of useful work, by run; "" stands for all others.
        dtype: of the matmuls, for the peak rate.
        compare: the results of the first round, by run, to figures that show that all did the same work.
        left_out: what cannot run here, and why.
        facts: further figures for the result.
    """

    work: dict[str, int]
    unit: str
    runs: dict[str, Run]
    flops: dict[str, float]
    dtype: str
    compare: Callable[[Mapping[str, Any]], dict[str, Any]]
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def measure(benchmark: Benchmark, rounds: int) -> dict[str, Any]:
    """Runs all of them in turn, once to compile and `rounds` times for the clock; memory is that of the last time.

    The machine's matmul rate is measured in the same rounds: a machine that others use too gives all of them the same
    bad minutes.

    Returns:
        The figures, ready for JSON; those of each run are under "ways".
    """
    multiply, operations = _matmul(benchmark.dtype)
    runs = {**benchmark.runs, "matmul": multiply}
    first: dict[str, float] = {}
    found: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    memory: dict[str, dict[str, float | None]] = {}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            with _PeakMemory() as peak:
                start = time.perf_counter()
                value = run()
                taken = time.perf_counter() - start
            memory[name] = peak.megabytes()
            if turn == 0:
                first[name], found[name] = taken, value
            else:
                seconds[name].append(taken)
            print(f"  round {turn}: {name} {taken:.3f} s", file=sys.stderr, flush=True)
    rate = operations / statistics.median(seconds.pop("matmul"))
    sheet = datasheet_peak() if benchmark.dtype == "bfloat16" else None
    return {
        "work": benchmark.work,
        "dtype": benchmark.dtype,
        "matrix_product_flops": rate,
        "datasheet_flops": sheet,
        "ways": {
            name: _figures(benchmark, name, seconds, rate, sheet, first[name]) | memory[name]
            for name in seconds
        },
        "agreement": benchmark.compare(found),
        "left_out": benchmark.left_out,
        **benchmark.facts,
    }


def _figures(
    benchmark: Benchmark,
    name: str,
    seconds: Mapping[str, list[float]],
    matmul_rate: float,
    sheet_rate: float | None,
    first: float,
) -> dict[str, Any]:
    """What the timed rounds say of one run; `first` is the time of the one that compiled."""
    middle = statistics.median(seconds[name])
    rate = benchmark.flops.get(name, benchmark.flops[""]) / middle
    return {
        "seconds": seconds[name],
        "median_seconds": middle,
        f"{benchmark.unit}_per_second": benchmark.work[benchmark.unit] / middle,
        "ours_over": middle / statistics.median(seconds["ours"]),
        "flops_per_second": rate,
        "of_matrix_product": rate / matmul_rate,
        "of_datasheet": rate / sheet_rate if sheet_rate else None,
        "first_seconds": first,
        "compile_seconds": max(0.0, first - middle),
    }


def print_table(title: str, benchmark: Benchmark, result: Mapping[str, Any]) -> None:
    """Prints a result as a table."""
    work = ", ".join(f"{count:,} {name}" for name, count in benchmark.work.items())
    peak = result["datasheet_flops"]
    print(f"\n{title}: {work}, {benchmark.dtype}, {jax.devices()[0].device_kind}, {threads()} threads; "
          f"matmuls {result['matrix_product_flops'] / 1e9:,.1f} GFLOP/s"
          + (f", datasheet {peak / 1e9:,.0f}" if peak else ""))  # fmt: skip
    print(
        f"{'':24}{'median s':>10}{'range':>18}{benchmark.unit + '/s':>13}{'ours is':>9}"
        f"{'GFLOP/s':>11}{'of limit':>9}{'of sheet':>9}{'compile s':>10}{'peak MB':>9}"
    )
    for name, one in result["ways"].items():
        spread = f"{min(one['seconds']):.3f}-{max(one['seconds']):.3f}"
        sheet = "" if one["of_datasheet"] is None else f"{one['of_datasheet']:.1%}"
        memory = one["device_peak_mb"] or one["host_growth_mb"]
        print(
            f"{name:24}{one['median_seconds']:10.3f}{spread:>18}{one[benchmark.unit + '_per_second']:13,.1f}"
            f"{one['ours_over']:8.2f}x{one['flops_per_second'] / 1e9:11,.1f}{one['of_matrix_product']:9.1%}"
            f"{sheet:>9}{one['compile_seconds']:10.2f}{'' if memory is None else round(memory):>9}"
        )
    for name, why in result["left_out"].items():
        print(f"left out: {name}: {why}")
    for name, value in result["agreement"].items():
        print(f"agreement: {name}: {value}")


def threads() -> int:
    """Cores that this process may use; every run gets all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def datasheet_peak() -> float | None:
    """The first device's published peak in bfloat16, FLOP/s; None for one that is not known."""
    kind = jax.devices()[0].device_kind
    if re.search(r"\b(PCIe|NVL)\b", kind):  # slower than those of the table, which are SXM modules
        return None
    return next((CHIPS[chip].flops for name, chip in _KINDS.items() if re.search(rf"\b{name}\b", kind)), None)


def _matmul(dtype: str) -> tuple[Run, float]:
    """Matmuls of large square matrices, and their operations."""
    repeats, size = by_platform(cpu=CPU_MATMULS, accelerator=ACCELERATOR_MATMULS)
    # Of noise: some GPUs multiply constants faster.
    matrix = jax.random.normal(jax.random.key(0), (size, size), compute_dtype(dtype))
    multiply = jax.jit(project)

    def run() -> None:
        before = multiply(matrix, matrix)
        for _ in range(repeats - 1):  # two at a time, for the memory
            after = multiply(matrix, matrix)
            jax.block_until_ready(before)
            before = after
        jax.block_until_ready(before)

    return run, 2.0 * repeats * size**3


class _PeakMemory:
    """What runs inside adds so much to the memory of this process at its worst, looked at every 5 ms; and the peak of
    the device if it says so. JAX's is that of the process so far. Torch's is that of what runs inside."""

    def __enter__(self) -> _PeakMemory:
        self._cuda, self._cuda_start = _cuda(), 0
        if self._cuda is not None:
            self._cuda.reset_peak_memory_stats()
            self._cuda_start = self._cuda.memory_allocated()
        self._start = self._worst = _resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while self._start is not None and not self._done.wait(0.005):
            self._worst = max(self._worst or 0, _resident_bytes() or 0)

    def megabytes(self) -> dict[str, float | None]:
        """Of the host and of the device; None where the system does not tell."""
        host = device = None
        if self._start is not None:
            host = ((self._worst or 0) - self._start) / 1e6
        if self._cuda is not None and self._cuda.max_memory_allocated() > self._cuda_start:
            device = self._cuda.max_memory_allocated() / 1e6
        elif "peak_bytes_in_use" in (stats := jax.local_devices()[0].memory_stats() or {}):
            device = stats["peak_bytes_in_use"] / 1e6
        return {"host_growth_mb": host, "device_peak_mb": device}


def _cuda() -> Any:
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def _resident_bytes() -> int | None:
    found = resident_memory()
    return None if found is None else sum(found)
