"""SGPT in JAX: GPT decoders as sentence embedders (bi-encoder) and re-rankers (cross-encoder)."""

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.cross_encoder import CrossEncoder
from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.decoder.pooling import pool
from sgpt_jax.decoder.sharding import make_mesh
from sgpt_jax.errors import InputError
from sgpt_jax.load import load_decoder
from sgpt_jax.text.pairs import DEFAULT_PROMPT

__all__ = [
    "DEFAULT_PROMPT",
    "BiEncoder",
    "CrossEncoder",
    "DecoderConfig",
    "InputError",
    "load_decoder",
    "make_mesh",
    "pool",
]
