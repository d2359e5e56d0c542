"""Whether an ablation can run, before its first run starts."""

from collections.abc import Sequence
from typing import Any

from launch.ablate.parts import Part
from launch.ablate.plan import ADD_ONE, Plan
from launch.series import Resolve
from penstock.errors import InputError
from penstock.recipe import difference


def check(plan: Plan, parts: Sequence[Part], resolve: Resolve) -> dict[str, dict[str, Any]]:
    """The resolved recipe of each variant, and of the base as `full`.

    Raises InputError for a variant that cannot run, a part that the recipe does not have, and a part that changes
    nothing where the others are off.
    """
    off = {"full": [], **{f"without-{part.name}": [part.name] for part in parts}, **plan.variants}
    found = dict(zip(off, resolve(plan.recipe, [plan.values(each) for each in off.values()]), strict=True))
    if isinstance(found["full"], str):
        raise InputError(found["full"])
    wrong = [f"{name}: {words}" for name, words in found.items() if isinstance(words, str)]
    if wrong:
        raise InputError("\n".join(wrong))
    recipes: dict[str, dict[str, Any]] = {name: each for name, each in found.items() if isinstance(each, dict)}
    for part in parts:
        if not difference(recipes["full"], recipes[f"without-{part.name}"]):
            has = ", ".join(f"{key}={value}" for key, value in part.off.items())
            hint = f"; to have it on, write for example {part.on}" if part.on else ""
            raise InputError(f"{part.name}: {plan.recipe} has it off already ({has}){hint}")
    for contrast in plan.contrasts:
        if contrast.kind == ADD_ONE and not difference(recipes[contrast.on], recipes[contrast.off]):
            raise InputError(
                f"{contrast.part} changes nothing where the other parts are off, so it cannot be added alone: another "
                "part switches the same keys; leave one of them out, or give --leave-one-out"
            )
    return recipes
