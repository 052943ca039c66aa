"""What the project knows of a family of decoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.families.reading import ConfigReader
from sgpt_jax.families.tables import Rule

HfConfig = Mapping[str, Any]


def _as_it_is(hf: HfConfig, config: DecoderConfig) -> Iterable[dict[str, Any]]:
    yield dict(hf)


@dataclasses.dataclass(frozen=True)
class GgufArchitecture:
    """How a GGUF file of the architecture of this name maps to the family's own names.

    Attributes:
        parts: GGUF's name of a tensor, without block number and ending, and transformers' for it, without layer.
        pairs: those whose rows stand in pairs that rotate together; transformers has the halves of a head.
        settings: config keys beyond those that all architectures share, from the names of the file's tensors and the
            width of a head.
    """

    parts: Mapping[str, str]
    pairs: tuple[str, ...] = ()
    settings: Callable[[Collection[str], int], dict[str, Any]] = lambda tensors, head_dim: {}


@dataclasses.dataclass(frozen=True)
class Family:
    """What the project knows of one `model_type`."""

    model_type: str
    read: Callable[[ConfigReader], DecoderConfig]
    rules: tuple[Rule, ...]
    base_prefix: str
    """What stands before the tensor names where a language-model head is saved as well."""
    causal_lm: str
    """The transformers class with a language-model head; without one the class ends in Model."""
    other_prefixes: tuple[str, ...] = ()
    """Further prefixes that published checkpoints have."""
    renames: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Other spellings of a tensor name."""
    harmless: frozenset[str] = frozenset()
    """Keys of the config that change nothing, beyond those of `keys.HARMLESS`."""
    own_code: frozenset[str] = frozenset()
    """Values of `auto_map` in published folders whose classes compute what transformers' own do."""
    mask_by_config: bool = True
    """Whether `is_causal: false` makes attention bidirectional."""
    exports: Callable[[HfConfig, DecoderConfig], Iterable[dict[str, Any]]] = _as_it_is
    """Configs that may describe a decoder which was read from a config and may have got biases since, best first."""
    gguf: GgufArchitecture | None = None

    @property
    def headless_prefix(self) -> str:
        """What stands before tensor names without a language-model head: OPT keeps the last part of its prefix."""
        return self.base_prefix.partition(".")[2]
