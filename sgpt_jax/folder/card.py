"""The README.md of a model folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from etils import epath

from sgpt_jax.checkpoint.gguf_reader import open_gguf
from sgpt_jax.files.lines import atomic_write
from sgpt_jax.folder.modules import describe_modules
from sgpt_jax.folder.settings import ModelSettings

_LIBRARY = "sentence-transformers"
_TAGS = ["sentence-similarity", "feature-extraction", "sgpt", "sgpt-jax"]


def write_model_card(
    folder: str | os.PathLike[str],
    settings: ModelSettings,
    embed_dim: int,
    *,
    name: str = "",
    base_model: str = "",
    license: str | None = None,
    training: Mapping[str, object] | None = None,
    results: Mapping[str, object] | None = None,
    note: str = "",
    only_here: bool = False,
) -> None:
    """Writes README.md: front matter for the hub, how to use the model, and what is known of its making.

    Args:
        folder: the model folder.
        settings: as given to `write_settings`.
        embed_dim: length of the vectors.
        name: the model's name; the folder's name when empty.
        base_model: what it was made from. In the front matter only when it has the form of a hub id (org/name).
        license: of the base model, see `read_license`; left out when None.
        training: data and hyper-parameters, one table row each.
        results: measured scores, one table row each.
        note: a paragraph on the weights.
        only_here: sentence-transformers does not load the folder.
    """
    root = epath.Path(folder)
    name = name or root.name
    front: dict[str, object] = {"pipeline_tag": "sentence-similarity", "tags": _TAGS}
    if not only_here:
        front = {"library_name": _LIBRARY, **front, "tags": [_LIBRARY, *_TAGS]}
    if license:
        front["license"] = license
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base_model):
        front["base_model"] = base_model
    # A JSON value is a YAML value, so that no name needs quoting rules of its own.
    lines = [
        "---",
        *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()),
        "---",
    ]
    lines += [f"# {name}", "", _summary(settings, embed_dim, base_model), "", *([note, ""] if note else [])]
    lines += _usage(settings, name, only_here)
    for title, rows in (("Training", training), ("Results", results)):
        if rows:
            lines += ["", f"## {title}", "", "| | |", "|---|---|"]
            lines += [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()]
    with atomic_write(root / "README.md") as stream:
        stream.write(("\n".join(lines) + "\n").encode("utf-8"))


def read_license(path: str | os.PathLike[str]) -> str | None:
    """The license that a model states, in its README.md's front matter or its `.gguf` file; None without one."""
    path = Path(path)
    if path.is_file():
        return open_gguf(path).metadata.get("general.license")
    card = path / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"---\r?\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:[ \t]*(\S+)", front.group(1), re.MULTILINE) if front else None
    return found.group(1).strip("\"'") if found else None


def _summary(settings: ModelSettings, embed_dim: int, base_model: str) -> str:
    made = describe_modules(settings.pooling or "weightedmean", settings.include_prompt, settings.modules)
    parts = [f"A bi-encoder: one vector of {embed_dim} dimensions a text, by {made}"]
    if base_model:
        parts.append(f" over {base_model}")
    if settings.max_seq_length:
        parts.append(f". Texts are read up to {settings.max_seq_length} tokens")
    if settings.truncate_dim:
        parts.append(f". Of each vector the first {settings.truncate_dim} dimensions are kept")
    return "".join(parts) + "."


def _usage(settings: ModelSettings, name: str, only_here: bool) -> list[str]:
    query, document = (
        ("encode_query", "encode_document")
        if settings.brackets or any((settings.prompts or {}).values())
        else ("encode",) * 2
    )
    calls = [
        f'queries = model.{query}(["how do cells divide"])',
        f'documents = model.{document}(["Mitosis is the division of a cell into two."])',
        "print(model.similarity(queries, documents))",
    ]
    ours = ["import sgpt_jax as sgpt", "", f"model = sgpt.BiEncoder.from_pretrained({json.dumps(name)})"]
    theirs = [
        "from sentence_transformers import SentenceTransformer",
        "",
        f"model = SentenceTransformer({json.dumps(name)})",
    ]
    lines = ["With sgpt-jax:", "", "```python", *ours, *calls, "```"]
    if only_here:
        return lines
    lines += ["", "With sentence-transformers:", "", "```python", *theirs, *calls, "```"]
    if settings.brackets:
        lines += [
            "",
            "The model expects queries in `[` `]` and documents in `{` `}`, each bracket a token of its own. sgpt-jax "
            "adds them. **sentence-transformers adds no brackets by itself**, so its vectors are not those that the "
            "model was trained for: its layout has prompts before a text, but nothing behind one, and a "
            "tokenizer for each side would need the whole decoder twice. Brackets written into the text come near, but "
            "they can merge with the characters beside them into other tokens, and long texts lose the closing one.",
        ]
    return lines


def _cell(value: object) -> str:
    """Text for a cell of a table."""
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return " ".join(text.replace("|", "\\|").split())
