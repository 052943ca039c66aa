"""Configs as people have them, and as they should not be: every key handled, harmless, or named."""

import copy
import json
import random
import time
import warnings

import decoders
import pytest

from sgpt_jax.decoder.config import DecoderConfig
from sgpt_jax.errors import InputError
from sgpt_jax.families import FAMILIES, read_config
from sgpt_jax.families.keys import REFUSED
from sgpt_jax.families.reading import ConfigReader
from sgpt_jax.families.unsupported import REASONS

DAMAGE = [
    *(None, True, False, 0, 1, -1, 3, 2**31, 10**9, 10**30, -(10**9)),
    *(0.0, -0.5, 0.3, 1.5, 1e-300, 1e300, float("nan"), float("inf"), float("-inf")),
    *("", "x", "32", "gelu", "default", "\x00", [], [0], [None], ["full_attention"], {}, {"a": 1}),
    *([[["global", "local"], 10**9]], [[[], 10**9]], [["global"]], {"rope_type": "linear", "factor": 0}),
    *(
        {"type": "llama3"},
        {"rope_type": "linear"},
        {"rope_theta": "x"},
        {"full_attention": {"rope_theta": 1.0}},
    ),
]


@pytest.mark.parametrize("variant", decoders.VARIANTS)
@pytest.mark.parametrize("spelling", ["new", "old"])
def test_no_key_of_a_real_config_is_unknown(variant, spelling):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_config(decoders.config(variant, spelling))


def test_damaged_configs_are_refused_or_read():
    """200 configs with one to three keys damaged in type or range: an InputError or a config, and at once."""
    draw = random.Random(0)
    refused = 0
    for _ in range(200):
        variant, spelling = draw.choice(decoders.VARIANTS), draw.choice(["new", "old"])
        hf = decoders.config(variant, spelling)
        for _ in range(draw.randint(1, 3)):
            keys = [key for key in hf if key != "model_type"]
            target = hf
            key = draw.choice(keys)
            if isinstance(hf[key], dict) and hf[key] and draw.random() < 0.7:
                target = hf[key]
                key = draw.choice(list(target))
            if draw.random() < 0.15:
                del target[key]
            else:
                target[key] = copy.deepcopy(draw.choice(DAMAGE))
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert isinstance(read_config(hf), DecoderConfig)
        except InputError as error:
            refused += 1
            assert len(str(error)) < 500, error
        assert time.perf_counter() - start < 1
    assert 60 < refused < 190


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
@pytest.mark.parametrize("value", [0, -4, 2.0, "32", [32], True, float("nan"), 2**40])
def test_sizes_are_whole_numbers_in_range(key, value):
    with pytest.raises(InputError, match=rf"{key} is .*, expected a whole number from 1 to"):
        read_config(decoders.config("llama") | {key: value})


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("llama", {"model_type": ["llama"]}, "model_type"),
        ("llama", {"hidden_size": 2**31 - 4, "vocab_size": 2**31 - 1}, "parameters, more than any decoder"),
        (
            "llama",
            {"hidden_size": 33, "head_dim": None},
            "hidden_size is 33, expected a multiple of the 4 heads",
        ),
        ("llama", {"num_key_value_heads": 3}, "cannot be shared"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 0}},
            "factor is 0, expected a number above 0",
        ),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "has no 'factor'"),
        ("llama", {"rope_parameters": {"rope_theta": -1.0}}, "rope_theta is -1.0"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 2}}, "partial_rotary_factor is 2"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "by layer type"),
        (
            "llama",
            {"rope_theta": 777.0},
            r"llama contradicts itself: rope_theta is 777\.0, and 500\.0 elsewhere",
        ),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "contradicts itself: rope_type"),
        (
            "llama3",
            {"rope_parameters": decoders.config("llama3")["rope_parameters"] | {"low_freq_factor": 4.0}},
            "low_",
        ),
        ("llama", {"hidden_act": 3}, "activation 3 is not supported"),
        ("llama", {"attention_bias": "yes"}, "attention_bias is 'yes', expected true or false"),
        ("llama", {"rms_norm_eps": 0}, "rms_norm_eps is 0, expected a number above 0"),
        ("llama", {"attention_dropout": 1}, "attention_dropout is 1"),
        ("mistral", {"sliding_window": -1}, "sliding_window is -1"),
        ("qwen2_window", {"layer_types": ["full_attention"]}, "layer_types is"),
        ("qwen2_window", {"layer_types": 3 * ["chunked_attention"]}, "layer_types is"),
        ("gptj", {"rotary_dim": 7}, "must be even"),
        ("gpt_neo", {"attention_layers": None, "attention_types": [[["global"], 10**9]]}, "3 layers in all"),
        ("gpt_neo", {"attention_layers": None, "attention_types": [[[], 10**9]]}, "3 layers in all"),
        ("gpt_neo", {"attention_layers": None, "attention_types": 5}, "attention_types is 5"),
        ("gpt_neo", {"attention_layers": ["global", "near", "global"]}, "attention_layers is"),
    ],
)
def test_impossible_values_are_named(variant, change, message):
    with pytest.raises(InputError, match=message):
        read_config(decoders.config(variant) | change)


def _config_of(family):
    variants = (*decoders.VARIANTS, *decoders.NEW_VARIANTS)
    return next(hf for hf in map(decoders.config, variants) if hf["model_type"] == family)


def _not_handled():
    for family in FAMILIES:
        reader = ConfigReader(_config_of(family), family)
        FAMILIES[family].read(reader)
        handled = reader.taken | FAMILIES[family].harmless
        handled |= {"is_causal"} if FAMILIES[family].mask_by_config else set()
        yield from ((family, key) for key in REFUSED if key not in handled)


@pytest.mark.parametrize(("family", "key"), list(_not_handled()))
def test_what_changes_the_result_is_refused_by_name(family, key):
    hf = _config_of(family)
    neutral, _ = REFUSED[key]
    for value in (None, *neutral):
        read_config(hf | {key: value})
    with pytest.raises(InputError, match=key):
        read_config(hf | {key: not neutral[0] if neutral and isinstance(neutral[0], bool) else 0.5})


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ("x", "'x'"),
    ],
)
def test_quantised_configs_are_refused_by_name(value, name):
    with pytest.raises(InputError, match=f"quantised \\({name}"):
        read_config(decoders.config("llama") | {"quantization_config": value})


@pytest.mark.parametrize("value", [{"AutoModel": "modeling_qwen.Qwen2Model"}, "x", ["modeling.X"]])
def test_own_code_is_refused(value):
    with pytest.raises(InputError, match="auto_map names code of its own"):
        read_config(decoders.config("qwen2") | {"auto_map": value})
    read_config(decoders.config("qwen2") | {"auto_map": {}})


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("qwen3_5_text", "three of four layers are gated delta nets: .* no softmax attention"),
        ("embedding_gemma2_text", r"an input of its own from the embedding \(per-layer inputs\)"),
        ("lfm2", "short convolutions, in place of attention"),
        ("qwen3_moe", "it is a mixture of experts"),
        ("xlm-roberta", "it is an encoder, and not a decoder"),
        ("unheard_of", "known: gpt2, gpt_neo"),
    ],
)
def test_other_families_are_refused_with_the_reason(kind, reason):
    with pytest.raises(InputError, match=f"model_type '{kind}' is not supported[:;] .*{reason}"):
        read_config(decoders.config("llama") | {"model_type": kind})
    assert not REASONS.keys() & FAMILIES.keys()


def test_unknown_keys_are_listed_in_one_line():
    hf = decoders.config("llama") | {
        "attention_temperature": 2,
        "unused": None,
        "off": False,
        "note": "x" * 999,
    }
    hf["rope_parameters"] = hf["rope_parameters"] | {"mscale": 0.7}
    with pytest.warns(UserWarning) as caught:
        read_config(hf)
    (warning,) = caught
    message = str(warning.message)
    assert "ignored what is not known here: attention_temperature (2), note ('x" in message
    assert "rope_parameters.mscale (0.7)" in message
    assert "unused" not in message and "off" not in message and len(message) < 300


def test_another_familys_biases_are_no_news_to_mistral():
    """transformers' Mistral has no biases whatever its config says, and neither has ours: with a word."""
    with pytest.warns(UserWarning, match=r"attention_bias \(True\)"):
        config = read_config(decoders.config("mistral") | {"attention_bias": True})
    assert not config.qkv_bias


def test_configs_are_not_changed():
    hf = decoders.config("qwen3_window")
    before = json.dumps(hf)
    read_config(hf)
    assert json.dumps(hf) == before


@pytest.mark.parametrize(
    ("variant", "keys", "read"),
    [
        ("gpt_neo", ["window_size"], lambda c: c.windows == (None, 256, None)),
        ("mistral", ["sliding_window"], lambda c: c.windows == (4096, 4096)),
        ("qwen2_window", ["sliding_window"], lambda c: c.windows == (None, 4096, 4096)),
        ("gptj", ["rotary_dim"], lambda c: c.rotary.dim == min(64, c.head_dim)),
        ("llama", ["max_position_embeddings"], lambda c: c.max_positions == 2048),
        ("llama", ["rope_theta"], lambda c: (c.rotary.base, c.rotary.dim) == (10_000, c.head_dim)),
        (
            "gpt_neox",
            ["rotary_pct", "partial_rotary_factor", "rotary_emb_base", "rope_theta"],
            lambda c: (c.rotary.base, c.rotary.dim) == (10_000, c.head_dim // 4),
        ),
        (
            "phi",
            ["partial_rotary_factor", "rope_theta"],
            lambda c: (c.rotary.base, c.rotary.dim) == (10_000, c.head_dim // 2),
        ),
    ],
)
@pytest.mark.parametrize("spelling", ["new", "old"])
def test_missing_keys_have_the_defaults_of_transformers(variant, keys, read, spelling):
    hf = decoders.config(variant, spelling)
    for key in keys:
        hf.pop(key, None)
        (hf.get("rope_parameters") or {}).pop(key, None)
    assert read(read_config(hf))
