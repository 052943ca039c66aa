"""Evaluation programs: ``python -m eval <task>``; of what pip installed, ``python -m sgpt_jax.eval <task>``."""
