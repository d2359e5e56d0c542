"""`python -m finetune.teacher RECIPE [key=value ...] --out FOLDER`: the teacher's answers, written down once.

RECIPE is the student's: its teacher answers every view of a fixed pool (`data.pool`) of its training images, and the
student then trains on those very views without running the teacher. Several processes share the work when started as
`python -m launch local --procs N finetune.teacher RECIPE --out FOLDER`, or by torchrun.
"""

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.answers import Cache, Identity, conflicts, precision_of
from finetune.recipe import Finetune
from penstock.errors import DONE, INPUT_WRONG, STOPPED, InputError, RunFailed
from penstock.recipe import check, load
from penstock.stage import exit_code

if TYPE_CHECKING:
    from finetune.cache_facts import Checked
    from finetune.cache_writer import Pool, Written
    from penstock.streams.sets.manifest import Shard

BATCH = 128  # views that the teacher sees at once
TOP = 50  # classes kept where there are more than ALL
ALL = 100
VERIFIED = 256  # views asked for again
TOLERANCE = 1e-3  # of probabilities
NOTABLE = 0.01  # of a loss, lost by leaving classes out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m finetune.teacher", description=__doc__.partition("\n\n")[2])
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="the student's recipe, with task.name: distill")
    add("overrides", nargs="*", metavar="key=value", help="values that replace the recipe's")
    add("--out", metavar="FOLDER", type=Path, required=True, help="where the answers go; the same command goes on")
    add("--views", metavar="V", type=int, help="views of each image, instead of the recipe's data.pool")
    add("--top", metavar="K", type=int, help=f"classes kept (all of up to {ALL}, else the {TOP} most likely)")
    add("--batch", metavar="N", type=int, default=BATCH, help=f"views that the teacher sees at once ({BATCH})")
    add("--verify", metavar="N", type=int, default=VERIFIED, help=f"views asked for again at the end ({VERIFIED})")
    args = parser.parse_intermixed_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        return exit_code(_start(args))
    except InputError as error:
        return exit_code(INPUT_WRONG, f"finetune.teacher: {error}")
    except RunFailed as error:
        return exit_code(RunFailed.code, f"finetune.teacher: {error}")
    except KeyboardInterrupt:
        return exit_code(STOPPED, "finetune.teacher: stopped; finished shards are kept, the same command goes on")


def _start(args: argparse.Namespace) -> int:
    recipe = _recipe(args)
    for name in ("batch", "top"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: give a number of at least 1")

    from finetune.cache_writer import Pool, write_cache
    from finetune.teachers import load_teacher
    from penstock import distributed
    from penstock.engine_start import start_ranks
    from penstock.streams.classes import class_names
    from penstock.streams.data import Data

    data = Data(recipe.data, recipe.seed)
    classes = class_names(data)
    top = args.top or (len(classes) if len(classes) <= ALL else TOP)
    if top > len(classes):
        raise InputError(f"--top {top}: there are {len(classes)} classes; give {len(classes)} or fewer")
    start_ranks()
    teacher = load_teacher(recipe.task.teacher, classes, recipe.data.channels, [round(recipe.augment.size)])
    identity = Identity.of(recipe, teacher, classes, data.train)
    about = {"teacher": teacher.name, "precision": precision_of(recipe), "batch": args.batch}
    pool = Pool(recipe, data.train, teacher, identity, distributed.device())
    written = write_cache(pool, Cache(args.out, identity, top, about), args.batch)
    if written is None:
        return DONE
    return _report(args, pool, written)


def _recipe(args: argparse.Namespace) -> Finetune:
    pool = [] if args.views is None else [f"data.pool={args.views}"]
    source = load(args.recipe, [*args.overrides, *pool])
    task = source.values.get("task")
    if not isinstance(task, dict) or task.get("name") != "distill":
        raise InputError(f"{args.recipe}: its task is not distill, so there is no teacher; give a student's recipe")
    task.pop("cache", None)  # what is made here need not be there
    recipe = check(Finetune, source)
    wrong = [line.replace("such as 10", "such as data.pool=10 or --views 10") for line in conflicts(recipe)]
    if wrong:
        raise InputError("\n".join([f"{args.recipe}:", *wrong]))
    return recipe


def _report(args: argparse.Namespace, pool: "Pool", written: "Written") -> int:
    from finetune.cache_facts import check_again, facts
    from finetune.report import say

    cache, manifest = written.cache, written.manifest
    found = facts(pool, cache)
    views, size = (
        manifest.samples * cache.identity.pool,
        sum(_bytes(Path(manifest.root), shard) for shard in manifest.shards),
    )
    these = "these views" if found.images + found.unreadable >= manifest.samples else f"{found.images:,} images' views"
    rate = f"{written.views / written.seconds:,.0f} a second" if written.views else "all were there"
    rows = [
        ("images", f"{manifest.samples:,}" + (f", {found.unreadable:,} unreadable" if found.unreadable else "")),
        ("views", f"{views:,}, {cache.identity.pool} of each image; {rate}"),
        ("shards", f"{len(manifest.shards)}" + (f", {written.kept} finished before" if written.kept else "")),
        ("size", f"{size / 1e6:,.1f} MB, {size / max(manifest.samples, 1):,.0f} bytes per image"),
        ("top-1 of the teacher", f"{found.top1:.2f} % of {these}"),
        (f"mass of the top {cache.top}", f"{found.mass:.4f}"),
    ]
    checked = check_again(pool, cache, args.verify, args.batch) if args.verify > 0 else None
    if checked:
        rows += _of_checked(checked, cache)
    overrides = [*args.overrides, f"data.pool={cache.identity.pool}", f"task.cache={args.out}"]
    rows.append(("train", shlex.join(["python", "-m", "finetune", args.recipe, *overrides])))
    say(f"{args.out}: answers of {cache.about['teacher']}", rows)
    if checked and checked.apart > TOLERANCE:
        raise RunFailed(
            f"{args.out}: asked again, the teacher's probabilities differ by {checked.apart:.1e}, more than "
            f"{TOLERANCE:g}; delete the folder and make it anew on this machine"
        )
    return DONE


def _of_checked(checked: "Checked", cache: Cache) -> list[tuple[str, str]]:
    rows = [("asked again", f"{checked.views} views, probabilities at most {checked.apart:.1e} apart")]
    if cache.top < len(cache.identity.classes):
        lost = ", ".join(f"{value:.2g} at temperature {t}" for t, value in checked.lost.items())
        advice = "; keep more classes (--top) for such a temperature" if max(checked.lost.values()) > NOTABLE else ""
        rows.append(("loss left out", f"{lost} (the divergence of whole and kept answers){advice}"))
    return rows


def _bytes(root: Path, shard: "Shard") -> int:
    return shard.bytes + (root / shard.index).stat().st_size


if __name__ == "__main__":
    sys.exit(main())
