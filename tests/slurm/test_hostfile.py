"""DeepSpeed's own launcher with a hostfile of two hosts; ssh and pdsh are stand-ins that stay on this machine."""

import os
import subprocess
import sys
from pathlib import Path

from penstock.tracking.journal import read_run
from tests.slurm.cluster import ROOT

SSH = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do case $1 in -o) shift 2 ;; *) shift ;; esac; done
shift
exec bash -c "$*"
"""
PDSH = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do case $1 in -f) shift 2 ;; -w) hosts=$2; shift 2 ;; *) shift ;; esac; done
number=0
for host in ${hosts//,/ }; do
    command="$*"
    bash -c "${command//%n/$number}" & pids+=($!)
    number=$((number + 1))
done
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit ${code:-0}
"""


def test_deepspeeds_launcher_with_a_hostfile(recipe, tmp_path):
    for name, text in (("ssh", SSH), ("pdsh", PDSH)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("first slots=1\nsecond slots=1\n")
    deepspeed = Path(sys.executable).with_name("deepspeed")
    options = ("--hostfile", tmp_path / "hosts", "--no_local_rank", "--master_addr", "127.0.0.1")
    ports = ("--master_port", str(20000 + os.getpid() % 10000))
    done = subprocess.run(
        [deepspeed, *options, *ports, "--module", "pretrain", recipe, f"out={tmp_path}", "duration=4 steps"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = read_run(tmp_path / "run")
    assert run.status == "FINISHED" and run.tags["world_size"] == "2"
