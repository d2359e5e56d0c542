"""Whole shards, each handled by one of several processes, with one progress bar over their images."""

import multiprocessing as mp
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_any
from typing import Any

from penstock.errors import InputError
from penstock.progress import Meter

Advance = Callable[[int], None]


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    function: Callable[..., Any], jobs: list[tuple], workers: int, meter: Meter, loaded: Sequence[str] = ()
) -> list[Any]:
    """`function(*job, advance)` for every job, results in the jobs' order; `advance(n)` reports n images done.

    `loaded` names modules to load once for all processes, where the function imports them late.

    Jobs run in this process when one is enough. The first exception ends the others and is raised.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        return [function(*job, meter.advance) for job in jobs]
    # A forked child would inherit the locks of this process's threads; the fork server has none.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([function.__module__, *loaded])
    counter = context.Value("q", 0)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(counter,))
    try:
        futures = [pool.submit(_run, function, job) for job in jobs]
        waiting: Any = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=0.25, return_when=FIRST_EXCEPTION)
            meter.advance(counter.value - meter.count)
            for future in done:
                future.result()
        return [future.result() for future in futures]
    except BrokenProcessPool:
        raise InputError(
            "a worker process was killed, most often for want of memory; run the same command with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_counter: Any = None  # images done by all workers; set in each by _start


def _start(counter: Any) -> None:
    global _counter
    _counter = counter
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker at once and quietly; its drafts do not count
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = mp.parent_process()
    if parent is not None:
        wait_for_any([parent.sentinel])
        os._exit(1)


def _advance(count: int) -> None:
    with _counter.get_lock():
        _counter.value += count


def _run(function: Callable[..., Any], job: tuple) -> Any:
    return function(*job, _advance)
