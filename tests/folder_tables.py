"""What the tiny folders of `folders.py` hold: embedders and re-rankers as published.

Prompts and templates are those of the models' cards; weights, sizes and vocabularies are not.
"""

from dataclasses import dataclass, field
from typing import Any

Fields = dict[str, Any]

# The four ids behind the 380 of the byte-level BPE.
STYLES = {
    "qwen": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object|>"),
    "llama": ("</s>", "<s>", "<unk>", "<pad>"),
    "gemma": ("<eos>", "<bos>", "<pad>", "<unk>"),
}
WEB_SEARCH = "Given a web search query, retrieve relevant passages that answer the query"
SIMILAR = "Retrieve semantically similar text."


@dataclass(frozen=True)
class Folder:
    """One model folder.

    variant: of `decoders.py`; spelling: of its config.json; config: changes there (None removes a key);
    architecture: written there, decides which head the file holds; bare: names without `model.`.
    style, before, after: the special tokens, and which the post-processor puts around a text (or a pair).
    tokenizer: further keys of tokenizer_config.json; chat_template: its file.
    layout: of modules.json, "old" and "new" type paths (sentence-transformers before and after 5.4), "" for no
    modules.json; modules: class name and config of what follows the decoder.
    transformer, settings: sentence_bert_config.json and config_sentence_transformers.json ({}: no such file).
    """

    variant: str
    architecture: str
    spelling: str = "old"
    config: Fields = field(default_factory=dict)
    bare: bool = False
    style: str = "qwen"
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    tokenizer: Fields = field(default_factory=dict)
    chat_template: str = ""
    layout: str = "old"
    modules: tuple[tuple[str, Fields], ...] = ()
    transformer: Fields = field(default_factory=dict)
    settings: Fields = field(default_factory=dict)


def pooling(*modes: str, include_prompt: bool = True) -> tuple[str, Fields]:
    """Pooling as sentence-transformers 6 writes it."""
    mode = modes[0] if len(modes) == 1 else list(modes)
    return "Pooling", {"embedding_dimension": 32, "pooling_mode": mode, "include_prompt": include_prompt}


def old_pooling(*modes: str, dimension: int = 32, **more: Any) -> tuple[str, Fields]:
    """Pooling as older versions wrote it."""
    keys = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}
    keys |= {"mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "weightedmean": "weightedmean_tokens"}
    keys["lasttoken"] = "lasttoken"
    flags = {f"pooling_mode_{key}": mode in modes for mode, key in keys.items()}
    return "Pooling", {"word_embedding_dimension": dimension} | flags | more


def dense(inside: int, outside: int, **config: Any) -> tuple[str, Fields]:
    return "Dense", {"in_features": inside, "out_features": outside} | config


def modality(output: str, name: str, task: str, chat: bool = False) -> Fields:
    """sentence_bert_config.json of sentence-transformers 6."""
    how = {"method": "forward", "method_output_name": output}
    known = {"text": how} | ({"message": how | {"format": "flat"}} if chat else {})
    return {"transformer_task": task, "modality_config": known, "module_output_name": name}


EMBED = modality("last_hidden_state", "token_embeddings", "feature-extraction")
NORMALIZE: tuple[str, Fields] = ("Normalize", {})
IDENTITY = "torch.nn.modules.linear.Identity"
QWEN: Fields = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
LLAMA: Fields = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
GEMMA: Fields = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
QWEN_IDS: Fields = {"bos_token_id": 380, "eos_token_id": 382, "pad_token_id": None}
LLAMA_IDS: Fields = {"bos_token_id": 381, "eos_token_id": 380, "pad_token_id": 383}
GEMMA_IDS: Fields = {"bos_token_id": 381, "eos_token_id": 380, "pad_token_id": 382}
SETTINGS: Fields = {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
GTE_CODE = {"AutoModel": "modeling_qwen.Qwen2Model", "AutoModelForCausalLM": "modeling_qwen.Qwen2ForCausalLM"}
GTE_CODE |= {"AutoModelForSequenceClassification": "modeling_qwen.Qwen2ForSequenceClassification"}
GRIT_CODE = {"AutoModel": "modeling_gritlm7b.MistralModel"}
GRIT_CODE |= {"AutoModelForCausalLM": "modeling_gritlm7b.MistralForCausalLM"}


def prompts(default: str | None = None, **texts: str) -> Fields:
    return SETTINGS | {"prompts": texts, "default_prompt_name": default}


EMBEDDERS = {
    "qwen3_embedding": Folder(
        "qwen3",
        "Qwen3ForCausalLM",
        config=QWEN_IDS | {"tie_word_embeddings": True},
        bare=True,
        after=("<|endoftext|>",),
        tokenizer=QWEN | {"padding_side": "left", "model_max_length": 131072},
        modules=(old_pooling("lasttoken", include_prompt=True), NORMALIZE),
        settings=prompts(query=f"Instruct: {WEB_SEARCH}\nQuery:", document=""),
    ),
    "embeddinggemma": Folder(
        "gemma3_bidirectional",
        "Gemma3TextModel",
        config=GEMMA_IDS,
        bare=True,
        style="gemma",
        before=("<bos>",),
        after=("<eos>",),
        tokenizer=GEMMA | {"model_max_length": 2048},
        modules=(
            old_pooling("mean", include_prompt=True),
            dense(32, 48, bias=False, activation_function=IDENTITY),
            dense(48, 32, bias=False, activation_function=IDENTITY),
            NORMALIZE,
        ),
        transformer={"max_seq_length": 90, "do_lower_case": False},
        settings=prompts(
            query="task: search result | query: ",
            document="title: none | text: ",
            Clustering="task: clustering | query: ",
            STS="task: sentence similarity | query: ",
        ),
    ),
    "gritlm": Folder(  # its own code is bidirectional; no modules.json is read here
        "mistral_full",
        "MistralForCausalLM",
        config=LLAMA_IDS | {"auto_map": GRIT_CODE},
        style="llama",
        before=("<s>",),
        tokenizer=LLAMA | {"model_max_length": 4096},
        layout="",
    ),
    "e5_mistral": Folder(  # add_eos_token, and a post-processor that only adds <s>
        "mistral",
        "MistralModel",
        config=LLAMA_IDS | {"sliding_window": 64},
        bare=True,
        style="llama",
        before=("<s>",),
        tokenizer=LLAMA | {"pad_token": "</s>", "add_eos_token": True, "model_max_length": 4096},
        modules=(old_pooling("lasttoken"), NORMALIZE),
        transformer={"max_seq_length": 4096, "do_lower_case": False},
        settings=prompts(
            web_search_query=f"Instruct: {WEB_SEARCH}\nQuery: ", sts_query=f"Instruct: {SIMILAR}\nQuery: "
        ),
    ),
    "gte_qwen2": Folder(  # its own code is bidirectional, its own tokenizer appends <|endoftext|>
        "qwen2",
        "Qwen2ForCausalLM",
        config=QWEN_IDS | {"auto_map": GTE_CODE, "eos_token_id": 380},
        tokenizer=QWEN
        | {"eos_token": "<|endoftext|>", "add_eos_token": True, "model_max_length": 32768}
        | {"auto_map": {"AutoTokenizer": [None, "tokenization_qwen.Qwen2TokenizerFast"]}},
        modules=(old_pooling("lasttoken", include_prompt=True), NORMALIZE),
        transformer={"max_seq_length": 8192, "do_lower_case": False},
        settings=prompts(query=f"Instruct: {WEB_SEARCH}\nQuery: "),
    ),
    "nemotron_3_embed": Folder(
        "ministral3_bidirectional",
        "Ministral3Model",
        spelling="new",
        config=LLAMA_IDS,
        bare=True,
        style="llama",
        before=("<s>",),
        tokenizer=LLAMA | {"model_max_length": 4096},
        layout="new",
        modules=(pooling("mean"), NORMALIZE),
        transformer=EMBED,
        settings=prompts(query="query: ", document="passage: "),
    ),
    "kalm": Folder(
        "qwen2_bidirectional",
        "Qwen2Model",
        config=QWEN_IDS,
        bare=True,
        tokenizer=QWEN | {"eos_token": "<|endoftext|>", "model_max_length": 512},
        modules=(old_pooling("mean"), NORMALIZE),
        transformer={"max_seq_length": 150, "do_lower_case": False},
        settings=prompts("query", query=f"Instruct: {WEB_SEARCH} \n Query: ", document=""),
    ),
    "harrier": Folder(
        "gemma3",
        "Gemma3TextModel",
        spelling="new",
        config=GEMMA_IDS,
        bare=True,
        style="gemma",
        before=("<bos>",),
        tokenizer=GEMMA | {"model_max_length": 32768},
        layout="new",
        modules=(pooling("lasttoken"), NORMALIZE),
        transformer=EMBED,
        settings=prompts(
            web_search_query=f"Instruct: {WEB_SEARCH}\nQuery:", sts_query=f"Instruct: {SIMILAR}\nQuery:"
        ),
    ),
    "pooling_all": Folder(  # all modes side by side, without the prompt
        "llama",
        "LlamaModel",
        config=LLAMA_IDS,
        bare=True,
        style="llama",
        before=("<s>",),
        after=("</s>",),
        tokenizer=LLAMA | {"model_max_length": 192},
        layout="new",
        modules=(
            pooling(
                "cls",
                "max",
                "mean",
                "mean_sqrt_len_tokens",
                "weightedmean",
                "lasttoken",
                include_prompt=False,
            ),
        ),
        transformer=EMBED,
        settings=prompts(query="find: ", document="a text: "),
    ),
    "pooling_two": Folder(
        "gpt2",
        "GPT2Model",
        config={"bos_token_id": 380, "eos_token_id": 380},
        bare=True,
        tokenizer={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "model_max_length": 64},
        modules=(old_pooling("lasttoken", "mean", dimension=24),),
        settings=prompts("passage", passage="passage: ", question="question: "),
    ),
    "dense_chain": Folder(
        "llama",
        "LlamaModel",
        config=LLAMA_IDS,
        bare=True,
        style="llama",
        before=("<s>",),
        tokenizer=LLAMA | {"model_max_length": 192},
        layout="new",
        modules=(
            pooling("weightedmean"),
            dense(32, 20),  # with a bias and Tanh, which is what an absent activation means
            dense(20, 20, activation_function="torch.nn.modules.activation.GELU", use_residual=True),
            dense(20, 24, bias=False, activation_function=IDENTITY, use_residual=True),
        ),
        transformer=EMBED,
        settings=SETTINGS | {"similarity_fn_name": "dot", "truncate_dim": 10},
    ),
    "plain_causal": Folder(
        "qwen3",
        "Qwen3ForCausalLM",
        config=QWEN_IDS,
        tokenizer=QWEN | {"model_max_length": 192},
        layout="",
    ),
    "plain_bidirectional": Folder(
        "llama_bidirectional",
        "LlamaForCausalLM",
        spelling="new",
        config=LLAMA_IDS,
        style="llama",
        before=("<s>",),
        tokenizer=LLAMA | {"model_max_length": 192},
        layout="",
    ),
    "chat_embedder": Folder(  # every text goes through the template
        "qwen3",
        "Qwen3Model",
        config=QWEN_IDS,
        bare=True,
        tokenizer=QWEN | {"model_max_length": 60},
        chat_template=(
            "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
            "{{ '<|im_end|>\n' }}{%- endfor -%}{{ '<|endoftext|>' }}"
        ),
        layout="new",
        modules=(pooling("lasttoken"), NORMALIZE),
        transformer=modality("last_hidden_state", "token_embeddings", "feature-extraction", chat=True),
        settings=prompts(query=WEB_SEARCH),
    ),
}

JUDGE = "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
JUDGE += 'Note that the answer can only be "yes" or "no".'
_FIND = "{%%- set %s = messages | selectattr('role', 'eq', '%s') | map(attribute='content') | first -%%}"
QWEN3_TEMPLATE = (
    _FIND % ("instruct", "system")
    + _FIND % ("query", "query")
    + _FIND % ("document", "document")
    + f"{{{{ '<|im_start|>system\n{JUDGE}<|im_end|>\n<|im_start|>user\n' }}}}"
    + f"{{{{ '<Instruct>: ' + (instruct | default('{WEB_SEARCH}')) + '\n<Query>: ' + query }}}}"
    + "{{ '\n<Document>: ' + document + '<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n' }}"
)
ZERANK_TEMPLATE = (
    _FIND % ("query", "query")
    + _FIND % ("document", "document")
    + "{{ '<|im_start|>system\n' + query + '<|im_end|>\n<|im_start|>user\n' + document }}"
    + "{{ '<|im_end|>\n<|im_start|>assistant\n' }}"
)
CAUSAL = modality("logits", "causal_logits", "text-generation", chat=True)
CE_SETTINGS: Fields = {"model_type": "CrossEncoder", "prompts": {}, "default_prompt_name": None}
SIGMOID = "torch.nn.modules.activation.Sigmoid"
FISH = "Find the passage that is about fish"

RERANKERS = {
    "qwen3_reranker": Folder(
        "qwen3",
        "Qwen3ForCausalLM",
        config=QWEN_IDS | {"max_position_embeddings": 2048},
        tokenizer=QWEN | {"padding_side": "left", "model_max_length": 512},
        chat_template=QWEN3_TEMPLATE,
        layout="new",
        modules=(
            (
                "LogitScore",
                {"true_token_id": 374, "false_token_id": 375, "module_input_name": "causal_logits"},
            ),
        ),
        transformer=CAUSAL,
        settings=CE_SETTINGS | {"activation_fn": SIGMOID, "prompts": {"fish": FISH}},
    ),
    "qwen3_reranker_plain": Folder(  # no files of sentence-transformers: what it makes of that folder
        "qwen3",
        "Qwen3ForCausalLM",
        config=QWEN_IDS | {"max_position_embeddings": 2048},
        tokenizer=QWEN | {"padding_side": "left", "model_max_length": 2048},
        chat_template=QWEN3_TEMPLATE,
        layout="",
    ),
    "zerank": Folder(
        "qwen3",
        "Qwen3ForCausalLM",
        config=QWEN_IDS | {"max_position_embeddings": 2048},
        tokenizer=QWEN | {"padding_side": "left", "model_max_length": 256},
        chat_template=ZERANK_TEMPLATE,
        layout="new",
        modules=(
            (
                "LogitScore",
                {"true_token_id": 376, "false_token_id": None, "module_input_name": "causal_logits"},
            ),
        ),
        transformer=CAUSAL,
        settings=CE_SETTINGS | {"activation_fn": IDENTITY},
    ),
    "pair_reranker": Folder(  # yes and no without a template: the pair as two texts
        "qwen2",
        "Qwen2ForCausalLM",
        config=QWEN_IDS | {"max_position_embeddings": 2048},
        tokenizer=QWEN | {"model_max_length": 96},
        after=("<|im_end|>",),
        layout="new",
        modules=(
            (
                "LogitScore",
                {"true_token_id": 374, "false_token_id": 375, "module_input_name": "causal_logits"},
            ),
        ),
        transformer=modality("logits", "causal_logits", "text-generation"),
        settings=CE_SETTINGS | {"prompts": {"fish": FISH + ": "}, "default_prompt_name": "fish"},
    ),
    "qwen3_classifier": Folder(  # the appended end token is the padding token: the head reads the token before it
        "qwen3",
        "Qwen3ForSequenceClassification",
        config=QWEN_IDS | {"pad_token_id": 380, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
        after=("<|endoftext|>",),
        tokenizer=QWEN | {"model_max_length": 96},
        layout="",
    ),
    "gemma_classifier": Folder(
        "gemma",
        "GemmaForSequenceClassification",
        config=GEMMA_IDS
        | {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        | {"sentence_transformers": {"activation_fn": IDENTITY, "version": "5.1.0"}},
        style="gemma",
        before=("<bos>",),
        after=("<eos>",),
        tokenizer=GEMMA | {"model_max_length": 192, "padding_side": "left"},
        layout="",
    ),
    "bge_reranker_v2_gemma": Folder(
        "gemma",
        "GemmaForCausalLM",
        config=GEMMA_IDS | {"max_position_embeddings": 2048},
        style="gemma",
        before=("<bos>",),
        tokenizer=GEMMA | {"model_max_length": 2048},
        layout="",
    ),
    "mxbai_rerank_v2": Folder(
        "qwen2",
        "Qwen2ForCausalLM",
        config=QWEN_IDS | {"max_position_embeddings": 2048},
        tokenizer=QWEN | {"model_max_length": 1024},
        layout="",
    ),
    "rankllama_base": Folder(
        "llama",
        "LlamaForCausalLM",
        config=LLAMA_IDS | {"pad_token_id": None, "max_position_embeddings": 2048},
        style="llama",
        before=("<s>",),
        tokenizer={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 2048},
        layout="",
    ),
}
