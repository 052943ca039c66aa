"""How probable queries are after prompts with documents (SGPT-CE): tokens to log-probabilities, in packed batches."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from sgpt_jax.decoder.log_probs import score_tokens
from sgpt_jax.decoder.model import Decoder, split
from sgpt_jax.decoder.sharding import batch_sharding, num_shards
from sgpt_jax.packing.layout import BATCH_TOKENS, lay_out, plan_batches
from sgpt_jax.packing.shared import lay_out_targets, shared_rows
from sgpt_jax.reports import ScoreReport
from sgpt_jax.runtime.one_behind import one_behind
from sgpt_jax.runtime.platform import by_platform
from sgpt_jax.runtime.progress import Show, shared_progress
from sgpt_jax.text.encoder import TextEncoder, check_ids
from sgpt_jax.text.pairs import TokenPairs

# CPU: tokens of a batch. Small batches stay in the caches, and little of the last one is padding.
CPU_BATCH_TOKENS = 1024


def batch_budget(asked: int | None = None) -> int:
    """Padded tokens of pairs computed at a time: what is asked for, or what suits the device."""
    return by_platform(cpu=CPU_BATCH_TOKENS, accelerator=BATCH_TOKENS) if asked is None else asked


def log_probs_of_targets(
    decoder: Decoder,
    text: TextEncoder,
    tokens: TokenPairs,
    *,
    mesh: Mesh | None,
    batch_tokens: int | None = None,
    batch_size: int | None = None,
    report: ScoreReport | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The log-probability of every token of the queries, batch by batch.

    Args:
        decoder, text, mesh: of the cross-encoder.
        tokens: the pairs.
        batch_tokens, batch_size: see `CrossEncoder.predict`.
        report: the tokens that went through the decoder are added here.

    Yields:
        Of which of `tokens.pairs` each token is, int [n], and its log-probability, float64 [n]. Those of a pair come
        in the order of the query, and in one batch.

    Raises:
        InputError: for a token that the decoder does not have.
    """
    for ids in (tokens.contexts, tokens.queries):
        check_ids(ids, decoder.config.vocab_size)
    report = ScoreReport() if report is None else report
    return one_behind(
        _start(decoder, text, tokens, mesh, batch_budget(batch_tokens), batch_size, report), _fetch
    )


def sum_log_probs(
    batches: Iterator[tuple[np.ndarray, np.ndarray]],
    pairs: int,
    *,
    shown: int | None = None,
    show_progress: Show = None,
) -> np.ndarray:
    """The sum of the query's log-probabilities for each of so many pairs, float64 [P].

    Args:
        batches: from `log_probs_of_targets`.
        pairs: P.
        shown: progress counts so many pairs, the first ones; None counts all.
        show_progress: see `CrossEncoder.predict`.
    """
    sums = np.zeros(pairs)
    shown = pairs if shown is None else shown
    with shared_progress("scoring", "pair", shown, show_progress) as bar:
        for owners, log_probs in batches:
            np.add.at(sums, owners, log_probs)
            bar.update(int((np.unique(owners) < shown).sum()))
    return sums


def _start(
    decoder: Decoder,
    text: TextEncoder,
    tokens: TokenPairs,
    mesh: Mesh | None,
    batch_tokens: int,
    batch_size: int | None,
    report: ScoreReport,
) -> Iterator[tuple[np.ndarray, jax.Array]]:
    """Starts one batch after the other: of which pair each target is (-1 none), and the targets' log-probabilities."""
    pairs, contexts, queries = tokens.pairs, tokens.contexts, tokens.queries
    structure, params = split(decoder)
    shards = num_shards(mesh)
    sharding = jax.local_devices()[0] if mesh is None else batch_sharding(mesh)
    plans = plan_batches(
        shared_rows(pairs, list(map(len, contexts)), list(map(len, queries)), decoder.config),
        batch_tokens=batch_tokens,
        row_multiple=shards,
        batch_texts=batch_size,
    )
    read = [queries[query][:-1] for _, query in pairs]  # the last token is predicted, but not read
    for plan in plans:
        batch = lay_out(plan, read, text.pad_id, contexts)
        targets, owners = lay_out_targets(plan, pairs, contexts, queries, shards)
        report.tokens += int((batch.segments >= 0).sum())
        report.tokens_padded += plan.padded_tokens
        log_probs = score_tokens(structure, params, *jax.device_put((batch, targets), sharding), mesh=mesh)
        yield owners, log_probs


def _fetch(started: tuple[np.ndarray, jax.Array]) -> tuple[np.ndarray, np.ndarray]:
    """The targets' pairs and log-probabilities, [n] each, without what is no target."""
    owners, log_probs = started
    used = owners >= 0
    return owners[used], np.asarray(log_probs, np.float64)[used]


def count_pairs(tokens: TokenPairs, count: int) -> ScoreReport:
    """What the first `count` pairs are; the tokens are those of all."""
    used = [
        (tokens.pairs[index], length)
        for index, length in zip(tokens.indices, tokens.lengths, strict=True)
        if length
    ]
    return ScoreReport(
        pairs=count,
        tokens_alone=sum(len(tokens.contexts[context]) + int(length) - 1 for (context, _), length in used),
        documents_cut=int(tokens.documents_cut[:count].sum()),
        queries_cut=int(tokens.queries_cut[:count].sum()),
        queries_empty=int((tokens.lengths[:count] == 0).sum()),
    )
