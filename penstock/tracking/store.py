"""Where a run is mirrored to, and how far the mirror has come."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from penstock.errors import InputError


def check_uri(uri: str) -> None:
    if uri.startswith("file:") or ("://" not in uri and uri != "databricks"):
        raise ValueError(f"MLflow keeps no runs in plain folders any more ({uri!r}); write sqlite:////PATH/mlflow.db")


def without_password(uri: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if parts.netloc else uri


def recorded_uri(configured: str | None) -> str | None:
    """What the journal remembers: None for the store beside the run, which may move with it; never a password."""
    uri = configured or os.environ.get("MLFLOW_TRACKING_URI") or None
    if uri is None:
        return None
    try:
        check_uri(uri)
    except ValueError as error:
        raise InputError(f"MLFLOW_TRACKING_URI: {error}") from None
    path = sqlite_path(uri)
    return f"sqlite:///{path.resolve()}" if path else without_password(uri)


def actual_uri(recorded: str | None, runs: Path) -> str:
    """The store to open; a password comes from the environment again."""
    from_environment = os.environ.get("MLFLOW_TRACKING_URI")
    if recorded is None:
        return f"sqlite:///{runs.resolve() / 'mlflow.db'}"
    return from_environment if from_environment and without_password(from_environment) == recorded else recorded


def sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


@dataclass
class State:
    """What the mirror has done, in `run.json`: replaced as a whole, so it is never half written."""

    uri: str | None = None
    run_id: str | None = None
    offset: int = 0  # bytes of the journal that MLflow has acknowledged
    owed: list[str] = field(default_factory=list)  # files that could not be sent yet
    trouble: str | None = None  # why the last attempt failed

    @classmethod
    def load(cls, folder: Path) -> "State":
        path = folder / "run.json"
        return cls(**json.loads(path.read_text())) if path.exists() else cls()

    def save(self, folder: Path) -> None:
        fresh = folder / f".run.json.{os.getpid()}"
        fresh.write_text(json.dumps(asdict(self), indent=1))
        fresh.replace(folder / "run.json")
