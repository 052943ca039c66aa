"""What encoding and scoring did, counted."""

from __future__ import annotations

import dataclasses
import time


@dataclasses.dataclass
class EncodeReport:
    """What `BiEncoder.encode_chunks` did.

    Attributes:
        texts: texts that became vectors.
        cut: those of them that were too long, for which there is no warning.
        tokens: their tokens, padding not counted.
        tokens_padded: tokens that went through the decoder, padding included.
        seconds: how long it took, with what the caller did meanwhile.
        waited: how much of that was spent waiting for texts to be read, tokenised and joined into rows. The device may
            have been busy with one more batch during a part of it.
    """

    texts: int = 0
    cut: int = 0
    tokens: int = 0
    tokens_padded: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def begin(self) -> None:
        """The clock goes on from `seconds`."""
        self._begin = time.perf_counter() - self.seconds

    def add_cut(self, texts: int) -> None:
        self.cut += texts

    def add_batch(self, texts: int, tokens_padded: int) -> None:
        self.texts += texts
        self.tokens_padded += tokens_padded
        self._stop()

    def add_wait(self, seconds: float) -> None:
        self.waited += seconds
        self._stop()

    def _stop(self) -> None:
        self.seconds = time.perf_counter() - self._begin


@dataclasses.dataclass
class ScoreReport:
    """What scoring did. Passed to several calls it adds up."""

    pairs: int = 0
    tokens: int = 0
    """Tokens that went through the decoder, padding not counted."""
    tokens_alone: int = 0
    """Tokens that one pass for each pair would have taken."""
    tokens_padded: int = 0
    """Tokens that went through the decoder, padding included."""
    documents_cut: int = 0
    """Pairs whose document was too long."""
    queries_cut: int = 0
    """Pairs whose query was too long for the room that the prompt leaves."""
    queries_empty: int = 0
    """Pairs without a query; their score is 0."""

    @property
    def tokens_saved(self) -> int:
        """Tokens that sharing documents between queries made unnecessary."""
        return self.tokens_alone - self.tokens

    def add(self, other: ScoreReport) -> None:
        """Adds another report's counts."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def warning(self) -> str | None:
        """What the user should know: how many pairs were not scored as they are; None if all were."""
        notes = [
            f"{number} {what}"
            for number, what in (
                (self.documents_cut, "with a document that is too long and was cut"),
                (self.queries_cut, "with a query that is too long and was cut"),
                (self.queries_empty, "with an empty query, whose score is 0"),
            )
            if number
        ]
        return f"of {self.pairs} pairs: {', '.join(notes)}" if notes else None
