"""What a model folder says about how it scores (query, document) pairs.

A folder that says nothing is a decoder, which scores a document by the query's log-probability. Others score on their
own: by the logits of one or two tokens at the end of a text with both, or by a classifier's `score` head. They say so
in the layout of sentence-transformers (6.2, with which all of this agrees), by their architecture, or by a chat
template with the roles "query" and "document"; a few published re-rankers say nothing, and are known by their names.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from sgpt_jax.checkpoint.untrusted import inside, read_json, read_object
from sgpt_jax.errors import InputError
from sgpt_jax.text.templates import ChatTemplate, FixedTemplate, PairForm, Parts, TwoTexts

_ADAPTER = "adapter_config.json"

_ACTIVATIONS = {"Sigmoid": "sigmoid", "Identity": "identity", "Tanh": "tanh"}


@dataclasses.dataclass(frozen=True)
class Scoring:
    """A folder's own way to score pairs.

    Attributes:
        form: how a pair becomes token ids.
        true: the token whose logit is the score, by its id or as a text that is one token; None for a `score` head.
        false: the token whose logit is taken from it, or None.
        activation: what the score goes through: "sigmoid", "tanh" or "identity".
        says: what says so, for messages.
        prompts: instructions by name.
        prompt: the instruction that is used when none is asked for, "" for none.
        max_seq_length: tokens of a pair at the most as the folder states it, or None: the tokenizer states it.
    """

    form: PairForm
    true: int | str | None
    false: int | str | None
    activation: str
    says: str
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prompt: str = ""
    max_seq_length: int | None = None

    def asked(self, prompt: str | None) -> Scoring:
        """The same with another instruction: the name of one of the folder's, or a text ("" for none)."""
        return self if prompt is None else dataclasses.replace(self, prompt=self.prompts.get(prompt, prompt))

    def facts(self) -> dict[str, Any]:
        """All that scores depend on, besides the model, as JSON values."""
        form: Any = self.form
        return {
            "form": {"kind": type(form).__name__} | dataclasses.asdict(form),
            "true": self.true,
            "false": self.false,
            "activation": self.activation,
            "prompt": self.prompt,
        }

    def describe(self) -> str:
        """One line for the user."""
        if self.true is None:
            score = "score head"
        else:
            token, other = (f"token {value!r}" for value in (self.true, self.false))
            score = f"logit of {token}" + ("" if self.false is None else f" minus that of {other}")
        shown = {
            TwoTexts: "two texts",
            ChatTemplate: "chat template",
            FixedTemplate: "known template",
            Parts: "known template",
        }[type(self.form)]  # type: ignore[index]
        instruction = f", instruction {self.prompt!r}" if self.prompt else ""
        return f"{score}, {self.activation}, of the pair in {shown}{instruction} ({self.says})"


WEB_SEARCH = "Given a web search query, retrieve relevant passages that answer the query"
_QWEN3 = FixedTemplate(
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    instruction=WEB_SEARCH,
    limit=8192,
)
_ZERANK = FixedTemplate(
    "<|im_start|>system\n{query}<|im_end|>\n<|im_start|>user\n{document}<|im_end|>\n<|im_start|>assistant\n"
)
_MXBAI = Parts(
    before=(
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n",
    ),
    query="query: {}",
    document="document: {}",
    after=(
        "\n",
        "You are a search relevance expert who evaluates how well documents match search queries. For each "
        "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
        "relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    limit=8192,
    instruction="instruction: {}",
)
_BGE_GEMMA = Parts(
    before=(),
    query="A: {}",
    document="B: {}",
    after=(
        "\n",
        "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing "
        "a prediction of either 'Yes' or 'No'.",
    ),
    limit=512,
    bos=True,
)


@dataclasses.dataclass(frozen=True)
class _Known:
    """How a published re-ranker scores whose folder does not say so: as its model card does.

    Attributes:
        names: a pattern of its names.
        model_type: of its config.json.
        form, true, false, activation: see `Scoring`; without `true` its folder is known for its `score` head.
    """

    names: str
    model_type: str
    form: PairForm
    true: str | None
    false: str | None = None
    activation: str = "identity"


_KNOWN = (
    _Known(r"qwen3[-_]reranker", "qwen3", _QWEN3, "yes", "no", "sigmoid"),
    _Known(r"zerank[-_]?\d", "qwen3", _ZERANK, "Yes"),
    _Known(r"mxbai[-_]rerank[-_](base|large)[-_]v2", "qwen2", _MXBAI, "1", "0"),
    _Known(r"bge[-_]reranker[-_]v2[-_]gemma", "gemma", _BGE_GEMMA, "Yes"),
    _Known(r"rankllama", "llama", TwoTexts("query: {}", "document: {}"), None),
)
_NOT_SUPPORTED = {
    r"bge[-_]reranker[-_]v2[-_]minicpm|bge[-_]reranker[-_]v2\.5": "its scores come from heads inside the decoder",
    r"jina[-_]reranker[-_]v3": "it reads all documents of a query at once",
    r"nemotron[-_]rerank": "it pools hidden states by code of its own",
}


def read_scoring(
    path: str | os.PathLike[str], name: str = "", adapters: Sequence[str | os.PathLike[str]] = ()
) -> Scoring | None:
    """How a model scores pairs on its own; None where nothing says so.

    A chat template counts as a re-ranker's where it names both roles; of one that writes any role, as many decoders'
    do, sentence-transformers would take "yes" and "no" that the model was never trained to say.

    Args:
        path: the model folder, or a .gguf file.
        name: the name it goes by, such as the hub id.
        adapters: folders of LoRA adapters over it; one that was trained as a classifier brings a `score` head.

    Raises:
        InputError: for broken files, and for what is not supported, by its name.
    """
    path = Path(path)
    config = _object(path / "config.json")
    names = " ".join(
        (name, *(each for folder in (path, *map(Path, adapters)) for each in _names(folder)))
    ).lower()
    for pattern, reason in _NOT_SUPPORTED.items():
        if found := re.search(pattern, names):
            raise InputError(f"{path}: {found[0]} is not supported: {reason}")
    if (path / "modules.json").is_file():
        saved = _object(path / "config_sentence_transformers.json")
        kind = saved.get("model_type", "SentenceTransformer")
        if kind == "CrossEncoder":
            return _read_cross_encoder(path, config, saved)
        if kind != "SentenceTransformer":
            raise InputError(f"{path / 'config_sentence_transformers.json'}: a {kind} model scores no pairs")
        return None
    known = next((each for each in _KNOWN if re.search(each.names, names)), None)
    if known is not None and config.get("model_type", known.model_type) != known.model_type:
        known = None
    return _read_plain(path, config, known, _classifies_by_adapter((path, *adapters)))


def _read_plain(path: Path, config: dict[str, Any], known: _Known | None, adapted: bool) -> Scoring | None:
    """The scoring of a folder without modules: by adapter, architecture, chat template or name."""
    template = _template(path)
    form = None if template is None else ChatTemplate(template, _is_structured(template))
    roles = template is not None and all(re.search(f"['\"]{r}['\"]", template) for r in ("query", "document"))
    if adapted or _classifies(config):
        if not adapted:
            _check_classifier(path, config)
        says = f"{_ADAPTER}: SEQ_CLS" if adapted else f"config.json: {config['architectures'][0]}"
        if known is not None and not roles:
            return Scoring(known.form, None, None, known.activation, f"{says}; known by its name")
        return Scoring(form or TwoTexts(), None, None, _activation(path, config, {}), says)
    if form is not None and roles:
        says = "chat template with the roles query and document"
        return Scoring(form, "yes", "no", _activation(path, config, {}), says)
    if known is not None and known.true is not None:
        return Scoring(known.form, known.true, known.false, known.activation, "known by its name")
    return None


def is_classifier(path: str | os.PathLike[str], adapters: Sequence[str | os.PathLike[str]] = ()) -> bool:
    """Whether a model folder, or one with these adapters over it, is a classifier, which gives no log-probabilities."""
    return _classifies(_object(Path(path) / "config.json")) or _classifies_by_adapter((path, *adapters))


def _read_cross_encoder(path: Path, config: dict[str, Any], saved: dict[str, Any]) -> Scoring:
    """The scoring of a folder that sentence-transformers saved."""
    file = path / "modules.json"
    modules = read_json(file)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise InputError(f"{file}: expected a list of modules")
    kinds = [str(module.get("type", "")) for module in modules]
    short = [kind.rpartition(".")[2] if kind.startswith("sentence_transformers.") else kind for kind in kinds]
    if short not in (["Transformer"], ["Transformer", "LogitScore"], ["Transformer", "CausalScoreHead"]):
        odd = next((kind for kind in short if kind not in ("Transformer", "LogitScore")), " + ".join(short))
        raise InputError(
            f"{file}: scoring by {odd} is not supported; supported are a Transformer that classifies, and one with a "
            "LogitScore"
        )
    if modules[0].get("path"):
        raise InputError(
            f"{path}: the decoder lies in {modules[0]['path']}; move its files to the top folder"
        )
    transformer = _object(path / "sentence_bert_config.json")
    task = transformer.get("transformer_task", "feature-extraction")
    wanted = "text-generation" if len(modules) == 2 else "sequence-classification"
    if task != wanted:
        raise InputError(f"{path / 'sentence_bert_config.json'}: transformer_task is {task}, not {wanted}")
    true = false = None
    if len(modules) == 2:
        head = _object(inside(epath.Path(path), modules[1].get("path", ""), file.name) / "config.json")
        true, false = head.get("true_token_id"), head.get("false_token_id")
        if type(true) is not int or not (false is None or type(false) is int):
            raise InputError(f"{path}: LogitScore has the token ids {true!r} and {false!r}")
        if head.get("module_input_name", "causal_logits") != transformer.get("module_output_name"):
            raise InputError(
                f"{path}: LogitScore reads {head.get('module_input_name')!r}, which nothing gives"
            )
    else:
        _check_classifier(path, config)
    prompts, default = saved.get("prompts") or {}, saved.get("default_prompt_name")
    if not isinstance(prompts, dict) or (default is not None and default not in prompts):
        raise InputError(
            f"{path / 'config_sentence_transformers.json'}: default_prompt_name {default!r} is no prompt"
        )
    prompts = {key: text or "" for key, text in prompts.items()}
    return Scoring(
        _form(path, transformer),
        true,
        false,
        _activation(path, config, saved),
        "modules.json",
        prompts,
        prompts.get(default, ""),
        _limit(path, transformer),
    )


def _form(path: Path, transformer: dict[str, Any]) -> PairForm:
    """How sentence_bert_config.json has pairs written."""
    file = path / "sentence_bert_config.json"
    modalities = transformer.get("modality_config") or {}
    processing = dict(transformer.get("processing_kwargs") or {})
    variables = dict(processing.pop("chat_template", None) or {})
    odd = {
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "restore_suffix",
        "chat_template",
    } & variables.keys()
    if any(processing.values()) or odd:
        raise InputError(f"{file}: processing_kwargs {sorted([*processing, *odd])} is not supported")
    if transformer.get("do_lower_case"):
        raise InputError(f"{file}: do_lower_case is not supported")
    if "message" not in modalities:
        return TwoTexts()
    template = _template(path)
    if template is None:
        raise InputError(f"{path}: its pairs are messages, but it has no chat template")
    said = modalities["message"].get("format", "auto") if isinstance(modalities["message"], dict) else "auto"
    structured = _is_structured(template) if said == "auto" else said == "structured"
    return ChatTemplate(template, structured, variables)


def _limit(path: Path, transformer: dict[str, Any]) -> int | None:
    """max_seq_length, where sentence_bert_config.json has it."""
    kept = transformer.get("processor_kwargs") or transformer.get("tokenizer_args") or {}
    odd = sorted(set(kept) - {"model_max_length", "padding_side"})
    if odd:
        raise InputError(
            f"{path / 'sentence_bert_config.json'}: {', '.join(odd)} of the tokenizer is not supported"
        )
    limit = kept.get("model_max_length", transformer.get("max_seq_length"))
    if limit is not None and (type(limit) is not int or limit < 1):
        raise InputError(
            f"{path / 'sentence_bert_config.json'}: max_seq_length is {limit!r}, not a positive number"
        )
    return limit


def _activation(path: Path, config: dict[str, Any], saved: dict[str, Any]) -> str:
    """The activation that a folder names, else that of sentence-transformers for one label."""
    own = config.get("sentence_transformers")
    said = saved.get("activation_fn") or (own.get("activation_fn") if isinstance(own, dict) else None)
    said = said or config.get("sbert_ce_default_activation_function") or "torch.nn.Sigmoid"
    kind = str(said).rpartition(".")[2]
    if not str(said).startswith("torch.") or kind not in _ACTIVATIONS:
        raise InputError(
            f"{path}: the activation {said} is not supported (supported: {', '.join(_ACTIVATIONS)})"
        )
    return _ACTIVATIONS[kind]


def _classifies(config: dict[str, Any]) -> bool:
    architectures = config.get("architectures") or [""]
    return isinstance(architectures, list) and str(architectures[0]).endswith("ForSequenceClassification")


def _classifies_by_adapter(folders: Sequence[str | os.PathLike[str]]) -> bool:
    return any(_object(Path(folder) / _ADAPTER).get("task_type") == "SEQ_CLS" for folder in folders)


def _check_classifier(path: Path, config: dict[str, Any]) -> None:
    """Refuses what is no classifier with one label and the library's own head."""
    file = path / "config.json"
    if not _classifies(config):
        raise InputError(f"{file}: a {config.get('architectures')} has no score head")
    if "AutoModelForSequenceClassification" in (config.get("auto_map") or {}):
        raise InputError(f"{file}: it scores by code of its own (auto_map), which is not run")
    labels = config.get("num_labels") or len(config.get("id2label") or "12")  # two where it does not say
    if labels != 1:
        raise InputError(f"{file}: a classifier with {labels} labels is no re-ranker: a re-ranker has one")


def _template(path: Path) -> str | None:
    """The source of the chat template, or None."""
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    said = _object(path / "tokenizer_config.json").get("chat_template")
    if isinstance(said, list):  # several by name
        said = next(
            (t.get("template") for t in said if isinstance(t, dict) and t.get("name") == "default"), None
        )
    return said if isinstance(said, str) else None


def _is_structured(template: str) -> bool:
    """Whether a template reads messages as lists of parts, by the signs that sentence-transformers looks for."""
    return any(sign in template for sign in ("content[0]", ".type", "'type'", '"type"', "message.content["))


def _names(path: Path) -> list[str]:
    """All the names that a folder goes by, the one in the hub's cache (models--org--name/snapshots/commit) included."""
    full = path.absolute()
    cached = full.parent.parent.name if full.parent.name == "snapshots" else ""
    return [full.name, cached, str(_object(path / "config.json").get("_name_or_path", ""))]


def _object(file: os.PathLike[str]) -> dict[str, Any]:
    """A JSON object, or {} when there is no such file."""
    return read_object(file) if os.path.isfile(file) else {}
