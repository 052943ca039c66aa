"""Damaged files of a model: an error that names what is wrong, or a model, and at once; never another exception.

200 damages with fixed seeds: JSON files of a folder cut, with bytes changed, and with values of other types; the
headers of a GGUF file cut, zeroed and with bytes changed.
"""

import copy
import json
import random
import shutil
import time
import warnings

import pytest
from etils import epath
from folders import write_folder
from gguf_files import write_gguf

from sgpt_jax.checkpoint import gguf_reader
from sgpt_jax.checkpoint.gguf_tokenizer import load_gguf_tokenizer
from sgpt_jax.checkpoint.tensors import open_checkpoint
from sgpt_jax.checkpoint.weights import load_checkpoint
from sgpt_jax.decoder.model import Decoder
from sgpt_jax.errors import InputError
from sgpt_jax.folder.settings import ModelSettings, read_settings
from sgpt_jax.text.encoder import TextEncoder
from sgpt_jax.text.tokenizer import load_tokenizer

VALUES = [
    None,
    True,
    False,
    0,
    -1,
    3,
    10**9,
    2**70,
    0.5,
    float("nan"),
    "",
    "x",
    "\0",
    [],
    [1, "a"],
    {},
    {"a": [None]},
]
FILES = (
    "modules.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "sentence_bert_config.json",
    "tokenizer_config.json",
)


def attempt(action, wanted, what):
    """Whether an action refuses its input; else it must give what is wanted, and in any case soon."""
    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert isinstance(action(), wanted)
        return False
    except InputError as error:
        assert 0 < len(str(error)) < 2000
        return True
    finally:
        assert time.process_time() - start < 20, what


def damaged_bytes(content, draw):
    """Cut, zeroed in a span, or with some bytes changed."""
    data = bytearray(content)
    kind, start = draw.randrange(3), draw.randrange(len(data))
    if kind == 0:
        del data[start:]
    elif kind == 1:
        end = min(len(data), start + draw.choice([1, 4, 40]))
        data[start:end] = bytes(end - start)
    else:
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data)


def damaged_json(content, draw):
    """With a value, at any depth, of another type or missing."""
    value = copy.deepcopy(content)
    spots = []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            spots.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(value)
    if not spots or draw.random() < 0.1:
        return draw.choice(VALUES)
    node, key = draw.choice(spots)
    if draw.random() < 0.2:
        del node[key]
    else:
        node[key] = copy.deepcopy(draw.choice(VALUES))
    return value


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder("embeddinggemma", tmp_path_factory.mktemp("folder") / "model")


@pytest.mark.parametrize("file", FILES)
def test_json_files_of_a_folder(file, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / file
    content = path.read_bytes()
    draw = random.Random(file)
    refused = 0
    for number in range(20):
        if number % 4 == 0:
            path.write_bytes(damaged_bytes(content, draw))
        else:
            path.write_text(json.dumps(damaged_json(json.loads(content), draw)))

        def read(root=tmp_path / "model"):
            settings = read_settings(root)
            if file == "tokenizer_config.json":
                TextEncoder(load_tokenizer(root), 64, prompts=settings.prompts).ids(["a heron"])
            return settings

        refused += attempt(read, ModelSettings, path.read_bytes())
    assert refused > 0


def test_headers_of_a_gguf_file(tmp_path):
    path = write_gguf("llama", tmp_path / "model.gguf")
    content = path.read_bytes()
    header = min(int(tensor.data_offset) for tensor in gguf_reader.open_gguf(path).tensors)
    draw = random.Random(0)
    refused = 0
    for number in range(80):
        damaged = damaged_bytes(content[:header], draw)
        rest = b"" if len(damaged) < header else content[header:]
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(damaged + rest)
        # Of what is read of it, each part by itself: the next is reached whatever the one before says.
        refused += attempt(
            lambda path=path: load_checkpoint(open_checkpoint(epath.Path(path))), Decoder, number
        )
        attempt(lambda path=path: TextEncoder(load_gguf_tokenizer(path), 64), TextEncoder, number)
        attempt(lambda path=path: read_settings(path), ModelSettings, number)
    assert refused > 20
