"""Where models are found: folders, files and the hub, whose client answers from a folder here."""

import types
import warnings

import huggingface_hub
import pytest
from etils import epath
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from sgpt_jax.errors import InputError
from sgpt_jax.folder.source import choose_files, resolve


def test_folders_and_files(tmp_path, monkeypatch):
    folder = tmp_path / "My model"
    folder.mkdir()
    file = tmp_path / "small.Q4_1.gguf"
    file.write_bytes(b"GGUF")
    assert (resolve(folder).path, resolve(str(folder)).name) == (folder, "My model")
    assert resolve(epath.Path(folder)).path == folder
    assert (resolve(file).path, resolve(file).name) == (file, "small.Q4_1")
    monkeypatch.chdir(folder)
    assert resolve(".").name == "My model"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/My model").path == folder


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{tmp}/gone", "no such folder or .gguf file, and it is not the form of a hub id"),
        ("org/name/too/deep", "not the form of a hub id"),
        ("models/gone.gguf", "no such folder or .gguf file"),
        ("two words", "not the form of a hub id"),
        ("", "no such folder"),
        ("org/--name", "not the form of a hub id"),
        ("gs://bucket/model", "copy models from other storage"),
        ("{tmp}/weights.safetensors", "not this kind of file"),
    ],
)
def test_sources_that_are_nothing(source, message, tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=message):
        resolve(source.format(tmp=tmp_path))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's client, answering from a folder; `hub.fail` is raised instead, `hub.broken` by downloads."""
    state = types.SimpleNamespace(
        fail=None, broken=None, names=["config.json"], calls=[], cached=True, folder=tmp_path / "snapshot"
    )
    state.folder.mkdir()

    def model_info(self, repo_id, *, revision=None):
        if state.fail:
            raise state.fail
        return types.SimpleNamespace(
            sha="snapshot", siblings=[types.SimpleNamespace(rfilename=n) for n in state.names]
        )

    def snapshot_download(repo_id, *, revision=None, allow_patterns=None, local_files_only=False):
        state.calls.append((repo_id, revision, allow_patterns, local_files_only))
        if local_files_only and not state.cached:
            raise FileNotFoundError("not in the cache")
        if state.broken and not local_files_only:
            raise state.broken
        return str(state.folder)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def test_a_hub_id_is_downloaded(hub):
    hub.names = ["config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json"]
    found = resolve("org/name")
    assert (found.path, found.name) == (hub.folder, "org/name")
    assert hub.calls == [("org/name", None, ["config.json", "tokenizer.json", "model.safetensors"], False)]
    assert resolve("org/name@refs/pr/1").name == "org/name"
    assert hub.calls[1][1] == "refs/pr/1"
    assert resolve("gpt2").name == "gpt2"


def test_an_unreachable_hub_leaves_the_cache(hub):
    hub.fail = OSError("[Errno -2] Name or service not known")
    with pytest.warns(UserWarning, match=r"no modules\.json"):  # nobody knows whether it should have one
        assert resolve("org/name@v1").path == hub.folder
    assert hub.calls == [("org/name", "v1", None, True)]
    hub.cached = False
    with pytest.raises(
        InputError, match=r"no such folder or .gguf file, and .* cannot be reached .*Name or service"
    ):
        resolve("org/name")


def test_an_interrupted_download_is_refused_without_the_hub(hub):
    """Whichever of its files is the first that is missing."""
    hub.names = ["config.json", "model.safetensors", "modules.json", "1_Pooling/config.json", "README.txt"]
    resolve("org/name")
    hub.fail = OSError("Name or service not known")
    for name in ("config.json", "model.safetensors", "modules.json", "1_Pooling/config.json"):
        with pytest.raises(InputError, match=rf"org/name: its download was interrupted before .*{name}"):
            resolve("org/name")
        (hub.folder / name).parent.mkdir(exist_ok=True)
        (hub.folder / name).write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve("org/name").path == hub.folder
    hub.fail = None
    (hub.folder / "modules.json").unlink()
    assert (
        resolve("org/name").path == hub.folder
    )  # with the hub it is repaired: everything is asked for again
    assert "modules.json" in hub.calls[-1][2] and not hub.calls[-1][3]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RepositoryNotFoundError,
            "no such folder or .gguf file, and the Hugging Face hub has no model of that name",
        ),
        (RevisionNotFoundError, "no revision 'v9'"),
        (GatedRepoError, "login"),
    ],
)
def test_what_the_hub_refuses(hub, error, message):
    hub.fail = refusal(error)
    with pytest.raises(InputError, match=message):
        resolve("org/name@v9")


def refusal(error):
    return error("refused", response=types.SimpleNamespace(headers={}, request=None, status_code=403))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (refusal(GatedRepoError), "org/name: the hub asks for a login"),
        (
            RuntimeError("peer closed connection\nlong"),
            r"org/name: cannot be fetched: peer closed connection; start again",
        ),
    ],
)
def test_a_download_that_breaks_off(hub, error, message):
    hub.broken = error
    with pytest.raises(InputError, match=message):
        resolve("org/name")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["README.md", "config.json", "m.Q4_0.gguf", "m.Q8_0.gguf", "BF16/m.gguf"],
            "download one of its GGUF files and give its path: m.Q4_0.gguf, m.Q8_0.gguf, BF16/m.gguf",
        ),
        ([".gitattributes", "model.onnx"], "org/name: no model in this repository"),
    ],
)
def test_repositories_of_which_nothing_can_be_chosen(hub, names, message):
    hub.names = names
    with pytest.raises(InputError, match=message):
        resolve("org/name")
    assert not hub.calls


def test_only_what_a_model_needs_is_fetched():
    names = [
        *(".gitattributes", "README.md", "config.json", "modules.json", "1_Pooling/config.json"),
        *("tokenizer.json", "tokenizer.model", "merges.txt", "vocab.json", "model.safetensors.index.json"),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "consolidated.safetensors"),
        *("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "onnx/model.onnx", "onnx/config.json"),
        *("original/consolidated.00.pth", "model.fp16.safetensors", "rust_model.ot", "10_Dense/config.json"),
    ]
    assert sorted(set(names) - set(choose_files(names))) == [
        *(".gitattributes", "consolidated.safetensors", "flax_model.msgpack", "model.fp16.safetensors"),
        *("onnx/config.json", "onnx/model.onnx", "original/consolidated.00.pth", "pytorch_model.bin"),
        *("rust_model.ot", "tf_model.h5"),
    ]
    assert choose_files(["config.json", "pytorch_model.bin", "training_args.bin"])[1:] == [
        "pytorch_model.bin"
    ]
    # What is not named as transformers names it would not be loaded.
    assert choose_files(["weights.safetensors", "pytorch_model.bin"]) == ["pytorch_model.bin"]
    assert choose_files(["README.md", "x.Q4_0.gguf"]) == ["README.md", "x.Q4_0.gguf"]
    assert choose_files(["README.md", "x.Q4_0.gguf", "x.Q8_0.gguf"]) == ["README.md"]
    parts = [f"x-0000{number}-of-00002.gguf" for number in (1, 2)]
    assert choose_files(["README.md", *parts]) == ["README.md", *parts]
    adapter = ["adapter_config.json", "adapter_model.safetensors", "2_Dense/model.safetensors"]
    assert choose_files([*adapter, "2_Dense/other.safetensors"]) == adapter
