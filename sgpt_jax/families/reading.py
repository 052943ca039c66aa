"""Reading a Hugging Face config: every value is checked when it is read, and keys that nobody read can be listed."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from sgpt_jax.decoder.config import Activation
from sgpt_jax.errors import InputError

Choice = TypeVar("Choice")

MAX_SIZE = 2**31 - 1
MAX_LAYERS = 1_000

LAYER_KINDS = ("full_attention", "sliding_attention")

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


class ConfigReader:
    """Reads the values of a config.json (or of a GGUF file's metadata) by type, and remembers which keys were read.

    As in transformers, null means that nothing is set. Where a method names several keys, the first that is set
    counts, and all are remembered as read.

    Attributes:
        values: the config.
        what: what messages call it, such as "config.json of a llama".
        taken: the keys that were asked for.
        sections: the readers of nested objects, by their key.

    Every method raises InputError, which names the key and its value, for a value of another type or out of range, and
    for a key that is not set and has no default.
    """

    def __init__(self, values: Mapping[str, Any], what: str):
        self.values, self.what = values, what
        self.taken: set[str] = set()
        self.sections: dict[str, ConfigReader] = {}

    def get(self, *keys: str) -> tuple[str, Any]:
        """The first of the keys that is set, and its value of whatever type; the first key and None if none is."""
        self.taken.update(keys)
        return next(
            ((key, value) for key in keys if (value := self.values.get(key)) is not None), (keys[0], None)
        )

    def size(self, *keys: str, default: int | None = None, least: int = 1, most: int = MAX_SIZE) -> int:
        """A whole number from `least` to `most`; required when there is no default."""
        value = self.optional_size(*keys, least=least, most=most)
        if value is None and default is None:
            raise InputError(f"{self.what} has no {keys[0]!r}")
        return default if value is None else value  # type: ignore[return-value]

    def optional_size(self, *keys: str, least: int = 1, most: int = MAX_SIZE) -> int | None:
        """A whole number from `least` to `most`, or None where none is set."""
        key, value = self.get(*keys)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(key, value, f"a whole number from {least} to {most}")
        return int(value)

    def number(
        self,
        *keys: str,
        default: float | None = None,
        above: float = -math.inf,
        least: float = -math.inf,
        most: float = 1e30,
    ) -> float:
        """A finite number more than `above`, from `least` to `most`; required when there is no default."""
        key, value = self.get(*keys)
        if value is None:
            if default is None:
                raise InputError(f"{self.what} has no {key!r}")
            return default
        good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e30
        if not good or not above < value or not least <= value <= most:
            lower = (
                f" above {above:g}" if above > -math.inf else f" from {least:g}" if least > -math.inf else ""
            )
            raise self.wrong(key, value, f"a number{lower}" + (f" to {most:g}" if most < 1e30 else ""))
        return float(value)

    def share(self, key: str, default: float = 0.0) -> float:
        """A dropout rate: a number from 0 to below 1."""
        value = self.number(key, default=default, least=0, most=1)
        if value == 1:
            raise self.wrong(key, value, "less than 1")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        _, value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return default if value is None else value

    def choice(
        self, *keys: str, options: Mapping[str, Choice], default: str | None = None, what: str = ""
    ) -> Choice:
        """What one of the names stands for; `what` is what messages call the names."""
        key, value = self.get(*keys)
        value = default if value is None else value
        if value is None:
            raise InputError(f"{self.what} has no {key!r}")
        if not isinstance(value, str) or value not in options:
            raise InputError(
                f"{self.what}: {what or key} {short(value)} is not supported; known: {', '.join(options)}"
            )
        return options[value]

    def kinds(self, key: str, known: Iterable[str], layers: int) -> list[str] | None:
        """A list with one of the known names for each layer, or None where none is set."""
        _, value = self.get(key)
        known = tuple(known)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != layers or any(kind not in known for kind in value):
            raise self.wrong(key, value, f"a list of {layers} (one a layer) of {', '.join(known)}")
        return value

    def switches(self, key: str, layers: int) -> list[bool] | None:
        """A list with 0 or 1 for each layer, or None where none is set."""
        _, value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != layers or any(item not in (0, 1) for item in value):
            raise self.wrong(key, value, f"a list of {layers} (one a layer) of 0 and 1")
        return [bool(item) for item in value]

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of so many numbers above 0."""
        _, value = self.get(key)
        good = isinstance(value, list) and len(value) == count
        if not good or any(type(item) not in (int, float) or not 0 < item < 1e30 for item in value):
            raise self.wrong(key, value, f"a list of {count} numbers above 0")
        return tuple(map(float, value))

    def section(self, key: str) -> ConfigReader:
        """The reader of a nested object; an empty one where none is set."""
        _, value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, value, "an object")
        if key not in self.sections:
            self.sections[key] = ConfigReader(value or {}, f"{self.what}: {key}")
        return self.sections[key]

    def wrong(self, key: str, value: Any, expected: str) -> InputError:
        """The error for a value that is not what it should be."""
        return InputError(f"{self.what}: {key} is {short(value)}, expected {expected}")

    def untaken(self, prefix: str = "") -> Iterable[tuple[str, Any]]:
        """The keys that nobody asked for, with their values; those of sections as section.key."""
        yield from ((prefix + key, value) for key, value in self.values.items() if key not in self.taken)
        for name, section in self.sections.items():
            yield from section.untaken(f"{prefix}{name}.")


def short(value: Any) -> str:
    """A value for a message, cut where it is long or deep."""
    return reprlib.repr(value)


def activation(hf: ConfigReader, *keys: str, default: str) -> Activation:
    """The activation that a config names."""
    return hf.choice(*keys, options=ACTIVATIONS, default=default, what="activation")


def head(hf: ConfigReader, *, tied_by_default: bool) -> Literal["tied", "untied"]:
    """Whether the language-model head is the token embedding."""
    return "tied" if hf.flag("tie_word_embeddings", tied_by_default) else "untied"


def shape(
    hf: ConfigReader, *, embed: tuple[str, ...], layers: tuple[str, ...], heads: tuple[str, ...]
) -> dict:
    """The shape fields of a `DecoderConfig`, with as many key/value heads as query heads.

    Args:
        hf: the config.
        embed: its keys for E.
        layers: for the number of layers.
        heads: for the number of heads N; H is E / N.
    """
    embed_dim, count = hf.size(*embed), hf.size(*heads)
    return {
        "vocab_size": hf.size("vocab_size"),
        "embed_dim": embed_dim,
        "num_layers": hf.size(*layers, most=MAX_LAYERS),
        "num_heads": count,
        "num_kv_heads": count,
        "head_dim": divided(hf, embed[0], embed_dim, count),
    }


def divided(hf: ConfigReader, key: str, embed_dim: int, heads: int) -> int:
    """The head dimension H = E / N."""
    if embed_dim % heads:
        raise hf.wrong(key, embed_dim, f"a multiple of the {heads} heads")
    return embed_dim // heads


def optional_number(hf: ConfigReader, key: str, default: float | None) -> float | None:
    """A number above 0, or None where null turns it off."""
    _, value = hf.get(key)
    if value is None:
        return None if key in hf.values else default
    return hf.number(key, above=0)


def window(hf: ConfigReader, default: int = 4096) -> int | None:
    """The size of attention windows; null turns them off."""
    size = hf.optional_size("sliding_window")
    return size if "sliding_window" in hf.values else default


def window_kinds(hf: ConfigReader, *, pattern: int) -> list[str]:
    """The kind of every layer, "full_attention" or "sliding_attention": as listed, or every `pattern`-th is full."""
    layers = hf.size("num_hidden_layers", most=MAX_LAYERS)
    listed = hf.kinds("layer_types", LAYER_KINDS, layers)
    if listed is not None:
        return listed
    full, sliding = LAYER_KINDS
    return [full if (layer + 1) % pattern == 0 else sliding for layer in range(layers)]


def windows_of(kinds: Iterable[str], size: int | None) -> tuple[int | None, ...]:
    """The attention windows of layers of these kinds; () where none has one."""
    windows = tuple(size if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()


def windows_by_kind(hf: ConfigReader, layers: int, *, first: int | None) -> tuple[int | None, ...]:
    """The attention windows of decoders whose layers are "sliding_attention" or "full_attention".

    Args:
        hf: the config, with `sliding_window` and `layer_types`.
        layers: their number.
        first: the first layer with a window where the config does not list the layers; None for no window at all.
    """
    # Read in any case, so that the keys are not called unknown.
    size = window(hf)
    kinds = hf.kinds("layer_types", LAYER_KINDS, layers)
    if first is None:
        return ()
    full, sliding = LAYER_KINDS
    return windows_of(kinds or [sliding if layer >= first else full for layer in range(layers)], size)
