"""`mepa doctor`: what is whole is ok, and each thing that is not has its remedy."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest
import torch

from mepa_ds.cli.tools import doctor
from mepa_ds.doctor import belongings, computer, versions
from mepa_ds.doctor.finding import Finding
from mepa_ds.runtime.run_lock import RunLock
from tests.teachers import transformers_fixtures as fixtures
from tests.tiny_run import make_run
from tests.var_fixtures import fixture_state

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    make_run(folder)
    return folder


def test_a_machine_that_is_ready(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    doctor.main(["--data", "train.tokens", "heldout.tokens", "--weights", "tokenizer"])
    lines = capsys.readouterr().out.splitlines()
    for line in (
        "ok       train.tokens: 40 tokens in 3 shards, 3 classes",
        "ok       tokenizer: a tokenizer of this project",
        "ok       runs: runs: none that is finished",
        f"ok       torch: {metadata.version('torch')}",
    ):
        assert line in lines
    assert lines[-1].startswith("0 problems, ")


def test_problems_end_with_status_1_and_their_remedies(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as end:
        doctor.main(["--data", "none", "--weights", "recipe.yaml", "--cluster", "nowhere", "--json"])
    assert end.value.code == 1
    findings = [Finding(**item) for item in json.loads(capsys.readouterr().out)]
    problems = {finding.about: finding for finding in findings if finding.level == "problem"}
    assert list(problems) == ["none", "recipe.yaml", "cluster"]
    assert "no such directory" in problems["none"].text
    assert "known clusters" in problems["cluster"].text
    assert all(finding.remedy for finding in findings if finding.level != "ok")


def test_a_set_that_is_not_whole(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for path in (folder / "train.tokens").iterdir():
        (tmp_path / "set" / path.name).write_bytes(path.read_bytes())
    tars = sorted((tmp_path / "set").glob("*.tar"))
    tars[1].write_bytes(b"short")
    assert "1 shards have another size" in belongings.look_at_set(tmp_path / "set").text
    tars[0].unlink()
    assert "1 shards are missing" in belongings.look_at_set(tmp_path / "set").text
    (tmp_path / "set/index.plan.json").write_text("{}")
    assert belongings.look_at_set(tmp_path / "set")[1:3] == ("problem", "the shard set is not finished")


def test_runs_that_were_killed_or_have_failed(tmp_path: Path) -> None:
    for name, status in (
        ("a", {"state": "running", "step": 3}),
        ("b", {"state": "failed", "error": "UserError: full\n"}),
        ("c", {"state": "finished"}),
        ("d", {"state": "finished"}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").write_text(json.dumps(status))
    (tmp_path / "e").mkdir()
    (tmp_path / "e/status.json").write_text("{")
    lock = RunLock(tmp_path / "d")
    killed, failed, rest = belongings.look_at_runs(tmp_path)
    assert (killed.level, killed.text) == ("note", f"{tmp_path}/a: was killed at step 3; nobody holds its lock")
    assert (failed.level, failed.text) == ("note", f"{tmp_path}/b: failed: UserError: full")
    assert rest.text == f"{tmp_path}: 2 finished, 1 unknown"
    lock.release()


def test_versions_that_do_not_fit_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    found = versions._version_of
    fake = {"deepspeed": "0.10.0", "timm": None}
    monkeypatch.setattr(versions, "_version_of", lambda name: fake[name] if name in fake else found(name))
    problems = {finding.about: finding for finding in versions.look_at_versions() if finding.level == "problem"}
    assert problems["deepspeed"].text.startswith("0.10.0, but mepa_ds needs ==")
    assert problems["deepspeed"].remedy.startswith("run: pip install 'deepspeed==")
    assert problems["timm"].text == "is not installed"


def test_threads_disks_and_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = {text: next(iter(_of("threads", text))).level for text in ("1", "1,1", "999", "many", "0")}
    assert levels == {"1": "ok", "1,1": "ok", "999": "note", "many": "problem", "0": "problem"}
    monkeypatch.setattr(computer.shutil, "disk_usage", lambda path: Usage(64 << 20, 0, 64 << 20))
    (disk,), (shared,) = _of("disk", None), _of("/dev/shm", None)
    assert (disk.level, shared.level) == ("note", "problem")
    assert "--shm-size" in shared.remedy


def _of(about: str, threads: str | None) -> list[Finding]:
    return [finding for finding in computer.look_at_computer(threads) if finding.about == about]


def test_weights_that_are_cut_short_are_a_problem(folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    shutil.copytree(folder / "tokenizer", weights)
    assert belongings.look_at_weights(weights).level == "ok"
    file = weights / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors is cut short or damaged" in belongings.look_at_weights(weights).text
    file.unlink()
    assert belongings.look_at_weights(weights).text == "model.safetensors is missing"


def test_a_checkpoint_of_vars_training_is_known(tmp_path: Path) -> None:
    """It holds two networks, of which the transformer is told."""
    networks = {"var_wo_ddp": fixture_state("tiny_var_adaln"), "vae_local": fixture_state("tiny_vae")}
    torch.save({"trainer": networks}, tmp_path / "ar-ckpt-best.pth")
    torch.save(networks["var_wo_ddp"], tmp_path / "var.pth")
    for name in ("ar-ckpt-best.pth", "var.pth"):
        found = belongings.look_at_weights(tmp_path / name)
        assert found.level == "ok"
        assert found.text.startswith("VAR's transformer of depth 2, ")


def test_weights_of_teachers_in_the_transformers_layout(tmp_path: Path) -> None:
    config = fixtures.models()["dinov3-l"]["config"]
    path = fixtures.write(tmp_path / "weights", "dinov3-l", {"x": torch.ones(1)})  # what is in it is not read
    found = belongings.look_at_weights(path)
    text = "weights in the transformers library's layout of the teacher dinov3-l or dinov3-l-sat"
    assert (found.level, found.text) == ("ok", text)
    satellite = {"image_mean": [0.43, 0.411, 0.296], "image_std": [0.213, 0.156, 0.143]}
    (path / "preprocessor_config.json").write_text(json.dumps(satellite))
    assert belongings.look_at_weights(path).text == text.replace("dinov3-l or ", "")
    for change, told in (
        ({"num_hidden_layers": 11}, "but of no teacher: no teacher here is like that; nearest is dinov3-l"),
        ({"model_type": "clip"}, "a clip, which is none of this project's models"),
    ):
        (path / "config.json").write_text(json.dumps(config | change))
        assert belongings.look_at_weights(path).level == "note"
        assert told in belongings.look_at_weights(path).text
    (path / "model.safetensors").unlink()
    assert belongings.look_at_weights(path).text == "model.safetensors is missing"


def test_a_file_of_a_teacher_in_the_transformers_layout(tmp_path: Path) -> None:
    state = {key: torch.zeros(shape, dtype=torch.float16) for key, shape in fixtures.shapes_of("dinov2-s").items()}
    path = tmp_path / "model.pth"
    torch.save({f"dinov2.{key}": tensor for key, tensor in state.items()}, path)
    found = belongings.look_at_weights(path)
    assert (found.level, found.text) == (
        "ok",
        "weights in the transformers library's layout of the teacher dinov2-s, 22.1M numbers",
    )
    torch.save({key: tensor for key, tensor in state.items() if "layer.3." not in key}, path)
    assert "in neither VAR's nor this project's layout" in belongings.look_at_weights(path).text
