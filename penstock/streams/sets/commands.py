"""`penstock shards pack | index | verify | show`. Each command imports what it needs when it runs."""

import argparse
from pathlib import Path

from penstock.arguments import count, place
from penstock.errors import DONE, INPUT_WRONG
from penstock.streams.sets import look


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    """Add `shards` and its commands; each sets `run`, a function of the parsed arguments that gives an exit code."""
    shards = subparsers.add_parser("shards", help="pack images into WebDataset shards, and look after them")
    commands = shards.add_subparsers(required=True, metavar="COMMAND")
    _add_pack(commands.add_parser("pack", help="pack images into shards with a manifest", description=PACK))
    index = commands.add_parser("index", help="make manifest and index for tars made elsewhere", description=INDEX)
    index.add_argument("folder", metavar="FOLDER", type=place)
    says = "members that look like images and are none, such as mask.png; all others are found without"
    index.add_argument("--extra", metavar="SUFFIXES", type=_suffixes, default=(), help=says)
    _add_workers(index)
    index.set_defaults(run=_index)
    verify = commands.add_parser("verify", help="find every damaged byte of a set", description=VERIFY)
    verify.add_argument("folder", metavar="FOLDER", type=place)
    verify.add_argument("--fast", action="store_true", help="compare checksums only, decode nothing")
    _add_workers(verify)
    verify.set_defaults(run=_verify)
    show = commands.add_parser("show", help="print what a set holds; draw a contact sheet")
    show.add_argument("folder", metavar="FOLDER", type=place)
    show.add_argument("--sheet", metavar="PNG", type=Path, help="write a picture of some images with their labels")
    show.add_argument("--images", type=int, default=64, help="images on the sheet (64)")
    show.set_defaults(run=_show)
    look.add_commands(commands)


PACK = """SOURCE is a folder of images (one folder per class, or images alone), torchvision:NAME[:SPLIT], a Parquet file
or folder with image bytes and an optional label, or digits[:train|:test]. JPEG, PNG and WebP files are stored as they
are, others as PNG; --short-side makes large ones smaller. A pack that was interrupted goes on when the same command
runs again."""
INDEX = """FOLDER holds .tar files with, per sample, an image (jpg, jpeg, png, webp) and a label (cls, json with
"label", or none). Class names are read from classes.txt (a name per line) or classes.json (a list, or names by number)
if there is one."""
VERIFY = "Compares every byte with its checksum and decodes every image; exits 2 with a table if anything is wrong."


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", metavar="N", type=count, help="processes (default: the cores this job may use)")


def _add_pack(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SOURCE")
    add("dest", metavar="DEST", type=place)
    add("--split", help="the split to pack, where a source has several (train, test, ...)")
    add("--shard-size", metavar="BYTES", type=_bytes, default=256 << 20, help="at most this much a shard (256M)")
    add("--samples-per-shard", metavar="N", type=count, default=10_000, help="at most as many a shard (10000)")
    add("--shuffle-seed", metavar="S", type=int, default=0, help="the fixed shuffle, so shards hold all classes (0)")
    add("--no-shuffle", action="store_true", help="keep the order of the source")
    add("--limit", metavar="N", type=count, help="pack N images only; with the shuffle, N spread over all")
    add("--no-labels", action="store_true", help="pack images alone; folders are not classes")
    says = "pack files beside each image with it: with txt,mask.png photo.txt and photo.mask.png go with photo.jpg"
    add("--extra", metavar="SUFFIXES", type=_suffixes, default=(), help=says)
    add("--skip-bad", metavar="N", type=int, default=0, help="leave out up to N images that do not open, and list them")
    says = "re-encode larger images as JPEGs of this short side: 512 for training at 224 or below (as they are)"
    add("--short-side", metavar="PIXELS", type=count, help=says)
    add("--quality", metavar="Q", type=_quality, default=90, help="of those JPEGs, 1 to 100 (90)")
    add("--size", metavar="PIXELS", type=count, default=16, help="digits: side of the images (16; bilinear from 8)")
    add("--root", metavar="FOLDER", type=Path, default=Path("data"), help="torchvision: where its datasets lie (data)")
    add("--download", action="store_true", help="torchvision: download the dataset to --root")
    add("--image-column", metavar="NAME", help="parquet: the column with images, where it cannot be told")
    add("--label-column", metavar="NAME", help="parquet: the column with class numbers, where it cannot be told")
    _add_workers(parser)
    parser.set_defaults(run=_pack)


def _pack(args: argparse.Namespace) -> int:
    from penstock.streams.sets.jobs import available_cores
    from penstock.streams.sets.pack import Request, pack, refuse_nested
    from penstock.streams.sets.sources import Options, open_source

    if Path(args.source).exists() and isinstance(args.dest, Path):
        refuse_nested(Path(args.source), args.dest)
    options = Options(
        split=args.split,
        root=args.root,
        download=args.download,
        size=args.size,
        image_column=args.image_column,
        label_column=args.label_column,
        labels=not args.no_labels,
        extra=args.extra,
    )
    source = open_source(args.source, options)
    if args.short_side is not None:
        from penstock.streams.sets.sources.smaller import Smaller

        source = Smaller(source, args.short_side, args.quality)
    seed = None if args.no_shuffle else args.shuffle_seed
    request = Request(args.shard_size, args.samples_per_shard, seed, args.limit)
    done = pack(
        source,
        args.source,
        args.dest,
        request,
        args.workers or available_cores(),
        args.skip_bad,
    )
    for remark in done.remarks:
        print(remark)
    if done.skipped:
        print(f"left out {len(done.skipped)} images that do not open:", *done.skipped[:20], sep="\n  ")
    manifest = done.manifest
    kept = f", {done.kept} of them finished before" if done.kept else ""
    rate = f"{done.written:,} packed in {done.seconds:.1f} s, {done.written / done.seconds:,.0f} images/s"
    print(
        f"{args.dest}: {manifest.samples:,} images in {len(manifest.shards)} shards{kept}, "
        f"{sum(shard.bytes for shard in manifest.shards) / 1e6:,.1f} MB; {rate if done.written else 'nothing to do'}"
    )
    return DONE


def _index(args: argparse.Namespace) -> int:
    from penstock.streams.sets.foreign import index_folder
    from penstock.streams.sets.jobs import available_cores

    manifest, unreadable = index_folder(args.folder, args.workers or available_cores(), extra=args.extra)
    if unreadable:
        print(f"{len(unreadable)} images have headers that cannot be read:", *unreadable[:20], sep="\n  ")
    labels = "" if manifest.unlabelled == 0 else f", {manifest.unlabelled:,} of them without label"
    print(f"{args.folder}: {manifest.samples:,} images in {len(manifest.shards)} shards{labels}")
    return DONE


def _verify(args: argparse.Namespace) -> int:
    from penstock.streams.sets.jobs import available_cores
    from penstock.streams.sets.manifest import Manifest
    from penstock.streams.sets.verify import print_damage, verify

    manifest = Manifest.load(args.folder)
    damage = verify(manifest, decode_images=not args.fast, workers=args.workers or available_cores())
    if not damage:
        how = "every checksum agrees" if args.fast else "every checksum agrees and every image decodes"
        print(f"{args.folder}: {manifest.samples:,} images in {len(manifest.shards)} shards, {how}")
        return DONE
    print_damage(damage)
    return INPUT_WRONG


def _show(args: argparse.Namespace) -> int:
    from penstock.streams.sets.manifest import Manifest
    from penstock.streams.sets.show import print_summary

    manifest = Manifest.load(args.folder)
    manifest.check_files()
    print_summary(manifest)
    if args.sheet:
        from penstock.streams.sets.sheet import draw_sheet

        draw_sheet(manifest, args.sheet, args.images)
        print(f"sheet: {args.sheet}")
    return DONE


def _suffixes(text: str) -> tuple[str, ...]:
    from penstock.streams.sets.index import SUFFIX
    from penstock.streams.sets.tar import runs_code

    found = tuple(dict.fromkeys(part.strip().lstrip(".").lower() for part in text.split(",")))
    for suffix in found:
        if not SUFFIX.fullmatch(suffix) or suffix == "cls":
            raise argparse.ArgumentTypeError(f"{suffix!r} is no suffix of other members; write some as txt,mask.png")
        if runs_code(suffix):
            raise argparse.ArgumentTypeError(f"{suffix} files are pickles, which can run code when they are read")
    return found


def _quality(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a JPEG quality; write a number from 1 to 100, such as 90")
    return int(text)


def _bytes(text: str) -> int:
    from penstock.streams.sets.remote.options import parse_bytes

    try:
        size = parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if size == 0:
        raise argparse.ArgumentTypeError("a shard holds bytes; write 256M or 1G")
    return size
