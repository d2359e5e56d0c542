"""The process beside a run that mirrors its journal, and `penstock sync`, which does the same afterwards."""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from penstock.errors import InputError
from penstock.tracking.journal import NAME, Lock

CLOSE_WITHIN = 20.0  # seconds a run that has ended waits for its mirror
SEND_EVERY = 5.0  # seconds between batches of a live run
LONGEST_PAUSE = 60.0  # seconds between attempts to reach a server that does not answer
# A scheduler signals every process of a job, a terminal its whole group; the mirror ends after its run, not with it.
NOT_FOR_THE_MIRROR = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}


def sender_lock(folder: Path) -> Lock:
    """Held by the process that mirrors the run: its own, or `penstock sync`."""
    return Lock(folder / ".mirror.lock")


def start_mirror(folder: Path) -> "subprocess.Popen[bytes]":
    """The mirror as a child that inherits blocked signals, so that there is no moment in which one could end it."""
    command = [sys.executable, "-m", "penstock.tracking", str(folder.resolve())]
    checkout = str(Path(__file__).parents[2])  # the same code as the run's, wherever the run was started
    paths = os.pathsep.join(filter(None, [checkout, os.environ.get("PYTHONPATH")]))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_THE_MIRROR)
    try:
        with (folder / "mirror.log").open("ab") as log:
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": paths}
            )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop_mirror(process: "subprocess.Popen[bytes]") -> None:
    """Ask for the rest to be sent, and wait a bounded time."""
    assert process.stdin is not None
    try:
        process.stdin.write(b".")  # a byte, since a forked data worker may keep the pipe from ending
        process.stdin.close()
    except OSError:
        pass  # the mirror is gone
    try:
        process.wait(CLOSE_WITHIN)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def follow(folder: Path) -> None:
    """Mirror a live run until it ends or its process is gone, then try three times more to send the rest."""
    from penstock.tracking.mirror import Mirror, use_short_timeouts

    os.nice(10)
    use_short_timeouts()
    lock, parent = sender_lock(folder), os.getppid()
    while not lock.take(wait=1.0):  # the mirror of the attempt before this one may still be at work
        if os.getppid() != parent:
            return
    mirror = Mirror(folder)
    failures = 0
    while True:
        try:
            mirror.send()
            if failures:
                say("MLflow answers again")
            failures = 0
        except Exception:
            if not failures:
                say(f"{mirror.state.trouble}; trying again")
            failures += 1
        if run_over(parent, min(SEND_EVERY * 2**failures, LONGEST_PAUSE)):
            break
    for _ in range(3):
        try:
            mirror.send()
            mirror.fail_if_crashed()
            return
        except Exception:
            time.sleep(1.0)
    say(f"{mirror.state.trouble}; gave up")


def say(text: str) -> None:
    print(time.strftime("%F %T"), text, file=sys.stderr, flush=True)


def run_over(parent: int, seconds: float) -> bool:
    """Wait; true as soon as the run has said that it ends, or its process is gone."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if select.select([sys.stdin], [], [], min(left, 1.0))[0] or os.getppid() != parent:
            return True
    return False


def sync(folder: Path, uri: str | None = None) -> str:
    """Bring MLflow (at `uri`, else where the run went) up to date with a run's journal; returns the MLflow run id.

    Changes the process's environment. Raises InputError where the folder is no run, the run mirrors itself at this
    moment, or MLflow does not take it.
    """
    from penstock.tracking.mirror import Mirror, use_short_timeouts

    if not (folder / NAME).is_file():
        raise InputError(f"{folder} is not a run: it holds no {NAME}")
    lock = sender_lock(folder)
    if not lock.take():
        raise InputError(f"{folder}: the run is going on and sends its journal by itself; nothing to do")
    use_short_timeouts()
    mirror = Mirror(folder, uri)
    try:
        mirror.send()
        mirror.fail_if_crashed()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{folder}: MLflow did not take the run: {mirror.state.trouble or error}") from error
    finally:
        lock.release()
    return str(mirror.state.run_id)
