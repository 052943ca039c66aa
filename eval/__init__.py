"""Evaluation programs, run from a checkout: ``python -m eval <task>``."""
