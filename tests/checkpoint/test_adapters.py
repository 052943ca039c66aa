"""LoRA adapters in peft's layout, against what peft gives for them; and what cannot be merged."""

import json

import decoders
import numpy as np
import pytest
from adapters import ADAPTERS, adapter_tensors, write_adapter
from decoders import hidden_states, relative_error
from folders import QUERIES, expected
from gguf_files import write_gguf
from safetensors.numpy import load_file, save_file

import sgpt_jax as sgpt
from sgpt_jax.checkpoint.weights import load_checkpoint
from sgpt_jax.errors import InputError
from sgpt_jax.folder.source import resolve
from sgpt_jax.load import load_decoder, open_model


def write_base(name, folder, **options):
    return decoders.write_checkpoint(ADAPTERS[name].variant, folder, **options)


def inputs(name):
    ids = decoders.expected(ADAPTERS[name].variant)["input_ids"][:1]
    return ids, np.ones_like(ids)


def loaded(base, *adapters):
    return load_checkpoint(open_model(resolve(base), adapters).files)


@pytest.mark.parametrize(
    "name", [n for n in ADAPTERS if not n.startswith("chain") and n not in ("e5_lora", "rankllama")]
)
def test_hidden_states_and_logits_are_those_of_peft(name, tmp_path):
    base = write_base(name, tmp_path / "base")
    adapter = write_adapter(name, tmp_path / "adapter", base)
    decoder = load_decoder(adapter)  # brings its base
    wanted = expected(name)
    hidden = hidden_states(decoder, *inputs(name))
    assert relative_error(hidden[0], wanted["hidden"]) < 1e-5
    if "logits" in wanted:
        logits = np.asarray(decoder.logits(hidden[:, -1:]))[0, 0]
        assert relative_error(logits, wanted["logits"]) < 1e-5
    before = hidden_states(load_decoder(base), *inputs(name))
    assert relative_error(before[0], wanted["hidden"]) > 0.1


def test_a_chain(tmp_path):
    """As the argument, and as an adapter over an adapter; the base without the head and its prefix."""
    base = write_base("chain_first", tmp_path / "base", model_class="base")
    first = write_adapter("chain_first", tmp_path / "first", base)
    second = write_adapter("chain_second", tmp_path / "second", first)
    for decoder in (loaded(base, first, tmp_path / "second"), load_decoder(second)):
        hidden = hidden_states(decoder, *inputs("chain_first"))
        assert relative_error(hidden[0], expected("chain")["hidden"]) < 1e-5
    folder = json.loads((first / "adapter_config.json").read_text())
    (first / "adapter_config.json").write_text(json.dumps(folder | {"base_model_name_or_path": str(second)}))
    with pytest.raises(InputError, match="a circle"):
        load_decoder(second)


def test_over_a_gguf_file_and_on_a_bi_encoder(tmp_path):
    base = write_gguf("llama", tmp_path / "base.gguf")
    adapter = write_adapter("plain", tmp_path / "adapter", "some/base")
    hidden = hidden_states(loaded(base, adapter), *inputs("plain"))
    assert relative_error(hidden[0], expected("plain")["hidden"]) < 1e-5
    adapted = sgpt.BiEncoder.from_pretrained(base, adapter=adapter)
    adapted.save_pretrained(tmp_path / "merged")
    merged = sgpt.BiEncoder.from_pretrained(tmp_path / "merged")
    np.testing.assert_array_equal(merged.encode(QUERIES), adapted.encode(QUERIES))
    plain = sgpt.BiEncoder.from_pretrained(base)
    assert relative_error(plain.encode(QUERIES), adapted.encode(QUERIES)) > 0.1


def test_dtype_and_mesh(tmp_path):
    base = write_base("plain", tmp_path / "base", dtype="bfloat16")
    adapter = write_adapter("plain", tmp_path / "adapter", base)
    decoder = load_checkpoint(open_model(resolve(adapter)).files, "bfloat16")
    assert relative_error(hidden_states(decoder, *inputs("plain"))[0], expected("plain")["hidden"]) < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is True, which cannot be merged"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"use_tomorrows_kind": True}, "use_tomorrows_kind"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the weights of the base"),
        ({"init_lora_weights": "loftq"}, "changed the weights of the base"),
        ({"loftq_config": {"loftq_bits": 4}}, "changed the weights of the base"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"r": 0}, "r is 0"),
        ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern"),
        ({"rank_pattern": {"(": 4}}, "no pattern"),
        ({"r": 8}, "has rank 4, but adapter_config.json says 8"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": "/no/such/base"}, "names the base /no/such/base, which is not found"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_its_name(change, message, tmp_path):
    base = write_base("plain", tmp_path / "base")
    adapter = write_adapter("plain", tmp_path / "adapter", base)
    config = json.loads((adapter / "adapter_config.json").read_text()) | change
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        load_decoder(adapter)


def test_tensors_that_do_not_fit(tmp_path):
    base = write_base("plain", tmp_path / "base")
    adapter = write_adapter("plain", tmp_path / "adapter", base)
    file = adapter / "adapter_model.safetensors"
    stored = load_file(file)
    name = next(name for name in stored if name.endswith("q_proj.lora_A.weight"))
    dora = {name.replace("lora_A.weight", "lora_magnitude_vector"): np.ones(32, np.float32)}
    further = {name.replace("layers.0", "layers.7"): stored[name]}
    further |= {n.replace("lora_A", "lora_B"): np.ones((32, 4), np.float32) for n in further}
    for tensors, message in (
        (stored | dora, r"DoRA\) cannot be merged"),
        (stored | further, "belongs to another base than this llama: that has no layers.7"),
        (
            stored | {name: np.ones((4, 16), np.float32)},
            "belongs to another base: it changes layers.0.self_attn.q_proj",
        ),
        ({n: v for n, v in stored.items() if n != name}, "lora_A and lora_B of .* do not belong together"),
    ):
        save_file(tensors, file)
        with pytest.raises(InputError, match=message):
            load_decoder(adapter)
    file.unlink()
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors"):
        load_decoder(adapter)


def test_a_vocabulary_that_grew(tmp_path):
    base = write_base("modules_to_save", tmp_path / "base")
    adapter = write_adapter("modules_to_save", tmp_path / "adapter", base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    file = adapter / "adapter_model.safetensors"
    stored = adapter_tensors("modules_to_save", config)
    tables = {n: np.concatenate([v, v[:3]]) for n, v in stored.items() if "lora" not in n}
    assert len(tables) == 2
    save_file(stored | tables, file)
    decoder = load_decoder(adapter)
    assert decoder.config.vocab_size == decoders.VOCAB_SIZE + 3
    assert (
        relative_error(
            hidden_states(decoder, *inputs("modules_to_save"))[0], expected("modules_to_save")["hidden"]
        )
        < 1e-5
    )


@pytest.mark.parametrize("variant", ["llama_tied", "gpt2"])
@pytest.mark.parametrize(
    ("saved", "lora", "tied"),
    [
        (("head",), (), False),
        ((), ("head",), False),
        (("embed",), (), False),
        (("embed", "head"), (), False),
        (("embed",), (), True),
        ((), ("embed",), True),
    ],
)
def test_a_head_that_the_base_ties(variant, saved, lora, tied, tmp_path):
    """New tensors of peft's `modules_to_save`, and LoRA, over either of two tables that are one in the base."""
    base = decoders.write_checkpoint(variant, tmp_path / "base")
    embed = {"llama_tied": "model.embed_tokens", "gpt2": "transformer.wte"}[variant]
    names = {"embed": embed, "head": "lm_head"}
    old = decoders.tensors(variant)[f"{embed}.weight"]
    random = np.random.RandomState(0)
    tables, tensors = {"embed": old, "head": old}, {}
    for which in saved:
        tables[which] = random.standard_normal(old.shape).astype(np.float32)
        tensors[f"{names[which]}.weight"] = tables[which]
    for which in lora:
        parts = {
            "embed": ("lora_embedding_A", "lora_embedding_B"),
            "head": ("lora_A.weight", "lora_B.weight"),
        }
        shapes = [
            (2, old.shape[0]),
            (old.shape[1], 2),
        ]  # of embeddings; of a linear layer they are swapped around
        if which == "head":
            shapes = [(2, old.shape[1]), (old.shape[0], 2)]
        down, up = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
        tables[which] = old + 2 * ((up @ down).T if which == "embed" else up @ down)
        tensors |= {
            f"{names[which]}.{part}": values for part, values in zip(parts[which], (down, up), strict=True)
        }
        tensors[f"{names[which]}.base_layer.weight"] = old  # peft stores it with embeddings and heads
    if tied:
        tables["head"] = tables["embed"]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": list(lora)}
    config |= {"modules_to_save": list(saved), "ensure_weight_tying": tied and not lora}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {f"base_model.model.{name}": values for name, values in tensors.items()},
        adapter / "adapter_model.safetensors",
    )
    decoder = loaded(base, adapter)
    assert decoder.config.head == ("tied" if tied else "untied")
    np.testing.assert_allclose(np.asarray(decoder.embed.tokens.embedding[...]), tables["embed"], rtol=1e-5)
    hidden = random.standard_normal((1, 1, old.shape[1])).astype(np.float32)
    assert relative_error(np.asarray(decoder.logits(hidden)), hidden @ tables["head"].T) < 1e-5


def test_over_a_base_with_code_of_its_own(tmp_path):
    """Whose mask the user gives, as without an adapter."""
    base = write_base("plain", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_x.X"}}))
    adapter = write_adapter("plain", tmp_path / "adapter", base)
    with pytest.raises(InputError, match="auto_map names code of its own"):
        load_decoder(adapter)
    decoder = load_checkpoint(open_model(resolve(adapter), bidirectional=False).files)
    hidden = hidden_states(decoder, *inputs("plain"))
    assert relative_error(hidden[0], expected("plain")["hidden"]) < 1e-5
