"""A training step on one batch: biases alone, also over int8 weights, everything, and biases alone in torch."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.checkpoint.bias_sets import add_zero_biases, bias_leaves
from sgpt_jax.decoder.flops import training_flops
from sgpt_jax.decoder.model import split
from sgpt_jax.errors import InputError
from sgpt_jax.files.beir import DataSet

from ..training import (
    BatchPlan,
    Example,
    ListExamples,
    LossConfig,
    PackedBatches,
    init_state,
    jit_step,
    make_optimizer,
    make_step,
    place_batch,
    split_params,
    trainable_mask,
)
from .benchmark import Benchmark
from .models import INT8, Torch, exported, pooled

RATE = 1e-4


def train_benchmark(
    model: BiEncoder, data: DataSet, batch_size: int, *, int8: BiEncoder | None = None, alone: bool = False
) -> Benchmark:
    """All runs of a step on the same batch of triplets; a model without biases is given zero ones.

    Each goes on from its own state. Ours is a batch of packed rows; torch pads each column (queries, positives,
    negatives) to its longest text, as sentence-transformers does.

    Args:
        model: the model.
        data: where the triplets come from.
        batch_size: triplets a step.
        int8: the model over int8 weights, whose step is measured in place of the one that trains everything.
        alone: leave the peers out.
    """
    model, int8 = _with_biases(model), int8 and _with_biases(int8)
    examples = triplets(data, batch_size)
    plan = BatchPlan(ListExamples(examples), batch_size, seed=0, shuffle=False, no_duplicates=False)
    config = model.decoder.config
    batch = PackedBatches(plan, model.text, vocab_size=config.vocab_size, symmetric=True, steps=1)[0]
    texts = [text for e in examples for text in (e.query, e.positive, *e.negatives)]
    lengths = [len(row) for row in model.text.ids(texts, show_progress=False)]
    benchmark = Benchmark(
        work={"examples": batch_size, "tokens": sum(lengths)},
        unit="tokens",
        runs={},
        flops={
            "": training_flops(config, lengths, biases_only=True),
            "ours, all weights": training_flops(config, lengths, biases_only=False),
        },
        dtype=model.decoder.dtype.name,
        compare=_first_losses,
    )
    benchmark.facts["compiled_memory_mb"] = {}
    other = ("ours, all weights", model, "all") if int8 is None else (INT8, int8, "bias")
    for name, trained, rule in (("ours", model, "bias"), other):
        benchmark.runs[name], benchmark.facts["compiled_memory_mb"][name] = _ours(trained, batch, rule)
    if alone:
        return benchmark
    try:
        torch = Torch(model.decoder.dtype.name)
        benchmark.runs["torch"] = _in_torch(torch, model, examples)
        benchmark.facts |= torch.facts()
        benchmark.runs["sentence-transformers"] = _by_trainer(torch, model, examples)
    except ModuleNotFoundError as error:
        name = "sentence-transformers" if "torch" in benchmark.runs else "torch"
        benchmark.left_out[name] = f"{error.name} is not installed"
    except InputError as error:  # transformers has no such biases
        benchmark.left_out["torch"] = str(error)
    return benchmark


def _with_biases(model: BiEncoder) -> BiEncoder:
    if bias_leaves(split(model.decoder)[1]):
        return model
    return dataclasses.replace(model, decoder=add_zero_biases(model.decoder))


def triplets(data: DataSet, count: int) -> list[Example]:
    """Judged queries with a relevant document each, no document twice, and as the negative one relevant to no query.

    Raises:
        InputError: there are fewer.
    """
    relevant = {
        query: next((document for document, grade in judged.items() if grade > 0), None)
        for query, judged in data.qrels.items()
        if query in data.queries
    }
    judged = {document for grades in data.qrels.values() for document in grades}
    positives: dict[str, str] = {}
    negatives: list[str] = []
    for document in data.documents():
        if document.id in judged:
            positives[document.id] = document.text
        elif len(negatives) < count:
            negatives.append(document.text)
    # A document that two queries share would be masked here, and pushed away from one of them in plain torch.
    pairs = {document: query for query, document in relevant.items() if document in positives}
    if min(len(pairs), len(negatives)) < count:
        raise InputError(f"{data.folder}: too few queries and documents for a batch of {count}")
    return [
        Example(data.queries[query], positives[document], (negative,))
        for (document, query), negative in zip(list(pairs.items())[:count], negatives, strict=True)
    ]


def _ours(model: BiEncoder, batch: dict, rule: str) -> tuple[Callable[[], float], dict[str, float]]:
    """The step and its memory in megabytes: the compiled program's, and the optimizer's moments."""
    structure, params = split(model.decoder)
    params = jax.tree.map(jnp.copy, params)  # the step overwrites what it trains
    mask = trainable_mask(params, rule)
    trainable, frozen = split_params(params, mask)
    optimizer = make_optimizer(mask, lambda _: jnp.float32(RATE))
    state = init_state(trainable, optimizer, 0, None)
    step = make_step(
        structure,
        pooling=model.pooling,
        loss=LossConfig(),
        optimizer=optimizer,
        dtype=model.decoder.dtype,
        chunk_rows=0,
        dropout=False,
    )
    rows = len(batch["rows"].segments)
    arrays = place_batch(batch, rows=rows, chunk_rows=0, pad_id=model.text.pad_id, mesh=None)
    jitted = jit_step(step, structure, state, None)
    sizes = {"moments": sum(leaf.nbytes for leaf in jax.tree.leaves(state.moments)) / 1e6}
    compiled = None

    def run() -> float:
        nonlocal state, compiled
        if compiled is None:
            compiled = jitted.lower(state, frozen, arrays).compile()
            if needs := compiled.memory_analysis():  # not every backend says
                sizes["temporary"] = needs.temp_size_in_bytes / 1e6
                sizes["arguments"] = needs.argument_size_in_bytes / 1e6
        state, loss, _ = compiled(state, frozen, arrays)
        return float(jax.block_until_ready((state, loss))[1])

    return run, sizes


def _in_torch(torch: Torch, model: BiEncoder, examples: list[Example]) -> Callable[[], float]:
    t = torch.torch
    with exported(model) as folder:
        net = torch.load("AutoModel", folder)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("bias" in name)
    trainable = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = t.optim.AdamW(trainable, lr=RATE, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0)
    columns = []
    for texts in zip(*((e.query, e.positive, *e.negatives) for e in examples), strict=True):
        ids = [t.tensor(row) for row in model.text.ids(list(texts), show_progress=False)]
        padded = t.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        sizes = t.tensor([len(row) for row in ids])
        mask = (t.arange(padded.shape[1]) < sizes[:, None]).long()
        columns.append((padded.to(torch.device), mask.to(torch.device)))

    def run() -> float:
        vectors = []
        for ids, mask in columns:
            hidden = net(ids, attention_mask=mask, use_cache=False).last_hidden_state.float()
            vectors.append(t.nn.functional.normalize(pooled(t, hidden, mask, model.pooling), dim=-1))
        scores = 20 * vectors[0] @ t.cat(vectors[1:]).T
        loss = t.nn.functional.cross_entropy(scores, t.arange(len(scores), device=scores.device))
        optimizer.zero_grad()
        loss.backward()
        t.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        return loss.item()

    return run


def _by_trainer(torch: Torch, model: BiEncoder, examples: list[Example]) -> Callable[[], float]:
    """A step of the trainer that sentence-transformers has, tokenising included: each of its epochs is this batch."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers import TrainerCallback

    begin, end = threading.Semaphore(0), threading.Semaphore(0)
    losses: list[Any] = []

    class OneByOne(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            begin.acquire()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            end.release()

    with exported(model) as folder:
        net = torch.best_attention(
            lambda attention: SentenceTransformer(
                folder,
                device=torch.device,
                model_kwargs={"dtype": torch.dtype, "attn_implementation": attention},
            )
        )
        net.max_seq_length = model.text.max_seq_length
        for name, parameter in net.named_parameters():
            parameter.requires_grad_("bias" in name)
        loss = MultipleNegativesRankingLoss(net)
        loss.register_forward_hook(lambda _, __, value: losses.append(value.detach()))
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=len(examples),
            max_steps=1_000_000,
            learning_rate=RATE,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=torch.device == "cpu",
        )
        columns = {
            "anchor": [e.query for e in examples],
            "positive": [e.positive for e in examples],
            "negative": [e.negatives[0] for e in examples],
        }
        trainer = SentenceTransformerTrainer(
            model=net,
            args=arguments,
            train_dataset=Dataset.from_dict(columns),
            loss=loss,
            callbacks=[OneByOne()],
        )

    def train() -> None:
        try:
            trainer.train()
        except Exception as error:
            losses.append(error)
            end.release()

    threading.Thread(target=train, daemon=True).start()

    def run() -> float:
        begin.release()
        end.acquire()
        if isinstance(losses[-1], Exception):
            raise losses[-1]
        return float(losses[-1])

    return run


def _first_losses(found: Mapping[str, Any]) -> dict[str, Any]:
    """All begin with the same weights."""
    return {f"first loss of {name}": loss for name, loss in found.items() if loss is not None}
