"""`python -m finetune.variants RECIPE`: what the recipe becomes under several sets of overrides.

For a launcher, which imports no torch. Reads a JSON list of lists of key=value, and writes a JSON list with a resolved
recipe, or with the words that say what is wrong with it, for each.
"""

import json
import sys

from finetune.recipe import Finetune
from penstock.errors import InputError
from penstock.recipe import check, load, resolved


def variant(recipe: str, overrides: list[str]) -> dict | str:
    try:
        return resolved(check(Finetune, load(recipe, overrides)))
    except InputError as error:
        return str(error)


if __name__ == "__main__":
    print(json.dumps([variant(sys.argv[1], overrides) for overrides in json.load(sys.stdin)]))
