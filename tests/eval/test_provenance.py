"""What a result says of the code that made it."""

import subprocess

from eval import provenance


def test_a_commit_is_dirty_by_its_files_but_not_by_results(tmp_path):
    """Otherwise the second of several results would be of another commit than the first."""

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    assert provenance._commit(tmp_path / "nowhere") is None
    folder, results = tmp_path / "eval", tmp_path / "eval" / "results"
    results.mkdir(parents=True)
    code, table = tmp_path / "code.py", results / "README.md"
    for file in (code, table):
        file.write_text("first")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = provenance._commit(folder)
    assert clean and len(clean) == 12
    table.write_text("second")
    (results / "new.json").write_text("{}")
    assert provenance._commit(folder) == clean
    code.write_text("second")
    assert provenance._commit(folder) == f"{clean}-dirty"
