"""What systems are called in a report: their models, and the options that change their numbers."""

from __future__ import annotations

import json
import re
from typing import Any

from etils import epath

from .results import Result

_GGUF = re.compile(r"(?:\.([IQFB][A-Z0-9_]*))?\.gguf$")  # the end of a file's name: how it is quantised


def models_of(result: Result) -> list[dict[str, Any]]:
    """What a result says of each of its models."""
    first = result.get("first_stage") or {}
    return [
        model for model in (result.get("model"), first.get("model"), result.get("cross_encoder")) if model
    ]


def label(result: Result) -> str:
    """What a result's system is called: the model and the options that change its numbers."""
    first = result.get("first_stage") or {}
    start = _model_label(result["model"]) if result.get("model") else first.get("name", "")
    if start == "run":
        start = f"run {first['run']}"
    if start == "bi-encoder" and first.get("model"):  # ranked by another command
        start = _model_label(first["model"])
    if first.get("hybrid"):
        scaled = "scores" in first["hybrid"]["fusion"]
        start += f" + BM25 ({'scaled scores' if scaled else 'reciprocal rank fusion'})"
    encoder = result.get("cross_encoder")
    by = ", by mteb" if result["kind"] == "mteb" else ""
    if not encoder:
        return start + by
    depth = (result.get("settings", {}).get("cross_encoder") or {}).get("rerank_depth")
    return f"{_model_label(encoder)} on {start}, top {depth}, {_meaning(encoder)}{by}"


def _meaning(encoder: dict[str, Any]) -> str:
    """What a cross-encoder's scores are: after which prompt, or by which instruction of its own scoring."""
    if "scoring" in encoder:
        instruction = encoder["scoring"]["prompt"]
        said = f", instruction {json.dumps(instruction, ensure_ascii=False)}" if instruction else ""
        return f"its own scoring{said}"
    prompt = encoder["prompt"]["prefix"] + "{}" + encoder["prompt"]["suffix"]
    named = encoder.get("study") or next((name for name, text in _prompts().items() if text == prompt), None)
    return f"prompt {named}" if named else f"prompt {json.dumps(prompt, ensure_ascii=False)}"


def _prompts() -> dict[str, str]:
    from .models import PROMPTS  # imports JAX, which a report does not need otherwise

    return PROMPTS


def _model_label(model: dict[str, Any]) -> str:
    source = str(model["source"])
    name = epath.Path(source).name if epath.Path(source).exists() or source.count("/") != 1 else source
    name, quantised = _GGUF.sub("", name), _GGUF.search(name)
    options = [quantised[1]] if quantised and quantised[1] else []
    options += [str(model["pooling"])] if model.get("pooling") else []
    options += ["brackets"] * bool(model.get("brackets"))
    options += [f"biases {model['biases'][-8:]}"] if model.get("biases") else []
    options += (
        [f"adapter {', '.join(part[-8:] for part in model['adapter'])}"] if model.get("adapter") else []
    )
    for side in ("query", "document"):
        prompt = model.get(f"{side}_prompt")
        options += [f"{side} prompt {json.dumps(prompt, ensure_ascii=False)}"] if prompt is not None else []
    if model.get("bidirectional") is not None:
        options.append("bidirectional" if model["bidirectional"] else "causal")
    options += [f"{model['truncate_dim']} dimensions"] if model.get("truncate_dim") else []
    options += [model["dtype"]] if model.get("dtype", "float32") != "float32" else []
    options += [f"{model['weights']} weights"] if model.get("weights") else []
    return f"{name} ({', '.join(options)})" if options else name
