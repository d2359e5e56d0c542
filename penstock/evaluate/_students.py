"""`penstock students TEACHER STUDENT ...`. Heavy imports wait until the command runs."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.arguments import count, place
from penstock.errors import DONE, InputError

if TYPE_CHECKING:
    from penstock.students import Entry, Report
    from penstock.tracking import Tracker

DESCRIPTION = """What students know and cost, beside their teacher: accuracy, calibration, agreement with the teacher,
parameters, multiply-accumulates, time on this machine, and size. Where the same student was trained alone and
distilled, the difference has a paired 95 % interval over images and seeds. A student of several seeds is
NAME=RUN,RUN,RUN."""
JSON, TABLE, PICTURE = "report.json", "report.md", "students.png"


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("students", help="a teacher and its students side by side", description=DESCRIPTION)
    add = parser.add_argument
    add("teacher", metavar="TEACHER", help="run or export folder of the teacher")
    add("students", metavar="STUDENT", nargs="+", help="run or export folder, or NAME=RUN,RUN,... for several seeds")
    add("--data", metavar="SET", type=place, required=True, help="packed validation set, or a folder that holds `val`")
    add(
        "--labels",
        metavar="NAME,NAME",
        help="names of the students in order, the teacher's first if there is one more",
    )
    add("--rounds", metavar="N", type=count, help="rounds of the latency, in which the networks take turns (15)")
    add("--threads", metavar="N", type=count, help="threads of the processor (torch's own number)")
    add("--limit", metavar="N", type=count, help="at most N images, a fixed subset")
    add("--batch", metavar="N", type=count, default=256, help="images per forward while answers are measured (256)")
    add("--workers", metavar="N", type=int, default=2, help="decoding processes (2)")
    add("--out", metavar="FOLDER", type=Path, help=f"keep {JSON}, {TABLE} and {PICTURE} there")
    add("--format", choices=("table", "json"), default="table")
    add(
        "--track",
        action=argparse.BooleanOptionalAction,
        help="make an MLflow run of it (with --out, where the students' runs went to one store)",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.track and args.out is None:
        raise InputError("--track needs --out FOLDER, where the report and its journal lie")
    from penstock.cost import ROUNDS
    from penstock.evaluate._classifier import labelled_set
    from penstock.students import as_json, compare, print_report

    teacher, students = _named(args)
    uri = None if args.track is False or args.out is None else _store([teacher, *students])
    report = compare(
        teacher,
        students,
        labelled_set(args.data),
        batch=args.batch,
        workers=args.workers,
        limit=args.limit,
        rounds=args.rounds or ROUNDS,
        threads=args.threads,
    )
    if args.out is not None:
        keep(report, args.out)
        if args.track or uri is not None:
            track(report, args.out, uri)
    if args.format == "json":
        print(json.dumps(as_json(report), indent=1))
        return DONE
    print_report(report)
    if args.out is not None:
        print(f"kept in {args.out}: {JSON}, {TABLE}, {PICTURE}")
    return DONE


def keep(report: "Report", folder: Path) -> None:
    """Write the report's three files."""
    from penstock.students import as_json, draw, markdown

    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON).write_text(json.dumps(as_json(report), indent=1) + "\n", encoding="utf-8")
    (folder / TABLE).write_text(markdown(report), encoding="utf-8")
    draw(report, folder / PICTURE)


def track(report: "Report", folder: Path, uri: str | None, enabled: bool = True) -> None:
    """An MLflow run of the report in `folder`; made again, its figures are the next step of the same run.

    Args:
        uri: the store; the usual one where None.
        enabled: whether it is sent to MLflow, or only written to its journal.
    """
    from penstock.students import as_json
    from penstock.tracking import Tracker

    said = as_json(report)
    params = {"data": said["data"], "machine": said["machine"], "latency_rounds": said["latency_rounds"]}
    tags = {"stage": "students"} | {f"network.{row.name}": ", ".join(row.places) for row in report.rows}
    tracker = Tracker(
        Tracker.Config(uri=uri, enabled=enabled), folder, folder.resolve().name, params, tags, active=True
    )
    try:
        _log(tracker, said, len(tracker.journal.attempts))
        for name in (JSON, TABLE, PICTURE):
            tracker.artifact(folder / name)
    except BaseException:
        tracker.close("FAILED")
        raise
    tracker.close("FINISHED")


def _log(tracker: "Tracker", said: dict[str, Any], step: int) -> None:
    for row in (said["teacher"], *said["students"]):
        figures = {**row["figures"], **{key: row["cost"][key] for key in ("parameters", "macs", "bytes")}}
        figures |= {f"latency_ms_{batch}": each["median"] for batch, each in row["cost"]["latency_ms"].items()}
        tracker.log(step, {f"{row['name']}/{name}": value for name, value in figures.items()})
    for gain in said["gains"]:
        for metric, effect in gain["effects"].items():
            limits = {limit: effect[limit] for limit in ("value", "low", "high")}
            tracker.log(step, {f"gain/{gain['distilled']}/{metric}_{limit}": v for limit, v in limits.items()})


def _named(args: argparse.Namespace) -> "tuple[Entry, list[Entry]]":
    from penstock.students import entry

    names: list[str | None] = [None] * len(args.students)
    if args.labels is not None:
        names = [name.strip() for name in args.labels.split(",")]
    if len(names) == len(args.students):
        names = [None, *names]
    if len(names) != len(args.students) + 1:
        raise InputError(f"--labels gives {len(names)} names for {len(args.students)} students; give one each")
    teacher, *students = [entry(text, name) for text, name in zip((args.teacher, *args.students), names, strict=True)]
    return teacher, students


def _store(entries: "list[Entry]") -> str | None:
    """The MLflow store that the runs of all students went to; None where one is no run, or they differ."""
    from penstock.tracking.journal import NAME, read_lines
    from penstock.tracking.store import State, actual_uri

    found = set()
    for folder in (Path(name) for each in entries[1:] for name in each.places):
        run = folder if (folder / NAME).is_file() else folder.parent
        if State.load(run).uri is None:
            return None  # no run, or one that was kept from MLflow
        attempts = [line["attempt"] for line in read_lines(run / NAME) if "attempt" in line]
        found.add(actual_uri(attempts[-1]["uri"], run.parent) if attempts else None)
    return found.pop() if len(found) == 1 else None
