"""`python -m launch local --procs N STAGE RECIPE [key=value ...]`, and the other ways to start runs."""

import argparse
import sys

from launch import ablate, demo, distill, local, look, pipeline, slurm


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launch", description="Start runs, and look after them.")
    ways = parser.add_subparsers(required=True, metavar="WHERE")
    local.add_command(ways)
    slurm.add_command(ways)
    pipeline.add_command(ways)
    look.add_commands(ways)
    demo.add_command(ways)
    ablate.add_command(ways)
    distill.add_command(ways)
    args, rest = parser.parse_known_args()
    return args.run(args, rest)


if __name__ == "__main__":
    sys.exit(main())
