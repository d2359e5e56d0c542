"""A pool of gloo ranks, started once for a test session: importing torch and DeepSpeed costs seconds a process.

`pool(world).run(function, *args)` calls `function(rank, world, *args)` in every rank, where torch.distributed is
initialised, and returns the ranks' results in order. Functions live at the top level of a test module.
"""

import multiprocessing as mp
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

TIMEOUT = 180.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _serve(rank: int, world: int, port: int, pipe: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
        TORCH_DISTRIBUTED_DEBUG="OFF",
    )
    import datetime

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60))
    while True:
        call = pipe.recv()
        if call is None:
            break
        function, args, kwargs = call
        try:
            pipe.send((True, function(rank, world, *args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Pool:
    """Ranks that stay alive between calls; a call that fails or hangs restarts them."""

    def __init__(self, world: int):
        self.world = world
        self.processes: list[Any] = []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        port = free_port()
        self.pipes, self.processes = [], []
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, port, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT, **kwargs: Any) -> list[Any]:
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        results, errors = [], []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(timeout if not errors else 5.0):
                errors.append(f"rank {rank} did not answer")
                continue
            good, value = pipe.recv()
            (results if good else errors).append(value if good else f"rank {rank}:\n{value}")
        if errors:
            self.stop()
            raise AssertionError("\n".join(errors))
        return results

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []
