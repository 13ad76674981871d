"""A real Slurm for tests: munged, slurmctld and one slurmd per node, all on this machine, without systemd or cgroups.

Two partitions: ``batch``, whose jobs are requeued to make room for those of ``urgent``. It does not cover accounting
(no slurmdbd, so no sacct), GPUs, or limits on memory.
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.distributed import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
NODES = ("127.0.0.1", "127.0.0.2")
"""Names that resolve without an entry in /etc/hosts, because jobs meet at the name of their first node."""

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
# A job's processes meet at a port that follows from its number: clusters of tests that run side by side must differ.
FirstJobId={port}
AuthType=auth/munge
CryptoType=crypto/munge
# A requeued job waits until its old credential has expired.
AuthInfo=socket={root}/munge/munge.sock,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=3600
SlurmctldTimeout=30
SlurmdTimeout=30
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 GraceTime={grace} State=UP
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF State=UP
"""


def unavailable() -> str | None:
    """Why no cluster can be started here, or None."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no Slurm here ({', '.join(missing)} not found); on Debian: slurmctld slurmd slurm-client munge"
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    return None


def _running(pid: int) -> bool:
    """Whether a process lives; a daemon that has ended may stay a zombie until process 1 reaps it."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def wait_for(what: str, condition: Callable[[], object], timeout: float) -> None:
    """Wait until ``condition`` is true.

    Raises:
        TimeoutError: it is not within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} not within {timeout:g} s")
        time.sleep(0.1)


class Cluster:
    """Two nodes of ``cpus`` advertised processors each. A context manager; ``environment`` is what clients need."""

    def __init__(self, cpus: int = 4, grace: int = 20) -> None:
        self.cpus, self.grace = cpus, grace
        self.root = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: the daemons' sockets are in it
        self.environment = {**os.environ, "SLURM_CONF": f"{self.root}/slurm.conf"}

    def __enter__(self) -> "Cluster":
        try:
            self._configure()
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if (self.root / "run" / "slurmctld.pid").exists():
            self.client("scancel", "--user=root", check=False)
            try:  # so that no slurmstepd is left behind
                wait_for("end of all jobs", lambda: not self.client("squeue", "--noheader", check=False), 15)
            except TimeoutError:
                self.client("scancel", "--signal=KILL", "--user=root", check=False)
        # The controller first: it would wait for the nodes' daemons.
        for name in ("slurmctld.pid", *(f"slurmd.{node}.pid" for node in NODES), "munged.pid"):
            self._stop(self.root / "run" / name)
        shutil.rmtree(self.root, ignore_errors=True)

    def _configure(self) -> None:
        for name in ("log", "run", "state", "munge", *(f"spool/{node}" for node in NODES)):
            (self.root / name).mkdir(parents=True)
        self.root.chmod(0o755)
        (self.root / "munge").chmod(0o711)
        key = self.root / "munge" / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        host = socket.gethostname().split(".")[0]
        port, *node_ports = free_ports(1 + len(NODES))
        nodes = "\n".join(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} CPUs={self.cpus} "
                          "RealMemory=1000 State=UNKNOWN" for node, node_port in zip(NODES, node_ports, strict=True))
        (self.root / "slurm.conf").write_text(CONFIGURATION.format(
            root=self.root, host=host, port=port, nodes=nodes, grace=self.grace))

    def _start(self) -> None:
        munge = self.root / "munge"
        self._daemon("munged", "--force", f"--key-file={munge}/munge.key", f"--socket={munge}/munge.sock",
                     f"--log-file={self.root}/log/munged.log", f"--pid-file={self.root}/run/munged.pid",
                     f"--seed-file={munge}/munge.seed")
        self._daemon("slurmctld")
        for node in NODES:
            self._daemon("slurmd", "-N", node)

        def up() -> bool:  # a node that does not answer yet is shown as idle*
            return self.client("sinfo", "--noheader", "--Node", "--partition=batch", "--format=%T",
                               check=False).split() == ["idle"] * len(NODES)

        try:
            wait_for("idle nodes", up, 30)
        except TimeoutError as error:
            logs = "\n".join(f"{path.name}: {path.read_text()[-1000:]}" for path in (self.root / "log").iterdir())
            raise RuntimeError(f"{error}\n{logs}") from None

    def _daemon(self, *command: str) -> None:
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=30)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {result.stderr}")

    def _stop(self, pid_file: Path) -> None:
        if not pid_file.exists():
            return
        pid = int(pid_file.read_text())
        for signal in (15, 9):
            if _running(pid):
                os.kill(pid, signal)
                try:
                    wait_for(f"end of {pid_file.stem}", lambda: not _running(pid), 10)
                except TimeoutError:
                    continue

    def client(self, *command: str, check: bool = True) -> str:
        """What a Slurm command prints."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        if check:
            assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def show(self, job: str | int) -> dict[str, str]:
        """What Slurm knows about a job (an array task as ``12_1``): JobState, Reason, Restarts, ExitCode, …"""
        text = self.client("scontrol", "--oneliner", "show", "job", str(job))
        return dict(word.split("=", 1) for word in text.splitlines()[0].split() if "=" in word)

    def wait(self, job: str | int, timeout: float = 1500) -> dict[str, str]:
        """Wait until a job has ended for good, and return what Slurm then knows about it."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        wait_for(f"end of job {job}", lambda: self.show(job)["JobState"] in ended, timeout)
        return self.show(job)
