"""This project's models as mteb's: they satisfy mteb 2's EncoderProtocol and CrossEncoderProtocol."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from mteb.abstasks.abstask import get_abstask_prompt
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.abs_encoder import get_prompt_name
from mteb.types import PromptType

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.checkpoint.fingerprint import model_fingerprint
from sgpt_jax.cross_encoder import CrossEncoder
from sgpt_jax.decoder.model import split
from sgpt_jax.errors import InputError

from .sts import similarities


class BiEncoderModel:
    """A `BiEncoder` as mteb's EncoderProtocol.

    Args:
        model_name: a loaded `BiEncoder`, or what `BiEncoder.from_pretrained` takes.
        revision: the model's revision, for mteb's records; of a hub id, the one that is loaded. None for a digest of
            all that its vectors depend on: mteb takes a result in its cache for that of any model of the same name,
            revision and options.
        device: not used; JAX decides.
        prompts: more named prompts, by the names that mteb looks for: a task (`NFCorpus`), a task and a side
            (`NFCorpus-query`), a type of tasks (`Retrieval`, `Retrieval-query`), or a side (`query`).
        instruction: a template with {instruction} for the task's, such as "Instruct: {instruction}\\nQuery: ". It goes
            before queries, and before the texts of tasks without sides, where no named prompt fits.
        options: for `BiEncoder.from_pretrained`.

    Raises:
        InputError: the template lacks {instruction}.
    """

    def __init__(
        self,
        model_name: str | BiEncoder,
        revision: str | None = None,
        *,
        device: str | None = None,
        prompts: dict[str, str] | None = None,
        instruction: str | None = None,
        **options: Any,
    ) -> None:
        if instruction is not None and "{instruction}" not in instruction:
            raise InputError(f"the instruction's template {instruction!r} has no {{instruction}}")
        self.model = (
            BiEncoder.from_pretrained(_at(model_name, revision), **options)
            if isinstance(model_name, str)
            else model_name
        )
        self.prompts = self.model.text.prompts | (prompts or {})
        self.instruction = instruction
        given = {"prompts": prompts, "instruction": instruction}
        more = [self.prompts, self.model.text.default_prompt_name, instruction, self.model.similarity_name]
        self.mteb_model_meta = _meta(
            self.model, revision, [self.model.fingerprint(), *more], options | given, self.model.dimension
        )

    def prompt(self, task: TaskMetadata | None, prompt_type: PromptType | None) -> str | None:
        """What goes before the texts of a task; None where its side says it all."""
        name = None if task is None else get_prompt_name(self.prompts, task, prompt_type)
        if name not in (None, "query", "document"):
            return self.prompts[name]
        if name is not None and self.prompts[name] != self.model.text.prompts.get(name):
            return self.prompts[name]
        if task is None or self.instruction is None or prompt_type == PromptType.document:
            return None
        asked = task.prompt
        if isinstance(asked, dict):
            asked = asked.get((prompt_type or PromptType.query).value)
        asked = asked or get_abstask_prompt(task.name)
        return self.instruction.replace("{instruction}", asked) if asked else None

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: TaskMetadata | None = None,
        prompt_type: PromptType | None = None,
        hf_split: str | None = None,
        hf_subset: str | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Vectors of a loader's texts, [n, E]; queries and documents with the model's brackets, if any.

        `options` (mteb's encode_kwargs) are those of `BiEncoder.encode`; a prompt among them takes the place of the
        task's.
        """
        encode = {
            PromptType.query: self.model.encode_query,
            PromptType.document: self.model.encode_document,
            None: self.model.encode,
        }[prompt_type]
        if not options.keys() & {"prompt", "prompt_name"}:
            options["prompt"] = self.prompt(task_metadata, prompt_type)
        return encode(_texts(inputs), **options)

    def similarity(self, embeddings1: np.ndarray, embeddings2: np.ndarray) -> np.ndarray:
        """The model's own similarity, [n, E] x [m, E] -> [n, m]; one number of two vectors [E]."""
        a, b = np.asarray(embeddings1), np.asarray(embeddings2)
        # torch warns of arrays that it may not write to, and JAX's are such
        found = np.array(self.model.similarity(a, b))
        return found.reshape(()) if a.ndim == b.ndim == 1 else found

    def similarity_pairwise(self, embeddings1: np.ndarray, embeddings2: np.ndarray) -> np.ndarray:
        """The same of row with row, [n, E] x [n, E] -> [n]."""
        return similarities(np.asarray(embeddings1), np.asarray(embeddings2))[self.model.similarity_name]


class CrossEncoderModel:
    """A `CrossEncoder` as mteb's CrossEncoderProtocol; arguments as `BiEncoderModel`."""

    def __init__(
        self,
        model_name: str | CrossEncoder,
        revision: str | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        self.model = (
            CrossEncoder.from_pretrained(_at(model_name, revision), **options)
            if isinstance(model_name, str)
            else model_name
        )
        made_of = model_fingerprint(self.model.decoder, self.model.facts(), head=True)
        self.mteb_model_meta = _meta(
            self.model, revision, [made_of, self.model.text.max_seq_length], options, None
        )

    def predict(
        self,
        inputs1: Any,
        inputs2: Any,
        *,
        task_metadata: TaskMetadata | None = None,
        prompt_type: PromptType | None = None,
        hf_split: str | None = None,
        hf_subset: str | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Scores of pairs, float32 [n]: queries from the first loader, documents from the second.

        `options` (mteb's encode_kwargs) are those of `CrossEncoder.predict`.
        """
        return self.model.predict(list(zip(_texts(inputs1), _texts(inputs2), strict=True)), **options)


def _texts(loader: Any) -> list[str]:
    return [text for batch in loader for text in batch["text"]]


def _at(source: str, revision: str | None) -> str:
    """A source with the revision that mteb asks for; local files have none."""
    return f"{source}@{revision}" if revision and not Path(source).exists() else source


def _meta(
    model: Any, revision: str | None, made_of: list[Any], given: dict[str, Any], dimension: int | None
) -> ModelMeta:
    """What mteb files results under: by all that they depend on, since it takes those of the same name and revision
    for this model's.

    Args:
        model: a loaded model.
        revision: what the user calls it.
        made_of: its weights and settings, as JSON values.
        given: what was asked for besides the source: an experiment, as mteb calls it.
        dimension: of its vectors.
    """
    text = json.dumps([*made_of, model.decoder.dtype.name, model.decoder.build.int8], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:40]
    experiment = {
        name: str(value) for name, value in given.items() if value not in (None, {}) and name != "mesh"
    }
    name = model.name if "/" in model.name else f"local/{model.name or 'model'}"
    leaves = jax.tree.leaves(split(model.decoder)[1])
    config = model.decoder.config
    facts = {
        "name": name,
        "revision": revision or digest,
        "experiment_kwargs": experiment and {**experiment, "digest": digest[:16]},
        "n_parameters": sum(leaf.size for leaf in leaves),
        "n_embedding_parameters": config.vocab_size * config.embed_dim,
        "memory_usage_mb": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 2**20,
        "max_tokens": model.text.max_seq_length,
        "embed_dim": dimension,
        "similarity_fn_name": model.similarity_name if dimension else None,
        "use_instructions": given.get("instruction") is not None,
        "model_type": ["dense"] if dimension else ["cross-encoder"],
        "framework": ["JAX"],
    }
    return ModelMeta.create_empty(facts)
