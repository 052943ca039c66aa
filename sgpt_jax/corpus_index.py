"""A corpus into an index: texts, a model, and what the index notes of both."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.errors import InputError
from sgpt_jax.files.columns import DOCUMENT
from sgpt_jax.files.corpora import Document, document, read_corpus
from sgpt_jax.files.lines import PathLike
from sgpt_jax.index.build import build_index
from sgpt_jax.index.files import Dtype
from sgpt_jax.index.search import Index
from sgpt_jax.reports import EncodeReport
from sgpt_jax.runtime.progress import progress

Corpus = PathLike | Iterable[str | Mapping[str, Any] | Document]


def index_corpus(
    folder: PathLike,
    corpus: Corpus,
    model: BiEncoder,
    *,
    store: Dtype = "float32",
    texts: bool = True,
    chunk_size: int = 1024,
    report: EncodeReport | None = None,
    show_progress: bool | None = None,
) -> Index:
    """Embeds a corpus into an index, or goes on with one that was interrupted.

    `sgpt index` is this function. The index notes the model and its options, so that `sgpt search` needs only the
    folder; it is resumed, checked and shared by several processes as `build_index` says.

    Args:
        folder: of the index; made when it is not there.
        corpus: a file, see `read_corpus`, or a series of documents: texts, whose ids are then their numbers from 0;
            records with the keys of BEIR ({"_id", "title", "text"}, or other usual spellings); or `Document`s. A call
            that goes on needs the same ones.
        model: what makes the vectors, as of documents.
        store: "float32", "float16" or "int8".
        texts: keep the texts.
        chunk_size: documents between two moments of safety.
        report: counts are added here.
        show_progress: None shows a bar on a terminal, after a second.

    Raises:
        InputError: see `build_index` and `read_corpus`; or the model compares vectors by a distance.
    """
    if model.similarity_name not in ("cosine", "dot"):
        raise InputError(
            f"{model.name} compares vectors by {model.similarity_name} distance; an index is searched by cosine or dot "
            "product"
        )
    report = EncodeReport() if report is None else report
    with progress("indexing", "doc", show=show_progress) as bar:

        def safe(rows: int) -> None:
            if rows > bar.n:  # those found there; others are counted when their batch is done
                bar.update(rows - bar.n)

        def encoded(texts: int) -> None:
            bar.note = f"{report.tokens / max(report.seconds, 1e-9):,.0f} tokens/s"
            bar.update(texts)

        return build_index(
            folder,
            read_corpus(corpus) if isinstance(corpus, str | os.PathLike) else _documents(corpus),
            lambda chunks: model.encode_chunks(chunks, side="document", report=report, on_batch=encoded),
            dtype=store,
            similarity="dot" if model.similarity_name == "dot" else "cosine",
            chunk_size=chunk_size,
            store_texts=texts,
            metadata=_metadata(model),
            fingerprint=model.fingerprint(),
            on_progress=safe,
        )


def _documents(corpus: Iterable[str | Mapping[str, Any] | Document]) -> Iterator[Document]:
    for number, each in enumerate(corpus):
        if isinstance(each, Document):
            yield each
        elif isinstance(each, str):
            yield Document(str(number), each)
        elif isinstance(each, Mapping):
            try:
                yield document(DOCUMENT.of_object(each))
            except ValueError as error:
                raise InputError(f"document {number}: {error}") from None
        else:
            raise TypeError(f"document {number} must be a str, a record or a Document, not {each!r:.80}")


def _metadata(model: BiEncoder) -> dict[str, Any]:
    """What the vectors depend on, as `BiEncoder.from_settings` takes it; a build that goes on must have the same."""
    source = model.source
    noted = {
        "model": _absolute(source.get("model", model.name)),
        "pooling": model.pooling,
        "brackets": model.text.brackets,
        "max_seq_length": model.text.max_seq_length,
        "dtype": model.decoder.dtype.name,
        "biases": source.get("biases") and _absolute(source["biases"]),
    }
    names = ("weights", "query_prompt", "document_prompt", "truncate_dim")
    noted |= {name: source[name] for name in names if source.get(name) is not None}
    if adapter := source.get("adapter"):
        adapters = adapter if isinstance(adapter, list | tuple) else [adapter]
        noted["adapter"] = [_absolute(each) for each in adapters]
    return noted


def _absolute(source: Any) -> str:
    source = os.fspath(source)
    return os.path.abspath(source) if os.path.exists(source) else source
