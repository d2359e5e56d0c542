"""What is known about a cluster: the options of its jobs, from configs/launch/, and questions to its queue."""

import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from penstock.errors import InputError, nearest
from penstock.recipe import Block, Rule, check, load

ROOT = Path(__file__).resolve().parents[1]
CLUSTERS = ROOT / "configs" / "launch"
EARLY = 60  # seconds that Slurm may send a signal too early


def runs_have_time(cluster: "Cluster") -> Iterator[str]:
    limit = seconds(cluster.time) if cluster.time else None
    if limit is not None and limit <= cluster.signal + EARLY:
        yield (
            f"signal: sent {cluster.signal} s before the limit of {limit} s, or a minute earlier, it leaves no time to "
            "train; give a longer time, or a smaller signal"
        )


class Cluster(Block):
    """What a job asks for."""

    nodes: int = Field(1, ge=1, description="how many")
    time: str | None = Field(None, description="limit of one start, as sbatch takes it; else the partition's own")
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus: int | None = Field(None, ge=1, description="of each node; a rank for each")
    cpus: int | None = Field(None, ge=1, description="of each node")
    ranks: int | None = Field(None, ge=1, description="of each node; else one per GPU, or one")
    signal: int = Field(180, ge=1, le=65535, description="seconds before the limit at which a run saves and requeues")
    torchrun: list[str] = Field([], description="more options of torchrun, such as --numa-binding=node")
    options: list[str] = Field([], description="more options of sbatch")
    setup: list[str] = Field([], description="shell lines before training")
    env: dict[str, str] = Field({}, description="environment of the job")

    @field_validator("time", mode="before")
    @classmethod
    def _as_written(cls, time: Any) -> Any:
        if isinstance(time, int):  # YAML 1.1 reads 24:00:00 as a number of seconds, in base 60
            raise ValueError(f"YAML read {time}, a number; write the time in quotes, '24:00:00' say")
        return time

    @field_validator("options")
    @classmethod
    def _are_options(cls, options: list[str]) -> list[str]:
        for option in options:
            if not option.startswith("-") or "\n" in option:
                raise ValueError(f"{option!r} is no option of sbatch; write --name=value")
        return options

    rules: ClassVar[tuple[Rule, ...]] = (runs_have_time,)

    @property
    def world(self) -> int:
        """Ranks of a job."""
        return self.nodes * (self.ranks or self.gpus or 1)

    def sbatch(self) -> list[str]:
        """Its options of sbatch."""
        given = {
            "--nodes": self.nodes,
            "--time": self.time,
            "--partition": self.partition,
            "--account": self.account,
            "--qos": self.qos,
            "--gpus-per-node": self.gpus,
            "--cpus-per-task": self.cpus,
            "--signal": f"B:USR1@{self.signal}",
        }
        return [*(f"{name}={value}" for name, value in given.items() if value is not None), *self.options]


def seconds(time: str) -> int | None:
    """Of a time as sbatch takes it: minutes, m:s, h:m:s, d-h, d-h:m, d-h:m:s. None for other words, as UNLIMITED."""
    days, dash, clock = time.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts) or len(parts) > 3 or (dash and not days.isdigit()):
        return None
    numbers = [int(part) for part in parts]
    if dash:
        numbers = [*numbers, 0, 0][:3]
    elif len(numbers) == 1:
        numbers = [0, numbers[0], 0]
    elif len(numbers) == 2:
        numbers = [0, *numbers]
    hours, minutes, rest = numbers
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + rest


def cluster_of(name: str, changes: dict[str, Any]) -> Cluster:
    """The cluster of configs/launch/NAME.yaml, or of a file, with changes that are not None."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else CLUSTERS / f"{name}.yaml"
    if not path.is_file():
        known = [file.stem for file in CLUSTERS.glob("*.yaml")]
        raise InputError(f"--cluster {name}: there is no {path}{nearest(name, known)}")
    source = load(path)
    for key, value in changes.items():
        if value is not None:
            source.values[key], source.origins[key] = value, "command line"
    return check(Cluster, source)


def ask(*command: str) -> str:
    """What a Slurm command prints. Raises InputError where it is absent or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise InputError(f"there is no {command[0]} here; `launch slurm` runs on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise InputError(f"Slurm did not answer {' '.join(command[:2])} within two minutes; try again") from None
    if done.returncode:
        raise InputError(f"{command[0]}: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()


def queued(jobs: Iterable[str]) -> dict[str, str]:
    """Those of the jobs that wait or run, with their states; an array's tasks count as the array."""
    wanted = set(jobs)
    if not wanted:
        return {}
    found: dict[str, str] = {}
    for line in ask("squeue", "--noheader", "--me", "--format=%F %T").splitlines():
        job, state = line.split(maxsplit=1)
        if job in wanted and found.get(job) != "RUNNING":
            found[job] = state
    return found


def submit(script: Path, after: Sequence[str] = (), when: str = "afterok") -> str:
    """Send a job; its id. With `after`, it waits for those jobs, and is dropped where they fail."""
    depend = [f"--dependency={when}:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    return ask("sbatch", "--parsable", *depend, str(script)).partition(";")[0]
