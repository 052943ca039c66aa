"""GGUF files whose metadata is not what it should be: one clear line each, before anything of that size is made."""

import random
import time

import decoders
import numpy as np
import pytest
from etils import epath
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFEndian, GGUFWriter, dequantize
from gguf_files import write_gguf

from sgpt_jax.bi_encoder import BiEncoder
from sgpt_jax.checkpoint import gguf, gguf_reader
from sgpt_jax.checkpoint.weights import load_checkpoint
from sgpt_jax.decoder.model import Decoder
from sgpt_jax.errors import InputError
from sgpt_jax.families import read_config
from sgpt_jax.load import load_decoder

DAMAGE = [None, True, 0, -1, 10**9, 2**40, 0.5, float("nan"), "", "x", [], [1, 2], {}]


@pytest.fixture
def opened(tmp_path):
    path = epath.Path(write_gguf("llama", tmp_path / "model.gguf"))
    return path, gguf_reader.open_gguf(path)


def load(monkeypatch, path, metadata, tensors):
    monkeypatch.setattr(gguf, "open_gguf", lambda _: gguf_reader.Gguf(metadata, tensors))
    return load_checkpoint(gguf.GgufFile(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"general.architecture": "mamba"},
            "architecture 'mamba' is not supported; known: llama, qwen2, qwen3, gemma, gemma2, gemma3",
        ),
        ({"general.architecture": None}, "has no 'general.architecture'"),
        ({"llama.block_count": 10**9}, "num_hidden_layers is 1000000000"),
        ({"llama.block_count": 999}, "parameters, the files can hold"),
        ({"llama.attention.head_count": 0}, "head_count is 0"),
        ({"llama.attention.head_count": 5}, "partial rotation"),
        ({"llama.feed_forward_length": 2**30}, "parameters, the files can hold"),
        ({"llama.rope.freq_base": -1.0}, "freq_base is -1.0"),
        ({"llama.rope.scaling.type": "yarn"}, "rotary scaling 'yarn'"),
        ({"llama.rope.scaling.type": "linear"}, r"no 'llama.rope.scaling.factor'"),
        (
            {"llama.rope.scaling.attn_factor": 2.0},
            "attn_factor 2 is not supported without rope_factors_long",
        ),
        ({"llama.attention.value_length": 4}, "value_length differs from key_length"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8, which is not supported"),
        ({"llama.attention.sliding_window": 4}, "llama.attention.sliding_window is 4"),
    ],
)
def test_impossible_metadata_is_named(change, message, opened, monkeypatch):
    path, file = opened
    with pytest.raises(InputError, match=message):
        load(monkeypatch, path, file.metadata | change, file.tensors)


@pytest.mark.parametrize("key", ["scaling.factor", "scale_linear"])
def test_a_rotary_factor_without_a_type_is_linear(key, opened, monkeypatch):
    path, file = opened
    stated = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    wanted = load(monkeypatch, path, file.metadata | stated, file.tensors).config.rotary
    assert (
        load(monkeypatch, path, file.metadata | {f"llama.rope.{key}": 4.0}, file.tensors).config.rotary
        == wanted
    )
    plain = load(monkeypatch, path, file.metadata, file.tensors).config.rotary
    for change in ({"llama.rope.scaling.factor": 1.0}, stated | {"llama.rope.scaling.type": "none"}):
        assert load(monkeypatch, path, file.metadata | change, file.tensors).config.rotary == plain


@pytest.mark.parametrize("change", [{"llama.rope.scaling.factor": 4.0}, {"llama.rope.scaling.type": "yarn"}])
def test_a_rotary_scaling_beside_that_of_tensors_is_refused(change, opened, monkeypatch, tmp_path):
    path = epath.Path(write_gguf("llama3", tmp_path / "scaled.gguf"))
    file = gguf_reader.open_gguf(path)
    with pytest.raises(InputError, match=r"rope\.scaling\.factor 4 beside rope_freqs|rotary scaling 'yarn'"):
        load(monkeypatch, path, file.metadata | change, file.tensors)


def test_big_endian_files_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama", endianess=GGUFEndian.BIG)
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="a big-endian GGUF file, which is not supported"):
        load_decoder(path)


def test_a_file_without_token_embedding(opened, monkeypatch):
    path, file = opened
    tensors = [tensor for tensor in file.tensors if tensor.name != "token_embd.weight"]
    with pytest.raises(InputError, match="no token embedding"):
        load(monkeypatch, path, file.metadata, tensors)


def test_damaged_metadata_is_refused_or_read(opened, monkeypatch):
    path, file = opened
    draw = random.Random(0)
    keys = [key for key in file.metadata if key.startswith(("llama.", "general.arch", "split."))]
    refused = 0
    for _ in range(60):
        change = {key: draw.choice(DAMAGE) for key in draw.sample(keys, draw.randint(1, 2))}
        start = time.perf_counter()
        try:
            assert isinstance(load(monkeypatch, path, file.metadata | change, file.tensors), Decoder)
        except InputError:
            refused += 1
        assert time.perf_counter() - start < 20, change
    assert refused > 30


def hidden_of(path, variant, ids=None):
    wanted = decoders.expected(variant)
    ids = wanted["input_ids"] if ids is None else ids
    mask = wanted["attention_mask"] if ids is wanted["input_ids"] else np.ones_like(ids)
    return decoders.hidden_states(load_decoder(path), ids, mask) * mask[..., None]


@pytest.mark.parametrize(
    "variant",
    [
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_bidirectional",
        "phi3",
        "phi3_window",
        "phi3_partial",
        "mistral_full",
    ],
)
def test_hidden_states_are_those_of_torch(variant, tmp_path):
    path = write_gguf(variant, tmp_path / "model.gguf")
    wanted = decoders.expected(variant)
    assert decoders.relative_error(hidden_of(path, variant), wanted["hidden"]) < 2e-5
    if "long_ids" in wanted:
        long = hidden_of(path, variant, wanted["long_ids"])[0, -2:]
        assert decoders.relative_error(long, wanted["long_hidden"]) < 2e-5


@pytest.mark.parametrize("variant", ["phi3_longrope_short", "phi3_longrope_long"])
def test_longrope(variant, tmp_path):
    config = decoders.config(variant)
    rope = config["rope_parameters"]
    factors = {
        f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32)
        for kind in ("short", "long")
    }
    original = config.get("original_max_position_embeddings") or rope["original_max_position_embeddings"]
    reference = read_config(config).rotary
    fields = {
        "phi3.rope.scaling.original_context_length": original,
        "phi3.rope.scaling.attn_factor": float(reference.attention_factor),
    }
    path = write_gguf(variant, tmp_path / "model.gguf", fields=fields, more=factors)
    assert decoders.relative_error(hidden_of(path, variant), decoders.expected(variant)["hidden"]) < 2e-5


@pytest.mark.parametrize(("dtype", "most"), [("Q8_0", 0.05), ("BF16", 0.05), ("Q5_1", 0.3), ("Q4_0", 0.6)])
def test_quantised_matrices(dtype, most, tmp_path):
    path = write_gguf("llama", tmp_path / "model.gguf", dtype=dtype)
    kinds = {tensor.tensor_type.name for tensor in gguf_reader.open_gguf(path).tensors}
    assert dtype in kinds
    error = decoders.relative_error(hidden_of(path, "llama"), decoders.expected("llama")["hidden"])
    assert 1e-6 < error < most


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_k_quants_are_decoded_in_parts(kind, tmp_path):
    """Their sizes in bytes differ from those in values; more rows than are decoded at a time."""
    quantisation = GGMLQuantizationType[kind]
    values, size = GGML_QUANT_SIZES[quantisation]
    stored = np.random.RandomState(0).randint(0, 60, (gguf.DECODE_ROWS + 3, 2 * size), np.uint8)
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", stored, raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = gguf_reader.open_gguf(tmp_path / "x.gguf").tensors
    decoded = gguf._decode(tensor)
    assert decoded.shape == (gguf.DECODE_ROWS + 3, 2 * values)
    np.testing.assert_array_equal(decoded, dequantize(stored, quantisation))
    assert np.unique(decoded).size > 10


def write_k_quants(path, kinds, decoded):
    """A Llama of one layer, width 256, its matrices of these kinds and of random contents; or the same as float32."""
    writer = GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, 1), (writer.add_context_length, 64), (writer.add_embedding_length, 256),
        (writer.add_feed_forward_length, 512), (writer.add_head_count, 4), (writer.add_head_count_kv, 4),
        (writer.add_layer_norm_rms_eps, 1e-5),
    ):  # fmt: skip
        add(value)
    draw = np.random.RandomState(0)
    for name in ("attn_norm", "ffn_norm", "output_norm"):
        layer = "" if name == "output_norm" else "blk.0."
        writer.add_tensor(f"{layer}{name}.weight", draw.randn(256).astype(np.float32))
    sizes = {"token_embd": (24, 256), "ffn_gate": (512, 256), "ffn_up": (512, 256), "ffn_down": (256, 512)}
    for name, kind in kinds.items():
        quantisation = GGMLQuantizationType[kind]
        rows, columns = sizes.get(name, (256, 256))
        values, size = GGML_QUANT_SIZES[quantisation]
        stored = draw.randint(0, 60, (rows, columns // values * size), np.uint8)
        name = name if name == "token_embd" else f"blk.0.{name}"
        if decoded:
            writer.add_tensor(f"{name}.weight", dequantize(stored, quantisation))
        else:
            writer.add_tensor(f"{name}.weight", stored, raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_of_k_quants_is_what_the_gguf_package_decodes(tmp_path):
    kinds = {
        "token_embd": "Q6_K", "attn_q": "Q4_K", "attn_k": "Q5_K", "attn_v": "Q3_K", "attn_output": "Q2_K",
        "ffn_gate": "IQ4_XS", "ffn_up": "Q8_0", "ffn_down": "Q4_K",
    }  # fmt: skip
    ids = np.arange(24)[None]
    stored, decoded = (
        decoders.hidden_states(
            load_decoder(write_k_quants(tmp_path / f"{plain}.gguf", kinds, plain)), ids, np.ones_like(ids)
        )
        for plain in (False, True)
    )
    np.testing.assert_array_equal(stored, decoded)
    assert np.isfinite(stored).all() and stored.std() > 0.1
    opened = gguf_reader.open_gguf(tmp_path / "False.gguf")
    tensor = next(tensor for tensor in opened.tensors if "attn_q" in tensor.name)
    with pytest.raises(InputError, match=r"blk.0.attn_q.weight is stored as Q8_K, which is not supported"):
        gguf._decode(tensor._replace(tensor_type=GGMLQuantizationType.Q8_K))


def test_split_files(tmp_path):
    first = write_gguf("llama", tmp_path / "model.gguf", split=7)
    parts = gguf_reader.parts_of(first)
    assert len(parts) > 2 and all(part.exists() for part in parts)
    wanted = decoders.expected("llama")["hidden"]
    for path in (first, parts[1], tmp_path):
        assert decoders.relative_error(hidden_of(path, "llama"), wanted) < 1e-5
    renamed = tmp_path / "renamed.gguf"
    parts[0].rename(renamed)
    with pytest.raises(InputError, match=r"parts of this split GGUF file are not there: model-00001-of"):
        load_decoder(parts[1])
    with pytest.raises(InputError, match="but its name does not say so"):
        load_decoder(renamed)


def test_embedding_files_say_their_pooling_and_mask(tmp_path):
    for kind, pooling in ((0, "weightedmean"), (1, "mean"), (2, "cls"), (3, "lasttoken")):
        path = write_gguf("llama", tmp_path / f"{kind}.gguf", fields={"llama.pooling_type": kind})
        assert BiEncoder.from_pretrained(path).pooling == pooling
    assert BiEncoder.from_pretrained(path, pooling="mean").pooling == "mean"
    path = write_gguf("llama", tmp_path / "rank.gguf", fields={"llama.pooling_type": 4})
    with pytest.raises(InputError, match="pooling_type rank"):
        BiEncoder.from_pretrained(path)
    path = write_gguf("llama_bidirectional", tmp_path / "both.gguf", fields={"llama.attention.causal": False})
    wanted = decoders.expected("llama_bidirectional")["hidden"]
    assert decoders.relative_error(hidden_of(path, "llama_bidirectional"), wanted) < 2e-5


def test_embeddinggemmas_dense_layers(tmp_path):
    weights = {f"dense_{i}.weight": np.random.RandomState(i).randn(*shape).astype(np.float32)
               for i, shape in ((2, (48, 32)), (3, (32, 48)))}  # fmt: skip
    fields = {"gemma-embedding.pooling_type": 1}
    path = write_gguf("gemma3_bidirectional", tmp_path / "x.gguf", fields=fields, more=weights)
    plain = write_gguf("gemma3_bidirectional", tmp_path / "y.gguf", fields=fields)
    model, texts = BiEncoder.from_pretrained(path), ["a heron", "the bay"]
    assert model.decoder.config.bidirectional and model.pooling == "mean" and model.dimension == 32
    wanted = (
        BiEncoder.from_pretrained(plain).encode(texts)
        @ weights["dense_2.weight"].T
        @ weights["dense_3.weight"].T
    )
    np.testing.assert_allclose(model.encode(texts), wanted, rtol=1e-4, atol=1e-4)


def test_fields_that_nobody_knows_are_named(opened, monkeypatch):
    path, file = opened
    with pytest.warns(UserWarning, match=r"ignored what is not known here: llama\.tomorrow"):
        load(monkeypatch, path, file.metadata | {"llama.tomorrow": 1}, file.tensors)
