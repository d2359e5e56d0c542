"""The run folder on disk. A checkpoint is complete or it is not there, loads without unpickling anything, and fits any
number of ranks and any ZeRO stage.

    RUN/checkpoints/step-00000100/manifest.json      every other file's size and sha256; written last
                                  state.json         position, clock, digests: whatever is not a tensor
                                  rank-00000.safetensors   that rank's share of weights, optimizer state and buffers
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from penstock import distributed
from penstock.ema import AVERAGE, AVERAGED_BUFFER, Average
from penstock.engine import Engine
from penstock.engine_state import read_share, write_all
from penstock.errors import InputError
from penstock.recipe import Block
from penstock.schedule import Duration, Length

MANIFEST, STATE, FORMAT = "manifest.json", "state.json", 1


class Checkpoints:
    """Saves and restores a run.

    Args:
        folder: the run's folder, shared by all ranks.
    """

    class Config(Block):
        every: Duration = Field(Length(10, "%"), description="how often a checkpoint is saved; the end always is")
        keep: int = Field(2, ge=1, description="newest checkpoints that are kept")
        keep_every: Duration | None = Field(None, description="checkpoints at these intervals are kept for good")
        resume: Literal["auto", "must", "never"] = Field(
            "auto", description="continue a run in the same folder: if there is one, else fail, or refuse to"
        )

    def __init__(self, config: "Checkpoints.Config", folder: Path):
        self.config, self.folder = config, folder / "checkpoints"

    # Saving -------------------------------------------------------------------------------------------------------

    def save(
        self,
        engine: Engine,
        step: int,
        state: Mapping[str, Any],
        meters: Mapping[str, Tensor] | None = None,
        forever: bool = False,
        average: Average | None = None,
    ) -> str | None:
        """Write a checkpoint; collective. Returns what went wrong, on every rank, when it could not be written.

        `state` is JSON-ready and the same on all ranks; `meters` are this rank's open sums.

        Whatever happens at any byte, earlier checkpoints stay as they were.
        """
        final, partial = self.folder / name_of(step), self.folder / f".partial-{name_of(step)}"
        trouble = None
        if distributed.is_main():
            trouble = _attempt(lambda: _fresh(partial))
        trouble = distributed.broadcast(trouble)
        share = read_share(engine.task, engine.masters(), distributed.rank(), distributed.world())
        share |= {f"meter|{name}": value for name, value in (meters or {}).items()}
        share |= average.share(distributed.rank(), distributed.world()) if average is not None else {}
        written: dict[str, Any] = {}
        if trouble is None:
            file = partial / f"rank-{distributed.rank():05d}.safetensors"
            trouble = _attempt(lambda: written.update({file.name: _write(file, _to_bytes(share))}))
        reports = distributed.collect((trouble, written))
        troubles = [text for text, _ in reports if text]
        if not troubles and distributed.is_main():
            files = {name: entry for _, part in reports for name, entry in part.items()}
            about = {**state, "step": step, "world": distributed.world(), "forever": forever, "fp16": engine.scaler()}
            trouble = _attempt(lambda: self._complete(partial, final, files, about))
            troubles = [trouble] if trouble else []
        if troubles and distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        troubles = distributed.broadcast(troubles)
        if not troubles and distributed.is_main():
            self._retain()
        return "; ".join(troubles) or None

    def _complete(self, partial: Path, final: Path, files: dict[str, Any], about: dict[str, Any]) -> None:
        files[STATE] = _write(partial / STATE, _json(about))
        _write(partial / MANIFEST, _json({"format": FORMAT, "files": files}))
        _sync_folder(partial)
        if final.exists():  # written by an attempt that crashed later; this one equals it or is better
            shutil.rmtree(final)
        partial.rename(final)
        _sync_folder(self.folder)

    def _retain(self) -> None:
        """Remove what the retention rule does not keep."""
        found = self.found()
        for path in found[: -self.config.keep]:
            if not _read_json(path / STATE).get("forever"):
                doomed = path.with_name(f".removing-{path.name}")
                path.rename(doomed)  # a half-removed checkpoint must not look like one
                shutil.rmtree(doomed, ignore_errors=True)

    # Restoring ----------------------------------------------------------------------------------------------------

    def found(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if (path / MANIFEST).is_file())

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that verifies, and what was wrong with those passed over. Collective."""
        chosen, passed = None, []
        if distributed.is_main():
            for path in reversed(self.found()):
                fault = verify(path)
                if fault is None:
                    chosen = path
                    break
                passed.append(f"{path.name} is damaged ({fault})")
        return distributed.broadcast((chosen, passed))

    def restore(
        self, engine: Engine, meters: dict[str, Tensor] | None = None, average: Average | None = None
    ) -> tuple[dict[str, Any] | None, list[str]]:
        """Load the newest good checkpoint: its state (None for a fresh start), and warnings. Collective.

        `meters` receives this rank's open sums (all ranks' on rank 0, when their number has changed).

        Raises:
            InputError: there is none though `resume` says must, there is one though it says never, all are damaged, or
                it is of another model.
        """
        path, passed = self.newest()
        if path is None and (self.config.resume == "must" or passed):
            why = "; ".join(passed) or "there is none"
            raise InputError(
                f"no checkpoint in {self.folder} can be resumed: {why}. "
                "Start in another folder (out=...), or restore the files from a copy"
            )
        if path is None:
            return None, []
        if self.config.resume == "never":
            raise InputError(
                f"{self.folder.parent} already holds a run, at {path.name}, and checkpoint.resume is 'never'; "
                "give another name or folder (name=..., out=...), or checkpoint.resume=auto to continue it"
            )
        found = self.load(engine, path, average)
        if meters is not None:
            meters.update(found)
        return _read_json(path / STATE), passed

    def load(self, engine: Engine, path: Path, average: Average | None = None) -> dict[str, Tensor]:
        """Set weights, optimizer state, buffers and the average from one checkpoint; this rank's meters."""
        from safetensors import safe_open

        own = f"rank-{distributed.rank():05d}.safetensors"
        state = _read_json(path / STATE)
        same_world = state["world"] == distributed.world()
        buffers_from = own if same_world else "rank-00000.safetensors"
        place: dict[str, Any] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        meters: dict[str, Tensor] = {}
        for file in sorted(path.glob("rank-*.safetensors")):
            opened = safe_open(file, framework="pt")
            for key in opened.keys():  # noqa: SIM118 - not a mapping
                if key.startswith("meter|"):
                    if file.name == own if same_world else distributed.is_main():
                        name = key.removeprefix("meter|")
                        meters[name] = meters.get(name, 0) + opened.get_tensor(key)
                elif not key.startswith(("buffer|", AVERAGED_BUFFER)) or file.name == buffers_from:
                    place[key] = opened
                    shapes[key] = tuple(opened.get_slice(key).get_shape())
        _check_same_model(engine, shapes, path)

        def tensor(key: str) -> Tensor:
            return place[key].get_tensor(key)

        averaged = [key for key in place if key.startswith(AVERAGE)]
        write_all(engine.task, engine.masters(), tensor, place.keys() - averaged)
        if average is not None:
            if not averaged:
                raise InputError(
                    f"{path} holds no averaged weights, so average.name={average.config.name} cannot go on from it; "
                    "set average.name=none, or start a new run"
                )
            average.load(tensor, averaged)
        engine.restore_scaler(state["fp16"])
        return meters


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        manifest = _read_json(path / MANIFEST)
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, this Penstock reads {FORMAT}"
        for name, entry in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
            with file.open("rb") as handle:
                if hashlib.file_digest(handle, "sha256").hexdigest() != entry["sha256"]:
                    return f"the checksum of {name} is not the recorded one"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


def _check_same_model(engine: Engine, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    saved = {key.removeprefix("weight|"): shape for key, shape in shapes.items() if key.startswith("weight|")}
    now = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.task.named_parameters()}
    if saved == now:
        return
    differ = sorted(name for name in saved.keys() | now.keys() if saved.get(name) != now.get(name))
    shown = ", ".join(f"{n} {saved.get(n, 'absent')} there, {now.get(n, 'absent')} here" for n in differ[:3])
    raise InputError(
        f"{path} is a checkpoint of another model: {len(differ)} weights differ ({shown}). Give the recipe's run "
        "another name or folder (name=..., out=...), or the backbone and method the checkpoint was made with"
    )


def _fresh(partial: Path) -> None:
    for leftover in partial.parent.glob(".*-step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)


def _attempt(action: Any) -> str | None:
    try:
        action()
    except OSError as error:
        return f"{error.strerror or error} ({error.filename})" if error.filename else str(error)
    except Exception as error:  # safetensors reports a full disk in an exception of its own
        if "No space" not in str(error) and "I/O" not in str(error):
            raise
        return str(error)
    return None


def _to_bytes(tensors: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save(tensors)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: bytes) -> dict[str, Any]:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
