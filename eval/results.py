"""Result files: one JSON a measurement, written whole or not at all, and read back by the other programs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from etils import epath

from sgpt_jax.errors import InputError
from sgpt_jax.files.lines import atomic_write

from .datasets import default_split

Result = dict[str, Any]

# mteb's names of tasks -> those of BEIR's data sets; others are the same in lower case.
MTEB_NAMES = {
    "CQADupstackRetrieval": "cqadupstack",
    "ClimateFEVER": "climate-fever",
    "DBPedia": "dbpedia-entity",
    "FiQA2018": "fiqa",
    "QuoraRetrieval": "quora",
    "TRECCOVID": "trec-covid",
    "Touche2020": "webis-touche2020",
}
_ON_ONE_LINE = ("queries", "per_query")  # long lists of numbers


def write_result(path: epath.Path, result: Result) -> None:
    """Writes a result as JSON; its folder is made where it does not exist yet.

    Raises:
        InputError: the folder cannot be made or written.
    """
    make_folder(path.parent)
    entries = []
    for key, value in result.items():
        text = json.dumps(
            value, ensure_ascii=False, allow_nan=False, indent=None if key in _ON_ONE_LINE else 2
        )
        entries.append(f"  {json.dumps(key)}: " + text.replace("\n", "\n  "))
    with atomic_write(path) as stream:
        stream.write(("{\n" + ",\n".join(entries) + "\n}\n").encode())


def check_settings(
    path: epath.Path,
    kind: str,
    settings: dict[str, Any],
    data: Callable[[], dict[str, Any]] = dict,
    instead: str = "give another --output, or remove it",
) -> Result:
    """The result that a file holds, which is of this kind and these settings; empty where there is no file.

    Args:
        path: a result.
        kind: the task that makes the new one.
        settings: of the new one.
        data: what tells its data from others; asked for where the file's settings have it.
        instead: for the message.

    Raises:
        InputError: the file holds something else.
    """
    if not path.exists():
        return {}
    result = read_result(path)
    if result["kind"] != kind:
        raise InputError(f"{path}: is a result of eval {result['kind']}; {instead}")
    there = result.get("settings", {})
    if kind != "beir" and not there:
        # Results of other tasks did not say their settings once: their model's revision tells the most.
        was, now = (
            ((each.get("model") or each.get("cross_encoder") or {}).get("revision"), each.get("split"))
            for each in (result, settings)
        )
        if was == now:
            return result
    settings = json.loads(json.dumps(settings | ({"data": data()} if "data" in there else {})))
    for key in ("model", "cross_encoder"):  # nor did they say what an adapter lies over
        if "base" not in (there.get(key) or {"base": None}):
            settings.get(key, {}).pop("base", None)
    if there != settings:
        different = [key for key in settings if there.get(key) != settings[key]]
        raise InputError(
            f"{path}: was made with other settings ({', '.join(different) or 'more'}); {instead}"
        )
    return result


def split_of(result: Result) -> str | None:
    """The judgements that a result is measured on, where they are not its data set's usual ones."""
    split = result.get("settings", {}).get("split", result.get("split"))
    return None if split == default_split(str(result["name"])) else split


def make_folder(folder: epath.Path) -> None:
    """Makes a folder and those above it.

    Raises:
        InputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made: {error.strerror}") from error


def read_result(path: epath.Path) -> Result:
    """Reads a result of this package, or one that mteb has written.

    Raises:
        InputError: the file cannot be read, or is something else.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a result: {error}") from error
    if isinstance(result, dict) and "task_name" in result and "scores" in result:
        return of_mteb(path, result)
    if not isinstance(result, dict) or "kind" not in result or not isinstance(result.get("metrics"), dict):
        raise InputError(f"{path}: is no result of python -m eval")
    return result


def of_mteb(path: epath.Path, result: Result) -> Result:
    """What mteb wrote for a task, in the form of this package: means over subsets, of the split test if it is there.

    Raises:
        InputError: there are no scores.
    """
    splits = result["scores"]
    split = "test" if "test" in splits or not splits else next(iter(splits))
    subsets = splits.get(split) or []
    if not subsets:
        raise InputError(f"{path}: a result of mteb without scores")
    # mteb writes NaN where a measure is the same for all queries, which JSON has no word for.
    shared = set.intersection(
        *(
            {key for key, value in subset.items() if isinstance(value, int | float) and math.isfinite(value)}
            for subset in subsets
        )
    )
    means = {key: sum(subset[key] for subset in subsets) / len(subsets) for key in sorted(shared)}
    meta_file = path.parent / "model_meta.json"
    meta = json.loads(meta_file.read_text(encoding="utf-8")) if meta_file.exists() else {}
    return {
        "kind": "mteb",
        "name": MTEB_NAMES.get(result["task_name"], result["task_name"].lower()),
        "metrics": {key.replace("_at_", "@"): value for key, value in means.items() if "_at_" in key},
        "main_score": means.get("main_score"),
        "model": {"source": meta.get("name") or path.parent.name, "parameters": meta.get("n_parameters")},
        "seconds": {"total": result.get("evaluation_time")},
        "command": f"mteb {result.get('mteb_version', '')}".strip(),
    }


def find_results(sources: Iterable[epath.Path]) -> list[tuple[epath.Path, Result]]:
    """Every result among files and folders (searched deeply), in the order given, then by path.

    Raises:
        InputError: a file is no result, or a folder holds none. JSON files of another kind in a folder are passed
            over.
    """
    found = []
    for source in sources:
        if source.is_file():
            found.append((source, read_result(source)))
            continue
        if not source.is_dir():
            raise InputError(f"{source}: no such file or folder")
        before = len(found)
        for path in (path for path in files_under(source) if path.name.endswith(".json")):
            try:
                found.append((path, read_result(path)))
            except InputError:
                continue
        if len(found) == before:
            raise InputError(f"{source}: holds no result of python -m eval")
    return found


def files_under(folder: epath.Path) -> list[epath.Path]:
    """All files in a folder and in those below it, sorted (epath has no recursive glob)."""
    found = []
    for path in sorted(folder.iterdir()):
        found += files_under(path) if path.is_dir() else [path]
    return found


def mean_metrics(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of every metric over data sets, each with the same weight."""
    return {key: sum(one[key] for one in metrics) / len(metrics) for key in metrics[0]}
