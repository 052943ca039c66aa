"""Published folders with modelling code of their own: what that code makes of a decoder that a family describes.

The code itself is never run. A folder is known by the class that its config.json names in `auto_map`, or by its
`model_type`; what is known of it becomes keys that the families read. Any other `auto_map` is refused (`keys.py`).

The names below are those by which public code and file listings of these models call them: gte-Qwen2's and stella's
`modeling_qwen.Qwen2Model`, `modeling_llama_encoder.LlamaEncoderModel` of LLM2Vec, `llama_bidirectional_model`,
`modeling.PPLXQwen3Model` with its `model_type`, and the files `modeling_gritlm7b`, `modeling_mistral_gritlm` and
`modeling_nvembed`. Those that were not seen there, and follow from the names of their siblings, are marked; a wrong
name costs a refusal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sgpt_jax.errors import InputError

# The instruction with which embedders search the web; their cards and MS MARCO's results use it.
WEB_SEARCH = "Given a web search query, retrieve relevant passages that answer the query"


@dataclasses.dataclass(frozen=True)
class OwnCode:
    """What the code of a folder does.

    Attributes:
        name: of the models.
        classes: beginnings of the `auto_map` values by which they are known, without the repository.
        model_types: `model_type` values by which they are known, and the family that each stands for.
        config: keys of config.json that say the same.
        pooling: how hidden states become a vector; None where the folder's modules say it.
        include_prompt: whether the prompt's tokens are pooled.
        normalize: whether vectors have length 1.
        prompts: texts before queries and documents.
        refused: why it is not supported; empty where it is.
    """

    name: str
    classes: tuple[str, ...] = ()
    model_types: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"is_causal": False})
    pooling: str | None = None
    include_prompt: bool = True
    normalize: bool = False
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    refused: str = ""


# Masks of padding alone, whatever window the config states.
_NO_WINDOW: Mapping[str, Any] = {"is_causal": False, "sliding_window": None, "use_sliding_window": False}

OWN_CODES = (
    OwnCode(
        "GritLM",
        ("modeling_gritlm7b.", "modeling_mistral_gritlm."),
        config=_NO_WINDOW,
        pooling="mean",
        include_prompt=False,
        normalize=True,
        prompts={"query": f"<|user|>\n{WEB_SEARCH}\n<|embed|>\n", "document": "<|embed|>\n"},
    ),
    OwnCode(
        "gte-Qwen2 (and stella, inf-retriever and others made from it)",
        ("modeling_qwen.Qwen2",),
        config=_NO_WINDOW,
        pooling="lasttoken",
        normalize=True,
    ),
    OwnCode(
        "LLM2Vec",
        (
            "modeling_llama_encoder.",
            *("modeling_mistral_encoder.", "modeling_qwen2_encoder.", "modeling_gemma_encoder."),  # not seen
        ),
        config=_NO_WINDOW,
        pooling="mean",
        include_prompt=False,
    ),
    OwnCode(
        "llama-embed-nemotron",
        ("llama_bidirectional_model.",),
        {"llama_bidirec": "llama"},
        pooling="mean",
        normalize=True,
    ),
    OwnCode(
        "pplx-embed",
        ("modeling.PPLXQwen3Model",),
        {"bidirectional_pplx_qwen3": "qwen3"},
        config={**_NO_WINDOW, "use_bidirectional_attention": None},
        pooling="mean",
    ),
    OwnCode(
        "NV-Embed",
        ("modeling_nvembed.",),
        {"nvembed": "mistral", "latent_attention": "mistral", "bidir_mistral": "mistral"},
        refused="its vectors come from latent attention pooling",
    ),
)


def own_code_of(hf: Mapping[str, Any]) -> OwnCode | None:
    """What is known of the code that a config.json names; None without one, and for code that is not known.

    Raises:
        InputError: it is known, and not supported.
    """
    classes = hf.get("auto_map")
    named = [str(name).rpartition("--")[2] for name in classes.values()] if isinstance(classes, dict) else []
    for code in OWN_CODES:
        if hf.get("model_type") in code.model_types or any(name.startswith(code.classes) for name in named):
            if code.refused:
                raise InputError(
                    f"config.json names the code of {code.name}, which is not supported: {code.refused}"
                )
            return code
    return None


def without_own_code(hf: Mapping[str, Any], code: OwnCode) -> dict[str, Any]:
    """The config with keys in place of its code: families of transformers compute the same from it."""
    changed = {key: value for key, value in hf.items() if key != "auto_map"} | dict(code.config)
    kind = hf.get("model_type")
    if isinstance(kind, str) and kind in code.model_types:
        changed["model_type"] = code.model_types[kind]
    return changed


def describe(code: OwnCode) -> str:
    """One line for people."""
    parts = ["attention is bidirectional"]
    if code.pooling:
        skipped = "" if code.include_prompt else " without the prompt's tokens"
        parts.append(f"pooling is {code.pooling}{skipped} where the folder says nothing else")
    if code.prompts:
        parts.append("queries are prompted for web search")
    return f"known as {code.name}, whose own code is not run: {', '.join(parts)}"
