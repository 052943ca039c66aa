"""Query log-probabilities of pairs: this project with and without sharing, and torch one by one and in batches.

The pairs are whole documents of a re-ranking job: of documents drawn from BM25's first hits, every query that has them
there, as the job itself would meet them.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.bm25 import Bm25
from sgpt_jax.checkpoint.export import export_folder
from sgpt_jax.cross_encoder import CrossEncoder
from sgpt_jax.decoder.batch import Batch, Targets
from sgpt_jax.decoder.build import Build
from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.decoder.flops import forward_flops
from sgpt_jax.decoder.log_probs import score_tokens
from sgpt_jax.decoder.model import abstract_decoder, merge
from sgpt_jax.errors import InputError
from sgpt_jax.files.beir import DataSet
from sgpt_jax.query_scoring import log_probs_of_targets, sum_log_probs
from sgpt_jax.reports import ScoreReport
from sgpt_jax.text.encoder import TextEncoder
from sgpt_jax.text.pairs import DEFAULT_PROMPT, Prompt, TokenPairs, tokenise_pairs

from .benchmark import Benchmark, Run
from .models import Torch

Pairs = list[tuple[str, str]]

DEPTH = 100
TORCH_BATCH_TOKENS = 2048  # torch's time a token on a CPU is the same for 512 to 4096
MEMORY_LENGTH = 2048


def score_benchmark(
    bi_encoder: BiEncoder, limit: int, data: DataSet, count: int, *, alone: bool
) -> Benchmark:
    """All runs that score the same pairs with a model's weights, from texts to numbers on the host.

    "torch, one by one" is the SGPT repository's sgptce.py: one pair at a time, logits of every token. "torch, batches"
    has pairs of like length together, and the head at the query's tokens only.

    Args:
        bi_encoder: has decoder and tokenizer.
        limit: tokens of a pair that are read.
        data: has the texts.
        count: pairs.
        alone: leave the peers out.
    """
    text = TextEncoder(bi_encoder.text.tokenizer, limit)
    model = CrossEncoder(bi_encoder.decoder, text, Prompt.parse(DEFAULT_PROMPT))
    pairs = sample_pairs(data, DEPTH, count)
    rows = _rows(model, pairs)
    lengths = [len(context) + len(asked) - 1 for context, asked in rows]
    flops = sum(forward_flops(model.decoder.config, lengths, logits=sum(len(asked) for _, asked in rows)))

    def ours() -> np.ndarray:
        report = ScoreReport()
        scores = model.predict(pairs, show_progress=False, report=report)
        benchmark.flops["ours"] = flops * report.tokens / report.tokens_alone
        benchmark.facts["tokens"] = {
            "alone": report.tokens_alone,
            "shared": report.tokens,
            "shared_padded": report.tokens_padded,
        }
        return scores

    benchmark = Benchmark(
        work={"pairs": len(pairs), "tokens": sum(lengths)},
        unit="pairs",
        runs={
            "ours": ours,
            "ours, pairs alone": lambda: _without_sharing(model, pairs),
        },
        flops={"": flops},
        dtype=model.decoder.dtype.name,
        compare=_differences,
        facts={
            "documents": len({document for _, document in pairs}),
            "compiled_memory_mib": memory(model.decoder.config),
        },
    )
    if alone:
        return benchmark
    try:
        torch = Torch(model.decoder.dtype.name)
        benchmark.runs |= _in_torch(torch, model, bi_encoder.hf_config, pairs)
        benchmark.facts |= torch.facts()
    except ModuleNotFoundError as error:
        benchmark.left_out["torch"] = f"{error.name} is not installed"
    except InputError as error:  # transformers has no such model
        benchmark.left_out["torch"] = str(error)
    return benchmark


def sample_pairs(data: DataSet, depth: int, count: int) -> Pairs:
    """`count` pairs: of randomly drawn documents all queries that have them among BM25's first `depth`."""
    run = Bm25(data.documents()).search(data.queries, depth)
    asking: dict[str, list[str]] = {}
    for query, hits in run.items():
        for document in hits:
            asking.setdefault(document, []).append(query)
    texts = {document.id: document.text for document in data.documents() if document.id in asking}
    order = np.random.RandomState(0).permutation(sorted(asking)).tolist()
    pairs = [(data.queries[query], texts[document]) for document in order for query in asking[document]]
    return pairs[:count]


def _tokens(model: CrossEncoder, pairs: Pairs) -> TokenPairs:
    queries, documents = zip(*pairs, strict=True)
    assert model.prompt is not None
    return tokenise_pairs(model.text, model.prompt, queries, documents, show_progress=False)


def _without_sharing(model: CrossEncoder, pairs: Pairs) -> np.ndarray:
    """Scores where each pair has a context, and so a row, of its own."""
    tokens = _tokens(model, pairs)
    alone = dataclasses.replace(
        tokens,
        contexts=[tokens.contexts[context] for context, _ in tokens.pairs],
        pairs=[(index, query) for index, (_, query) in enumerate(tokens.pairs)],
    )
    return sum_log_probs(
        log_probs_of_targets(model.decoder, model.text, alone, mesh=None),
        len(alone.pairs),
        show_progress=False,
    )[tokens.indices].astype(np.float32)


def _rows(model: CrossEncoder, pairs: Pairs) -> list[tuple[list[int], list[int]]]:
    """Ids of the prompt with the document, and of the query, for every pair."""
    tokens = _tokens(model, pairs)
    chosen = (tokens.pairs[index] for index in tokens.indices)
    return [(tokens.contexts[context], tokens.queries[query]) for context, query in chosen]


def _in_torch(torch: Torch, model: CrossEncoder, hf: Mapping[str, Any], pairs: Pairs) -> dict[str, Run]:
    t = torch.torch
    with tempfile.TemporaryDirectory() as folder:
        export_folder(model.decoder, hf, folder)
        net = torch.load("AutoModelForCausalLM", folder)
    backbone, head = net.base_model, net.get_output_embeddings()

    @t.inference_mode()
    def one_by_one() -> np.ndarray:
        scores = []
        for pair in pairs:
            ((context, asked),) = _rows(model, [pair])
            ids = t.tensor([context + asked], device=torch.device)
            logits = net(input_ids=ids[:, :-1], use_cache=False).logits
            log_probs = t.log_softmax(logits.float(), dim=-1)[0, -len(asked) :]
            scores.append(log_probs.gather(1, ids[0, -len(asked) :, None]).sum().item())
        return np.array(scores, np.float32)

    @t.inference_mode()
    def batched() -> np.ndarray:
        rows = _rows(model, pairs)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
        scores = np.zeros(len(rows), np.float32)
        while order:
            longest = sum(map(len, rows[order[0]])) - 1
            size = max(1, TORCH_BATCH_TOKENS // longest)
            batch, order = order[:size], order[size:]
            ids = t.zeros(len(batch), longest, dtype=t.long)
            mask = t.zeros_like(ids)
            where, targets = [], []
            for line, i in enumerate(batch):
                context, asked = rows[i]
                used = len(context) + len(asked) - 1
                ids[line, :used] = t.tensor((context + asked)[:-1])
                mask[line, :used] = 1
                where += [(line, len(context) - 1 + j) for j in range(len(asked))]
                targets += asked
            ids, mask, lines_places = (x.to(torch.device) for x in (ids, mask, t.tensor(where).T))
            hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            lines, places = lines_places
            log_probs = t.log_softmax(head(hidden[lines, places]).float(), dim=-1)
            found = log_probs.gather(1, t.tensor(targets, device=torch.device)[:, None])[:, 0]
            sums = t.zeros(len(batch), device=torch.device).index_add(0, lines, found)
            scores[batch] = sums.cpu().numpy()
        return scores

    return {"torch, one by one": one_by_one, "torch, batches": batched}


def _differences(found: Mapping[str, Any]) -> dict[str, Any]:
    ours = found["ours"]
    return {
        f"largest relative difference from {name}": float(np.max(np.abs(scores - ours) / np.abs(ours)))
        for name, scores in found.items()
        if name != "ours" and scores is not None
    }


def memory(config: DecoderConfig) -> dict[str, float]:
    """What compiled programs take beside weights, inputs and results for one long row of float32, in MiB.

    `scores` is this project's program, `hidden_states` its decoder alone, and `all_logits` what scoring takes when the
    head runs at every token. `logits_float32`, for comparison, is [1, T, V] itself, with T 2,048 or the model's limit.
    """
    length = min(MEMORY_LENGTH, config.max_positions or MEMORY_LENGTH)
    structure, params = abstract_decoder(config, Build(jnp.dtype("float32")))
    array = jax.ShapeDtypeStruct((1, length), jnp.int32)
    batch = Batch(array, array, array)

    def hidden_states(params: Any, batch: Batch) -> jax.Array:
        decoder = merge(structure, params)
        return decoder(batch.input_ids, positions=batch.positions, segments=batch.segments)

    def all_logits(params: Any, batch: Batch, targets: jax.Array) -> jax.Array:
        logits = merge(structure, params).logits(hidden_states(params, batch))
        return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)

    lowered = {
        "scores": score_tokens.lower(structure, params, batch, Targets(array, array), mesh=None),
        "hidden_states": jax.jit(hidden_states).lower(params, batch),
        "all_logits": jax.jit(all_logits).lower(params, batch, array),
    }
    found = {"logits_float32": 4 * length * config.vocab_size / 2**20}
    for name, program in lowered.items():
        if needs := program.compile().memory_analysis():  # not every backend says
            found[name] = needs.temp_size_in_bytes / 2**20
    return {name: round(size, 1) for name, size in found.items()}
