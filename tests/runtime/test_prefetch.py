"""A thread that works ahead: order, bounds, errors, and its end."""

import threading
import time

import pytest

from sgpt_jax.runtime.prefetch import ahead


def test_order_and_how_far_ahead():
    made: list[int] = []

    def items():
        for number in range(20):
            made.append(number)
            yield number

    waits: list[float] = []
    result = ahead(items(), 2, waits.append)
    assert next(result) == 0
    time.sleep(0.2)
    assert len(made) <= 4  # one taken, two ready, one in the making
    assert list(result) == list(range(1, 20))
    assert len(waits) == 21 and all(wait >= 0 for wait in waits)


def test_waiting_is_measured():
    def slow():
        time.sleep(0.2)
        yield 1

    waits: list[float] = []
    assert list(ahead(slow(), 1, waits.append)) == [1]
    assert waits[0] > 0.1


def test_an_error_comes_after_the_items_before_it():
    def broken():
        yield 1
        yield 2
        raise KeyError("three")

    result = ahead(broken(), 5)
    assert [next(result), next(result)] == [1, 2]
    with pytest.raises(KeyError, match="three"):
        next(result)


def test_closing_ends_the_thread():
    before = threading.active_count()

    def endless():
        while True:
            yield 0

    result = ahead(endless(), 1)
    assert next(result) == 0
    result.close()
    assert threading.active_count() == before
