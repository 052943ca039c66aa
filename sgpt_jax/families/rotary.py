"""Reading rotary settings: `rope_parameters` of transformers 5, and the separate keys of earlier versions."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from sgpt_jax.decoder.config import RotaryConfig
from sgpt_jax.errors import InputError
from sgpt_jax.families.reading import LAYER_KINDS, ConfigReader

Scaling = Literal["none", "linear", "llama3", "yarn", "longrope"]

# "dynamic" scales only texts beyond the trained length, and the limit of a model here is that length.
SCALINGS: dict[str, Scaling] = {
    "default": "none",
    "linear": "linear",
    "dynamic": "none",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
}


def rotary(
    hf: ConfigReader, head_dim: int, *, share: float | None = None, scalings: dict[str, Scaling] = SCALINGS
) -> RotaryConfig:
    """The rotary settings that all layers share.

    Args:
        hf: the config.
        head_dim: H.
        share: of a head's dimensions, how many rotate where the config says nothing; None where all do whatever it
            says, and a config that says otherwise is refused.
        scalings: `rope_type` -> scaling.
    """
    old, new = hf.section("rope_scaling"), hf.section("rope_parameters")
    rope = ConfigReader({**old.values, **new.values}, f"{hf.what}: rotary settings")
    old.taken = new.taken = rope.taken  # one set: what is read of `rope` counts as read of both
    if nested := [key for key, value in rope.values.items() if isinstance(value, dict)]:
        raise InputError(f"{rope.what} by layer type ({', '.join(nested)}) are not supported in this family")
    for one, other in ((old, new), (hf, rope)):
        _check_agreement(one, other)
    base = hf.number("rope_theta", "rotary_emb_base", default=10_000.0, above=0)
    return _settings(hf, rope, head_dim, share, base, scalings)


def _check_agreement(one: ConfigReader, other: ConfigReader) -> None:
    """Checks that what two places say of the same thing is the same."""
    for key in sorted(one.values.keys() & other.values.keys()):
        if None not in (values := (one.values[key], other.values[key])) and values[0] != values[1]:
            raise InputError(
                f"{one.what} contradicts itself: {key} is {values[0]!r}, and {values[1]!r} elsewhere"
            )


def rotary_by_kind(
    hf: ConfigReader, head_dim: int, *, full: tuple[str | None, float], sliding: tuple[str | None, float]
) -> dict[str, RotaryConfig]:
    """The rotary settings of "full_attention" and of "sliding_attention" layers.

    transformers 5 nests them by kind; before, they were flat, and the scaling was that of full attention alone.

    Args:
        hf: the config.
        head_dim: H.
        full, sliding: the flat key of the base, if there is one, and its default.
    """
    nested, flat_scaling = hf.section("rope_parameters"), hf.section("rope_scaling")
    found = {}
    for kind, (key, base) in zip(LAYER_KINDS, (full, sliding), strict=True):
        base = base if key is None else hf.number(key, default=base, above=0)
        if isinstance(nested.values.get(kind), dict):
            rope = nested.section(kind)
        elif kind == "full_attention":
            rope = nested if nested.values else flat_scaling
        else:
            rope = ConfigReader({}, hf.what)
        found[kind] = _settings(hf, rope, head_dim, None, base, SCALINGS)
    return found


def _settings(
    hf: ConfigReader,
    rope: ConfigReader,
    head_dim: int,
    share: float | None,
    base: float,
    scalings: dict[str, Scaling],
) -> RotaryConfig:
    scaling = rope.choice("rope_type", "type", options=scalings, default="default", what="rotary scaling")
    stated = hf.number(
        "partial_rotary_factor", "rotary_pct", default=1.0 if share is None else share, above=0, most=1
    )
    stated = rope.number("partial_rotary_factor", default=stated, above=0, most=1)
    if share is None and stated != 1:
        raise InputError(
            f"{hf.what}: partial_rotary_factor is {stated:g}: heads that rotate in part are not supported in this "
            "family"
        )
    base = rope.number("rope_theta", default=base, above=0)
    dim = int(head_dim * stated)
    if dim < 2:
        raise InputError(f"{rope.what}: no dimension rotates in heads of dimension {head_dim}")
    plain = RotaryConfig(dim=dim, base=base, scaling=scaling)
    if scaling == "none":
        rope.get("factor")  # may be there, and has no effect
        return plain
    if scaling == "linear":
        return dataclasses.replace(plain, factor=rope.number("factor", above=0))
    if scaling == "llama3":
        low, high = rope.number("low_freq_factor", above=0), rope.number("high_freq_factor", above=0)
        if low >= high:
            raise rope.wrong("low_freq_factor", low, f"less than high_freq_factor ({high:g})")
        return dataclasses.replace(
            plain,
            factor=rope.number("factor", above=0),
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_positions=rope.size("original_max_position_embeddings"),
        )
    most = hf.size("max_position_embeddings", default=4096)
    original = rope.size("original_max_position_embeddings", default=most)
    original = hf.size("original_max_position_embeddings", default=original)
    plain = dataclasses.replace(plain, original_max_positions=original)
    if scaling == "yarn":
        return _yarn(rope, plain)
    factor = rope.number("factor", default=most / original, above=0)
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return dataclasses.replace(
        plain,
        short_factors=rope.numbers("short_factor", dim // 2),
        long_factors=rope.numbers("long_factor", dim // 2),
        attention_factor=rope.number("attention_factor", default=default, above=0),
    )


def _yarn(rope: ConfigReader, plain: RotaryConfig) -> RotaryConfig:
    factor = rope.number("factor", above=0)
    fast, slow = rope.number("beta_fast", default=32, above=0), rope.number("beta_slow", default=1, above=0)
    scale, scale_all = rope.number("mscale", default=0), rope.number("mscale_all_dim", default=0)

    def length_factor(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1

    default = length_factor(scale) / length_factor(scale_all) if scale and scale_all else length_factor(1.0)
    return dataclasses.replace(
        plain,
        factor=factor,
        beta_fast=fast,
        beta_slow=slow,
        truncate=rope.flag("truncate", True),
        attention_factor=rope.number("attention_factor", default=default, above=0),
    )
