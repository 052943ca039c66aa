"""The habits of sentence-transformers: its names for what means the same here, and what to use in place of the rest.

Whoever writes `model.encode(texts, batch_size=32, normalize_embeddings=True)` goes on. What is left out on purpose is a
TypeError (or an AttributeError) that names what does the same here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypedDict

if TYPE_CHECKING:
    from sgpt_jax.runtime.progress import Progress

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]

# sentence-transformers' name -> the one here.
_SAME = {"normalize_embeddings": "normalize", "show_progress_bar": "show_progress"}

# Arguments that ask for what is the case anyway, and may stand there.
_ANYWAY: dict[str, tuple[Any, ...]] = {
    "convert_to_numpy": (True,),
    "convert_to_tensor": (False,),
    "output_value": ("sentence_embedding",),
    "apply_softmax": (False,),
    "trust_remote_code": (False,),
    **dict.fromkeys(("device", "pool", "chunk_size", "activation_fn", "backend", "revision"), (None,)),
}

_NUMPY = "the result is a numpy array; torch.from_numpy(...) or jax.numpy.asarray(...) makes another of it"
_DEVICES = (
    "devices are chosen when a model is loaded: from_pretrained(mesh=sgpt.make_mesh()), or JAX_PLATFORMS"
)
_FOLDER = "the model folder says so, or an argument of its own: see help(from_pretrained)"
_RUN = "`train.run(TrainConfig(...))` or `python -m train` trains"
_INSTEAD = {
    "convert_to_numpy": _NUMPY,
    "convert_to_tensor": _NUMPY,
    "output_value": "`model.decoder(input_ids, attention_mask)` gives the hidden states of tokens",
    "device": _DEVICES,
    "pool": _DEVICES,
    "chunk_size": "`encode_chunks` takes a stream of lists of texts",
    "prompts": "`model.with_prompts(query=..., document=...)`, or `prompt=` of encode",
    "default_prompt_name": "`prompt=` or `prompt_name=` of encode",
    "revision": "the source names it: from_pretrained('org/name@revision')",
    "cache_folder": "the environment variable HF_HOME",
    "local_files_only": "the environment variable HF_HUB_OFFLINE=1",
    "token": "the environment variable HF_TOKEN, or `hf auth login`",
    "trust_remote_code": "code that a folder brings is never run",
    "model_kwargs": "`dtype='bfloat16'` or `weights='int8'`",
    "processor_kwargs": _FOLDER,
    "tokenizer_kwargs": _FOLDER,
    "config_kwargs": _FOLDER,
    "backend": "there is one: JAX",
    "similarity_fn_name": "the model folder says it; `model.similarity` computes it",
    "max_length": "`max_seq_length=`",
    "num_labels": "the model folder says it",
    "activation_fn": "the model folder says it",
    "apply_softmax": "scores are log-probabilities, or what the model folder says",
    "prompt": "`CrossEncoder.from_pretrained(prompt=...)`",
    "prompt_name": "`CrossEncoder.from_pretrained(prompt=...)` takes the name, too",
}

_ATTRIBUTES = {
    "get_sentence_embedding_dimension": "dimension",
    "get_embedding_dimension": "dimension",
    "max_seq_length": "text.max_seq_length",
    "get_max_seq_length": "text.max_seq_length",
    "tokenizer": "text.tokenizer",
    "tokenize": "text.ids",
    "prompts": "text.prompts",
    "device": "mesh (None is the first device)",
    "similarity_fn_name": "similarity_name",
    "similarity_pairwise": "(a * b).sum(axis=-1), of vectors of length 1",
    "save": "save_pretrained",
    "encode_multi_process": "encode, of a model loaded with mesh=sgpt.make_mesh()",
    "start_multi_process_pool": "encode, of a model loaded with mesh=sgpt.make_mesh()",
    "fit": f"no method: {_RUN}",
    "old_fit": f"no method: {_RUN}",
    "half": "from_pretrained(dtype='bfloat16')",
    "to": f"no method: {_DEVICES}",
}


class EncodeOptions(TypedDict, total=False):
    """The options of `BiEncoder.encode`, with the names of sentence-transformers that it takes too."""

    prompt: str | None
    prompt_name: str | None
    truncate_dim: int | None
    normalize: bool
    normalize_embeddings: bool
    precision: Precision
    batch_size: int | None
    batch_tokens: int | None
    show_progress: bool | Progress | None
    show_progress_bar: bool | None
    convert_to_numpy: bool


def translate(function: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments under their names here.

    Args:
        function: what was called, for the message.
        given: the keyword arguments that the function does not know.

    Raises:
        TypeError: an argument means nothing here; it names what to use, where sentence-transformers has it.
    """
    ours = {}
    for name, value in given.items():
        if name in _SAME:
            ours[_SAME[name]] = value
        elif not (name in _ANYWAY and any(value is usual or value == usual for usual in _ANYWAY[name])):
            raise TypeError(f"{function}() has no argument {name!r}" + _hint(name))
    return ours


def refuse(function: str, given: Mapping[str, Any]) -> None:
    """As `translate`, for a function that has no argument under another name.

    Raises:
        TypeError: see there.
    """
    if ours := translate(function, given):
        raise TypeError(f"{function}() has no argument {next(iter(ours))!r}")


def _hint(name: str) -> str:
    return f": {_INSTEAD[name]}" if name in _INSTEAD else ""


def refuse_attribute(model: Any, name: str) -> NoReturn:
    """For `__getattr__` of a model.

    Raises:
        AttributeError: naming what does the same here, where sentence-transformers has such an attribute.
    """
    kind = type(model).__name__
    ours = f": here it is {_ATTRIBUTES[name]}" if name in _ATTRIBUTES else ""
    raise AttributeError(f"{kind!r} object has no attribute {name!r}{ours}", name=name, obj=model)


def refuse_source(kind: type, arguments: tuple[Any, ...]) -> None:
    """For `__new__` of a model, whose fields no user fills in.

    Raises:
        TypeError: the first argument is the source of a model.
    """
    if arguments and isinstance(arguments[0], str | os.PathLike):
        raise TypeError(f"{kind.__name__}.from_pretrained(source) loads a model")
