"""The bi-encoder: one vector a text, from a decoder's pooled hidden states (SGPT-BE)."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Unpack

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sgpt_jax.checkpoint import bias_sets
from sgpt_jax.checkpoint.export import export_folder
from sgpt_jax.checkpoint.fingerprint import model_fingerprint, module_facts
from sgpt_jax.decoder.model import Decoder
from sgpt_jax.decoder.modules import Modules, output_dimension
from sgpt_jax.decoder.pooling import pooling_modes, similarities
from sgpt_jax.decoder.sharding import describe_devices, num_shards
from sgpt_jax.errors import InputError, whole
from sgpt_jax.folder.card import read_license
from sgpt_jax.folder.hub import PushOptions, push_folder
from sgpt_jax.folder.modules import describe_modules
from sgpt_jax.folder.settings import SIMILARITIES, read_settings
from sgpt_jax.folder.source import resolve
from sgpt_jax.habits import EncodeOptions, Precision, refuse, refuse_attribute, refuse_source, translate
from sgpt_jax.load import base_sha256, load_parts, open_model, token_limit
from sgpt_jax.packing.layout import BATCH_TOKENS, PlannedBatch
from sgpt_jax.packing.portions import CPU_PORTION, PORTION_BATCHES, plan_portions, portions
from sgpt_jax.packing.rows import Packing, plan_texts
from sgpt_jax.packing.stream import Chunk, Embedder, warn_not_finite
from sgpt_jax.precision import check_precision, quantize_embeddings
from sgpt_jax.reports import EncodeReport
from sgpt_jax.runtime.forks import check_fork
from sgpt_jax.runtime.platform import by_platform
from sgpt_jax.runtime.prefetch import ahead
from sgpt_jax.runtime.progress import Show, shared_progress
from sgpt_jax.saving import DEQUANTISED, save_settings
from sgpt_jax.text.encoder import Side, TextEncoder, check_ids, check_texts

# CPU: tokens of a batch; more make no matmul faster.
CPU_BATCH_TOKENS = 4096

_ARGUMENTS = (
    "pooling", "brackets", "max_seq_length", "truncate_dim", "dtype", "biases", "weights", "adapter", "bidirectional",
)  # fmt: skip
# The names of what `BiEncoder.from_settings` takes.
BI_ENCODER_SETTINGS = ("model", *_ARGUMENTS, "query_prompt", "document_prompt")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BiEncoder:
    """Texts to vectors. Make one with `from_pretrained`.

    Attributes:
        decoder: the decoder, with its biases in place.
        hf_config: the Hugging Face config it was read from, which `save_pretrained` writes again.
        text: the tokenising rules: limit, brackets, prompts.
        pooling: how hidden states become one vector, see `pool`.
        modules: what follows the pooling, see `apply_modules`.
        include_prompt: whether the tokens of a prompt are pooled.
        truncate_dim: how many dimensions of a vector are kept; None keeps all.
        similarity_name: how vectors are compared, one of `SIMILARITIES`.
        name: the source's name, for model cards and reports.
        license: what the source states, for model cards; None where it states nothing.
        mesh: the devices it runs on, or None for the first one.
        source: what it was loaded from, as `from_settings` takes it, for indexes; empty where that is not known.
    """

    decoder: Decoder
    hf_config: Mapping[str, Any]
    text: TextEncoder
    pooling: str
    modules: Modules = ()
    include_prompt: bool = True
    truncate_dim: int | None = None
    similarity_name: str = "cosine"
    name: str = ""
    license: str | None = None
    mesh: Mesh | None = None
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __new__(cls, *arguments: Any, **_: Any) -> BiEncoder:
        refuse_source(cls, arguments)
        return super().__new__(cls)

    def __getattr__(self, name: str) -> Any:
        refuse_attribute(self, name)

    def __post_init__(self) -> None:
        token_limit(self.decoder.config, self.text.max_seq_length)
        if self.similarity_name not in SIMILARITIES:
            raise InputError(
                f"similarity_name must be one of {', '.join(SIMILARITIES)}, not {self.similarity_name!r}"
            )
        if self.truncate_dim is not None:
            _check_size(self.truncate_dim, self._whole_dimension)

    @classmethod
    def from_pretrained(
        cls,
        source: Any,
        *,
        pooling: str | None = None,
        brackets: bool | None = None,
        max_seq_length: int | None = None,
        truncate_dim: int | None = None,
        dtype: str = "float32",
        mesh: Mesh | None = None,
        biases: Any = None,
        weights: str | None = None,
        adapter: Any = None,
        bidirectional: bool | None = None,
        **others: Any,
    ) -> BiEncoder:
        """Loads a model.

        What is left at None comes from the bias set, then from the model folder (modules.json and what it names;
        "specb" in the name means brackets); where both are silent it is weightedmean, no brackets, and the
        decoder's own limit.

        Args:
            source: a folder (of transformers, sentence-transformers or peft), a hub id, or a .gguf file.
            pooling: see `pool`.
            brackets: put `[` `]` around queries and `{` `}` around documents.
            max_seq_length: tokens of a text that are read, brackets included.
            truncate_dim: keep so many dimensions of the vectors, counted from the first, after all modules. What is
                kept has no longer length 1 then, unless `encode(normalize=True)` asks for it.
            dtype: "float32" or "bfloat16", for weights and matmuls; vectors are float32 always.
            mesh: spread model and batches over it (`make_mesh`); None uses the first device.
            biases: a file of trained biases to apply (`python -m train` writes them as biases.safetensors).
            weights: "int8" holds the matrices as int8, at a quarter of float32's memory; None in the dtype. See
                `load_decoder`.
            adapter: a LoRA adapter to merge into the weights (a folder in peft's layout or a hub id), or several in
                their order. A source that is an adapter itself brings the base that it names.
            bidirectional: whether tokens see those after them, whatever the folder says; also for a folder with code of
                its own that is not known, if that changes nothing else. Windows reach to both sides then.

        Raises:
            InputError: the source is missing, damaged or not supported, or the options do not fit it.
            TypeError: for an argument of sentence-transformers that means nothing here, with what to use.
        """
        refuse("from_pretrained", others)
        resolved = resolve(source)
        opened = open_model(resolved, adapter, bidirectional=bidirectional)
        settings = read_settings(opened.settings, resolved.name)
        bias_set = None if biases is None else bias_sets.load_bias_set(biases)
        recorded = {} if bias_set is None else bias_set.header
        pooling = _first(pooling, recorded.get("pooling"), settings.pooling, "weightedmean")
        brackets = _first(brackets, recorded.get("brackets"), settings.brackets, False)
        try:
            pooling_modes(pooling)
        except ValueError as problem:
            raise InputError(str(problem)) from None
        parts = load_parts(opened, dtype, mesh, weights)
        stated = _first(recorded.get("max_seq_length"), settings.max_seq_length)
        length = token_limit(parts.decoder.config, max_seq_length, stated)
        decoder = parts.decoder
        if bias_set is not None:
            decoder = bias_sets.apply_bias_set(decoder, bias_set, base_sha256(opened.files, decoder))
        model = cls(
            decoder=decoder,
            hf_config=parts.hf_config,
            text=TextEncoder(
                parts.tokenizer, length, brackets, settings.prompts, settings.default_prompt_name
            ),
            pooling=pooling,
            modules=settings.modules,
            include_prompt=settings.include_prompt,
            similarity_name=settings.similarity or "cosine",
            name=resolved.name,
            license=read_license(resolved.path),
            mesh=mesh,
            source={
                "model": source,
                "biases": biases,
                "weights": weights,
                "adapter": adapter,
                "truncate_dim": truncate_dim,
                "bidirectional": bidirectional,
            },
        )
        size = _first(truncate_dim, settings.truncate_dim, model.dimension)
        return (
            model if size == model.dimension else dataclasses.replace(model, truncate_dim=model._kept(size))
        )

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], mesh: Mesh | None = None) -> BiEncoder:
        """Loads the model that options of a command, or the metadata of an index, describe.

        Args:
            settings: `model`, and as far as they are there the arguments of `from_pretrained` and `query_prompt` and
                `document_prompt`, see `with_prompts`; None counts as not there, and what else is there is passed over.
            mesh: see `from_pretrained`.

        Raises:
            InputError: see `from_pretrained`.
        """
        given = {name: settings[name] for name in _ARGUMENTS if settings.get(name) is not None}
        model = cls.from_pretrained(settings["model"], mesh=mesh, **given)
        return model.with_prompts(settings.get("query_prompt"), settings.get("document_prompt"))

    def with_prompts(self, query: str | None = None, document: str | None = None) -> BiEncoder:
        """The same model with other prompts before queries and documents.

        Args:
            query, document: a text, or the name of one of the model's prompts; None leaves what there is.
        """
        asked = {"query": query, "document": document}
        found = {side: self.text.prompts.get(text, text) for side, text in asked.items() if text is not None}
        text = copy.copy(self.text)
        text.prompts = self.text.prompts | found
        given = {f"{side}_prompt": prompt for side, prompt in asked.items() if prompt is not None}
        return dataclasses.replace(self, text=text, source={**self.source, **given})

    def __repr__(self) -> str:
        config = self.decoder.config
        mask = ", bidirectional" if config.bidirectional else ""
        return (
            f"BiEncoder({self.name or 'model'}: {self.hf_config['model_type']}, {config.num_layers} layers{mask}, "
            f"dimension {self.dimension}, {describe_modules(self.pooling, self.include_prompt, self.modules)}, "
            f"{self.text.max_seq_length} tokens, {self.decoder.dtype.name} on {describe_devices(self.mesh)})"
        )

    @property
    def dimension(self) -> int:
        """Length of the vectors."""
        return self.truncate_dim or self._whole_dimension

    @property
    def _whole_dimension(self) -> int:
        pooled = len(pooling_modes(self.pooling)) * self.decoder.config.hidden_dim
        return output_dimension(pooled, self.modules)

    def skip(self, prompt: str, side: Side | None = None) -> int:
        """How many first tokens of a text with this prompt are left out of the pooling."""
        return 0 if self.include_prompt else self.text.prompt_length(prompt, side)

    def fingerprint(self) -> str:
        """What tells this model and its settings from any other, see `model_fingerprint`: 40 hexadecimal digits.

        An index keeps it: queries must be encoded by what has the same one (`Index.check_model`). The prompt of queries
        is not in it, as it may change with the task.
        """
        settings = {
            "pooling": self.pooling,
            "brackets": self.text.brackets,
            "document_prompt": self.text.prompt("document"),
            "max_seq_length": self.text.max_seq_length,
            "include_prompt": self.include_prompt,
            "truncate_dim": self.truncate_dim,
            "modules": module_facts(self.modules),
        }
        return model_fingerprint(self.decoder, settings)

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        side: Side | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        truncate_dim: int | None = None,
        normalize: bool = False,
        precision: Precision = "float32",
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        show_progress: Show = None,
        **others: Any,
    ) -> np.ndarray:
        """Vectors of texts.

        Args:
            texts: a list, or one str.
            side: "query" or "document" for the brackets or prompts of a model that has them; None for texts as they
                are, or with the model's default prompt.
            prompt: goes before every text, in place of the model's own.
            prompt_name: the name of the model's prompt to use instead of the one of the side.
            truncate_dim: keep so many dimensions; None keeps what the model does.
            normalize: scale vectors, after they are cut, to length 1.
            precision: "int8", "uint8", "binary" or "ubinary" for vectors of fewer bits, see `quantize_embeddings`.
            batch_size: texts computed at a time at the most; None sets no bound of texts.
            batch_tokens: padded tokens computed at a time; None picks by device.
            show_progress: None shows a bar on a terminal after a second, and elsewhere a line now and then; a caller's
                `Progress` is moved on.
            others: normalize_embeddings and show_progress_bar, sentence-transformers' names for two of these, and what
                is the case anyway, such as convert_to_numpy=True.

        Returns:
            float32 [n, D] in the order of the texts, or what `precision` says; [D] for one str. A text whose vector is
            not finite is named in a warning.

        Raises:
            TypeError: for anything that is not a str, naming its index, and for other arguments, with what to use.
            InputError: there is no prompt of that name, there are fewer dimensions, or the precision is not possible.
        """
        ours = translate("encode", others)
        normalize, show_progress = ours.get("normalize", normalize), ours.get("show_progress", show_progress)
        check_precision(precision)
        asked = check_texts([texts] if isinstance(texts, str) else texts)
        prompt = self.text.prompt(side, prompt_name) if prompt is None else prompt
        vectors = np.zeros((len(asked), self._kept(truncate_dim)), np.float32)
        packing = self._packing(batch_tokens, batch_size)
        size = by_platform(cpu=CPU_PORTION, accelerator=PORTION_BATCHES * packing.batch_tokens)
        parts = portions(asked, size, packing.max_length, len(prompt))
        cut: list[int] = []

        def tokenised() -> Iterator[tuple[range, list[list[int]]]]:
            for part in parts:
                some = [asked[index] for index in part]
                ids = self.text.ids(some, side, prompt=prompt, show_progress=False, on_cut=cut.append)
                check_ids(ids, self.decoder.config.vocab_size, part)
                yield part, ids

        skip = self.skip(prompt, side)
        chunks = (
            Chunk(portion.ids, portion.plans, skip, vectors, portion.places)
            for portion in plan_portions(tokenised(), len(asked), packing)
        )
        if len(parts) > 1:  # a thread of its own costs more than a few texts
            chunks = ahead(chunks, 1)
        with (
            contextlib.closing(chunks),
            shared_progress("embedding", "text", len(asked), show_progress) as bar,
        ):
            for _ in self._embedder().vectors(chunks, normalize, lambda plan: bar.update(len(plan.texts))):
                pass
        self.text.warn_cut(sum(cut), len(asked))
        warn_not_finite(vectors)
        vectors = quantize_embeddings(vectors, precision)
        return vectors[0] if isinstance(texts, str) else vectors

    def encode_query(self, texts: str | Sequence[str], **options: Unpack[EncodeOptions]) -> np.ndarray:
        """Vectors of search queries, in `[` `]` if the model has brackets, and behind its prompt "query".

        Options and result as of `encode`.
        """
        return self.encode(texts, side="query", **options)

    def encode_document(self, texts: str | Sequence[str], **options: Unpack[EncodeOptions]) -> np.ndarray:
        """Vectors of documents, in `{` `}` if the model has brackets, and behind its prompt "document".

        Options and result as of `encode`.
        """
        return self.encode(texts, side="document", **options)

    def encode_chunks(
        self,
        chunks: Iterable[Sequence[str]],
        *,
        side: Side | None = None,
        normalize: bool = False,
        batch_tokens: int | None = None,
        report: EncodeReport | None = None,
        on_batch: Callable[[int], object] = lambda texts: None,
    ) -> Iterator[np.ndarray]:
        """Vectors of a stream of texts, in memory that does not grow with it.

        A thread reads and tokenises up to two chunks ahead, so that the device need not wait for that; nor does it
        between chunks. The vectors of a chunk do not depend on the others.

        Args:
            chunks: lists of texts, read in another thread.
            side, normalize, batch_tokens: see `encode`.
            report: counts are added here.
            on_batch: called with the number of texts of every batch that is done.

        Yields:
            float32 [n, D] for each chunk.
        """
        report = EncodeReport() if report is None else report
        report.begin()

        def planned() -> Iterator[Chunk]:
            packing, prompt = self._packing(batch_tokens), self.text.prompt(side)
            skip = self.skip(prompt, side)
            for texts in chunks:
                ids = self.text.ids(texts, side, prompt=prompt, show_progress=False, on_cut=report.add_cut)
                check_ids(ids, self.decoder.config.vocab_size)
                report.tokens += sum(map(len, ids))
                vectors = np.zeros((len(ids), self.dimension), np.float32)
                plans = plan_texts(list(map(len, ids)), packing)
                yield Chunk(ids, plans, skip, vectors, np.arange(len(ids)))

        def done(plan: PlannedBatch) -> None:
            report.add_batch(len(plan.texts), plan.padded_tokens)
            on_batch(len(plan.texts))

        with contextlib.closing(ahead(planned(), 2, report.add_wait)) as ready:
            first = 0
            for vectors in self._embedder().vectors(ready, normalize, done):
                warn_not_finite(vectors, first)
                first += len(vectors)
                yield vectors

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """How near vectors are, by the model's own measure: the higher, the nearer.

        Args:
            a, b: [n, D] (or [D]) and [m, D] (or [D]).

        Returns:
            float32 [n, m]: cosines or dot products, or distances (euclidean, manhattan) with a minus sign.
        """
        check_fork()
        x, y = (jnp.asarray(np.atleast_2d(vectors), jnp.float32) for vectors in (a, b))
        return np.asarray(similarities(x, y, self.similarity_name))

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
        save_settings(self, folder, training=training, results=results, note=note)

    def push_to_hub(self, repo_id: str, **options: Unpack[PushOptions]) -> str:
        """Uploads what `save_pretrained` writes to the Hugging Face hub, model card included, as one commit.

        Args:
            repo_id: "org/name" or "name".
            options: token, private, exist_ok, commit_message, revision and create_pr, see `PushOptions`.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            InputError: as `save_pretrained`, or the hub refuses.
        """
        return push_folder(self.save_pretrained, repo_id, **options)

    def _kept(self, truncate_dim: int | None) -> int:
        """How many dimensions are kept.

        Raises:
            InputError: there are not so many.
        """
        return self.dimension if truncate_dim is None else _check_size(truncate_dim, self.dimension)

    def _embedder(self) -> Embedder:
        return Embedder(self.decoder, self.pooling, self.modules, self.text.pad_id, self.mesh)

    def _packing(self, batch_tokens: int | None, batch_size: int | None = None) -> Packing:
        """How texts are joined into batches."""
        token_limit(self.decoder.config, self.text.max_seq_length)  # it may have been set since
        if batch_tokens is None:
            batch_tokens = by_platform(cpu=CPU_BATCH_TOKENS, accelerator=BATCH_TOKENS)
        return Packing(batch_tokens, self.text.max_seq_length, num_shards(self.mesh), batch_size)


def _check_size(truncate_dim: int, most: int) -> int:
    size = whole("truncate_dim", truncate_dim)
    if not 1 <= size <= most:
        raise InputError(f"truncate_dim {size}: the model's vectors have {most} dimensions")
    return size


def _first(*values: Any) -> Any:
    """The first value that is not None, if there is one."""
    return next((value for value in values if value is not None), None)
