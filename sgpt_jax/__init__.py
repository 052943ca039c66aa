"""SGPT in JAX: GPT decoders as sentence embedders and re-rankers."""
