"""What of the submitter's environment and words reaches a job, its record, and SLURM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mepa_ds.errors import UserError
from mepa_ds.slurm.environment import exported
from mepa_ds.slurm.jobs import Job, recorded_jobs, sbatch_command, submit
from mepa_ds.slurm.profile import read_profile
from tests.slurm import stand_ins

TOKEN = "hf_abcdefghijklmnop"


@pytest.fixture
def profile_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in stand_ins.write(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    path = tmp_path / "x.env"
    path.write_text("MEPA_PARTITION=gpu\nMEPA_SCRATCH=$LOCAL_DISK\n")
    return str(path)


def names(text: str) -> set[str]:
    return {word.partition("=")[0] for word in text.split(",")}


def test_jobs_get_a_list_without_secrets(profile_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {
        "PATH": "/bin", "HOME": "/h", "NCCL_DEBUG": "INFO", "HF_HOME": "/hf", "HF_TOKEN": TOKEN, "WANDB_API_KEY": TOKEN,
        "WANDB_MODE": "offline", "AWS_SECRET_ACCESS_KEY": TOKEN, "SSH_AUTH_SOCK": "/s", "MY_NOTES": "secret", "DATA": "/d",
        "LOCAL_DISK": "/l", "BASH_FUNC_module%%": "() { :; }",
    }  # fmt: skip
    recipe = tmp_path / "r.yaml"
    recipe.write_text("output_dir: ${DATA}/run\ntokenizer: $HF_TOKEN\n")
    found = names(exported({"MEPA_ROOT": "/r"}, [str(recipe)], read_profile(profile_path), here))
    assert found == {"MEPA_ROOT", "PATH", "HOME", "NCCL_DEBUG", "HF_HOME", "WANDB_MODE", "DATA", "LOCAL_DISK"}
    Path(profile_path).write_text("MEPA_PARTITION=gpu\nMEPA_EXPORT='HF_TOKEN MY_NOTES'\n")
    found = names(exported({}, [], read_profile(profile_path), here))
    assert {"HF_TOKEN", "MY_NOTES"} <= found
    assert "WANDB_API_KEY" not in found
    Path(profile_path).write_text("MEPA_PARTITION=gpu\nMEPA_EXPORT='A=b'\n")
    with pytest.raises(UserError, match="MEPA_EXPORT: 'A=b' is no variable's name"):
        exported({}, [], read_profile(profile_path), here)


def test_what_sbatch_would_take_for_another_variable_is_refused(profile_path: str) -> None:
    with pytest.raises(UserError, match="takes no commas"):
        exported({"MEPA_ROOT": "/a,LD_PRELOAD=/evil.so"}, [], read_profile(profile_path), {})


def test_the_record_of_a_job_holds_no_secret_and_follows_no_link(
    profile_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    state, thesis = tmp_path / "run/slurm", tmp_path / "thesis.tex"
    thesis.write_text("years of work")
    state.mkdir(parents=True)
    (state / "jobs.jsonl").symlink_to(thesis)
    word = f"data.tokens=https://me:{TOKEN}@host/set?sig=abcdef"
    job = Job("pretrain", ("r.yaml", word), state, "mepa-x")
    number = submit(job, read_profile(profile_path), state)
    text = (state / "jobs.jsonl").read_text()
    assert json.loads(text)["job"] == number
    assert TOKEN not in text
    assert "abcdef" not in text
    assert thesis.read_text() == "years of work"
    command = sbatch_command(job, read_profile(profile_path))
    assert not any(TOKEN in part for part in command if part != word)
    assert not any(part.startswith("--export=ALL") for part in command)
    (state / "mepa-x-8.log").symlink_to(thesis)
    with pytest.raises(UserError, match="would be written through it"):
        submit(job, read_profile(profile_path), state)


def test_lines_that_name_no_job_are_none_of_ours(tmp_path: Path) -> None:
    lines = [{"job": job, "state": "s", "time": 1} for job in ("--me", "7; rm", "../8", 9, "12_3")]
    (tmp_path / "jobs.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert [line["job"] for line in recorded_jobs(tmp_path)] == ["12_3"]
