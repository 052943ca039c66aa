"""Re-rankers with a scoring of their own against sentence-transformers and their makers' formulas: tiny folders."""

import dataclasses
import json
import shutil
import warnings

import adapters
import folders
import numpy as np
import pytest
from devices import run_on_eight
from transformers import AutoTokenizer

import sgpt_jax.own_scoring
from sgpt_jax.cli.parser import main
from sgpt_jax.cross_encoder import CrossEncoder, NaNScoreError
from sgpt_jax.errors import InputError
from sgpt_jax.folder.scoring import read_scoring
from sgpt_jax.reports import ScoreReport
from sgpt_jax.text.encoder import TextEncoder
from sgpt_jax.text.templates import TwoTexts

PAIRS = folders.PAIRS
LONG = folders.LONG_DOCUMENT
# folder, the name it is written under, what is asked for, the reference.
CASES = [
    ("qwen3_reranker", None, None, "scores"),
    ("qwen3_reranker", None, "fish", "prompt:fish"),
    ("qwen3_reranker_plain", None, None, "scores"),
    ("zerank", None, None, "scores"),
    ("pair_reranker", None, None, "scores"),
    ("pair_reranker", None, "", "no_prompt"),
    ("pair_reranker", None, "fish", "prompt:fish"),
    ("qwen3_classifier", None, None, "scores"),
    ("gemma_classifier", None, None, "scores"),
    ("bge_reranker_v2_gemma", None, None, "formula"),
    ("mxbai_rerank_v2", "mxbai-rerank-base-v2", None, "formula"),
]
NAMES = [name for name in dict.fromkeys(name for name, *_ in CASES) if name != "mxbai_rerank_v2"]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    made = {}

    def load(name, written=None, **options):
        written = written or name
        if written not in made:
            made[written] = folders.write_folder(name, tmp_path_factory.mktemp("models") / written)
        return CrossEncoder.from_pretrained(made[written], **options)

    return load


def scores_of(model, pairs=PAIRS, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.predict(pairs, **options)


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def edit(folder, name, **changes):
    """Changes keys of a JSON file; None removes one."""
    found = json.loads((folder / name).read_text("utf-8")) | changes
    (folder / name).write_text(json.dumps({k: v for k, v in found.items() if v is not None}), "utf-8")


@pytest.mark.parametrize(("name", "written", "prompt", "key"), CASES)
def test_scores_are_the_references(name, written, prompt, key, model_of):
    assert_close(scores_of(model_of(name, written, prompt=prompt)), folders.expected(name)[key])


@pytest.mark.parametrize("name", NAMES)
def test_alone_or_in_any_batch_the_same(name, model_of):
    model = model_of(name)
    pairs = [*PAIRS, ("", folders.DOCUMENTS[0]), (folders.QUERIES[2], ""), ("", ""), (LONG, LONG)]
    together = scores_of(model, pairs)
    assert_close(np.concatenate([scores_of(model, [pair]) for pair in pairs]), together)
    order = np.random.RandomState(0).permutation(np.repeat(np.arange(len(pairs)), 3))
    shuffled = scores_of(model, [pairs[i] for i in order], batch_tokens=512)
    assert_close(shuffled, together[order])
    assert len(np.unique(together[: len(PAIRS)].round(4))) == len(PAIRS)
    assert model.predict([]).shape == (0,)


def test_by_name_where_the_folder_says_nothing(tmp_path):
    """Qwen3-Reranker and zerank without template and modules, by folder name or by config.json's name."""
    folder = folders.write_folder("qwen3_reranker", tmp_path / "Qwen3-Reranker-0.6B")
    for file in ("modules.json", "chat_template.jinja", "config_sentence_transformers.json"):
        (folder / file).unlink()
    chances = 1 / (1 + np.exp(-folders.expected("qwen3_reranker")["formula"]))
    assert_close(scores_of(CrossEncoder.from_pretrained(folder)), chances)
    instructed = CrossEncoder.from_pretrained(folder, prompt="Find the passage that is about fish")
    assert_close(scores_of(instructed), folders.expected("qwen3_reranker")["prompt:fish"])
    folder = folder.rename(tmp_path / "copy")
    assert CrossEncoder.from_pretrained(folder).scoring is None
    edit(folder, "config.json", _name_or_path="Qwen/Qwen3-Reranker-0.6B")
    assert CrossEncoder.from_pretrained(folder).scoring.scoring.says == "known by its name"

    folder = folders.write_folder("zerank", tmp_path / "zerank-1-small")
    for file in ("modules.json", "chat_template.jinja"):
        (folder / file).unlink()
    model = CrossEncoder.from_pretrained(folder)
    assert_close(scores_of(model), folders.expected("zerank")["scores"])
    with pytest.raises(InputError, match="takes no instruction"):
        CrossEncoder.from_pretrained(folder, prompt="Find fish")


def test_rankllama(tmp_path):
    """An adapter that brings the `score` head, as the source or over its base."""
    base = folders.write_folder("rankllama_base", tmp_path / "llama")
    adapter = adapters.write_adapter("rankllama", tmp_path / "rankllama-v1-7b-lora-passage", base)
    for model in (
        CrossEncoder.from_pretrained(adapter),
        CrossEncoder.from_pretrained(base, adapter=adapter),
    ):
        assert_close(scores_of(model), folders.expected("rankllama")["pair"])
        assert model.scoring.scoring.says == "adapter_config.json: SEQ_CLS; known by its name"
    assert CrossEncoder.from_pretrained(base).scoring is None
    with pytest.raises(InputError, match="a classifier has no log-probabilities"):
        CrossEncoder.from_pretrained(adapter, prompt="{} a ")


def test_two_texts_are_tokenised_as_the_tokenizer_does(tmp_path):
    """At every limit, whichever text is the longer, and also where one of them is empty."""
    for name, side in (
        ("pair_reranker", "right"),
        ("gemma_classifier", "left"),
        ("gemma_classifier", "right"),
    ):
        folder = folders.write_folder(name, tmp_path / f"{name}-{side}")
        tokenizer = AutoTokenizer.from_pretrained(folder, truncation_side=side)
        texts = ["", "a", "no bacteria in the cell", "A river in the mountains brings cold water", LONG]
        pairs = [(first, second) for first in texts for second in texts]
        whole = tokenizer(pairs)["input_ids"]
        for limit in (5, 6, 9, 64, 2000):
            theirs = tokenizer(pairs, truncation="longest_first", max_length=limit)["input_ids"]
            found = TwoTexts().tokenise(TextEncoder(tokenizer, limit), "", *zip(*pairs, strict=True))
            assert found.ids == theirs, (name, side, limit)
            cut = [len(ids) > limit for ids in whole]
            assert (found.documents_cut | found.queries_cut).tolist() == cut


def test_cuts_are_counted_and_the_template_keeps_its_end(model_of):
    model, report = model_of("zerank", max_seq_length=64), ScoreReport()
    with pytest.warns(UserWarning, match="of 4 pairs: 2 with a document that is too long and was cut"):
        model.predict([(PAIRS[0][0], LONG), ("fish", "fish"), (PAIRS[0][0], LONG), ("", "")], report=report)
    assert (report.pairs, report.documents_cut, report.queries_empty) == (4, 2, 0)
    assert report.tokens < report.tokens_alone  # the equal pair was computed once
    tokens = model.scoring.scoring.form.tokenise(model.text, "", ["a"], [LONG])
    end = model.text.plain_ids(["<|im_end|>\n<|im_start|>assistant\n"])[0]
    assert len(tokens.ids[0]) == 64 and tokens.ids[0][-len(end) :] == end
    with pytest.raises(InputError, match="max_seq_length 6 leaves no room"):
        model_of("zerank", max_seq_length=6).predict(PAIRS)
    with pytest.raises(InputError, match="no log-probabilities of tokens"):
        model.token_log_probs("a", "b")
    with pytest.raises(InputError, match="leaves no room"):
        model_of("bge_reranker_v2_gemma", max_seq_length=90).predict(PAIRS)


def test_a_template_with_braces_asks_for_log_probabilities(model_of, tmp_path):
    for name in ("qwen3_reranker", "pair_reranker"):
        model = model_of(name, prompt='"{}" answers "')
        assert model.scoring is None and model.prompt.prefix == '"'
        plain = folders.write_folder(name, tmp_path / name)
        for file in ("modules.json", "config_sentence_transformers.json", "chat_template.jinja"):
            (plain / file).unlink(missing_ok=True)
        plain = plain.rename(tmp_path / f"a decoder {len(name)}")
        decoder = CrossEncoder.from_pretrained(plain, prompt='"{}" answers "')
        np.testing.assert_array_equal(scores_of(decoder), scores_of(model))
    with pytest.raises(InputError, match="a classifier has no log-probabilities"):
        model_of("qwen3_classifier", prompt="{} is about ")
    with pytest.raises(InputError, match="reduction is for log-probabilities"):
        model_of("qwen3_reranker", reduction="mean")
    model = model_of("qwen3_reranker")
    with pytest.raises(InputError, match="either a prompt or a scoring"):
        dataclasses.replace(model, scoring=None)


def test_rank_is_best_first(model_of):
    model = model_of("qwen3_reranker")
    ranked = model.rank(folders.QUERIES[0], folders.DOCUMENTS, top_k=2)
    scores = scores_of(model, [(folders.QUERIES[0], document) for document in folders.DOCUMENTS])
    assert [hit["corpus_id"] for hit in ranked] == np.argsort(-scores)[:2].tolist()


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"weights": "int8"}])
def test_bfloat16_and_int8(options, model_of):
    for name in ("qwen3_reranker", "qwen3_classifier"):
        scores = scores_of(model_of(name, **options))
        np.testing.assert_allclose(scores, folders.expected(name)["scores"], atol=0.1)


@pytest.mark.parametrize("name", ["qwen3_reranker", "gemma_classifier"])
def test_eight_devices(name, tmp_path):
    code = """
        import json, sys
        import folders
        import sgpt_jax as sgpt
        folder = folders.write_folder(sys.argv[1], sys.argv[2])
        meshes = ["data=8", "data=2,fsdp=2,tensor=2", "tensor=8", "fsdp=8"]
        found = [sgpt.CrossEncoder.from_pretrained(folder, mesh=sgpt.make_mesh(mesh)).predict(folders.PAIRS).tolist()
                 for mesh in meshes]
        print(json.dumps(found))
    """
    done = run_on_eight(code, name, tmp_path / "model")
    for scores in json.loads(done.stdout.splitlines()[-1]):
        assert_close(scores, folders.expected(name)["scores"])


def test_a_job_goes_on_only_with_the_same_scoring(tmp_path):
    folder = folders.write_folder("qwen3_reranker", tmp_path / "model")
    (tmp_path / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{i}", "text": text}) + "\n" for i, text in enumerate(folders.QUERIES))
    )
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(folders.DOCUMENTS))
    )
    (tmp_path / "run.json").write_text(json.dumps({"q0": {"d0": 2.0, "d1": 1.0}, "q1": {"d2": 1.0}}))
    arguments = ["rerank", "run.json", "--queries", "queries.jsonl", "--corpus", "corpus.jsonl", "-o", "out"]
    arguments = [str(tmp_path / a) if "." in a or a == "out" else a for a in arguments]
    assert main([*arguments, "--model", str(folder)]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    ours = [found["q0"]["d0"], found["q0"]["d1"], found["q1"]["d2"]]
    assert_close(ours, folders.expected("qwen3_reranker")["scores"][:3])
    facts = [
        CrossEncoder.from_pretrained(folder, prompt=prompt).facts() for prompt in (None, "fish", "{} a ")
    ]
    edit(folder, "1_LogitScore/config.json", true_token_id=376)
    facts.append(CrossEncoder.from_pretrained(folder).facts())
    assert len({json.dumps(fact, sort_keys=True) for fact in facts}) == 4


def test_info_tells_the_scoring(tmp_path, capsys):
    folder = folders.write_folder("pair_reranker", tmp_path / "model")
    assert main(["info", str(folder)]) == 0
    shown = capsys.readouterr().out
    scored = (
        "pairs: logit of token 374 minus that of token 375, sigmoid, of the pair in two texts, instruction"
    )
    assert scored in shown and "instruction fish: 'Find the passage that is about fish: '" in shown
    assert main(["info", str(folders.write_folder("qwen3_embedding", tmp_path / "embedder"))]) == 0
    assert "pairs: log-probability of the query" in capsys.readouterr().out
    assert main(["info", str(folders.write_folder("kalm", tmp_path / "bidirectional"))]) == 0
    assert "pairs: none (tokens see those behind them" in capsys.readouterr().out


def test_nan_names_the_pair(model_of, monkeypatch):
    model = model_of("pair_reranker")
    monkeypatch.setattr(
        sgpt_jax.own_scoring.OwnScoring,
        "activate",
        lambda self, scores: np.where(scores == scores.max(), np.nan, 0),
    )
    with pytest.raises(NaNScoreError, match="the score of pair 0 is NaN"):
        model.predict([PAIRS[0]] * 2)


def broken(tmp_path, name="qwen3_reranker", file="", **changes):
    folder = folders.write_folder(name, tmp_path / "model")
    if file:
        edit(folder, file, **changes)
    return folder


SETTINGS, BERT = "config_sentence_transformers.json", "sentence_bert_config.json"
CONFIG, LOGIT = "config.json", "1_LogitScore/config.json"
DENSE = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.base.modules.dense.Dense"}


@pytest.mark.parametrize(
    ("name", "file", "changes", "message"),
    [
        ("qwen3_reranker", SETTINGS, {"model_type": "SparseEncoder"}, "a SparseEncoder model"),
        ("zerank", SETTINGS, {"activation_fn": "torch.nn.GELU"}, "torch.nn.GELU is not supp"),
        ("zerank", SETTINGS, {"activation_fn": "mine.Sigmoid"}, "mine.Sigmoid is not supported"),
        ("zerank", SETTINGS, {"default_prompt_name": "x"}, "default_prompt_name 'x'"),
        ("zerank", LOGIT, {"true_token_id": None}, "token ids None"),
        ("zerank", LOGIT, {"true_token_id": 5000}, "token 5000"),
        ("zerank", LOGIT, {"module_input_name": "x"}, "LogitScore reads 'x'"),
        ("zerank", BERT, {"transformer_task": "fill-mask"}, "transformer_task is fill-mask"),
        ("zerank", BERT, {"processing_kwargs": {"text": {"max_length": 3}}}, "processing_kwargs"),
        ("qwen3_classifier", CONFIG, {"num_labels": 3}, "a classifier with 3 labels is no re-ranker"),
        ("qwen3_classifier", CONFIG, {"auto_map": {"AutoModelForSequenceClassification": "a.B"}}, "code of its own"),
        ("qwen3_classifier", CONFIG, {"sentence_transformers": {"activation_fn": "torch.nn.ELU"}}, "torch.nn.ELU"),
    ],
)  # fmt: skip
def test_refused_by_name(name, file, changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        CrossEncoder.from_pretrained(broken(tmp_path, name, file, **changes))


def test_other_modules_templates_and_names_are_refused(tmp_path):
    folder = broken(tmp_path)
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([*modules, DENSE]))
    with pytest.raises(InputError, match="scoring by Dense is not supported"):
        CrossEncoder.from_pretrained(folder)
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(InputError, match="the chat template leaves out the document"):
        CrossEncoder.from_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only users') }}")
    with pytest.raises(InputError, match="the chat template fails: TemplateError: only users"):
        CrossEncoder.from_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template"):
        CrossEncoder.from_pretrained(folder)
    folder = folder.rename(tmp_path / "jina-reranker-v3")
    with pytest.raises(InputError, match="jina-reranker-v3 is not supported: it reads all documents"):
        CrossEncoder.from_pretrained(folder)
    classifier = folders.write_folder("qwen3_classifier", tmp_path / "classifier")
    shutil.copy(
        folders.write_folder("qwen3_reranker_plain", tmp_path / "b") / "model.safetensors", classifier
    )
    with pytest.raises(InputError, match=r"has no score\.weight"):
        CrossEncoder.from_pretrained(classifier)
    plain = folders.write_folder("qwen3_reranker_plain", tmp_path / "c")
    tokenizer = json.loads((plain / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {
        ("nope" if t == "no" else t): i for t, i in tokenizer["model"]["vocab"].items()
    }
    tokenizer["model"]["merges"] = [m for m in tokenizer["model"]["merges"] if "".join(m) != "no"]
    (plain / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="no token 'no'"):
        CrossEncoder.from_pretrained(plain)


def test_folders_that_say_nothing(tmp_path):
    """A decoder with an ordinary chat template and an embedder are scored by log-probabilities, as ever."""
    folder = folders.write_folder("qwen3_embedding", tmp_path / "embedder")
    assert read_scoring(folder) is None
    chat = folders.write_folder("qwen3_reranker_plain", tmp_path / "chat")
    (chat / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}"
    )
    model = CrossEncoder.from_pretrained(chat)
    assert model.scoring is None and np.isfinite(scores_of(model)).all()
