"""Work that waits for the device: bounded in tokens, fair between callers, dropped when its caller has left.

HTTP handlers put a `Job` for each request. One thread, the `Worker`, takes what waits when the device is free. Fair
means by tokens: the caller that has had the fewest comes next, and of a caller's requests the one that has had the
fewest. So a large request is split over many batches, and a small one that comes later need not wait for it.
"""

from __future__ import annotations

import concurrent.futures
import heapq
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sgpt_jax.packing.layout import PlannedBatch
from sgpt_jax.serve.errors import ApiError, where

logger = logging.getLogger(__name__)


class Lane(Protocol):
    """One kind of work; `programs.py` has them."""

    name: str
    budget: int

    def plan(self, sizes: Sequence[int]) -> PlannedBatch:
        """Which items run now, the first among them; `sizes` are those of the items whose turn it is."""

    def start(self, items: Sequence[Any], plan: PlannedBatch) -> Callable[[], Sequence[Any]]:
        """Starts those of the items that are in the plan; returns what waits for their results, `plan.texts`."""


@dataclass(eq=False)
class Job:
    """What one request wants from one lane.

    Attributes:
        lane: the lane's name.
        caller: whom the request is from, for fairness.
        items: what the lane works on.
        sizes: of each item, in tokens.
        future: gets the results, in the order of the items.
        waiting: the items that have not been started.
        served: tokens that were, and a start that makes the job equal to those before it.
    """

    lane: str
    caller: str
    items: Sequence[Any]
    sizes: Sequence[int]
    future: concurrent.futures.Future[list[Any]] = field(default_factory=concurrent.futures.Future)
    served: int = 0
    put_at: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.waiting = dict.fromkeys(range(len(self.items)))
        self.results: list[Any] = [None] * len(self.items)
        self.unfinished = len(self.items)

    @property
    def tokens_waiting(self) -> int:
        """Tokens of the items that have not been started."""
        return sum(self.sizes[item] for item in self.waiting)


Entry = tuple[Job, int]
"""An item of a job."""


@dataclass(eq=False)
class _Caller:
    served: int
    jobs: dict[Job, None] = field(default_factory=dict)


def _least_first(groups: Iterable[tuple[int, Iterator[Entry]]]) -> Iterator[Entry]:
    """Entries of the groups, always of the one that has had the fewest tokens, beginning with what each had."""
    heap = [(served, number, entries) for number, (served, entries) in enumerate(groups)]
    heapq.heapify(heap)
    while heap:
        served, number, entries = heapq.heappop(heap)
        entry = next(entries, None)
        if entry is not None:
            yield entry
            heapq.heappush(heap, (served + entry[0].sizes[entry[1]], number, entries))


class Queue:
    """Jobs that wait, of all lanes.

    Args:
        lanes: their names.
        bound: tokens that may wait.

    Attributes:
        tokens: that wait now.
        most_tokens: the most that have waited.
        dropped: items that were dropped before their turn.
    """

    def __init__(self, lanes: Iterable[str], bound: int) -> None:
        self.bound = bound
        self.tokens = 0
        self.most_tokens = 0
        self.dropped = 0
        self._tokens_done = self._seconds_done = 0.0
        self._closed = False
        self._changed = threading.Condition()
        self._lanes: dict[str, dict[str, _Caller]] = {name: {} for name in lanes}

    def put(self, job: Job) -> None:
        """Lets a job wait.

        Raises:
            ApiError: 413 when it can never fit, 429 when it does not fit now, 503 when the server stops.
        """
        size = job.tokens_waiting
        if size > self.bound:
            raise ApiError(
                413,
                f"the request has {size} tokens, more than the {self.bound} that may wait at a time; send fewer texts",
                code="request_too_large",
            )
        with self._changed:
            if self._closed:
                raise ApiError(503, "the server is stopping", code="stopping", retry_after=1)
            if self.tokens + size > self.bound:
                wait = self.tokens * self._seconds_done / self._tokens_done if self._tokens_done else 1
                raise ApiError(
                    429,
                    f"{self.tokens} tokens are waiting; with {size} more they would exceed {self.bound}",
                    code="queue_full",
                    retry_after=min(60, max(1, math.ceil(wait))),
                )
            self.tokens += size
            self.most_tokens = max(self.most_tokens, self.tokens)
            callers = self._lanes[job.lane]
            if job.caller not in callers:
                callers[job.caller] = _Caller(min((c.served for c in callers.values()), default=0))
            caller = callers[job.caller]
            job.served = min((other.served for other in caller.jobs), default=0)
            caller.jobs[job] = None
            self._changed.notify_all()

    def drop(self, job: Job) -> None:
        """Forgets what has not been started of a job, whose caller has left or whose work failed."""
        with self._changed:
            self.dropped += len(job.waiting)
            self.tokens -= job.tokens_waiting
            job.waiting.clear()
            self._forget(job)

    def worked(self, tokens: int, seconds: float) -> None:
        """Notes what a batch took, for telling how long what waits will take; the last ten count most."""
        self._tokens_done = 0.9 * self._tokens_done + tokens
        self._seconds_done = 0.9 * self._seconds_done + seconds

    def close(self) -> None:
        """Lets nothing more in. What waits is still worked on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def turn(
        self, lanes: Iterable[str], budget: Mapping[str, int], full: bool
    ) -> tuple[str, list[Entry]] | None:
        """Whose turn it is, in order, somewhat more than a batch's worth. They go on waiting until `take`.

        Args:
            lanes: the first of these that has work.
            budget: the tokens of a batch of each lane.
            full: do not wait, and look only for enough work for a full batch.

        Returns:
            The lane and entries; None when the queue is closed and empty, or there is no full batch.
        """
        with self._changed:
            while True:
                for name in lanes:
                    found, tokens = [], 0
                    callers = self._lanes[name].values()
                    for entry in _least_first((c.served, self._entries(c)) for c in callers):
                        found.append(entry)
                        tokens += entry[0].sizes[entry[1]]
                        if tokens >= 1.25 * budget[name]:
                            break
                    if found and (tokens >= budget[name] or not full):
                        return name, found
                if full or self._closed:
                    return None
                self._changed.wait()

    def take(self, entries: Iterable[Entry]) -> None:
        """Takes entries of `turn` out of the queue."""
        with self._changed:
            for job, item in entries:
                if item not in job.waiting:
                    continue  # dropped meanwhile
                del job.waiting[item]
                size = job.sizes[item]
                self.tokens -= size
                job.served += size
                self._lanes[job.lane][job.caller].served += size
                if not job.waiting:
                    self._forget(job)

    def _entries(self, caller: _Caller) -> Iterator[Entry]:
        return _least_first((job.served, iter([(job, item) for item in job.waiting])) for job in caller.jobs)

    def _forget(self, job: Job) -> None:
        callers = self._lanes[job.lane]
        caller = callers.get(job.caller)
        if caller is not None:
            caller.jobs.pop(job, None)
            if not caller.jobs:
                del callers[job.caller]


@dataclass(frozen=True)
class BatchReport:
    """A batch that ran.

    Attributes:
        lane: its name.
        items: how many.
        tokens: theirs.
        padded: tokens that were computed, padding among them.
        seconds: from its start to its results.
        waited: seconds that the first of its items had waited.
    """

    lane: str
    items: int
    tokens: int
    padded: int
    seconds: float
    waited: float


class Worker:
    """The thread that the device belongs to.

    While a batch runs, the next is started only if it is full: then the device need not wait for the host; a part of a
    batch rather waits for more to come.
    """

    def __init__(
        self,
        queue: Queue,
        lanes: Sequence[Lane],
        on_batch: Callable[[BatchReport], object] = lambda report: None,
    ) -> None:
        self.queue = queue
        self.lanes = {lane.name: lane for lane in lanes}
        self._on_batch = on_batch
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    def start(self) -> None:
        """Begins to work."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it works."""
        return self._thread.is_alive()

    def join(self, seconds: float) -> bool:
        """Waits until all work of a closed queue is done; False if it is not after so many seconds."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        order = list(self.lanes)
        budget = {name: lane.budget for name, lane in self.lanes.items()}
        running: Callable[[], None] | None = None
        while True:
            turn = self.queue.turn(order, budget, full=running is not None)
            if turn is None and running is None:
                return
            started = None
            if turn is not None:
                name, entries = turn
                order.remove(name)
                order.append(name)
                started = self._start(self.lanes[name], entries)
            if running is not None:
                running()
            running = started

    def _start(self, lane: Lane, entries: list[Entry]) -> Callable[[], None] | None:
        """Starts a batch of the entries; returns what waits for it and hands out its results."""
        begin = time.perf_counter()
        taken = entries
        try:
            plan = lane.plan([job.sizes[item] for job, item in entries])
            taken = [entries[place] for place in plan.texts]
            self.queue.take(taken)
            fetch = lane.start([job.items[item] for job, item in entries], plan)
        except Exception as error:
            self._fail(taken, error)
            return None

        def finish() -> None:
            try:
                results = fetch()
            except Exception as error:
                self._fail(taken, error)
                return
            seconds = time.perf_counter() - begin
            tokens = sum(job.sizes[item] for job, item in taken)
            self.queue.worked(tokens, seconds)
            for (job, item), result in zip(taken, results, strict=True):
                job.results[item] = result
                job.unfinished -= 1
                if not job.unfinished and job.future.set_running_or_notify_cancel():
                    job.future.set_result(job.results)
            waited = begin - min(job.put_at for job, _ in taken)
            self._on_batch(BatchReport(lane.name, len(taken), tokens, plan.padded_tokens, seconds, waited))

        return finish

    def _fail(self, entries: Iterable[Entry], error: Exception) -> None:
        logger.error("a batch failed: %s", where(error))
        failure = (
            error
            if isinstance(error, ApiError)
            else ApiError(500, "the work failed on the device", retry=False)
        )
        for job in dict.fromkeys(job for job, _ in entries):
            self.queue.drop(job)
            if not job.future.done() and job.future.set_running_or_notify_cancel():
                job.future.set_exception(failure)
