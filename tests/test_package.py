"""What pip installs."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_in_the_wheel():
    """The list is written out, since `find` knows no packages that lie elsewhere than they are installed."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("sgpt_jax", "train", "eval")
        for path in (ROOT / top).rglob("__init__.py")
    }
    installed = {name if name.startswith("sgpt_jax") else f"sgpt_jax.{name}" for name in found}
    assert sorted(listed) == listed and set(listed) == installed


def test_the_programs_import_themselves_by_relative_names():
    """They are `train` and `eval` in a checkout, and parts of `sgpt_jax` in the wheel."""
    absolute = re.compile(r"^\s*(from|import) (train|eval)\b", re.MULTILINE)
    files = [path for top in ("train", "eval") for path in (ROOT / top).rglob("*.py")]
    assert len(files) > 30
    wrong = {path.name for path in files if absolute.search(path.read_text())}
    assert wrong == {"training.py"}
