"""The models of an evaluation: their options, loaded only when something has to be computed, and their identity."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from etils import epath

from sgpt_jax.bi_encoder import BI_ENCODER_SETTINGS, BiEncoder
from sgpt_jax.checkpoint.export import count_parameters
from sgpt_jax.cli.given import flags_given
from sgpt_jax.cli.options import BATCH_TOKENS, BI_ENCODER, MESH, WEIGHTS, Group, positive
from sgpt_jax.cli.options import dtype as dtype_option
from sgpt_jax.cli.options import model as model_option
from sgpt_jax.cross_encoder import CrossEncoder, is_template
from sgpt_jax.decoder.model import split
from sgpt_jax.decoder.sharding import device_mesh
from sgpt_jax.errors import InputError
from sgpt_jax.folder.scoring import read_scoring
from sgpt_jax.folder.source import resolve
from sgpt_jax.load import Opened, open_model
from sgpt_jax.text.pairs import DEFAULT_PROMPT, Prompt

from .provenance import revision

# The zero-shot prompts of the SGPT paper's ablation, by the names of its repository's cross-encoder notebook. "G" is
# the one that the paper's results were made with; the ones for Quora are for pairs of questions.
PROMPTS = {
    "A": "{} ",
    "B": "{}\n",
    "C": "Document:\n{}\n\nQuery:\n",
    "D": "Body:{}\n\nTitle:\n",
    "E": "selected document:\n{}\n\nrelevant query:\n",
    "F": "The selected text is:\n{}\n\nThe relevant query is:\n",
    "G": DEFAULT_PROMPT,
    "H": (
        "Documents are searched to find matches with the same content.\n"
        'Document: "{}"\n\nThe above document is a good match for the query: "'
    ),
    "I": (
        "# Get matching document and query with the same content\n"
        'get_document()\n{}\nget_query_matching_document()\n"'
    ),
    "quoraA": (
        "Questions are searched to find matches with the same content.\n"
        'The question "{}" is a good search result for "'
    ),
    "quoraB": 'Below are two similar questions asking the same thing.\nThe question "{}" is similar to "',
    "quoraC": "These two questions are the same: 1. {} 2.",
    "quoraD": "Question Body: {} Question Title:",
}

RERANK_DEPTH = 100


def add_bi_encoder_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """The options of a bi-encoder; what is not given comes from the model folder."""
    Group("bi-encoder", (model_option(required=required), *BI_ENCODER)).add_to(parser)


def add_cross_encoder_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a cross-encoder that re-ranks with one prompt."""
    group = parser.add_argument_group("cross-encoder")
    group.add_argument("--cross-encoder", metavar="MODEL", help="model folder, hub id, or .gguf file")
    add_depth_argument(group)
    group.add_argument(
        "--prompt",
        help="a template with {} for the document, or a prompt of the SGPT paper by name: "
        f"{', '.join(PROMPTS)}; of a re-ranker an instruction, or the name of one of its own "
        "(default: a re-ranker as its folder says, any other decoder G)",
    )


def add_depth_argument(group: Any) -> None:
    """How many documents of a query are re-ranked."""
    group.add_argument("--rerank-depth", type=positive, metavar="N", help=f"default: {RERANK_DEPTH}")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every model takes."""
    Group("computing", (dtype_option(), WEIGHTS, MESH, BATCH_TOKENS)).add_to(parser)


def check_stages(args: argparse.Namespace) -> None:
    """Refuses options that only a bi-encoder or only a cross-encoder has where it is not asked for.

    Raises:
        InputError: naming them.
    """
    of_encoder = sorted({*BI_ENCODER_SETTINGS} - {"model", "dtype", "weights"})
    for model, names in (("model", of_encoder), ("cross_encoder", ["prompt", "rerank_depth"])):
        if not getattr(args, model) and (unused := flags_given(args, names)):
            raise InputError(f"{', '.join(unused)}: only for a --{model.replace('_', '-')}")
    unused = ["--dtype"] * (args.dtype != "float32") + flags_given(args, ("weights", "mesh", "batch_tokens"))
    if unused and not (args.model or args.cross_encoder):
        raise InputError(f"{', '.join(unused)}: only for a --model or a --cross-encoder")


def check_sides(args: argparse.Namespace) -> None:
    """Refuses options of queries and documents where texts are encoded as neither.

    Raises:
        InputError: naming them.
    """
    if unused := flags_given(args, ("brackets", "query_prompt", "document_prompt")):
        raise InputError(f"{', '.join(unused)}: only for queries and documents; these texts are neither")


class LazyModel:
    """A model that is loaded when `model` is first asked for.

    Args:
        source: what it is loaded from.
        identity: known before: what tells its results from those of another model or other options.
        load: loads it.
    """

    def __init__(self, source: str, identity: dict[str, Any], load: Callable[[], Any]) -> None:
        self.source, self.identity = source, identity
        self._load = functools.cache(load)

    @property
    def model(self) -> Any:
        """The model itself."""
        return self._load()

    def describe(self) -> dict[str, Any]:
        """Source, identity, and what the model says of itself, for a result's JSON."""
        model = self.model
        facts = {
            "source": self.source,
            **self.identity,
            "parameters": count_parameters(split(model.decoder)[1]).total(),
        }
        facts["max_seq_length"] = model.text.max_seq_length
        if isinstance(model, BiEncoder):
            facts |= {"pooling": model.pooling, "brackets": model.text.brackets}
            facts["similarity"] = model.similarity_name
        return facts


def bi_encoder(args: argparse.Namespace) -> LazyModel:
    """The bi-encoder that `add_bi_encoder_arguments` and `add_common_arguments` describe."""
    options = {name: vars(args)[name] for name in ("pooling", "brackets", "max_seq_length", "dtype")}
    # Where they are given: results that were made before these options existed keep their identity.
    later = ("query_prompt", "document_prompt", "truncate_dim", "weights", "bidirectional")
    options |= {name: vars(args)[name] for name in later if vars(args)[name] is not None}
    identity = {**_revisions(open_model(resolve(args.model))), **options}
    if args.biases:
        if not epath.Path(args.biases).is_file():
            raise InputError(f"{args.biases}: no such file")
        identity["biases"] = revision(epath.Path(args.biases))
    if args.adapter:
        identity["adapter"] = [revision(epath.Path(resolve(adapter).path)) for adapter in args.adapter]
    return LazyModel(
        args.model, identity, lambda: BiEncoder.from_settings(vars(args), device_mesh(args.mesh))
    )


def cross_encoder(args: argparse.Namespace) -> LazyModel:
    """The cross-encoder that `add_cross_encoder_arguments` and `add_common_arguments` describe."""
    source = resolve(args.cross_encoder)
    prompt = PROMPTS.get(args.prompt, args.prompt)
    opened = open_model(source)
    scoring = None if is_template(prompt) else read_scoring(opened.settings, source.name, opened.adapters)
    if scoring is None:
        meaning = {"prompt": dataclasses.asdict(Prompt.parse(DEFAULT_PROMPT if prompt is None else prompt))}
    else:
        meaning = {"scoring": scoring.asked(prompt).facts()}
    return LazyModel(
        args.cross_encoder,
        {**_revisions(opened), "dtype": args.dtype, **_weights(args), **meaning},
        lambda: CrossEncoder.from_pretrained(
            args.cross_encoder,
            prompt=prompt,
            dtype=args.dtype,
            mesh=device_mesh(args.mesh),
            weights=args.weights,
        ),
    )


def _revisions(opened: Opened) -> dict[str, Any]:
    """What tells a model's files from others; of an adapter also what lies under it, its base first."""
    *under, top = (revision(epath.Path(path)) for path in dict.fromkeys((opened.base, *opened.adapters)))
    return {"revision": top, "base": under} if under else {"revision": top}


def _weights(args: argparse.Namespace) -> dict[str, str]:
    """The option `--weights`, where it is given: results that were made before it existed keep their identity."""
    return {"weights": args.weights} if args.weights else {}


def encode_options(args: argparse.Namespace) -> dict[str, Any]:
    """What every call of a model gets; the evaluations have progress bars of their own."""
    return {"batch_tokens": args.batch_tokens, "show_progress": False}
