"""`python -m launch local --procs N STAGE RECIPE [key=value ...]`"""

import argparse
import sys

from launch import ablate, demo, distill, local


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launch", description="Start a stage on this machine.")
    ways = parser.add_subparsers(required=True, metavar="WHERE")
    local.add_command(ways)
    demo.add_command(ways)
    ablate.add_command(ways)
    distill.add_command(ways)
    args, rest = parser.parse_known_args()
    return args.run(args, rest)


if __name__ == "__main__":
    sys.exit(main())
