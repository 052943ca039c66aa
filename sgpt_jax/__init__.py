"""SGPT in JAX: GPT decoders as sentence embedders (bi-encoder) and re-rankers (cross-encoder).

The names are imported when they are first used, so that `import sgpt_jax` does not wait for JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sgpt_jax.bi_encoder import BiEncoder
    from sgpt_jax.corpus_index import index_corpus
    from sgpt_jax.cross_encoder import CrossEncoder
    from sgpt_jax.decoder.config import DecoderConfig
    from sgpt_jax.decoder.pooling import pool
    from sgpt_jax.decoder.sharding import make_mesh
    from sgpt_jax.errors import InputError
    from sgpt_jax.index.search import Index
    from sgpt_jax.load import load_decoder
    from sgpt_jax.text.pairs import DEFAULT_PROMPT, Prompt

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_PROMPT",
    "BiEncoder",
    "CrossEncoder",
    "DecoderConfig",
    "Index",
    "InputError",
    "Prompt",
    "index_corpus",
    "load_decoder",
    "make_mesh",
    "pool",
]

_MODULES = {
    "BiEncoder": "bi_encoder",
    "CrossEncoder": "cross_encoder",
    "DEFAULT_PROMPT": "text.pairs",
    "DecoderConfig": "decoder.config",
    "Index": "index.search",
    "InputError": "errors",
    "Prompt": "text.pairs",
    "index_corpus": "corpus_index",
    "load_decoder": "load",
    "make_mesh": "decoder.sharding",
    "pool": "decoder.pooling",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
