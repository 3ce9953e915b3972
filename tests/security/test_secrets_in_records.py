"""Secrets of a process, of its recipe and of its errors are in none of the files that it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from mepa_ds.config.base import load_config, validate
from mepa_ds.config.paths import expand_path
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.remote.remote_file import RemoteShards
from mepa_ds.distributed import Launch
from mepa_ds.errors import UserError
from mepa_ds.runtime import failures
from mepa_ds.runtime.metrics import MetricsWriter
from mepa_ds.runtime.recorder import RunRecorder
from mepa_ds.runtime.status import write_status
from mepa_ds.runtime.trackers.opening import open_trackers
from mepa_ds.safety.secrets import redacted, redacted_json
from tests.tiny_run import ROOT, make_run, recipe_values

MARKS = {
    "HF_TOKEN": "hf_MARKmarkMARKmark",
    "WANDB_API_KEY": "0123456789MARKwandb",
    "AWS_SECRET_ACCESS_KEY": "MARKsecret/of+amazon",
    "AWS_SESSION_TOKEN": "MARKsession",
    "SITE_PASSWORD": "MARKpassword",
}
SIGNED = "https://me:MARKuser@host/x.tar?X-Amz-Signature=MARKsigned&e=1#MARKend"


def everything_in(directory: Path) -> str:
    """Names and bytes of all files."""
    texts = [f"{path}\n{path.read_bytes().decode('latin-1')}" for path in directory.rglob("*") if path.is_file()]
    assert texts
    return "\n".join(texts)


@pytest.fixture
def _marked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in MARKS.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("_marked")
@pytest.mark.parametrize("value", [SIGNED, *MARKS.values(), "s3://bucket/x?token=MARK", "wget --password=MARK"])
def test_a_recipe_with_a_secret_is_refused(tmp_path: Path, value: str) -> None:
    path = tmp_path / "recipe.yaml"
    values = recipe_values(tmp_path)
    path.write_text(yaml.safe_dump(values))
    load_config(PretrainConfig, path)
    override = f"log.wandb_project={json.dumps(value)}"
    message = r"recipe\.yaml: log\.wandb_project: it holds a secret.*HF_TOKEN"
    with pytest.raises(UserError, match=message) as error:
        load_config(PretrainConfig, path, [override])
    assert "MARK" not in str(error.value)
    values["data"]["tokens"] = value
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"data\.tokens: it holds a secret"):
        load_config(PretrainConfig, path)


@pytest.mark.usefixtures("_marked")
def test_records_status_and_crash_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = f"cannot read {SIGNED}: " + ", ".join(MARKS.values())
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "run/torchelastic.json"))
    writer = MetricsWriter(tmp_path / "run/metrics.jsonl")
    writer.write({"event": "odd", "step": 1, "message": said, "facts": {"HF_TOKEN": "MARK", "urls": [[SIGNED]]}})
    writer.close()
    write_status(tmp_path / "run", "failed", error=said)
    try:
        raise RuntimeError(said)
    except RuntimeError as error:
        failures._tell(error, tmp_path / "run", time.time(), Launch(0, 1, 0))
    kept = everything_in(tmp_path / "run")
    assert "MARK" not in kept
    assert "cannot read https://host/x.tar?..." in kept
    assert "MARK" not in capsys.readouterr().err
    told = json.loads((tmp_path / "run/torchelastic.json").read_text())["message"]
    assert told["message"].startswith("RuntimeError: cannot read https://host/x.tar?...")
    assert set(told["extraInfo"]) == {"py_callstack", "timestamp"}


def test_a_service_gets_no_places_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    done = threading.Event()

    def init(**options: Any) -> Any:
        seen.update(options)
        return SimpleNamespace(define_metric=lambda *_, **__: None, log=lambda _: None, finish=done.set, url=None)

    library = SimpleNamespace(init=init, Settings=dict, teardown=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", library)  # type: ignore[arg-type]
    values = recipe_values(tmp_path / "home" / "alice")
    values["log"]["wandb_project"] = "test"
    config = validate(PretrainConfig, values, "test")
    recorder = RunRecorder(config.output_dir, 0, 3, 0, open_trackers(config, 0))
    recorder.close("finished", 3, "done")
    assert done.wait(10)
    assert "alice" not in json.dumps(seen["config"])
    assert seen["config"]["data"]["tokens"] == "train.tokens"
    assert seen["settings"]["x_disable_meta"], "the command line, the user, the host"
    assert seen["settings"]["disable_git"]


def test_a_run_keeps_no_secrets_of_its_environment(tmp_path: Path) -> None:
    recipe = make_run(tmp_path, "train.steps=2", "log.evaluate_every=2", "log.checkpoint_every=2")
    environment = os.environ | MARKS | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "mepa_ds", "pretrain", str(recipe)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kept = done.stdout + done.stderr + everything_in(tmp_path / "run")
    assert not [name for name, value in MARKS.items() if value in kept]


@pytest.mark.usefixtures("_marked")
@pytest.mark.parametrize("name", ["$HF_TOKEN", "${AWS_SECRET_ACCESS_KEY}"])
def test_no_path_of_a_strangers_file_is_named_by_a_secret(name: str) -> None:
    with pytest.raises(ValueError, match="holds a secret, and paths are seen by others"):
        expand_path(f"/tmp/{name}")
    cache = RemoteShards(urls=("https://host/a.tar",), cache=f"$TMPDIR/{name}", cache_gigabytes=1, window=1)
    assert "MARK" not in cache.directory


@pytest.mark.parametrize(
    "text",
    [
        "{'api_key': 'MARKMARK', 'a': 1}",
        '{"token": "MARKMARK"}',
        "wandb_api_key: MARKMARK",
        "login --token MARKMARK --verbose",
        "PASSWORD: MARKMARK",
    ],
)
def test_dictionaries_yaml_and_options(text: str) -> None:
    assert "MARK" not in redacted(text)
    assert redacted(redacted(text)) == redacted(text)


@pytest.mark.parametrize(
    "text",
    ["unknown token: something", "--tokenizer: no such file", "secret: none", "--token is for the hub", "key: value"],
)
def test_words_that_are_no_secrets(text: str) -> None:
    assert redacted(text) == text


def test_json_keeps_its_kinds() -> None:
    value = {"a": [1, 2.5, None, True], "b": {"c": "plain", "losses": [0.5, 0.25]}}
    assert redacted_json(value) == value
    assert redacted_json({"api_key": "x", "n": (1, "a")}) == {"api_key": "...", "n": [1, "a"]}
