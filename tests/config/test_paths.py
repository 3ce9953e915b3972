"""Paths as people write them."""

from __future__ import annotations

import pwd
from dataclasses import dataclass
from pathlib import Path

import pytest
import tyro

from mepa_ds.cli import sample
from mepa_ds.command_line import entry
from mepa_ds.command_line.paths import REGISTRY, path_argument
from mepa_ds.config.paths import expand_path, given_path
from mepa_ds.data_tools import build_shards
from mepa_ds.data_tools.readers.webdataset import WebDataset
from mepa_ds.errors import UserError
from mepa_ds.slurm.command_words import command_words
from mepa_ds.slurm.in_job.recipe_value import recipe_value

ME = pwd.getpwuid(0)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HOME": "/home/me", "PLACE": "/far", "EMPTY": "", "TILDE": "~/x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("UNSET", raising=False)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~/x", "/home/me/x"),
        ("~", "/home/me"),
        (f"~{ME.pw_name}/x", f"{ME.pw_dir}/x"),
        ("$HOME/x", "/home/me/x"),
        ("${PLACE}er/x", "/farer/x"),
        ("a/$PLACE", "a//far"),
        ("$TILDE", "/home/me/x"),
        ("runs/x", "runs/x"),
        (".", "."),
        ("./~x", "~x"),
        ("cost$", "cost$"),
        ("a b", "a b"),
    ],
)
def test_a_path_is_read_as_a_shell_reads_it(text: str, path: str) -> None:
    assert expand_path(text) == Path(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty path"),
        (" ", "an empty path"),
        ("$UNSET/x", r"the variable \$UNSET is not set here"),
        ("${EMPTY}/x", r"the variable \$\{EMPTY\} is not set here"),
        ("${PLACE:-/x}", r"the variable \$\{PLACE:-/x\} is not set here"),
        ("~no-such-user-here/x", "no home directory of ~no-such-user-here; .* is ./~no-such-user-here"),
        ("$(hostname)/x", "has a command in it"),
        ("a\0b", "a null byte"),
    ],
)
def test_what_cannot_be_expanded_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand_path(text)
    with pytest.raises(UserError, match=f"--out: .*{message}"):
        given_path(text, "--out")


@dataclass
class Options:
    out: Path
    more: tuple[Path, ...] = ()
    maybe: Path | None = None


def test_options_of_every_command_are_expanded() -> None:
    """No shell expands the ~ of --out=~/x."""
    seen: list[Options] = []
    words = ["--out=~/x", "--more", "$PLACE/a", "b", "--maybe=~/y"]
    entry.run(lambda: seen.append(tyro.cli(Options, args=words)))
    assert seen == [Options(Path("/home/me/x"), (Path("/far/a"), Path("b")), Path("/home/me/y"))]
    with REGISTRY:
        command = build_shards.parse(["webdataset", "--shards=~/{0..3}.tar", "--out=~/set"])
        assert isinstance(command.reader, WebDataset)
        assert (command.reader.shards, command.options.out) == ("/home/me/{0..3}.tar", Path("/home/me/set"))
        url = "pipe:aws s3 cp s3://bucket/$UNSET/{0..3}.tar -"
        assert build_shards.parse(["webdataset", f"--shards={url}", "--out=x"]).reader == WebDataset(url)
    assert path_argument("~/r.yaml") == Path("/home/me/r.yaml")


def test_an_option_that_cannot_be_expanded_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with REGISTRY, pytest.raises(SystemExit) as end:
        tyro.cli(Options, args=["--out=$UNSET/x"])
    assert end.value.code == 2
    assert "Error parsing --out: '$UNSET/x': the variable $UNSET" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["nan", "inf", "-Infinity", "1e999"])
def test_numbers_of_options_are_finite(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with REGISTRY, pytest.raises(SystemExit):
        sample.parse(["--weights", "w", "--tokenizer", "t", "--out", "o", f"--cfg={number}"])
    assert f"expected a finite number, got {number}" in capsys.readouterr().err


def test_batch_jobs_get_expanded_paths(tmp_path: Path) -> None:
    """No shell sees the words of a recipe or a pipeline."""
    assert command_words("imagenet --tar ~/a.tar --out=$PLACE/x --image-side 8") == (
        ["imagenet", "--tar", "/home/me/a.tar", "--out=/far/x", "--image-side", "8"]
    )
    assert command_words("features ~/i --weights hub") == ["features", "/home/me/i", "--weights", "hub"]
    with pytest.raises(UserError, match=r"--out \$UNSET/x': .*the variable \$UNSET"):
        command_words("imagenet --out $UNSET/x")
    with pytest.raises(UserError, match="No closing quotation"):
        command_words("imagenet --out 'x")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: ~/run\nseed: 0\ntokenizer: $UNSET/t\ndata: {teacher: {weights: hub}}\n")
    assert recipe_value("output_dir", recipe) == "/home/me/run"
    assert recipe_value("seed", recipe) == 0
    with pytest.raises(UserError, match=r"recipe\.yaml: tokenizer: .*the variable \$UNSET"):
        recipe_value("tokenizer", recipe)
