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
class GgufFacts:
    """What a GGUF file says.

    Attributes:
        metadata: its fields.
        name: of the architecture, with which the fields' names begin.
        tensors: names of its tensors.
        head_dim: H.
        config: the keys of a Hugging Face config that all architectures share.
    """

    metadata: ConfigReader
    name: str
    tensors: Collection[str]
    head_dim: int
    config: Mapping[str, Any]

    def field(self, name: str) -> str:
        """The full name of a field of the architecture."""
        return f"{self.name}.{name}"


@dataclasses.dataclass(frozen=True)
class GgufArchitecture:
    """How a GGUF file of an architecture maps to the family's own names.

    Attributes:
        parts: GGUF's tensor name, without block number and suffix -> transformers' name, without the layer.
        pairs: the GGUF names of tensors whose rows are interleaved, so that the two of a rotated pair are neighbours;
            transformers pairs the first half of a head with the second.
        settings: config keys beyond those that all architectures share.
        names: of the architectures; () is the `model_type`.
        one_added: norms are stored as what multiplies, one more than the weights of transformers (Gemma).
    """

    parts: Mapping[str, str]
    pairs: tuple[str, ...] = ()
    settings: Callable[[GgufFacts], dict[str, Any]] = lambda facts: {}
    names: tuple[str, ...] = ()
    one_added: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """What the project knows of one `model_type`."""

    model_type: str
    read: Callable[[ConfigReader], DecoderConfig]
    rules: tuple[Rule, ...]
    base_prefix: str
    """Prefix of the tensor names in checkpoints with a language-model head."""
    causal_lm: str
    """The transformers class with a language-model head; without one the class ends in Model."""
    other_prefixes: tuple[str, ...] = ()
    """Further prefixes that published checkpoints have."""
    renames: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Other beginnings of tensor names, after the prefix -> those of the rules."""
    harmless: frozenset[str] = frozenset()
    """Keys of the config that change nothing, beyond those of `keys.HARMLESS`."""
    own_code: frozenset[str] = frozenset()
    """Values of `auto_map` in published folders whose classes compute what transformers' own do."""
    mask_by_config: bool = True
    """Whether `is_causal: false` makes attention bidirectional."""
    exports: Callable[[HfConfig, DecoderConfig], Iterable[dict[str, Any]]] = _as_it_is
    """(config it was read from, decoder's config now) -> candidates for the config to export, best first; the two can
    differ, as biases may have been added. `families.export_config` takes the first that describes the decoder."""
    gguf: GgufArchitecture | None = None

    @property
    def headless_prefix(self) -> str:
        """Prefix in checkpoints without a head: `base_prefix` less its first part, which leaves "decoder." for OPT."""
        return self.base_prefix.partition(".")[2]

    def tensor_of(self, leaf: str) -> str | None:
        """The name in the rules of the tensor that is a leaf; None where the family has no such leaf."""
        return next((rule.tensor for rule in self.rules if rule.leaves == (leaf,)), None)

    def key(self, tensor: str) -> str:
        """A tensor's name in the rules: without prefix, in their spelling."""
        for prefix in (self.base_prefix, *self.other_prefixes):
            if tensor.startswith(prefix):
                tensor = tensor.removeprefix(prefix)
                break
        for old, new in self.renames.items():
            if tensor.startswith(old):
                tensor = new + tensor.removeprefix(old)
        return tensor
