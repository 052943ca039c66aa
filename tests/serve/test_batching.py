"""The queue: its bound, whose turn it is, what is dropped; the device's thread, with a lane that computes nothing."""

import threading

import pytest
import serving

from sgpt_jax.packing.layout import PlannedBatch, Row
from sgpt_jax.serve.batching import Job, Queue, Worker
from sgpt_jax.serve.errors import ApiError


def job(caller, sizes, name="lane"):
    return Job(name, caller, [f"{caller}{number}" for number in range(len(sizes))], sizes)


def turn(queue, budget, full=False):
    found = queue.turn(["lane"], {"lane": budget}, full)
    return None if found is None else [job.items[item] for job, item in found[1]]


class Lane:
    """Answers with the items themselves, when it is let."""

    name = "lane"

    def __init__(self, budget=4):
        self.budget = budget
        self.go = threading.Event()
        self.batches = []

    def plan(self, sizes):
        rows = tuple(Row((item,), 1) for item in range(min(len(sizes), self.budget)))
        return PlannedBatch(rows, len(rows), 1)

    def start(self, items, plan):
        items = [items[item] for item in plan.texts]
        self.batches.append(items)

        def fetch():
            self.go.wait(20)
            if "broken0" in items:
                raise RuntimeError("a user's text")
            return items

        return fetch


def test_the_bound_counts_tokens_and_says_when_to_come_again():
    queue = Queue(["lane"], 10)
    queue.put(job("a", [4, 4]))
    with pytest.raises(ApiError) as refused:
        queue.put(job("b", [3]))
    assert refused.value.status == 429
    assert int(refused.value.headers["retry-after"]) >= 1
    queue.put(job("b", [2]))
    assert queue.tokens == 10
    with pytest.raises(ApiError) as never:
        queue.put(job("b", [6, 5]))
    assert never.value.status == 413
    queue.close()
    with pytest.raises(ApiError) as stopped:
        queue.put(job("b", [1]))
    assert stopped.value.status == 503


def test_callers_have_turns_by_tokens():
    queue = Queue(["lane"], 1000)
    queue.put(job("a", [2] * 6))
    queue.put(job("b", [1] * 6))
    # b's texts are half as long, so it has two for each of a's.
    assert turn(queue, 8) == ["a0", "b0", "b1", "a1", "b2", "b3", "a2"]


def test_requests_of_one_caller_have_turns_and_a_late_one_does_not_wait_for_a_large_one():
    queue = Queue(["lane"], 1000)
    large = job("a", [1] * 50)
    queue.put(large)
    queue.take([(large, item) for item in range(20)])
    queue.put(Job("lane", "a", ["small"], [1]))
    assert "small" in turn(queue, 2)


def test_who_comes_late_gets_no_more_than_its_share():
    queue = Queue(["lane"], 1000)
    first = job("a", [1] * 50)
    queue.put(first)
    queue.take([(first, item) for item in range(20)])
    queue.put(job("b", [1] * 50))
    assert sorted(name[0] for name in turn(queue, 8)) == ["a"] * 5 + ["b"] * 5


def test_a_full_batch_only():
    queue = Queue(["lane"], 1000)
    queue.put(job("a", [1, 1]))
    assert turn(queue, 4, full=True) is None
    queue.put(job("b", [1, 1]))
    assert len(turn(queue, 4, full=True)) == 4


def test_dropped_jobs_make_room():
    queue = Queue(["lane"], 10)
    gone = job("a", [5, 5])
    queue.put(gone)
    queue.drop(gone)
    assert (queue.tokens, queue.dropped) == (0, 2)
    queue.put(job("b", [10]))
    assert turn(queue, 1) == ["b0"]


def test_the_worker_splits_large_jobs_and_answers_in_order():
    queue, lane = Queue(["lane"], 1000), Lane()
    lane.go.set()
    worker = Worker(queue, [lane])
    jobs = [job(caller, [1] * 11) for caller in "abc"]
    for each in jobs:
        queue.put(each)
    worker.start()
    for each in jobs:
        assert each.future.result(20) == each.items
    assert all(len(batch) <= 4 for batch in lane.batches)
    assert queue.tokens == 0
    queue.close()
    assert worker.join(20)


def test_what_waits_when_the_queue_closes_is_still_done():
    queue, lane = Queue(["lane"], 1000), Lane()
    worker = Worker(queue, [lane])
    worker.start()
    last = job("a", [1] * 9)
    queue.put(last)
    queue.close()
    assert not worker.join(0.05)
    lane.go.set()
    assert last.future.result(20) == last.items
    assert worker.join(20)


def test_callers_who_left_cost_nothing():
    queue, lane = Queue(["lane"], 1000), Lane()
    worker = Worker(queue, [lane])
    queue.put(job("a", [1] * 4))
    worker.start()
    serving.until(lambda: lane.batches)
    gone = job("b", [1] * 3)
    queue.put(gone)
    gone.future.cancel()
    queue.drop(gone)
    lane.go.set()
    queue.close()
    assert worker.join(20)
    assert not any("b0" in batch for batch in lane.batches)


def test_a_batch_that_fails_fails_alone_and_its_message_stays_out_of_the_log(caplog):
    queue, lane = Queue(["lane"], 1000), Lane()
    lane.go.set()
    worker = Worker(queue, [lane])
    broken = job("broken", [1] * 9)
    queue.put(broken)
    worker.start()
    with pytest.raises(ApiError) as failure:
        broken.future.result(20)
    assert failure.value.status == 500
    well = job("a", [1])
    queue.put(well)
    assert well.future.result(20) == ["a0"]
    queue.close()
    assert worker.join(20)
    assert "RuntimeError" in caplog.text
    assert "a user's text" not in caplog.text
