"""What a step costs in time and memory: biases alone, everything, and the same step in torch."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.biases import add_zero_biases
from sgpt_jax.config import compute_dtype
from sgpt_jax.decoder import split
from sgpt_jax.io import InputError, write_json
from train.batches import BatchPlan, PackedBatches
from train.data import Example
from train.losses import LossConfig
from train.optimizer import make_optimizer, split_params, trainable_mask
from train.recipes import RECIPES, open_examples
from train.step import init_state, jit_step, make_step, place_batch

RATE = 1e-4


def add_speed_parser(commands: Any, formatter: type[argparse.HelpFormatter]) -> None:
    """Adds the subcommand `speed`."""
    text = "What a step costs: trains biases, then everything, in turn, on one batch, and prints seconds and memory."
    command = commands.add_parser(
        "speed", description=text, help=text.split(":")[0], formatter_class=formatter
    )
    command.add_argument(
        "--model", required=True, metavar="PATH", help="a folder, a hub id, or a .gguf file (required)"
    )
    command.add_argument("--data", required=True, metavar="PATH", help="as for the recipe (required)")
    command.add_argument(
        "--recipe", default="pairs", choices=list(RECIPES), help="how to read --data (default: pairs)"
    )
    command.add_argument("--output", metavar="FILE", help="also write the numbers to this JSON file")
    command.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="examples a step (default: 32)"
    )
    command.add_argument(
        "--chunk-size", type=int, default=0, metavar="N", help="rows at a time (default: 0, all)"
    )
    command.add_argument(
        "--max-seq-length", type=int, default=75, metavar="N", help="tokens of a text (default: 75)"
    )
    command.add_argument(
        "--dtype", default="float32", metavar="TEXT", help="float32 or bfloat16 (default: float32)"
    )
    command.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="timed steps of each (default: 5)"
    )
    command.add_argument(
        "--add-biases",
        action="store_true",
        help="give zero biases to all projections without one (default: off)",
    )
    command.add_argument(
        "--torch",
        action="store_true",
        help="also the bias-only step in torch, in float32 on the CPU (default: off)",
    )


def measure(
    model: str,
    data: str,
    recipe: str,
    output: str | None,
    batch_size: int,
    chunk_size: int,
    max_seq_length: int,
    dtype: str,
    rounds: int,
    add_biases: bool,
    torch: bool,
) -> None:
    """Runs the steps in turn, each on the same batch, and prints the median seconds of `rounds` after one warm-up.

    Memory is what the compiled step needs beside its arguments, and the size of the optimizer's moments.

    Raises:
        InputError: as in training.
    """
    config = dataclasses.replace(RECIPES[recipe][0], data=data, model=model)
    examples = open_examples(config)
    encoder = BiEncoder.from_pretrained(
        model, pooling="weightedmean", max_seq_length=max_seq_length, dtype=dtype
    )
    if add_biases:
        encoder = dataclasses.replace(encoder, decoder=add_zero_biases(encoder.decoder))
    plan = BatchPlan(examples, batch_size, seed=0, shuffle=True, no_duplicates=config.avoid_duplicates)
    batches = PackedBatches(
        plan, encoder.text, vocab_size=encoder.decoder.config.vocab_size, symmetric=True, steps=1
    )
    batch = batches[0]
    print(
        f"{batch_size} examples, {batch['tokens']:,} tokens in {len(batch['rows']['segments'])} packed rows"
    )
    results: dict[str, dict[str, float]] = {}
    steps: dict[str, Callable[[], float]] = {}
    for name in ("bias", "all"):
        steps[name], results[name] = _make_ours(encoder, batch, name, dtype, chunk_size)
    if torch:
        chosen = [examples.get(*plan.split(place)) for place in plan[0]]
        steps["torch bias"] = _make_torch(encoder, chosen)
        results["torch bias"] = {}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            loss = step()
            times[name].append(time.perf_counter() - start)
            if turn == 0:
                results[name]["first_loss"] = loss
    for name, values in times.items():
        results[name]["seconds"] = statistics.median(values[1:])
        print(f"{name:10}", ", ".join(f"{key} {value:,.3f}" for key, value in results[name].items()))
    if output:
        write_json(
            output, {"batch_size": batch_size, "tokens": batch["tokens"], "chunk_size": chunk_size} | results
        )


def _make_ours(
    encoder: BiEncoder, batch: dict, rule: str, dtype: str, chunk_size: int
) -> tuple[Callable[[], float], dict[str, float]]:
    """A step that goes on from its own state, and its memory in megabytes."""
    graphdef, params = split(encoder.decoder)
    params = jax.tree.map(jnp.copy, params)  # the step overwrites what it trains
    mask = trainable_mask(params, rule)
    trainable, frozen = split_params(params, mask)
    optimizer = make_optimizer(mask, lambda _: jnp.float32(RATE))
    state = init_state(trainable, optimizer, 0, None)
    step = make_step(
        graphdef,
        pooling=encoder.pooling,
        loss=LossConfig(),
        optimizer=optimizer,
        dtype=compute_dtype(dtype),
        chunk_rows=chunk_size,
        dropout=False,
    )
    rows = len(batch["rows"]["segments"])
    arrays = place_batch(batch, rows=rows, chunk_rows=chunk_size, pad_id=encoder.text.pad_id, mesh=None)
    compiled = jit_step(step, state, None).lower(state, frozen, arrays).compile()
    memory = compiled.memory_analysis()
    assert memory is not None  # every backend of XLA has it
    sizes = {"moments_mb": sum(leaf.nbytes for leaf in jax.tree.leaves(state.moments)) / 1e6}
    if memory is not None:  # not every backend says
        sizes["temporary_mb"] = memory.temp_size_in_bytes / 1e6
        sizes["arguments_mb"] = memory.argument_size_in_bytes / 1e6

    def run() -> float:
        nonlocal state
        state, loss, _ = compiled(state, frozen, arrays)
        return float(jax.block_until_ready((state, loss))[1])

    return run, sizes


def _make_torch(encoder: BiEncoder, examples: list[Example]) -> Callable[[], float]:
    """The bias-only step of a plain torch loop: columns padded to their longest text, as sentence-transformers does."""
    try:
        import torch
        from transformers import AutoModel
    except ImportError:
        raise InputError("--torch needs torch: pip install 'sgpt-jax[torch]'") from None
    with tempfile.TemporaryDirectory() as folder:
        encoder.save_pretrained(folder)
        model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bias" in name)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0)
    most = min(len(example.negatives) for example in examples)
    texts = [[e.query for e in examples], [e.positive for e in examples]]
    texts += [[e.negatives[place] for e in examples] for place in range(most)]
    columns = []
    for column in texts:
        ids = [torch.tensor(row) for row in encoder.text.ids(column)]
        pad = torch.nn.utils.rnn.pad_sequence
        columns.append(
            (pad(ids, batch_first=True), pad([torch.ones_like(row) for row in ids], batch_first=True))
        )

    def run() -> float:
        vectors = []
        for ids, mask in columns:
            weights = (mask * torch.arange(1, mask.shape[1] + 1))[..., None]
            hidden = model(ids, attention_mask=mask).last_hidden_state
            vectors.append(torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1))
        scores = 20 * vectors[0] @ torch.cat(vectors[1:]).T
        loss = torch.nn.functional.cross_entropy(scores, torch.arange(len(scores)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        return loss.item()

    return run
