"""The bi-encoder: one vector a text, from a decoder's pooled hidden states (SGPT-BE)."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from sgpt_jax.checkpoint import bias_sets
from sgpt_jax.checkpoint.export import export_folder
from sgpt_jax.checkpoint.fingerprint import model_fingerprint
from sgpt_jax.decoder.model import Decoder, split
from sgpt_jax.decoder.pooling import POOLING_MODES, normalize
from sgpt_jax.decoder.sharding import batch_sharding, num_shards
from sgpt_jax.errors import InputError
from sgpt_jax.folder.card import read_license, write_model_card
from sgpt_jax.folder.settings import ModelSettings, read_settings, write_settings
from sgpt_jax.folder.source import resolve
from sgpt_jax.load import base_sha256, load_parts, token_limit
from sgpt_jax.packing.layout import BATCH_TOKENS, PlannedBatch, lay_out
from sgpt_jax.packing.rows import embed, plan_texts, texts_per_row, vector_indices
from sgpt_jax.runtime.one_behind import one_behind
from sgpt_jax.runtime.platform import by_platform
from sgpt_jax.runtime.prefetch import ahead
from sgpt_jax.runtime.progress import progress
from sgpt_jax.text.encoder import Side, TextEncoder, check_ids
from sgpt_jax.text.tokenizer import save_tokenizer

# CPU: tokens of a batch; more make no matmul faster.
CPU_BATCH_TOKENS = 4096


# What a model card says of weights that were int8.
DEQUANTISED = (
    "The weights are the dequantised copy of int8 weights, one scale for each output channel, that the model was used "
    "with: another rounding of the base model's than its own files have."
)


class EncodeOptions(TypedDict, total=False):
    """The options of `BiEncoder.encode`."""

    normalize: bool
    batch_tokens: int | None
    show_progress: bool | None


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


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Token ids of some texts, the batches that they run in, and the vectors that are to come, float32 [n, E]."""

    ids: list[list[int]]
    plans: list[PlannedBatch]
    vectors: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Started:
    """A batch that the device may still be working on; without a plan and a result, a chunk that has no texts."""

    chunk: _Chunk
    plan: PlannedBatch | None = None
    room: int = 0
    result: jax.Array | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class BiEncoder:
    """Texts to vectors. Make one with `from_pretrained`.

    Attributes:
        decoder: the decoder, with its biases in place.
        hf_config: the Hugging Face config it was read from, which `save_pretrained` writes again.
        text: the tokenising rules: limit, brackets, prompts.
        pooling: how hidden states become one vector, see `pool`.
        normalized: the model folder asks for vectors of length 1.
        name: the source's name, for model cards and reports.
        license: what the source states, for model cards; None where it states nothing.
        mesh: the devices it runs on, or None for the first one.
    """

    decoder: Decoder
    hf_config: Mapping[str, Any]
    text: TextEncoder
    pooling: str
    normalized: bool = False
    name: str = ""
    license: str | None = None
    mesh: Mesh | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: Any,
        *,
        pooling: str | None = None,
        brackets: bool | None = None,
        max_seq_length: int | None = None,
        dtype: str = "float32",
        mesh: Mesh | None = None,
        biases: Any = None,
        weights: str | None = None,
    ) -> BiEncoder:
        """Loads a model.

        What is left at None comes from the bias set, then from the model folder (modules.json and what it names;
        "specb" in the name means brackets); where both are silent it is weightedmean, no brackets, and the
        decoder's own limit.

        Args:
            source: a folder (of transformers or sentence-transformers), a hub id, or a .gguf file.
            pooling: weightedmean, mean, lasttoken or cls.
            brackets: put `[` `]` around queries and `{` `}` around documents.
            max_seq_length: tokens of a text that are read, brackets included.
            dtype: "float32" or "bfloat16", for weights and matmuls; vectors are float32 always.
            mesh: spread model and batches over it (`make_mesh`); None uses the first device.
            biases: a file of trained biases to apply (`python -m train` writes them as biases.safetensors).
            weights: "int8" holds the matrices as int8, at a quarter of float32's memory; None in the dtype. See
                `load_decoder`.

        Raises:
            InputError: the source is missing, damaged or not supported, or the options do not fit it.
        """
        resolved = resolve(source)
        settings = read_settings(resolved.path, resolved.name)
        bias_set = None if biases is None else bias_sets.load_bias_set(biases)
        recorded = {} if bias_set is None else bias_set.header
        pooling = _first(pooling, recorded.get("pooling"), settings.pooling, "weightedmean")
        brackets = _first(brackets, recorded.get("brackets"), settings.brackets, False)
        if pooling not in POOLING_MODES:
            raise InputError(f"pooling must be one of {', '.join(POOLING_MODES)}, not {pooling!r}")
        parts = load_parts(resolved, dtype, mesh, weights)
        length = token_limit(parts.decoder.config, max_seq_length, settings.max_seq_length)
        decoder = parts.decoder
        if bias_set is not None:
            decoder = bias_sets.apply_bias_set(decoder, bias_set, base_sha256(resolved, decoder))
        return cls(
            decoder=decoder,
            hf_config=parts.hf_config,
            text=TextEncoder(parts.tokenizer, length, brackets, settings.prompts),
            pooling=pooling,
            normalized=bool(settings.normalize),
            name=resolved.name,
            license=read_license(resolved.path),
            mesh=mesh,
        )

    @property
    def dimension(self) -> int:
        """Length of the vectors."""
        return self.decoder.config.hidden_dim

    def fingerprint(self) -> str:
        """What tells this model and its settings from any other, see `model_fingerprint`: 40 hexadecimal digits.

        An index keeps it: queries must be encoded by what has the same one (`Index.check_model`).
        """
        settings = {
            "pooling": self.pooling,
            "brackets": self.text.brackets,
            "prompts": self.text.prompts,
            "max_seq_length": self.text.max_seq_length,
            "normalized": self.normalized,
        }
        return model_fingerprint(self.decoder, settings)

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        side: Side | None = None,
        normalize: bool = False,
        batch_tokens: int | None = None,
        show_progress: bool | None = None,
    ) -> np.ndarray:
        """Vectors of texts.

        Args:
            texts: a list, or one str.
            side: "query" or "document" for the brackets or prompts of a model that has them; None for texts as they
                are, or with the model's prompt for these.
            normalize: scale vectors to length 1.
            batch_tokens: padded tokens computed at a time; None picks by device.
            show_progress: None shows a bar on a terminal after a second.

        Returns:
            float32 [n, E] in the order of the texts; [E] for one str.

        Raises:
            TypeError: for anything that is not a str, naming its index.
        """
        asked = [texts] if isinstance(texts, str) else texts
        ids = self.text.ids(asked, side, show_progress=show_progress)
        chunk = self._plan(ids, batch_tokens)
        with progress("embedding", "text", len(ids), show=show_progress) as bar:
            (vectors,) = self._vectors([chunk], normalize, lambda plan: bar.update(len(plan.texts)))
        return vectors[0] if isinstance(texts, str) else vectors

    def encode_query(self, texts: str | Sequence[str], **options: Unpack[EncodeOptions]) -> np.ndarray:
        """Vectors of search queries, in `[` `]` if the model has brackets; options and result as of `encode`."""
        return self.encode(texts, side="query", **options)

    def encode_document(self, texts: str | Sequence[str], **options: Unpack[EncodeOptions]) -> np.ndarray:
        """Vectors of documents, in `{` `}` if the model has brackets; options and result as of `encode`."""
        return self.encode(texts, side="document", **options)

    def encode_chunks(
        self,
        chunks: Iterable[Sequence[str]],
        *,
        side: Side | None = None,
        normalize: bool = False,
        batch_tokens: int | None = None,
        report: EncodeReport | None = None,
    ) -> Iterator[np.ndarray]:
        """Vectors of a stream of texts, in memory that does not grow with it.

        A thread reads and tokenises up to two chunks ahead, so that the device need not wait for that; nor does it
        between chunks. The vectors of a chunk do not depend on the others.

        Args:
            chunks: lists of texts, read in another thread.
            side, normalize, batch_tokens: see `encode`.
            report: counts are added here.

        Yields:
            float32 [n, E] for each chunk.
        """
        report = EncodeReport() if report is None else report
        begin = time.perf_counter() - report.seconds

        def wait(seconds: float) -> None:
            report.waited += seconds
            report.seconds = time.perf_counter() - begin

        def count(plan: PlannedBatch) -> None:
            report.texts += len(plan.texts)
            report.tokens_padded += plan.padded_tokens
            report.seconds = time.perf_counter() - begin

        def cut(texts: int) -> None:
            report.cut += texts

        def planned() -> Iterator[_Chunk]:
            for texts in chunks:
                ids = self.text.ids(texts, side, show_progress=False, on_cut=cut)
                report.tokens += sum(map(len, ids))
                yield self._plan(ids, batch_tokens)

        with contextlib.closing(ahead(planned(), 2, wait)) as ready:
            yield from self._vectors(ready, normalize, count)

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cosine similarities: vectors [n, E] (or [E]) and [m, E] (or [E]) to float32 [n, m]."""
        a, b = np.atleast_2d(a), np.atleast_2d(b)
        return np.asarray(
            jnp.matmul(
                normalize(jnp.asarray(a)),
                normalize(jnp.asarray(b)).T,
                precision=jax.lax.Precision.HIGHEST,
            )
        )

    def save_pretrained(
        self,
        folder: Any,
        *,
        training: Mapping[str, object] | None = None,
        results: Mapping[str, object] | None = None,
    ) -> None:
        """Writes a folder that transformers, sentence-transformers and this project load.

        sentence-transformers adds no brackets by itself; the folder's model card says so where it matters. Of a model
        in int8 the folder has the dequantised copy, in the decoder's dtype, and the card says that too.

        Args:
            folder: created where it is not there.
            training: data and hyper-parameters for the model card.
            results: measured scores for the model card.

        Raises:
            InputError: when transformers has no config for the decoder (biases added to some families). Nothing is
                written then.
        """
        export_folder(self.decoder, self.hf_config, folder)
        note = DEQUANTISED if self.decoder.build.int8 else ""
        self.save_settings(folder, training=training, results=results, note=note)

    def save_settings(
        self,
        folder: Any,
        *,
        training: Mapping[str, object] | None = None,
        results: Mapping[str, object] | None = None,
        note: str = "",
    ) -> None:
        """Writes what a model folder has beside the weights: tokenizer, how vectors are made, model card.

        Args:
            folder: see `save_pretrained`.
            training, results: see there.
            note: for the model card, a paragraph on the weights.
        """
        folder = epath.Path(folder)
        save_tokenizer(self.text.tokenizer, folder)
        settings = ModelSettings(
            pooling=self.pooling,
            brackets=self.text.brackets,
            max_seq_length=self.text.max_seq_length,
            normalize=self.normalized,
            prompts=self.text.prompts,
        )
        write_settings(folder, settings, self.dimension)
        write_model_card(
            folder,
            settings,
            self.dimension,
            base_model=self.name,
            license=self.license,
            training=training,
            results=results,
            note=note,
        )

    def _plan(self, ids: list[list[int]], batch_tokens: int | None) -> _Chunk:
        check_ids(ids, self.decoder.config.vocab_size)
        plans = plan_texts(
            [len(text) for text in ids],
            batch_tokens=batch_tokens or by_platform(cpu=CPU_BATCH_TOKENS, accelerator=BATCH_TOKENS),
            max_length=self.text.max_seq_length,
            row_multiple=num_shards(self.mesh),
        )
        return _Chunk(ids, plans, np.zeros((len(ids), self.dimension), np.float32))

    def _vectors(
        self, chunks: Iterable[_Chunk], normalize: bool, on_batch: Callable[[PlannedBatch], object]
    ) -> Iterator[np.ndarray]:
        """The vectors of each chunk; the device goes on from chunk to chunk."""

        def fetch(started: _Started) -> _Started:
            if (plan := started.plan) is not None:
                vectors = np.asarray(started.result).reshape(-1, self.dimension)
                started.chunk.vectors[plan.texts] = vectors[vector_indices(plan, started.room)]
                on_batch(plan)
            return started

        for done in one_behind(self._start(chunks, normalize or self.normalized), fetch):
            if done.plan is None or done.plan is done.chunk.plans[-1]:
                yield done.chunk.vectors

    def _start(self, chunks: Iterable[_Chunk], normalize: bool) -> Iterator[_Started]:
        """Starts one batch after the other."""
        graphdef, params = split(self.decoder)
        sharding = jax.local_devices()[0] if self.mesh is None else batch_sharding(self.mesh)
        for chunk in chunks:
            for plan in chunk.plans:
                room = texts_per_row(plan)
                batch = jax.device_put(lay_out(plan, chunk.ids, self.text.pad_id), sharding)
                result = embed(
                    graphdef,
                    params,
                    batch,
                    pooling=self.pooling,
                    room=room,
                    normalize=normalize,
                    mesh=self.mesh,
                )
                yield _Started(chunk, plan, room, result)
            if not chunk.plans:
                yield _Started(chunk)


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next(value for value in values if value is not None)
