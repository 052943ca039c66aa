"""Options of `sgpt` that could do nothing are refused before anything is loaded, by name and in one line."""

import pytest

from sgpt_jax.cli.parser import main


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("search none heron --cross-encoder M", "--cross-encoder is for --rerank N"),
        ("search none heron --json -o run.trec", "--json prints what -o writes"),
        ("index -o none --compact --store int8", "--store: not for --compact"),
        ("index -o none --compact --no-texts", "--no-texts: not for --compact"),
        ("index -o none --remove d1 --chunk-size 8 --model M", "--chunk-size, --model: not for --remove"),
        ("index -o none --remove d1 --no-brackets", "--brackets: not for --remove"),
        (
            "index -o none --compact --query-prompt P --mesh data=1",
            "--query-prompt, --mesh: not for --compact",
        ),
        ("embed none -o v.npy --model M --brackets", "--brackets is for --side query or document"),
        (
            "embed none -o v.npy --model M --side document --query-prompt P",
            "--query-prompt is for --side query",
        ),
        ("embed none -o v.npy --model M --document-prompt P", "--document-prompt is for --side document"),
    ],
)
def test_an_option_that_could_do_nothing_is_refused(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_pooling_modes_are_checked(capsys):
    for modes in ("median", "mean+median", "mean+"):
        with pytest.raises(SystemExit):
            main(["embed", "none", "-o", "v.npy", "--model", "M", "--pooling", modes])
        assert "is none of weightedmean" in capsys.readouterr().err
    assert main(["embed", "none", "-o", "v.npy", "--model", "/no/such", "--pooling", "mean+max"]) == 1


@pytest.mark.parametrize(
    "command",
    [
        "search none heron --rerank 2 --cross-encoder M",
        "index -o none --compact",
        "index -o none --remove @ids.txt --encoding-errors replace",
        "embed none -o v.npy --model M --no-brackets",
        "embed none -o v.npy --model M --side query --brackets --query-prompt P",
        "embed none -o v.npy --model M --side document --no-brackets --document-prompt P",
    ],
)
def test_what_they_are_for_is_not(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 1
    error = capsys.readouterr().err  # of the index or model that is not there
    assert "is for" not in error and "not for" not in error
