"""A real Slurm of several nodes on this host, in a folder of its own: munged, slurmctld, and a slurmd for each node.

    with Cluster(folder, nodes=3) as cluster:
        job = cluster.sbatch("--nodes", "2", "slurm/pretrain.sbatch", "RECIPE")
        cluster.wait(job, "COMPLETED")

Two partitions: `main`, whose jobs are requeued when a job of `urgent` wants their nodes. Needs root, since munge checks
whose folders these are, and jobs run as whoever sends them.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
CONF = """
ClusterName=penstock
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until the credentials of its life before have expired: 120 seconds unless told otherwise.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
# The clock of schedulers: this one is to be quick.
SchedulerParameters=sched_min_interval=500000,bf_interval=1,batch_sched_delay=0,requeue_setup_env_fail
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=6
KillWait=20
# Signals ahead of time limits are sent when time limits are looked at.
OverTimeLimit=0
ReturnToService=2
MaxArraySize=100
NodeName=DEFAULT CPUs={cpus} RealMemory=2000 State=UNKNOWN
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=20 MaxTime=60 OverSubscribe=NO
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=60 OverSubscribe=NO
"""


def missing() -> str | None:
    """Why no cluster can be started here."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    absent = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if absent:
        return f"no {', '.join(absent)} here; on Debian: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "Slurm's daemons are started by root only"


class Cluster:
    """Started on entering, and gone, with every process of every job, on leaving.

    Args:
        folder: for state, logs and sockets.
        nodes: how many; their names are n0, n1, ...
        cpus: of each node, whatever the host has.
    """

    def __init__(self, folder: Path, nodes: int = 3, cpus: int = 2):
        self.folder = folder
        self.nodes = [f"n{number}" for number in range(nodes)]
        self.conf = folder / "slurm.conf"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(self.conf),
            "PATH": os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"]),
        }
        ports, host = free_ports(nodes + 1), socket.gethostname().partition(".")[0]
        lines = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
            for name, port in zip(self.nodes, ports[1:], strict=True)
        ]
        (folder / "state").mkdir(parents=True)
        self.conf.write_text(
            CONF.format(
                host=host,
                port=ports[0],
                folder=folder,
                cpus=cpus,
                nodes="\n".join(lines),
            )
        )

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _start(self) -> None:
        key, sock = self.folder / "munge.key", self.folder / "munge.socket"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {f"--{name}-file": self.folder / f"munge.{name}" for name in ("pid", "log", "seed")}
        options = [f"{option}={path}" for option, path in files.items()]
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={sock}", *options)
        until(sock.exists, 10, "munged")
        self._daemon("slurmctld", "-D")
        for node in self.nodes:
            self.start_node(node)
        until(lambda: self.say("sinfo", "-h", "-t", "idle", "-o", "%D") == str(len(self.nodes)), 30, "idle nodes")

    def start_node(self, node: str) -> None:
        """Boot a node; one that was killed comes back."""
        self._daemon("slurmd", "-D", "-N", node, node=node)

    def kill_node(self, node: str) -> None:
        """kill -9 of all that runs on a node, its slurmd first, as when its power fails."""
        doomed = sorted(self.processes(node), key=lambda one: one.name() != "slurmd")
        for one in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(doomed, timeout=5)

    def processes(self, node: str | None = None) -> list[psutil.Process]:
        """All that belongs to this cluster, or runs on one node of it: known by their environment."""
        found = []
        for one in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                its = one.environ()
                on = its.get("SLURMD_NODENAME", its.get("CLUSTER_NODE"))
                if its.get("SLURM_CONF") == str(self.conf) and (node is None or on == node) and one.pid != os.getpid():
                    found.append(one)
        return found

    def stop(self) -> None:
        for _ in range(3):  # a daemon may have started something meanwhile
            for one in self.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(self.processes(), timeout=5)

    def say(self, *command: str, environment: dict[str, str] | None = None) -> str:
        """What a command prints that asks this cluster."""
        env = environment or self.environment
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise AssertionError(f"{' '.join(command)} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def sbatch(self, *words: str, **environment: str) -> str:
        """Submit from the checkout; the job's id."""
        done = subprocess.run(
            ["sbatch", "--parsable", *words],
            env={**self.environment, **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().partition(";")[0]

    def state(self, job: str) -> str:
        found = re.search(r"JobState=(\w+)", self.say("scontrol", "show", "job", job))
        assert found
        return found[1]

    def restarts(self, job: str) -> int:
        found = re.search(r"Restarts=(\d+)", self.say("scontrol", "show", "job", job))
        assert found
        return int(found[1])

    def wait(self, job: str, *states: str, timeout: float = 150) -> str:
        """Until the job is in one of these states."""
        return until(lambda: (now := self.state(job)) in states and now, timeout, f"job {job} to be {states}")

    def _daemon(self, *command: str, node: str = "") -> None:
        environment = {**self.environment, "CLUSTER_NODE": node}
        with (self.folder / "daemons.log").open("ab") as log:
            subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def free_ports(count: int) -> Sequence[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def until(condition, timeout: float, what: str):
    """The condition's first true value."""
    began = time.monotonic()
    while not (value := condition()):
        assert time.monotonic() - began < timeout, f"waited {timeout:.0f} s in vain for {what}"
        time.sleep(0.2)
    return value
