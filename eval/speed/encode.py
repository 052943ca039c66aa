"""Texts to vectors: this project, sentence-transformers, and a plain loop over a transformers model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.decoder.flops import forward_flops
from sgpt_jax.decoder.modules import Normalize
from sgpt_jax.errors import InputError

from .benchmark import Benchmark
from .models import INT8, Torch, exported, pooled

# The default of sentence-transformers' `encode`.
BATCH_ROWS = 32


def encode_benchmark(
    model: BiEncoder, texts: list[str], *, int8: BiEncoder | None = None, alone: bool = False
) -> Benchmark:
    """All runs that encode `texts` with the model's weights, in its dtype, from str to float32 on the host.

    Args:
        model: the model.
        texts: the texts.
        int8: the model over int8 weights, to be measured too.
        alone: leave the peers out.
    """
    lengths = [len(row) for row in model.text.ids(texts, show_progress=False)]
    dtype = model.decoder.dtype.name
    benchmark = Benchmark(
        work={"texts": len(texts), "tokens": sum(lengths)},
        unit="tokens",
        runs={"ours": lambda: model.encode(texts, show_progress=False)},
        flops={"": sum(forward_flops(model.decoder.config, lengths))},
        dtype=dtype,
        compare=_differences,
    )
    if int8 is not None:
        benchmark.runs[INT8] = lambda: int8.encode(texts, show_progress=False)
    if alone:
        return benchmark
    peers = {"torch": _plain, "sentence-transformers": _sentence_transformers}
    try:
        torch = Torch(dtype)
        with exported(model) as folder:
            for name, make in peers.items():
                try:
                    benchmark.runs[name] = make(torch, model, folder, texts)
                except ModuleNotFoundError as error:
                    benchmark.left_out[name] = f"{error.name} is not installed"
        benchmark.facts |= torch.facts()
    except ModuleNotFoundError as error:
        benchmark.left_out |= dict.fromkeys(peers, f"{error.name} is not installed")
    except InputError as error:  # transformers has no such model
        benchmark.left_out |= dict.fromkeys(peers, str(error))
    return benchmark


def _sentence_transformers(torch: Torch, model: BiEncoder, folder: str, texts: list[str]) -> Any:
    from sentence_transformers import SentenceTransformer

    peer = torch.best_attention(
        lambda attention: SentenceTransformer(
            folder,
            device=torch.device,
            model_kwargs={"dtype": torch.dtype, "attn_implementation": attention},
        )
    )
    return lambda: peer.encode(texts, batch_size=BATCH_ROWS, show_progress_bar=False)


def _plain(torch: Torch, model: BiEncoder, folder: str, texts: list[str]) -> Any:
    """Texts by length, longest first, in batches of 32 padded to their longest."""
    t = torch.torch
    net = torch.load("AutoModel", folder)

    @t.inference_mode()
    def run() -> np.ndarray:
        rows = model.text.ids(texts, show_progress=False)
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
        vectors = np.zeros((len(rows), model.dimension), np.float32)
        for start in range(0, len(order), BATCH_ROWS):
            batch = order[start : start + BATCH_ROWS]
            ids = t.nn.utils.rnn.pad_sequence([t.tensor(rows[place]) for place in batch], batch_first=True)
            sizes = t.tensor([len(rows[place]) for place in batch])
            mask = (t.arange(ids.shape[1]) < sizes[:, None]).long().to(torch.device)
            hidden = net(ids.to(torch.device), attention_mask=mask, use_cache=False).last_hidden_state.float()
            vectors[batch] = pooled(t, hidden, mask, model.pooling).cpu().numpy()
        if any(isinstance(module, Normalize) for module in model.modules):
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    return run


def _differences(found: Mapping[str, Any]) -> dict[str, Any]:
    ours = np.asarray(found["ours"])
    size = np.linalg.norm(ours, axis=1)
    return {
        f"largest distance from {name} over the vector's length": float(
            np.max(np.linalg.norm(np.asarray(found[name]) - ours, axis=1) / size)
        )
        for name in found
        if name not in ("ours", "matmul")
    }
