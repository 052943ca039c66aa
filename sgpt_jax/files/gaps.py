"""Counting what is left when some numbers are left out."""

import numpy as np


class Gaps:
    """Some numbers, and the numbering of all others.

    Args:
        numbers: int64, ascending, without repetition: those that are left out.
    """

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers = numbers
        self._left_before = numbers - np.arange(len(numbers))  # how many numbers are left before each

    def __len__(self) -> int:
        return len(self.numbers)

    def number_of(self, positions: np.ndarray) -> np.ndarray:
        """The numbers at some positions among those that are left, which count from 0 without gaps."""
        return positions + np.searchsorted(self._left_before, positions, side="right")

    def among(self, start: int, stop: int) -> np.ndarray | None:
        """Which of the numbers ``[start, stop)`` are left out, bool; None for none of them."""
        first, last = np.searchsorted(self.numbers, [start, stop])
        if first == last:
            return None
        found = np.zeros(stop - start, bool)
        found[self.numbers[first:last] - start] = True
        return found
