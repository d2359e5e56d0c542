"""How a process joins the other ranks and loads DeepSpeed."""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from penstock import distributed


def start_ranks() -> None:
    """Join the other ranks (torchrun's environment says how); a process on its own becomes a group of one."""
    if distributed.started():
        return
    if "RANK" not in os.environ:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ.update(alone)
    device = distributed.device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet, and without the shared-memory op that it would compile at start on a CPU."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with _absent("mlflow"):  # its autotuner would load it, one second and 120 MB in every rank, and works without
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(
            dist_backend="gloo" if device.type == "cpu" else "nccl", auto_mpi_discovery=False, verbose=False
        )
    return deepspeed


@contextmanager
def _absent(module: str) -> Iterator[None]:
    """Importing `module` fails here, unless it was imported before."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
