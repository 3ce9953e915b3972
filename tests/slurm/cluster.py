"""A throw-away SLURM cluster on one machine: real slurmctld and slurmd, each node in namespaces of its own.

Every node has its own network, host name, process table, /dev/shm and disk (/mnt); GPUs are character devices; the rest
of the file system is shared, like a cluster's. Nothing leaves the outer namespaces, and all processes in them die with
this one: their init reads a pipe that closes when this process ends, however it ends. Needs root and Debian's
slurmctld, slurmd, slurm-client, munge and iproute2 (`missing()` says what is not there); no systemd.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter", "mknod")
# What a node's init runs: a shell that reaps orphans, and slurmd in the foreground.
_NODE_INIT = """hostname {name}; mount -t tmpfs tmpfs /dev/shm; mount -t tmpfs tmpfs /mnt
slurmd -D -N {name} & while :; do wait -n || :; sleep 0.2; done"""
# Declared, but never started: what `sbatch --test-only` plans with. PrivateData=cloud shows them.
_BIG = """
NodeName=big[1-32] CPUs=96 RealMemory=2000000 Gres=gpu:h100:8 State=CLOUD
NodeName=old[1-2] CPUs=48 RealMemory=500000 Gres=gpu:a100:4 State=CLOUD
NodeName=new[1-2] CPUs=96 RealMemory=2000000 Gres=gpu:h100:8 State=CLOUD
PartitionName=big Nodes=big[1-32] MaxTime=INFINITE State=UP
PartitionName=mixed Nodes=old[1-2],new[1-2] MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no cluster can run here; None if one can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"no SLURM cluster here: {', '.join(absent)} not installed (.ci/run names the packages)"
    if os.geteuid() != 0:
        return "no SLURM cluster here: namespaces and devices need root"
    probe = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "ip", "link", "add", "br0", "type", "bridge"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        return "no SLURM cluster here: this machine forbids new network namespaces"
    return None


@dataclass
class Cluster:
    """Nodes n1, n2, ...: the first half in the partition gpu (the default), the second in failing, for nodes that tests
    switch off, and in urgent, which preempts failing."""

    nodes: int = 4
    gpus: int = 16
    cpus: int = 64
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="slurm-")))

    def __post_init__(self) -> None:
        self.folder.chmod(0o755)  # munged wants every parent searchable
        for name in ("state", "spool", "log", "etc", "run"):
            (self.folder / name).mkdir()
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(self.folder / "etc/slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }
        self._stopped = False
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._write_files()
        self._start_namespaces()
        self._start_network()
        self._start_daemons()

    # --- use

    def run(
        self, *command: str | Path, env: dict[str, str] | None = None, timeout: float = 240, cwd: Path = ROOT
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command as on the login node. The exit status is not checked."""
        return subprocess.run(
            [*self._enter(cwd), *map(str, command)],
            env=self.environment | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def check(
        self, *command: str | Path, env: dict[str, str] | None = None, timeout: float = 240, cwd: Path = ROOT
    ) -> str:
        """`run`, but a failure raises, and standard output is returned."""
        result = self.run(*command, env=env, timeout=timeout, cwd=cwd)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    def job(self, job: str) -> dict[str, str]:
        """`scontrol show job` as a mapping; of an array, its first member."""
        return self.members(job)[0]

    def members(self, job: str) -> list[dict[str, str]]:
        lines = self.check("scontrol", "--oneliner", "show", "job", job).splitlines()
        return [dict(re.findall(r"(\w[\w/:]*)=(\S*)", line)) for line in lines]

    def wait_job(self, job: str, timeout: float = 300) -> str:
        """Waits for the end of a job, an array's members included: COMPLETED, or the state of one that is not."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"}

        def ended() -> str | None:
            states = {fields["JobState"] for fields in self.members(job)}
            return max(states, key=lambda state: state != "COMPLETED") if states <= ends else None

        return self.wait_for(ended, timeout, lambda: str(self.members(job)), every=1.5)

    def wait_for(
        self,
        condition: Callable[[], object],
        timeout: float,
        explain: Callable[[], str] = lambda: "",
        every: float = 0.5,
    ) -> str:
        """Polls until `condition` is true and returns what it gave; fails with `explain()` at the time-out."""
        end = time.monotonic() + timeout
        while not (result := condition()):
            assert not self._stopped, "the cluster was stopped"
            assert time.monotonic() < end, f"not within {timeout} s. {explain()}"
            time.sleep(every)
        return str(result)

    def power_off(self, node: str) -> None:
        """slurmd, its steps and tasks die together, at once."""
        process = self._nodes.pop(node)
        os.kill(_innermost(process.pid), signal.SIGKILL)
        process.wait(timeout=60)

    def power_on(self, node: str) -> None:
        number = int(node.removeprefix("n"))
        namespace = f"/run/netns/{node}"
        if self.run("test", "-e", namespace).returncode:
            self._ip(f"netns add {node}")
            self._ip(f"link add v{node} type veth peer name eth0 netns {node}")
            self._ip(f"link set v{node} master br0 up")
            self._ip(f"-n {node} addr add 10.99.0.{10 + number}/24 dev eth0")
            self._ip(f"-n {node} link set lo up")
            self._ip(f"-n {node} link set eth0 up")
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        command = ["nsenter", f"--net={namespace}", "unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount"]
        command += ["--mount-proc", "bash", "-c", _NODE_INIT.format(name=node)]
        log = open(self.folder / "log" / f"{node}.out", "ab")  # noqa: SIM115 - the process keeps it
        self._nodes[node] = subprocess.Popen(
            [*self._enter(), *command], env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        log.close()

    def cut(self, node: str) -> None:
        """The node lives on, but nothing reaches it."""
        self._ip(f"link set v{node} down")

    def heal(self, node: str) -> None:
        self._ip(f"link set v{node} up")

    def wait_idle(self, timeout: float = 240) -> None:
        """Until all nodes are up and free."""
        self.wait_for(self._idle, timeout, lambda: self.run("sinfo", "-N", "-l").stdout + self.logs())

    def logs(self) -> str:
        return "".join(f"--- {p}\n" + p.read_text()[-2000:] for p in sorted((self.folder / "log").iterdir()))

    def stop(self) -> None:
        """Ends everything in the cluster and removes its folder."""
        self._stopped = True
        assert self._init.stdin is not None
        self._init.stdin.close()
        self._init.wait(timeout=60)
        for process in self._nodes.values():
            process.wait(timeout=60)
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- making

    def _enter(self, folder: Path = Path("/")) -> list[str]:
        return ["nsenter", f"--target={self._pid}", "--net", "--mount", "--uts", "--pid", f"--wdns={folder}", "--"]

    def _ip(self, arguments: str) -> None:
        self.check("ip", *arguments.split())

    def _idle(self) -> bool:
        states = self.run("sinfo", "-h", "-N", "-p", "gpu,failing", "-o", "%T").stdout.split()
        return states == ["idle"] * self.nodes

    def _start_namespaces(self) -> None:
        # pid 1 ends when its standard input does: with `stop`, or with this process.
        command = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command += ["--propagation", "private", "bash", "-c", "trap : TERM INT HUP; echo ready; read -r _"]
        self._init = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.environment)
        assert self._init.stdout is not None
        self._init.stdout.readline()
        self._pid = _innermost(self._init.pid)

    def _start_network(self) -> None:
        etc = self.folder / "etc"
        for command in (
            "mount -t tmpfs tmpfs /run",
            "mkdir /run/netns",
            "hostname ctl",
            f"mount --bind {etc}/hosts /etc/hosts",
            f"mount --bind {etc}/nsswitch.conf /etc/nsswitch.conf",
            "ip link set lo up",
            "ip link add br0 type bridge",
            "ip addr add 10.99.0.1/24 dev br0",
            "ip link set br0 up",
        ):
            self.check(*command.split())

    def _start_daemons(self) -> None:
        folder = self.folder
        self.check(
            "munged",
            f"--key-file={folder}/etc/munge.key",
            f"--socket={folder}/run/munge.sock",
            f"--pid-file={folder}/run/munged.pid",
            f"--log-file={folder}/log/munged.log",
            f"--seed-file={folder}/run/munged.seed",
        )
        for number in range(self.gpus):
            self.check("mknod", f"{folder}/run/gpu{number}", "c", "1", "3")  # any character device will do
        self.check("slurmctld")
        for number in range(1, self.nodes + 1):
            self.power_on(f"n{number}")
        self.wait_idle()

    def _write_files(self) -> None:
        etc = self.folder / "etc"
        hosts = [(f"10.99.0.{10 + n}", f"n{n}") for n in range(1, self.nodes + 1)]
        lines = [f"{address} {name}" for address, name in [("127.0.0.1", "localhost"), ("10.99.0.1", "ctl"), *hosts]]
        (etc / "hosts").write_text("\n".join(lines) + "\n")
        (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        (etc / "munge.key").write_bytes(os.urandom(128))
        (etc / "munge.key").chmod(0o400)
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # unused, but slurmd wants to know
        devices = f"{self.folder}/run/gpu[0-{self.gpus - 1}]"
        (etc / "gres.conf").write_text(f"AutoDetect=off\nNodeName=n[1-{self.nodes}] Name=gpu File={devices}\n")
        (etc / "slurm.conf").write_text(self._slurm_conf())

    def _slurm_conf(self) -> str:
        folder, last, half = self.folder, self.nodes, self.nodes // 2
        # cred_expire is also how long a requeued job waits before it may start again; 5 is the least.
        return f"""ClusterName=ci
SlurmctldHost=ctl
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
BatchStartTimeout=15
MessageTimeout=20
KillWait=10
UnkillableStepTimeout=20
MinJobAge=3600
JobRequeue=1
EnforcePartLimits=ALL
GresTypes=gpu
PrivateData=cloud
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=INFINITE
NodeName=n[1-{last}] CPUs={self.cpus} RealMemory=64000 Gres=gpu:{self.gpus}
PartitionName=gpu Nodes=n[1-{half}] Default=YES MaxTime=INFINITE State=UP
PartitionName=failing Nodes=n[{half + 1}-{last}] MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=n[{half + 1}-{last}] MaxTime=INFINITE State=UP PriorityTier=10
{_BIG}"""


def _innermost(pid: int) -> int:
    """The first shell below a chain of nsenter and unshare: the init of the namespaces they made."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if Path(f"/proc/{pid}/comm").read_text().strip() == "bash":
            return pid
        children: Sequence[str] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children:
            pid = int(children[0])
        else:
            time.sleep(0.01)
    raise TimeoutError(f"process {pid} made no namespaces")
