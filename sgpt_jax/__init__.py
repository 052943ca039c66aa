"""SGPT in JAX: GPT decoders as sentence embedders (bi-encoder) and re-rankers (cross-encoder)."""

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.config import DecoderConfig
from sgpt_jax.cross_encoder import CrossEncoder
from sgpt_jax.io import InputError
from sgpt_jax.pooling import pool
from sgpt_jax.prompts import DEFAULT_PROMPT
from sgpt_jax.sharding import make_mesh
from sgpt_jax.weights import load_decoder

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
