"""A tiny decoder and its tasks, and the options of a plan."""

import argparse

from eval.plan import command as plan
from eval.plan.programs import Work
from sgpt_jax.decoder.config import DecoderConfig, RotaryConfig

TINY = DecoderConfig(
    vocab_size=512, embed_dim=64, num_layers=3, num_heads=8, num_kv_heads=8, head_dim=8, mlp_dim=256,
    max_positions=256, rotary=RotaryConfig(dim=8), head="untied", mlp_bias=True,
)  # fmt: skip


WORKS = {
    "encode": Work(task="encode", rows=8, length=64, dtype="float32"),
    "score": Work(task="score", rows=8, length=64, dtype="float32"),
    "train": Work(task="train", rows=16, length=64, examples=8, dtype="float32"),
    "in chunks": Work(task="train", rows=16, length=64, examples=8, chunk=4, dtype="float32"),
    "everything": Work(task="train", rows=16, length=64, examples=8, dtype="float32", trainable="all"),
}


def arguments(**changed):
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    args = parser.parse_args(["--model", "gpt-j-6b", "--topology", "v5e-8", "--no-compile"])
    for name, value in changed.items():
        setattr(args, name, value)
    plan.settle(args)
    return args
