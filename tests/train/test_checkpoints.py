"""Checkpoints damaged after they were written: the sound one before is taken, and it is said."""

import shutil
import warnings

import jax
import numpy as np
import pytest

from sgpt_jax.errors import InputError
from train.checkpoints import Checkpoints
from train.step import TrainState


def state(value, width=300):
    draw = np.random.default_rng(value)
    leaf = jax.device_put(draw.standard_normal((7, width)).astype(np.float32))
    return TrainState(
        {"bias": leaf, "frozen": None}, {"mu": leaf * 2}, jax.numpy.int32(value), jax.numpy.arange(2)
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(folder, 2)
    for step in (10, 20):
        checkpoints.save(step, state(step), {"epoch": 0, "position": step})
        checkpoints.save_best(step, state(step).trainable, step / 100)
    checkpoints.close()
    return folder


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def damage(file, kind, seed):
    draw = np.random.default_rng(seed)
    content = bytearray(file.read_bytes())
    start = int(draw.integers(len(content) or 1))
    if kind == "gone":
        file.unlink()
        return
    if kind == "cut":
        content = content[:start]
    elif kind == "zeroed":
        content[start : start + 64] = bytes(len(content[start : start + 64]))
    elif content:
        content[start] ^= 1 << int(draw.integers(8))
    file.write_bytes(content)


def all_files(folder):
    return sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("kind", ["gone", "cut", "zeroed", "flipped"])
@pytest.mark.parametrize("which", ["checkpoints", "best"])
def test_every_file_damaged(written, kind, which, tmp_path):
    """The newest, to the bit, or the one before with a warning that names the damaged one. Never anything else."""
    for number, name in enumerate(all_files(written / which / "20")):
        folder = tmp_path / str(number)
        shutil.copytree(written, folder)
        damage(folder / which / "20" / name, kind, number)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            checkpoints = Checkpoints(folder, 2)
            if which == "checkpoints":
                step, found, position = checkpoints.restore(state(0))
                assert position == {"epoch": 0, "position": step}
                assert same(found, state(step)), name
                checkpoints.save(20, state(21), {"epoch": 0, "position": 20})  # nothing is in the way
                checkpoints.wait()
                assert 20 in checkpoints.newest.all_steps()
            else:
                step, found, dev = checkpoints.restore_best(state(0).trainable)
                assert dev == step / 100
                assert same(found, state(step).trainable), name
        checkpoints.close()
        if (
            name.name == "commit_success.txt" and kind == "gone"
        ):  # by which it looks like one that was never finished
            continue
        said = [str(warning.message) for warning in caught if "damaged" in str(warning.message)]
        assert step in (10, 20)
        assert not said if step == 20 else said and str(folder / which / "20") in said[0], (name, said)
        if str(name) == "state/manifest.ocdbt" and kind in ("gone", "cut"):
            assert step == 10 and (folder / f"{which}.damaged/20").exists()


def test_all_damaged_is_an_error(written, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(written, folder)
    for step in ("10", "20"):
        damage(folder / "checkpoints" / step / "state/manifest.ocdbt", "gone", 0)
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(InputError, match=r"no checkpoint is sound; remove checkpoints\.damaged"),
    ):
        Checkpoints(folder, 2).restore(state(0))
    with pytest.raises(InputError, match="no checkpoint is sound"):  # nor does a second start begin unasked
        Checkpoints(folder, 2).restore(state(0))
    shutil.rmtree(folder / "checkpoints.damaged")
    assert Checkpoints(folder, 2).restore(state(0)) is None


def test_a_step_that_orbax_would_not_save(written, tmp_path):
    """It keeps no step before its newest: that is an error, and the best of later steps go when a run goes back."""
    shutil.copytree(written, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run", 5)
    with pytest.raises(InputError, match=r"did not save step 15; the newest there is 20"):
        checkpoints.save(15, state(15), {})
    checkpoints.drop_best_after(12)
    checkpoints.save_best(15, state(15).trainable, 0.9)
    assert checkpoints.restore_best(state(0).trainable)[0] == 15
    assert sorted(checkpoints.best.all_steps()) == [10, 15]
    checkpoints.close()


def test_another_model_is_no_damage(written, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(written, folder)
    before = all_files(folder)
    with pytest.raises(InputError, match=r"step 20 does not fit.*float32\[7, 300\].*float32\[7, 5\]"):
        Checkpoints(folder, 2).restore(state(0, width=5))
    other = state(0)._replace(trainable={"weight": state(0).trainable["bias"]})
    with pytest.raises(InputError, match=r"trainable\.bias is only in the checkpoint"):
        Checkpoints(folder, 2).restore(other)
    assert all_files(folder) == before
