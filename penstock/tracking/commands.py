"""`penstock sync`, `penstock compare` and `penstock ui`."""

import argparse
import os
import socket
import sys
from pathlib import Path

from penstock.errors import DONE, InputError


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands; each sets `run`, a function of the parsed arguments that returns the exit code."""
    sync = subparsers.add_parser("sync", help="bring MLflow up to date with the journals of runs")
    sync.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    sync.add_argument("--uri", help="an MLflow store other than the one the run went to")
    sync.set_defaults(run=run_sync)

    compare = subparsers.add_parser("compare", help="runs side by side: results, and what differs between the recipes")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or an MLflow run's id or name")
    compare.add_argument("--format", choices=["table", "json"], default="table")
    compare.add_argument("--metrics", nargs="*", default=[], metavar="GLOB", help="further metrics, such as 'perf/*'")
    compare.add_argument("--picture", type=Path, metavar="PNG", help="also draw the curves over samples seen")
    compare.add_argument("--uri", help="MLflow store for ids and names; else MLFLOW_TRACKING_URI, else runs/mlflow.db")
    compare.set_defaults(run=run_compare)

    ui = subparsers.add_parser("ui", help="the MLflow pages for the runs on this machine, at a loopback address")
    ui.add_argument("runs", nargs="?", type=Path, default=Path("runs"), metavar="RUNS", help="folder of the runs")
    ui.add_argument("--port", type=int, default=5000)
    ui.set_defaults(run=run_ui)


def run_sync(args: argparse.Namespace) -> int:
    from penstock.tracking.process import sync
    from penstock.tracking.store import State

    for folder in args.runs:
        run_id = sync(folder, args.uri)
        print(f"{folder}: MLflow run {run_id} at {State.load(folder).uri} is up to date")
    return DONE


def run_compare(args: argparse.Namespace) -> int:
    from rich.console import Console

    from penstock import compare
    from penstock.tracking.store import actual_uri, recorded_uri

    runs = compare.load(args.runs, args.uri or actual_uri(recorded_uri(None), Path("runs")))
    if args.format == "json":
        print(compare.as_json(runs, args.metrics))
    else:
        Console().print(compare.table(runs, args.metrics))
    if args.picture:
        compare.picture(runs, args.picture, args.metrics)
        print(f"curves: {args.picture}", file=sys.stderr)
    return DONE


def run_ui(args: argparse.Namespace) -> int:
    from penstock.tracking.mirror import open_store, use_short_timeouts

    if not args.runs.is_dir():
        raise InputError(f"{args.runs} is no folder of runs; give the folder that holds them: penstock ui RUNS")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", args.port))
        except OSError:
            raise InputError(f"port {args.port} is taken; choose another, such as --port {args.port + 1}") from None
    use_short_timeouts()
    open_store(f"sqlite:///{args.runs.resolve() / 'mlflow.db'}")  # a run and the server must not both create its tables
    print(f"MLflow: http://127.0.0.1:{args.port} (Ctrl-C ends it)", flush=True)
    command = server_command(args.runs, args.port)
    os.execve(command[0], command, server_environment())  # in this process's place, so that no server outlives it


def server_command(runs: Path, port: int) -> list[str]:
    """MLflow's server for the store of `runs`, on the loopback address, for browsers that call it by these names."""
    names = ("localhost", "127.0.0.1", "[::1]", socket.gethostname(), socket.getfqdn())
    hosts = sorted({each for name in names for each in (name, f"{name}:*")})  # a tunnel may use any port
    options = {
        "--backend-store-uri": f"sqlite:///{runs.resolve() / 'mlflow.db'}",
        "--default-artifact-root": (runs.resolve() / "artifacts").as_uri(),
        "--host": "127.0.0.1",
        "--port": str(port),
        "--workers": "1",
        "--allowed-hosts": ",".join(hosts),
        "--uvicorn-opts": "--log-level warning",
    }
    return [sys.executable, "-m", "mlflow", "server", *(word for option in options.items() for word in option)]


def server_environment() -> dict[str, str]:
    """Nothing is reported to anyone, and no jobs are run from the pages."""
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return {**os.environ, **quiet}
