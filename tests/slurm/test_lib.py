"""slurm/lib.sh without a cluster: SLURM's commands are stand-ins that note what they were asked."""

from __future__ import annotations

import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT

_SCONTROL = """#!/bin/bash
echo "scontrol $*" >>"$FAKE/calls"
if [[ -s $FAKE/outage ]]; then # an answer fewer is missing
    sed -i 1d "$FAKE/outage"
    echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2
    exit 1
fi
if [[ $1 == requeue ]]; then # SLURM ends the job's processes
    (while kill -0 "$SCRIPT" && ! pkill --parent "$SCRIPT" sleep; do sleep 0.1; done) &>/dev/null &
fi
echo "   JobState=RUNNING"
"""
_PROFILE = "MEPA_PARTITION=gpu\nMEPA_MAX_RESTARTS=2\nMEPA_STOP_SECONDS=3\nMEPA_SCRATCH=/tmp\n"


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A folder with a cluster profile, fake commands, and the state of a job that has started."""
    for name, text in (("scontrol", _SCONTROL), ("squeue", "#!/bin/bash\n")):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "fake.env").write_text(_PROFILE)
    (tmp_path / "state/exit-7").mkdir(parents=True)
    (tmp_path / "state/owner").write_text("7 0\n")
    (tmp_path / "state/starts-7").write_text("0 \n")
    (tmp_path / "log").write_text("")
    return tmp_path


def run(job: Path, script: str, profile: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Bash lines after a batch script's first ones."""
    if profile:
        (job / "fake.env").write_text(_PROFILE + profile)
    head = f"set -euo pipefail\nMEPA_ROOT={ROOT}\nsource {ROOT}/slurm/lib.sh\nmepa_setup\n"
    head += "export SCRIPT=$$\n"
    head += f"MEPA_STATE={job}/state LOG={job}/log PROGRESS={job}/checkpoints\n"
    environment = {
        **os.environ,
        "PATH": f"{job}/bin:{os.environ['PATH']}",
        "FAKE": str(job),
        "MEPA_CLUSTER": str(job / "fake.env"),
        "MEPA_PYTHON": sys.executable,
        "SLURM_JOB_ID": "7",
        "SLURMD_NODENAME": "n1",
        "SLURM_JOB_NUM_NODES": "1",
        "RANKS_PER_NODE": "1",
        "MEPA_RETRY_SECONDS": "0.1",
        **env,
    }
    (job / "job.sbatch").write_text(head + script)
    return subprocess.run(
        ["bash", job / "job.sbatch"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def result(job: Path) -> str:
    return (job / "state/result").read_text().strip()


def test_a_wrong_recipe_is_the_last_line_and_a_users_error(job: Path) -> None:
    end = run(job, f"mepa_train checkpoints pretrain {job}/nowhere.yaml")
    assert end.returncode == 2
    assert (end.stdout + end.stderr).splitlines()[-1].startswith(f"error: {job}/nowhere.yaml: cannot read the recipe")
    assert "error: slurm:" not in end.stdout + end.stderr


def test_a_line_of_the_script_that_fails_is_named(job: Path) -> None:
    end = run(job, "ls /nowhere")
    assert (end.returncode, end.stdout.splitlines()[-1]) == (1, "error: slurm: job.sbatch line 7: ls /nowhere")
    assert result(job).startswith("failed: slurm:")


def test_a_requeued_job_keeps_its_result(job: Path) -> None:
    """SLURM ends `sleep` in the script that waits for its end: no error of the script."""
    end = run(job, "STOP=signal; finish 75")
    assert end.returncode == 75, end.stdout + end.stderr
    assert "scontrol requeue 7" in (job / "calls").read_text()
    assert result(job) == "requeued: stopped in good order"
    assert "error" not in end.stdout


def test_a_controller_that_is_away_for_a_while_is_waited_for(job: Path) -> None:
    (job / "outage").write_text("1\n2\n3\n")
    end = run(job, "STOP=signal; finish 75")
    assert end.returncode == 75, end.stdout + end.stderr
    assert (job / "calls").read_text().count("scontrol requeue 7") == 4
    assert result(job) == "requeued: stopped in good order"
    (job / "outage").write_text("1\n" * 40)
    end = run(job, "STOP=signal; finish 75")
    assert end.stdout.splitlines()[-1].startswith("error: SLURM did not requeue job 7; submit it again")


CRASH = "failed (status 1): OSError: No space left on device"


@pytest.mark.parametrize(
    ("stop", "codes", "status", "last"),
    [
        ("signal", "75 75", 75, "stopped in good order"),
        ("", "75 75", 75, "stopped in good order"),
        ("", "75 143", 75, "stopped in good order"),  # the launcher ended the second when the first had left
        ("signal", "", 75, "stopped in good order"),  # before its ranks started
        ("signal", "1 75", 75, CRASH),
        ("", "75 1", 75, CRASH),  # SIGTERM for the neighbour of a crash
        ("", "75 2", 2, "OSError: No space left on device"),
        ("signal", "2 2", 2, "OSError: No space left on device"),
    ],
)
def test_what_ranks_said_decides(job: Path, stop: str, codes: str, status: int, last: str) -> None:
    for rank, code in enumerate(codes.split()):
        (job / f"state/exit-7/{rank}").write_text(f"{code}\n")
    (job / "log").write_text("OSError: No space left on device\n")
    end = run(job, f"LOG_START=0 STOP={stop}; finish 1")
    assert end.returncode == status, end.stdout + end.stderr
    assert result(job) == (f"requeued: {last}" if status == 75 else f"failed: {last}")


def test_ranks_have_time_after_their_neighbours(job: Path) -> None:
    """srun would kill ranks that copy or compute longer than others."""
    srun = job / "bin/srun"
    srun.write_text('#!/bin/bash\necho "$*"\n')
    srun.chmod(0o755)
    assert "--kill-on-bad-exit=1 --wait=0 " in run(job, "step 1 1 true").stdout


def test_ranks_know_the_disk_of_their_node(job: Path) -> None:
    (job / "fake.env").write_text("MEPA_PARTITION=gpu\n")
    assert run(job, "printenv MEPA_SCRATCH").stdout == "/tmp\n"


@pytest.mark.parametrize(("start", "status"), [(0, 75), (2, 1)])
def test_a_node_whose_python_does_not_start_is_no_mistake_of_the_users(job: Path, start: int, status: int) -> None:
    container = job / "bin/box"
    container.write_text("#!/bin/bash\necho 'stale file handle' >&2\nexit 255\n")
    container.chmod(0o755)
    script = f"mepa_train checkpoints pretrain {job}/recipe.yaml"
    end = run(job, script, "MEPA_CONTAINER=box\n", SLURM_RESTART_COUNT=str(start))
    assert "error: stale file handle" in end.stderr
    assert end.returncode == (75 if status == 75 else 255)
    assert ("requeued" in end.stdout) == (status == 75)


def test_another_member_of_the_array_is_not_the_owner(job: Path) -> None:
    """The number of an array's last member, 4, is the array's own."""
    squeue = job / "bin/squeue"
    squeue.write_text('#!/bin/bash\nprintf "5 RUNNING 4_0\\n4 COMPLETING 4_2\\n"\n')
    (job / "state/owner").write_text("4 0\n")
    end = run(job, "take_ownership; cat $MEPA_STATE/owner")
    assert end.stdout == "7 0\n", end.stdout + end.stderr
    squeue.write_text('#!/bin/bash\nprintf "5 RUNNING 4_0\\n4 RUNNING 4_2\\n"\n')
    (job / "state/owner").write_text("4 0\n")
    end = run(job, "take_ownership")
    assert end.returncode == 2
    assert "job 4_2 is working in" in end.stdout
    assert "(scancel 4_2)" in end.stdout


def test_a_start_that_lost_the_run_leaves_it_alone(job: Path) -> None:
    (job / "state/owner").write_text("7 1\n")
    (job / "state/result").write_text("running\n")
    end = run(job, "finish 137")
    assert end.returncode == 143, end.stdout + end.stderr
    assert "the run now belongs to job and restart 7 1" in end.stdout
    assert result(job) == "running"
    assert not (job / "calls").exists()


def starts(job: Path, prepare: str, last: str = "") -> list[int]:
    """Exit status of five starts in a row, each after `prepare`."""
    (job / "state/starts-7").unlink()
    return [
        run(job, f"{prepare}\nLAST_RESULT={last}\nbound_restarts\n", SLURM_RESTART_COUNT=str(n)).returncode
        for n in range(5)
    ]


SAVING = "mkdir -p $PROGRESS/step_1; rm -rf $PROGRESS/.step_2.tmp; mkdir $PROGRESS/.step_2.tmp"


def test_a_crash_during_each_save_is_no_progress(job: Path) -> None:
    assert starts(job, SAVING) == [0, 0, 0, 1, 1]


def test_a_new_checkpoint_each_time_is_progress(job: Path) -> None:
    assert starts(job, "mkdir -p $PROGRESS/step_$RESTART") == [0] * 5
    assert starts(job, "PROGRESS+=.pt; echo $RESTART >$PROGRESS; touch -d @$RESTART $PROGRESS") == [0] * 5


@pytest.mark.parametrize(("number", "status"), [(1, [0] * 5), (2, [0, 0, 0, 1, 1])])
def test_work_of_other_members_is_no_progress(job: Path, number: int, status: list[int]) -> None:
    """Member 1 of 4: the shards 1, 5, 9, ... are its own."""
    member = "SLURM_ARRAY_TASK_ID=1 PARTS=4 SETS=.tokens-*; mkdir -p $PROGRESS.tokens-vae"
    shard = f"touch $PROGRESS.tokens-vae/shard-$(printf %06d $((4 * RESTART + {number}))).idx.npz"
    assert starts(job, f"{member}\n{shard}") == status


def test_stops_in_good_order_without_progress_are_called_so(job: Path) -> None:
    (job / "state/starts-7").write_text("0 \n1 \n2 \n")
    end = run(job, "LAST_RESULT='requeued: stopped in good order'; bound_restarts", SLURM_RESTART_COUNT="3")
    assert end.stdout.splitlines()[-1] == (
        "error: 2 restarts without progress; the last start ended: requeued: stopped in good order"
    )
    end = run(job, "LAST_RESULT=running; bound_restarts", SLURM_RESTART_COUNT="4")
    assert "ended: without a word, perhaps with its node" in end.stdout.splitlines()[-1]


def test_setup_lines_need_not_be_strict(job: Path) -> None:
    """Module systems read unset variables and have commands that fail."""
    end = run(
        job, "echo $LOADED; set -o | grep -E 'errexit|nounset'", "MEPA_SETUP='false; echo $NOT_SET; LOADED=yes'\n"
    )
    assert end.returncode == 0, end.stdout + end.stderr
    assert end.stdout.split() == ["yes", "errexit", "on", "nounset", "on"]
    end = run(job, "echo on", "MEPA_SETUP='ls /nowhere'\n")
    assert (end.returncode, end.stdout.splitlines()[-1]) == (2, "error: MEPA_SETUP ended with status 2: ls /nowhere")


def test_every_python_runs_in_the_container(job: Path) -> None:
    """The recipe's values, the staged copies and the cause of a failure too."""
    box = job / "bin/box"
    box.write_text('#!/bin/bash\necho "$*" >>"$FAKE/boxed"\nexec "$@"\n')
    box.chmod(0o755)
    (job / "recipe.yaml").write_text(f"output_dir: {job}/run\n")
    (job / "log").write_text("error: all is lost\n")
    script = f"ask mepa_ds.slurm.in_job.recipe_value output_dir {job}/recipe.yaml\nLOG_START=0; finish 2"
    end = run(job, script, "MEPA_CONTAINER=box\n")
    assert end.stdout.splitlines()[0] == f"{job}/run"
    boxed = (job / "boxed").read_text()
    assert "mepa_ds.slurm.in_job.recipe_value" in boxed
    assert "mepa_ds.slurm.in_job.cause" in boxed
    assert "failed (status 2): all is lost" in end.stdout


@pytest.mark.parametrize(("asked", "stage"), [("on", "on"), ("", "off")])
def test_staging_that_was_asked_for_goes_before_the_profile(job: Path, asked: str, stage: str) -> None:
    assert run(job, "echo $MEPA_STAGE", "MEPA_STAGE=off\n", MEPA_STAGE=asked).stdout.strip() == stage


def test_only_a_users_request_is_passed_on_to_ranks(job: Path) -> None:
    """Ranks have SIGTERM from SLURM itself; a second signal would end them without saving."""
    srun = job / "bin/srun"
    srun.write_text('#!/bin/bash\ntrap "echo got USR1" USR1\nfor _ in {1..20}; do sleep 0.1; done\n')
    srun.chmod(0o755)
    for name, told in (("TERM", False), ("USR1", True)):
        end = run(job, f"(sleep 0.5; kill -{name} $$) & step 1 1 true || true; echo $STOP")
        assert ("got USR1" in end.stdout) == told, end.stdout + end.stderr
        assert end.stdout.splitlines()[-1] == {"TERM": "terminated", "USR1": "signal"}[name]


_SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0 exec "$@"
"""
# What SLURM tells member 1 of an array, on one node.
MEMBER = {
    "SLURM_ARRAY_JOB_ID": "7",
    "SLURM_ARRAY_TASK_ID": "1",
    "SLURM_JOB_NODELIST": "n1",
    "SLURM_CPUS_ON_NODE": "1",
    "SLURM_NTASKS_PER_NODE": "1",
}
_PRECOMPUTE = """import sys
from pathlib import Path
if sys.argv[1] == "tokens":
    for number in (0, 1):
        Path(f"{sys.argv[4]}.tokens-vae").mkdir(exist_ok=True)
        Path(f"{sys.argv[4]}.tokens-vae/shard-00000{number}.idx.npz").touch()
sys.exit("RuntimeError: out of luck")
"""


def test_progress_of_a_member_is_in_the_set_beside_its_images(job: Path) -> None:
    """precompute.sbatch finds the images wherever they stand among its words."""
    clone, images = job / "clone", job / "images"
    images.mkdir()
    (images / "index.json").touch()
    (clone / "mepa_ds/data_tools").mkdir(parents=True)
    (clone / "slurm").symlink_to(ROOT / "slurm")
    for path in (ROOT / "mepa_ds").iterdir():
        if path.name != "data_tools":
            (clone / "mepa_ds" / path.name).symlink_to(path)
    (clone / "mepa_ds/data_tools/__init__.py").touch()
    (clone / "mepa_ds/data_tools/precompute.py").write_text(_PRECOMPUTE)
    for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL + f'echo "   StdOut={job}/log"\n')):
        (job / "bin" / name).write_text(text)
        (job / "bin" / name).chmod(0o755)
    words = ["tokens", "--tokenizer", str(job), str(images)]
    command = ["bash", str(ROOT / "slurm/precompute.sbatch"), str(job / "array"), "2", *words]
    starts = job / "array/part-1/starts-7"
    for number in range(2):
        environment = MEMBER | {"SLURM_RESTART_COUNT": str(number)}
        run(job, f"MEPA_ROOT={clone} exec {shlex.join(command)} >>{job}/log 2>&1", **environment)
        text = (job / "log").read_text()
        assert text.count("failed (status 1): RuntimeError: out of luck; requeued") == number + 1, text
    first, second = starts.read_text().splitlines()
    assert first == "0 "
    assert second.endswith(f"{images}.tokens-vae/shard-000001.idx.npz")


def test_samples_of_weights_that_are_not_there(job: Path) -> None:
    """A member that cannot begin notes why, for the job after the array."""
    words = [job / "array", 2, job / "best", "tokenizer", 1, 0, "-", "-", "-"]
    command = ["bash", str(ROOT / "slurm/generate_evaluate.sbatch"), *map(str, words)]
    end = run(job, f"MEPA_ROOT={ROOT} exec {shlex.join(command)}", **MEMBER)
    cause = f"{job}/best/config.json: not a model's config: "
    assert end.returncode == 2
    assert (end.stdout + end.stderr).splitlines()[-1].startswith(f"error: {cause}")
    assert (job / "array/part-1/result").read_text().startswith(f"failed: {cause}")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_rank_that_is_stopped_before_its_first_line_had_nothing_to_save(
    job: Path, number: signal.Signals, code: int
) -> None:
    begun = job / "begun"
    starting = ["bash", "-c", f"touch {begun}; sleep 60"]
    command = [sys.executable, str(ROOT / "slurm/launch.py"), "rank", str(job / "state"), *starting]
    env = {**os.environ, "RANK": "3", "SLURM_JOB_ID": "7"}
    with subprocess.Popen(command, env=env) as launcher:
        while not begun.exists():
            time.sleep(0.02)
        launcher.send_signal(number)
        assert launcher.wait(timeout=100) == code
    assert (job / "state/exit-7/3").read_text() == f"{code}\n"
