"""Pairs per second of the cross-encoder beside torch, and the memory that its program takes.

Four ways score the same pairs with the same weights in float32, in turns, in this one process:

  ours           sgpt_jax.CrossEncoder, queries of a document sharing its pass
  ours-alone     the same with every pair in a row of its own
  torch-loop     transformers, one pair at a time, logits of every token, as the SGPT repository's sgptce.py does
  torch-batched  transformers, batches of pairs of like length, the head at the query's tokens only

On a machine that does other work too, set OMP_WAIT_POLICY=passive: torch's threads otherwise wait for each other by
spinning, which can make torch several times slower than it is.

Every way starts from texts. The pairs are whole documents of a re-ranking job: of documents drawn from BM25's first
hits, every query that has them there, as the job itself would meet them.

  python -m eval.score_speed --model MODEL.gguf --output OUT.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from eval import bm25
from eval.data import DataSet
from eval.models import positive
from eval.record import circumstances
from sgpt_jax import hub
from sgpt_jax.config import DecoderConfig
from sgpt_jax.cross_encoder import CrossEncoder, ScoreReport
from sgpt_jax.decoder import abstract_decoder, merge
from sgpt_jax.io import InputError, write_json
from sgpt_jax.log_probs import HEAD_ENTRIES, HEAD_POSITIONS, score_tokens
from sgpt_jax.prompts import tokenise_pairs
from sgpt_jax.tensor_files import open_checkpoint
from sgpt_jax.weights import export_folder

Pairs = list[tuple[str, str]]
Way = Callable[[Pairs], np.ndarray]

TORCH_BATCH_TOKENS = 2048  # torch's time a token is the same for 512 to 4096

# GPT-Neo 125M's sizes, without its windows.
MEMORY_CONFIG = DecoderConfig(
    vocab_size=50_257,
    embed_dim=768,
    num_layers=12,
    num_heads=12,
    num_kv_heads=12,
    head_dim=64,
    mlp_dim=3072,
    max_positions=2048,
    positions="learned",
    mlp_bias=True,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this program."""
    parser.add_argument("--model", required=True, help="model folder, hub id, or .gguf file")
    parser.add_argument("--data", required=True, help="a BEIR folder, such as $SGPT_DATA/scifact")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON")
    parser.add_argument("--pairs", type=positive, default=200, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--depth", type=positive, default=100, metavar="N", help="BM25 hits a query (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds",
        type=positive,
        default=5,
        metavar="N",
        help="timed turns of each way (default: %(default)s)",
    )
    parser.add_argument("--memory-only", action="store_true", help="measure no speed")


def main(args: argparse.Namespace) -> None:
    """Measures, prints and writes."""
    result: dict[str, Any] = {"memory": memory()}
    print("compiled memory beyond weights, MiB:", result["memory"])
    if not args.memory_only:
        result["speed"] = speed(args)
    made = circumstances("torch")
    made["command"] = made["command"].replace("-m eval ", "-m eval.score_speed ", 1)
    write_json(args.output, result | made)


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Pairs per second of the four ways."""
    import torch

    pairs = sample_pairs(DataSet("", epath.Path(args.data), "test").load(), args.depth, args.pairs)
    model = CrossEncoder.from_pretrained(args.model)
    report = ScoreReport()
    ways: dict[str, Way] = {
        "ours": lambda pairs: model.predict(pairs, show_progress=False),
        "ours-alone": lambda pairs: model.predict(pairs, share=False, show_progress=False),
        **torch_ways(model, args.model),
    }
    first: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    scores: dict[str, np.ndarray] = {}
    for turn in range(args.rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            scores[name] = way(pairs)
            taken = time.perf_counter() - start
            if turn:
                seconds[name].append(taken)
            else:  # compiling included
                first[name] = taken
            print(f"round {turn}: {name:14} {taken:8.2f} s, {len(pairs) / taken:7.2f} pairs/s", flush=True)
    model.predict(pairs, show_progress=False, report=report)
    rates = {name: len(pairs) / statistics.median(taken) for name, taken in seconds.items()}
    scale = np.abs(scores["torch-loop"])
    return {
        "pairs": len(pairs),
        "documents": len({document for _, document in pairs}),
        "pairs_per_second": rates,
        "ours_over": {name: rates["ours"] / rate for name, rate in rates.items()},
        "alone_over": {name: rates["ours-alone"] / rate for name, rate in rates.items()},
        "seconds": seconds,
        "seconds_first": first,
        "relative_difference_from_torch_loop": {
            name: float(np.max(np.abs(found - scores["torch-loop"]) / scale))
            for name, found in scores.items()
        },
        "tokens": {
            "alone": report.tokens_alone,
            "shared": report.tokens,
            "shared_padded": report.tokens_padded,
        },
        "torch": {"threads": torch.get_num_threads(), "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY")},
        "load_average": os.getloadavg(),
        "dtype": "float32",
    }


def sample_pairs(data: DataSet, depth: int, count: int) -> Pairs:
    """`count` pairs: of randomly drawn documents all queries that have them among BM25's first `depth`."""
    run = bm25.search(data.queries, data.documents(), depth)
    asking: dict[str, list[str]] = {}
    for query, hits in run.items():
        for document in hits:
            asking.setdefault(document, []).append(query)
    texts = {document.id: document.text for document in data.documents() if document.id in asking}
    order = np.random.RandomState(0).permutation(sorted(asking)).tolist()
    pairs = [(data.queries[query], texts[document]) for document in order for query in asking[document]]
    return pairs[:count]


def torch_ways(model: CrossEncoder, source: str) -> dict[str, Way]:
    """The two scorers in torch, with the model's own weights and its rules for tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        export_folder(model.decoder, open_checkpoint(hub.resolve(source).path).config, folder)
        net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    backbone, head = net.get_decoder(), net.get_output_embeddings()

    @torch.inference_mode()
    def loop(pairs: Pairs) -> np.ndarray:
        scores = []
        for query, document in pairs:
            tokens = tokenise_pairs(model.text, model.prompt, [query], [document], show_progress=False)
            context, asked = tokens.contexts[0], tokens.queries[0]
            ids = torch.tensor([context + asked])
            logits = net(input_ids=ids[:, :-1], use_cache=False).logits
            log_probs = torch.log_softmax(logits.float(), dim=-1)[0, -len(asked) :]
            scores.append(log_probs.gather(1, ids[0, -len(asked) :, None]).sum().item())
        return np.array(scores, np.float32)

    @torch.inference_mode()
    def batched(pairs: Pairs) -> np.ndarray:
        queries, documents = zip(*pairs, strict=True)
        tokens = tokenise_pairs(model.text, model.prompt, queries, documents, show_progress=False)
        rows = [
            (tokens.contexts[c], tokens.queries[q])
            for c, q in (tokens.pairs[place] for place in tokens.places)
        ]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
        scores = np.zeros(len(rows), np.float32)
        while order:
            longest = sum(map(len, rows[order[0]])) - 1
            size = max(1, TORCH_BATCH_TOKENS // longest)
            batch, order = order[:size], order[size:]
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            where, targets = [], []
            for line, i in enumerate(batch):
                context, asked = rows[i]
                used = len(context) + len(asked) - 1
                ids[line, :used] = torch.tensor((context + asked)[:-1])
                mask[line, :used] = 1
                where += [(line, len(context) - 1 + j) for j in range(len(asked))]
                targets += asked
            hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            lines, places = torch.tensor(where).T
            log_probs = torch.log_softmax(head(hidden[lines, places]).float(), dim=-1)
            found = log_probs.gather(1, torch.tensor(targets)[:, None])[:, 0]
            scores[batch] = torch.zeros(len(batch)).index_add(0, lines, found).numpy()
        return scores

    return {"torch-loop": loop, "torch-batched": batched}


def memory() -> dict[str, Any]:
    """What compiled programs take beside weights, inputs and results for [1, 2048] tokens, in MiB.

    `scores` is this project's program, `hidden_states` its decoder alone, and `all_logits` what scoring takes when the
    head runs at every token. For comparison, float32 [1, 2048, 50257] itself.
    """
    length = 2048
    graphdef, params = abstract_decoder(MEMORY_CONFIG, jnp.dtype("float32"))
    array = jax.ShapeDtypeStruct((1, length), jnp.int32)
    count = jax.ShapeDtypeStruct((), jnp.int32)

    def hidden_states(params: Any, ids: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
        return merge(graphdef, params)(ids, segments >= 0, positions=positions, segments=segments)

    def all_logits(
        params: Any, ids: jax.Array, positions: jax.Array, segments: jax.Array, targets: jax.Array
    ) -> jax.Array:
        logits = merge(graphdef, params).logits(hidden_states(params, ids, positions, segments))
        return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)

    positions = HEAD_POSITIONS.get(jax.default_backend(), 2048)
    blocks = {"positions_block": positions, "entries_block": HEAD_ENTRIES, "mesh": None}
    lowered = {
        "scores": score_tokens.lower(graphdef, params, *[array] * 5, count, **blocks),
        "hidden_states": jax.jit(hidden_states).lower(params, *[array] * 3),
        "all_logits": jax.jit(all_logits).lower(params, *[array] * 4),
    }
    found = {}
    for name, program in lowered.items():
        needs = program.compile().memory_analysis()
        assert needs is not None
        found[name] = needs.temp_size_in_bytes / 2**20
    logits = 4 * length * MEMORY_CONFIG.vocab_size / 2**20
    return {name: round(size, 1) for name, size in (found | {"logits_float32": logits}).items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m eval.score_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    try:
        main(parser.parse_args())
    except InputError as error:
        sys.exit(f"error: {error}")
