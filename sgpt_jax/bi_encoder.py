"""The bi-encoder: one vector a text, from a decoder's pooled hidden states (SGPT-BE)."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from sgpt_jax.checkpoint import bias_sets
from sgpt_jax.checkpoint.export import export_folder
from sgpt_jax.checkpoint.tensors import open_checkpoint
from sgpt_jax.checkpoint.weights import load_checkpoint
from sgpt_jax.decoder.model import Decoder, split
from sgpt_jax.decoder.pooling import POOLING_MODES, normalize
from sgpt_jax.decoder.sharding import batch_sharding, batch_ways, on_mesh
from sgpt_jax.errors import InputError
from sgpt_jax.folder.card import read_license, write_model_card
from sgpt_jax.folder.settings import ModelSettings, read_settings, write_settings
from sgpt_jax.folder.source import resolve
from sgpt_jax.packing.rows import RowBatch, encode_rows, lay_out, plan_batches
from sgpt_jax.runtime.prefetch import ahead
from sgpt_jax.text.encoder import Side, TextEncoder, check_ids
from sgpt_jax.text.tokenizer import load_tokenizer, save_tokenizer

# Tokens a batch: enough to keep matrix products large, and on accelerators to hide the launch of each program.
DEFAULT_BATCH_TOKENS = {"cpu": 4096, "gpu": 32768, "tpu": 32768}

# The default limit where positions are unlimited: what the released ALiBi decoders were trained on.
UNLIMITED_DEFAULT = 2048


@functools.partial(jax.jit, static_argnames=("graphdef", "pooling", "slots", "unit", "mesh"))
def embed(
    graphdef: Any,
    params: Any,
    rows: dict[str, jax.Array],
    *,
    pooling: str,
    slots: int,
    unit: bool,
    mesh: Mesh | None,
) -> jax.Array:
    """Packed rows (see `encode_rows`) to vectors, float32 [R, slots, E], of length 1 if `unit`; whole on every device
    of the mesh."""
    with on_mesh(mesh):
        vectors = encode_rows(graphdef, params, rows, pooling, slots)
    if unit:
        vectors = normalize(vectors)
    if mesh is not None:
        vectors = jax.lax.with_sharding_constraint(vectors, NamedSharding(mesh, PartitionSpec()))
    return vectors


Planned = tuple[list[list[int]], list[RowBatch]]
"""Token ids of texts, and the batches that they run in."""


@dataclasses.dataclass
class EncodeReport:
    """What `BiEncoder.encode_chunks` did.

    Attributes:
        texts: texts that became vectors.
        cut: those of them that were too long, for which there is no warning.
        tokens: their tokens, padding not counted.
        tokens_padded: tokens that went through the decoder, with padding.
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
            dtype: "float32" or "bfloat16", for weights and matrix products; vectors are float32 always.
            mesh: spread model and batches over it (`make_mesh`); None uses the first device.
            biases: a file of trained biases to apply (`python -m train` writes them as biases.safetensors).

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
        files = open_checkpoint(resolved.path)
        decoder = load_checkpoint(files, dtype, mesh)
        limit = decoder.config.max_positions
        if max_seq_length is not None and limit is not None and max_seq_length > limit:
            raise InputError(f"max_seq_length {max_seq_length}, but the model has {limit} positions")
        length = _first(max_seq_length, settings.max_seq_length, limit, UNLIMITED_DEFAULT)
        if bias_set is not None:
            decoder = bias_sets.apply_bias_set(decoder, bias_set)
        return cls(
            decoder=decoder,
            hf_config=files.config,
            text=TextEncoder(
                load_tokenizer(resolved.path),
                length if limit is None else min(length, limit),
                brackets,
                settings.prompts,
            ),
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

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        normalize: bool = False,
        batch_tokens: int | None = None,
        show_progress: bool | None = None,
    ) -> np.ndarray:
        """Vectors of texts as they are, without brackets.

        Args:
            texts: a list, or one str.
            normalize: scale vectors to length 1.
            batch_tokens: padded tokens computed at a time; None picks by device.
            show_progress: None shows a bar on a terminal after a second.

        Returns:
            float32 [n, E] in the order of the texts; [E] for one str.

        Raises:
            TypeError: for anything that is not a str, naming its index.
        """
        return self._encode(texts, None, normalize, batch_tokens, show_progress)

    def encode_query(
        self,
        texts: str | Sequence[str],
        *,
        normalize: bool = False,
        batch_tokens: int | None = None,
        show_progress: bool | None = None,
    ) -> np.ndarray:
        """Vectors of search queries, in `[` `]` if the model has brackets; see `encode`."""
        return self._encode(texts, "query", normalize, batch_tokens, show_progress)

    def encode_document(
        self,
        texts: str | Sequence[str],
        *,
        normalize: bool = False,
        batch_tokens: int | None = None,
        show_progress: bool | None = None,
    ) -> np.ndarray:
        """Vectors of documents, in `{` `}` if the model has brackets; see `encode`."""
        return self._encode(texts, "document", normalize, batch_tokens, show_progress)

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
            side: "query" or "document" for models with brackets or prompts.
            normalize, batch_tokens: see `encode`.
            report: counts are added here.

        Yields:
            float32 [n, E] for each chunk.
        """
        report = EncodeReport() if report is None else report
        begin = time.perf_counter() - report.seconds

        def wait(seconds: float) -> None:
            report.waited += seconds
            report.seconds = time.perf_counter() - begin

        def count(batch: RowBatch) -> None:
            report.texts += len(batch.indices)
            report.tokens_padded += batch.rows * batch.length
            report.seconds = time.perf_counter() - begin

        def cut(texts: int) -> None:
            report.cut += texts

        def planned() -> Iterator[Planned]:
            for texts in chunks:
                ids = self._tokenise(texts, side, False, cut)
                report.tokens += sum(map(len, ids))
                yield ids, self._plan(ids, batch_tokens)

        with contextlib.closing(ahead(planned(), 2, wait)) as ready:
            yield from self._stream(ready, normalize, count)

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cosine similarities: vectors [n, E] (or [E]) and [m, E] (or [E]) to float32 [n, m]."""
        a, b = np.atleast_2d(a), np.atleast_2d(b)
        return np.asarray(
            jnp.matmul(
                normalize(jnp.asarray(a)), normalize(jnp.asarray(b)).T, precision=jax.lax.Precision.HIGHEST
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

        sentence-transformers adds no brackets by itself; the folder's model card says so where it matters.

        Args:
            folder: created where it is not there.
            training: data and hyper-parameters for the model card.
            results: measured scores for the model card.

        Raises:
            InputError: when transformers has no config for the decoder (biases added to some families). Nothing is
                written then.
        """
        folder = epath.Path(folder)
        export_folder(self.decoder, self.hf_config, folder)
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
        )

    def _encode(
        self,
        texts: str | Sequence[str],
        side: Side | None,
        unit: bool,
        batch_tokens: int | None,
        show_progress: bool | None,
    ) -> np.ndarray:
        single = isinstance(texts, str)
        ids = self._tokenise([texts] if isinstance(texts, str) else texts, side, show_progress)
        with tqdm(
            total=len(ids),
            unit="text",
            desc="embedding",
            delay=1,
            disable=None if show_progress is None else not show_progress,
        ) as bar:
            plan = self._plan(ids, batch_tokens)
            (vectors,) = self._stream([(ids, plan)], unit, lambda batch: bar.update(len(batch.indices)))
        return vectors[0] if single else vectors

    def _tokenise(
        self,
        texts: Sequence[str],
        side: Side | None,
        show_progress: bool | None,
        on_cut: Callable[[int], object] | None = None,
    ) -> list[list[int]]:
        ids = self.text.ids(texts, side, show_progress=show_progress, on_cut=on_cut)
        check_ids(ids, self.decoder.config.vocab_size)
        return ids

    def _plan(self, ids: list[list[int]], batch_tokens: int | None) -> list[RowBatch]:
        return plan_batches(
            [len(row) for row in ids],
            batch_tokens=batch_tokens or DEFAULT_BATCH_TOKENS.get(jax.default_backend(), 32768),
            max_length=self.text.max_seq_length,
            row_multiple=batch_ways(self.mesh),
        )

    def _stream(
        self,
        chunks: Iterable[Planned],
        unit: bool,
        on_batch: Callable[[RowBatch], object],
    ) -> Iterator[np.ndarray]:
        """The vectors of each chunk of token ids, [n, E] float32."""
        # One batch behind, also from chunk to chunk: the host fetches a result while the device works on the next.
        started: collections.deque[tuple[np.ndarray, tuple[RowBatch, np.ndarray] | None, Any]]
        started = collections.deque()

        def finished(left: int) -> Iterator[np.ndarray]:
            while started and (started[0][1] is None or running() > left):
                vectors, placed, result = started.popleft()
                if placed is None:
                    yield vectors
                else:
                    batch, places = placed
                    vectors[list(batch.indices)] = np.asarray(result).reshape(-1, self.dimension)[places]
                    on_batch(batch)

        def running() -> int:
            return sum(placed is not None for _, placed, _ in started)

        for ids, plan in chunks:
            vectors = np.zeros((len(ids), self.dimension), np.float32)
            for batch, places, result in self._run(ids, plan, unit or self.normalized):
                started.append((vectors, (batch, places), result))
                yield from finished(1)
            started.append((vectors, None, None))
        yield from finished(0)

    def _run(
        self, ids: list[list[int]], plan: list[RowBatch], unit: bool
    ) -> Iterator[tuple[RowBatch, np.ndarray, jax.Array]]:
        """Starts each batch and yields it with its texts' places in its vectors, which may still be in the making."""
        graphdef, params = split(self.decoder)
        place = jax.local_devices()[0] if self.mesh is None else batch_sharding(self.mesh)
        for batch in plan:
            rows, places = lay_out(ids, batch, self.text.pad_id)
            vectors = embed(
                graphdef,
                params,
                jax.device_put(rows, place),
                pooling=self.pooling,
                slots=batch.slots,
                unit=unit,
                mesh=self.mesh,
            )
            yield batch, places, vectors


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next(value for value in values if value is not None)
