"""The command `sgpt index`: building an index, and changing it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from sgpt_jax.bi_encoder import BI_ENCODER_SETTINGS, BiEncoder
from sgpt_jax.cli.given import flags_given, given, reading_of, refuse_reading
from sgpt_jax.corpus_index import index_corpus
from sgpt_jax.decoder.sharding import device_mesh
from sgpt_jax.errors import InputError
from sgpt_jax.files.corpora import Document, read_corpus, read_ids
from sgpt_jax.files.counted import CountedCorpus, Reading, count_corpus, forget_counts
from sgpt_jax.files.hub_tables import is_hub
from sgpt_jax.files.lines import ReadReport
from sgpt_jax.index.change import compact_index, remove_documents
from sgpt_jax.index.files import MANIFEST, Manifest
from sgpt_jax.index.search import Index
from sgpt_jax.reports import EncodeReport
from sgpt_jax.runtime import processes
from sgpt_jax.runtime.command import printable
from sgpt_jax.runtime.memory import peak_memory
from sgpt_jax.runtime.progress import progress


def index(options: argparse.Namespace) -> None:
    """Builds an index, goes on with it, or changes it."""
    asked = [name for name in ("add", "remove", "compact") if vars(options)[name]]
    if len(asked) > 1:
        raise InputError(f"--{asked[0]} and --{asked[1]} are two commands: give one after the other")
    if bool(options.corpus) == (asked in (["remove"], ["compact"])):
        raise InputError("give a corpus to index or to --add; --remove and --compact take none")
    unused = flags_given(options, ("store", "chunk_size", *BI_ENCODER_SETTINGS, "mesh"))
    unused += ["--no-texts"] * options.no_texts
    if unused and not options.corpus:
        raise InputError(f"{', '.join(unused)}: not for --{asked[0]}, which encodes nothing")
    if not options.corpus and not any(id.startswith("@") for id in options.remove or ()):
        refuse_reading(options)
    if asked == ["remove"]:
        _remove(options)
    elif asked == ["compact"]:
        _compact(options)
    else:
        _encode_index(options)


def _remove(options: argparse.Namespace) -> None:
    removed, unknown = remove_documents(options.output, _ids(options))
    known = "" if not unknown else f"; {len(unknown)} ids are not in the index, such as {unknown[0]!r}"
    print(
        printable(
            f"{options.output}: {removed} documents removed, {len(Index.open(options.output))} left{known}"
        )
    )


def _ids(options: argparse.Namespace) -> Iterator[str]:
    """The ids that --remove gives, those of files among them."""
    for given_id in options.remove:
        if given_id.startswith("@"):
            yield from read_ids(given_id[1:], **reading_of(options))
        else:
            yield given_id


def _compact(options: argparse.Namespace) -> None:
    before = Index.open(options.output)
    documents, size = len(before), before.info()["bytes"] / 1e6
    del before  # what is open is not removed
    with progress("compacting", "doc", documents) as bar:
        after = compact_index(options.output, lambda rows: bar.update(rows - bar.n))
    now = after.info()["bytes"] / 1e6
    print(f"{options.output}: {len(after)} documents, {size:.1f} MB before and {now:.1f} MB now")


def _encode_index(options: argparse.Namespace) -> None:
    """Encodes a corpus, or what an index lacks of it."""
    there = (
        Manifest.load(Path(options.output))
        if os.path.exists(os.path.join(options.output, MANIFEST))
        else None
    )
    # What is not given is as in the index, if there is one.
    settings = vars(options) if there is None else given(there.metadata, options)
    settings = {"dtype": "float32"} | {key: value for key, value in settings.items() if value is not None}
    if "model" not in settings:
        raise InputError("give the --model that embeds")
    model = BiEncoder.from_settings(settings, device_mesh(options.mesh))
    corpus, read = _corpus(options)
    report = EncodeReport()
    try:
        index = index_corpus(
            options.output,
            corpus,
            model,
            store=options.store,
            texts=False if options.no_texts else None,
            chunk_size=options.chunk_size,
            add=options.add,
            report=report,
        )
    except InputError:
        if isinstance(corpus, CountedCorpus) and processes.count() == 1:  # others may still need it
            corpus.forget()
        raise
    work = _describe_work(report)
    if processes.first():
        forget_counts(_notes(options))
        size = index.info()["bytes"] / 1e6
        replaced = f", {_gone(index.manifest) - _gone(there)} replaced" if options.add and there else ""
        print(f"{options.output}: {len(index)} documents, {size:.1f} MB ({read}{replaced})\n{work}")


def _gone(manifest: Manifest) -> int:
    """How many rows are of documents that were removed or replaced."""
    return manifest.removed["rows"] if manifest.removed else 0


def _corpus(options: argparse.Namespace) -> tuple[CountedCorpus | Iterator[Document], ReadReport]:
    """The corpus, by row where it need not pass by in one go; and what was met in it."""
    reading = reading_of(options)
    # A data set of the hub can do either: streamed, nothing of it is kept on disk.
    either = processes.count() == 1 and len(options.corpus) == 1
    streams = [path for path in options.corpus if path == "-" or "://" in path or (either and is_hub(path))]
    if streams:
        if len(options.corpus) > 1:
            raise InputError(f"{streams[0]}: passes by once, and can only be the whole corpus")
        return read_corpus(options.corpus[0], **reading), reading["report"]
    del reading["report"]
    counted = count_corpus(options.corpus, _notes(options), Reading(**reading))
    return counted, counted.report


def _notes(options: argparse.Namespace) -> str:
    return os.path.abspath(options.output) + ".counting"


def _describe_work(report: EncodeReport) -> str:
    """What encoding took, of all processes together."""
    ours = [report.texts, report.tokens, report.seconds, report.waited, peak_memory(), report.cut]
    texts, tokens, seconds, waited, peak, cut = zip(*processes.gather(ours), strict=True)
    if not sum(texts):
        return "nothing was left to encode"
    took = max(seconds)
    parts = [f"{sum(texts)} encoded"]
    if sum(cut):
        parts.append(f"{sum(cut)} of them cut as they were too long")
    text = ", ".join(parts) + f" in {took:.1f} s"
    if processes.count() > 1:
        text += f", {processes.count()} processes"
    return (
        f"{text}: {sum(texts) / took:,.0f} documents/s, {sum(tokens) / took:,.0f} tokens/s; "
        f"{sum(waited) / sum(seconds):.1%} of the time spent waiting for the tokenizer; "
        f"peak memory {max(peak) / 1e6:,.0f} MB"
    )
