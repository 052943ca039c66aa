"""A corpus into an index: texts, a model, and what the index notes of both."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.errors import InputError, check_list, whole
from sgpt_jax.files.columns import DOCUMENT
from sgpt_jax.files.corpora import Document, SeenIds, document, read_corpus
from sgpt_jax.files.lines import PathLike
from sgpt_jax.index.build import add_documents, build_index
from sgpt_jax.index.files import MANIFEST, Dtype, Manifest
from sgpt_jax.index.search import Index
from sgpt_jax.index.writing import Documents
from sgpt_jax.reports import EncodeReport
from sgpt_jax.runtime import processes
from sgpt_jax.runtime.progress import progress

Corpus = PathLike | Documents | Iterable[str | Mapping[str, Any] | Document]


def index_corpus(
    folder: PathLike,
    corpus: Corpus,
    model: BiEncoder,
    *,
    store: Dtype | None = None,
    texts: bool | None = None,
    chunk_size: int | None = None,
    add: bool = False,
    report: EncodeReport | None = None,
    show_progress: bool | None = None,
) -> Index:
    """Embeds a corpus into an index, goes on with one that was interrupted, or adds to a finished one.

    `sgpt index` is this function. The index notes the model and its options, so that `sgpt search` needs only the
    folder; it is resumed, checked and shared by several processes as `build_index` says.

    Args:
        folder: of the index; made when it is not there.
        corpus: a file, see `read_corpus`; documents by row, such as `count_corpus` gives for several files; or a series
            of documents: texts, whose ids are then their numbers from 0;
            records with the keys of BEIR ({"_id", "title", "text"}, or other usual spellings); or `Document`s. The same
            id with the same content is taken once. A call that goes on needs the same ones.
        model: what makes the vectors, as of documents.
        store: "float32", "float16" or "int8"; None is as in the index that is there, or float32.
        texts: keep the texts; None is as in the index that is there, or True.
        chunk_size: documents between two moments of safety; None is as in the index that is there, or 1,024.
        add: the corpus has what is new or has changed, see `add_documents`; without, it has everything. Texts without
            ids of their own cannot be added.
        report: counts are added here.
        show_progress: None shows a bar on a terminal, after a second.

    Raises:
        InputError: see `build_index` and `read_corpus`; an id of a series has two contents; or the model compares
            vectors by a distance.
        TypeError: the corpus is a mapping or a DataFrame, or an element of a series is no document.
    """
    if model.similarity_name not in ("cosine", "dot"):
        raise InputError(
            f"{model.name} compares vectors by {model.similarity_name} distance; an index is searched by cosine or dot "
            "product"
        )
    if not isinstance(texts, bool | None):
        raise InputError(f"texts must be True, False or None, not {texts!r}")
    if chunk_size is not None and whole("chunk_size", chunk_size) < 1:
        raise InputError(f"chunk_size must be at least 1, not {chunk_size}")
    report = EncodeReport() if report is None else report
    there = Manifest.load(Path(folder)) if (Path(folder) / MANIFEST).exists() else None
    documents: Documents | Iterator[Document]
    if isinstance(corpus, str | os.PathLike):
        documents = read_corpus(corpus)
    elif isinstance(corpus, Documents):
        documents = corpus
    else:
        check_list("documents", corpus)
        documents = _documents(corpus)
    total, alone = getattr(documents, "total", None), processes.count() == 1
    if total is not None and not alone:  # of its own share
        total = -(-total // processes.count())
    with progress("indexing", "doc", None if add else total, show=show_progress) as bar:

        def safe(rows: int) -> None:
            if (
                rows > bar.n and alone and not add
            ):  # those found there; others are counted when their batch is done
                bar.update(rows - bar.n)

        def encoded(texts: int) -> None:
            bar.note = f"{report.tokens / max(report.seconds, 1e-9):,.0f} tokens/s"
            bar.update(texts)

        def encode(chunks: Iterator[list[str]]) -> Iterator[np.ndarray]:
            return model.encode_chunks(chunks, side="document", report=report, on_batch=encoded)

        how: dict[str, Any] = {
            "metadata": _metadata(model),
            "fingerprint": model.fingerprint(),
            "on_progress": safe,
        }
        if add:
            _check_unchanged(folder, there, store, texts, chunk_size)
            if isinstance(documents, Documents):
                documents = documents.read(0, sys.maxsize)
            return add_documents(folder, documents, encode, **how)
        dtype: Any = store or (there.dtype if there else "float32")
        if texts is None:
            texts = there is None or there.store_texts
        return build_index(
            folder,
            documents,
            encode,
            dtype=dtype,
            similarity="dot" if model.similarity_name == "dot" else "cosine",
            chunk_size=chunk_size or (there.chunk_size if there else 1024),
            store_texts=texts,
            **how,
        )


def _check_unchanged(
    folder: PathLike, there: Manifest | None, store: Dtype | None, texts: bool | None, chunk_size: int | None
) -> None:
    """Raises InputError when there is no index, or an option of the whole index is given and is another one there."""
    if there is None:
        raise InputError(f"{folder}: is no index yet, to which documents could be added")
    for name, asked, own in (
        ("store", store, there.dtype),
        ("texts", texts, there.store_texts),
        ("chunk_size", chunk_size, there.chunk_size),
    ):
        if asked is not None and asked != own:
            raise InputError(f"{folder}: {name} is {own!r} there, not {asked!r}; leave it out")


def _documents(corpus: Iterable[str | Mapping[str, Any] | Document]) -> Iterator[Document]:
    """The documents of a series, those with the same id and content once."""
    seen = SeenIds()
    for number, each in enumerate(corpus):
        found = _document(each, number)
        first, same = seen.first(found.id, found.content(), number)
        if not same:
            raise InputError(f"document {number}: id {found.id!r} is document {first} with different content")
        if first == number:
            yield found


def _document(each: str | Mapping[str, Any] | Document, number: int) -> Document:
    if isinstance(each, Document):
        return each
    if isinstance(each, str):
        return Document(str(number), each, numbered=True)
    if isinstance(each, Mapping):
        try:
            return document(DOCUMENT.of_object(each))
        except ValueError as error:
            raise InputError(f"document {number}: {error}") from None
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
    names = ("weights", "query_prompt", "document_prompt", "truncate_dim", "bidirectional")
    noted |= {name: source[name] for name in names if source.get(name) is not None}
    if adapter := source.get("adapter"):
        adapters = adapter if isinstance(adapter, list | tuple) else [adapter]
        noted["adapter"] = [_absolute(each) for each in adapters]
    return noted


def _absolute(source: Any) -> str:
    source = os.fspath(source)
    return os.path.abspath(source) if os.path.exists(source) else source
