"""What may stand in the JSON files of an index: every key with its type and allowed values."""

import re
from collections.abc import Callable, Mapping
from typing import Any

FORMAT = "sgpt-jax index 4"
UNTITLED_FORMAT = "sgpt-jax index 3"  # no titles, no removed rows: it is read, but does not grow
UNCHECKED_FORMAT = "sgpt-jax index 2"  # nor a fingerprint of a model, nor checksums

_MOST = 1 << 48  # rows, bytes: far more than any disk holds, and far from where int64 ends

Rule = tuple[Callable[[Any], bool], str]  # what a value must fulfil, and that in words


def _integer(low: int, high: int = _MOST) -> Rule:
    return lambda value: type(value) is int and low <= value <= high, f"an integer from {low} to {high}"


def _one_of(*values: str) -> Rule:
    return lambda value: isinstance(value, str) and value in values, f"one of {', '.join(values)}"


def _hexadecimal(digits: int) -> Rule:
    pattern = re.compile(f"([0-9a-f]{{{digits}}})?")
    return (
        lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None,
        f"{digits} hexadecimal digits or empty",
    )


def _is_recall(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or value.keys() != {"queries", "recall@10", "recall@100"}:
        return False
    shares = (value["recall@10"], value["recall@100"])
    return type(value["queries"]) is int and all(
        type(share) in (int, float) and 0 <= share <= 1 for share in shares
    )


def _is_removed(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or value.keys() != {"rows", "crc32"}:
        return False
    return _integer(1)[0](value["rows"]) and _integer(0, 2**32 - 1)[0](value["crc32"])


_BOOLEAN: Rule = (lambda value: isinstance(value, bool), "true or false")
_CRC = _integer(0, 2**32 - 1)

SHARD: dict[str, Rule] = {
    "start": _integer(0),
    "rows": _integer(0),
    "id_bytes": _integer(0),
    "text_bytes": _integer(0),
    "fingerprint": _hexadecimal(64),
    "checks": _CRC,
}

MANIFEST: dict[str, Rule] = {
    "dtype": _one_of("float32", "float16", "int8"),
    "similarity": _one_of("cosine", "dot"),
    "chunk_size": _integer(1),
    "shard_size": _integer(1),
    "store_texts": _BOOLEAN,
    "metadata": (lambda value: isinstance(value, dict), "a JSON object"),
    "fingerprint": _hexadecimal(40),
    "format": _one_of(FORMAT, UNTITLED_FORMAT, UNCHECKED_FORMAT),
    "dimension": _integer(0),
    "calibration": (lambda value: value is None or _CRC[0](value), f"null or {_CRC[1]}"),
    "complete": _BOOLEAN,
    "recall": (_is_recall, "null, or shares from 0 to 1 for recall@10 and recall@100 and how many queries"),
    "generation": _integer(0),
    "removed": (_is_removed, "null, or how many rows and the crc32 of their file"),
    "shards": (
        lambda value: isinstance(value, list) and all(isinstance(shard, dict) for shard in value),
        "a list of JSON objects",
    ),
}


def check(value: Any, rules: Mapping[str, Rule]) -> None:
    """Checks that a JSON object has the keys of ``rules`` and no others, each with a value that is allowed.

    Raises:
        ValueError: naming the first key that is missing, unknown or has another value.
    """
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    for name, (fits, words) in rules.items():
        if name not in value:
            raise ValueError(f"{name} is missing")
        if not fits(value[name]):
            raise ValueError(f"{name} must be {words}, not {value[name]!r:.60}")
    if unknown := sorted(value.keys() - rules.keys()):
        raise ValueError(f"the key {unknown[0]!r:.60} is unknown")
