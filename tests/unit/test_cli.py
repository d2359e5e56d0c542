"""The command itself, whatever it is asked to do."""

import subprocess
import sys
from pathlib import Path

import pytest

from penstock.cli import PIPE_CLOSED, main
from penstock.errors import DONE, INPUT_WRONG
from tests.shards import write_set

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("options", [[], ["-u"]], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("words", [["shards", "show", "SET"], ["--help"]], ids=lambda words: words[0])
def test_a_reader_that_has_read_enough_brings_no_traceback(tmp_path, words, options):
    write_set(tmp_path, [2])
    command = [str(tmp_path) if word == "SET" else word for word in words]
    process = subprocess.Popen(
        [sys.executable, *options, "-m", "penstock.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    process.stdout.close()  # before anything is written
    errors = process.stderr.read()
    assert process.wait(timeout=60) in (DONE, PIPE_CLOSED)  # argparse takes no notice of a closed pipe
    assert errors == ""


def test_exit_codes_and_errors_for_people(tmp_path, capsys):
    write_set(tmp_path / "set", [2])
    assert main(["shards", "show", str(tmp_path / "set")]) == DONE
    assert main(["shards", "show", str(tmp_path / "nothing")]) == INPUT_WRONG
    error = capsys.readouterr().err
    assert error.startswith("penstock: ") and "Traceback" not in error
    with pytest.raises(SystemExit) as usage:
        main(["no-such-command"])
    assert usage.value.code == INPUT_WRONG
