"""A recipe: YAML merged by OmegaConf, checked by pydantic models that sit inside the components they configure.

`load` merges a file, what it extends and the command line, and remembers where each value was written. `check` turns
the result into a validated model, or into one InputError that lists everything that is wrong.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from penstock.errors import InputError, nearest
from penstock.mistakes import mistake
from penstock.registry import Registry
from penstock.streams.sets.remote.address import redacted

DEFAULT, COMMAND_LINE = "default", "command line"


Rule = Callable[[Any], Iterable[str]]


class Block(BaseModel):
    """Base of every component's `Config`: unknown keys are errors, values do not change, defaults are checked.

    A block's validators look at the block alone; their messages may begin with `field: ` to name the one to blame. A
    whole recipe's `rules` look across blocks: each gives `key: what is wrong, and what to write instead` per mistake.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
    rules: ClassVar[tuple[Rule, ...]] = ()


@dataclass(frozen=True)
class Choice:
    """Marks a recipe field that holds one component of a registry, chosen by the block's `name`."""

    package: str
    default: str | None = None


@dataclass(frozen=True)
class Choices:
    """Marks a recipe field that maps names of a registry's components to their blocks (or to null)."""

    package: str


def one_of(package: str, default: str | None = None) -> Any:
    """A component of `package` by its name; without a default the name must be given."""
    return Annotated[Any, Choice(package, default)]


def several_of(package: str) -> Any:
    return Annotated[Any, Choices(package)]


# Loading --------------------------------------------------------------------------------------


@dataclass
class Source:
    """A merged recipe and where each of its values was written, by dotted key."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    path: Path | None = None

    def origin(self, key: str) -> str:
        """The place that wrote `key`, or the nearest block around it."""
        while key and key not in self.origins:
            key = key.rpartition(".")[0]
        return self.origins.get(key, DEFAULT)


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Source:
    """The recipe in `path`, with all it extends beneath it and `key=value` overrides on top."""
    source = _load_file(Path(path), ())
    for override in sorted(overrides, key=_depth):
        _override(source, override)
    try:
        source.values = OmegaConf.to_container(OmegaConf.create(source.values), resolve=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise InputError(f"{path}: {error}") from error
    return source


def _load_file(path: Path, above: tuple[Path, ...]) -> Source:
    path = path.resolve()
    if path in above:
        raise InputError(f"{_short(path)} extends itself: {' -> '.join(p.name for p in (*above, path))}")
    if not path.is_file():
        wanted = f" (extended by {_short(above[-1])})" if above else ""
        near = nearest(path.name, [p.name for p in path.parent.glob("*.yaml")]) if path.parent.is_dir() else ""
        raise InputError(f"no recipe at {_short(path)}{wanted}{near}")
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        loaded = OmegaConf.create(text) if tree is not None else OmegaConf.create({})
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise InputError(f"{_short(path)} is not valid YAML: {error}") from error
    if not isinstance(loaded, DictConfig) or not isinstance(tree, (yaml.MappingNode, type(None))):
        raise InputError(f"{_short(path)} must be a mapping of keys to values")
    values: dict[str, Any] = OmegaConf.to_container(loaded, resolve=False)  # type: ignore[assignment]
    extends = values.pop("extends", None) or []
    source = Source(path=path)
    parents = [extends] if isinstance(extends, str) else extends
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise InputError(f"{_short(path)}: extends is a file or a list of files, not {extends!r}")
    for parent in parents:
        below = _load_file(path.parent / parent, (*above, path))
        _merge(source, below.values, below.origins)
    _merge(source, values, dict(_lines(tree, _short(path))))
    return source


def _depth(override: str) -> int:
    """method=simclr comes before method.temperature=0.2, wherever they stand, as a new name starts the block afresh."""
    return override.partition("=")[0].strip().removesuffix(".name").count(".")


def _override(source: Source, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"{override!r} on the command line is not of the form key=value")
    try:
        values = OmegaConf.to_container(OmegaConf.from_dotlist([override]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{override!r} on the command line: {error}") from error
    origins = {".".join(key.split(".")[: depth + 1]): COMMAND_LINE for depth in range(key.count(".") + 1)}
    origins |= {f"{key}.{inner}": COMMAND_LINE for inner, _ in flatten(_at(values, key))} if "{" in text else {}
    _merge(source, values, origins)  # type: ignore[arg-type]


def _merge(source: Source, values: dict[str, Any], origins: Mapping[str, str]) -> None:
    """Lay `values` over the source; a block whose `name` changes starts afresh, so no key of the old one lingers."""
    for key in _renamed(source.values, values):
        _replace(source.values, key)
        source.origins = {k: v for k, v in source.origins.items() if k != key and not k.startswith(key + ".")}
    merged = OmegaConf.merge(OmegaConf.create(source.values), OmegaConf.create(values))
    source.values = OmegaConf.to_container(merged, resolve=False)  # type: ignore[assignment]
    source.origins |= origins


def _renamed(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in list(new.items()):
        before = old.get(key)
        if isinstance(before, dict) and "name" in before and isinstance(value, str):
            new[key] = value = {"name": value}  # method=moco
        if not (isinstance(before, dict) and isinstance(value, dict)):
            continue
        if "name" in before and "name" in value and before["name"] != value["name"]:
            yield prefix + key
        else:
            yield from _renamed(before, value, f"{prefix}{key}.")


def _replace(values: dict[str, Any], key: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = values[parent]
    values.pop(last)


def _lines(node: Any, file: str, prefix: str = "") -> Iterator[tuple[str, str]]:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        dotted = f"{prefix}{key.value}"
        yield dotted, f"{file}:{key.start_mark.line + 1}"
        yield from _lines(value, file, dotted + ".")


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


# Checking --------------------------------------------------------------------------------------


def check(model: type[Block], source: Source, without: Sequence[Rule] = ()) -> Any:
    """A validated `model`, or one InputError with every mistake: its key, where it was written, and what to write.

    `without` names rules of the model that are not to be applied.
    """
    problems: dict[str, str] = {}
    values: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(source.values))  # type: ignore[assignment]
    valid, before = None, -1
    while valid is None and len(problems) > before:  # what is wrong is taken out, so that later checks run, too
        before = len(problems)
        made = concrete(model, values, problems)
        try:
            valid = made(**values)
        except ValidationError as error:
            for detail in error.errors():
                if detail["type"] == "float_type" and isinstance(detail["input"], dict):
                    continue  # a number or a curve: what is wrong with the curve is another entry
                key, text = mistake(detail, made)
                if not (detail["type"] == "missing" and any(known.startswith(f"{key}.") for known in problems)):
                    problems.setdefault(key, text)
                _drop(values, key.removesuffix(".name") if detail["type"].startswith("union_tag") else key)
    recipe = valid or _partial(made, values)
    for rule in (rule for rule in model.rules if rule not in without):
        with suppress(AttributeError) if problems else nullcontext():  # a rule may need what is wrong or missing
            for key, _, text in (line.partition(": ") for line in rule(recipe)):
                problems.setdefault(key, text)
    if not problems:
        return valid
    lines = [f"  {key}: {redacted(text)}{_written(source.origin(key))}" for key, text in sorted(problems.items())]
    where = _short(source.path) if source.path else "the recipe"
    raise InputError(f"{where} has {len(lines)} mistake{'s' * (len(lines) > 1)}:\n" + "\n".join(lines))


def _written(origin: str) -> str:
    return "" if origin == DEFAULT else f" [{origin}]"


def _partial(model: type[BaseModel], values: dict[str, Any]) -> Any:
    """What is left of a recipe when its mistakes are taken out: fields that are wrong or missing are absent."""
    inner = {}
    for name, info in model.model_fields.items():
        kind, value = info.annotation, values.get(name)
        if isinstance(kind, type) and issubclass(kind, BaseModel) and isinstance(value, dict):
            inner[name] = _partial(kind, value)
    return model.model_construct(**values | inner)


def concrete(model: type[Block], values: dict[str, Any], problems: dict[str, str], prefix: str = "") -> type[Block]:
    """`model` with each component field typed by the component that `values` names, and so on within those.

    `prefix` is the dotted key of the block, with a dot behind.
    """
    fields: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        for mark in info.metadata:
            if isinstance(mark, Choice):
                fields[name] = (_config_type(mark, name, values, problems, prefix), info)
            elif isinstance(mark, Choices):
                if info.default and name not in values:
                    values[name] = deepcopy(info.default)
                fields[name] = (_configs_type(mark.package, name, values, problems, prefix), info)
    if not fields:
        return model
    for name, (kind, info) in fields.items():
        default = info.default if not info.is_required() else ...
        fields[name] = (Annotated[kind, *info.metadata], Field(default, description=info.description))
    return create_model(model.__name__, __base__=model, __module__=model.__module__, **fields)


def _config_type(choice: Choice, name: str, values: dict[str, Any], problems: dict[str, str], prefix: str) -> Any:
    block, key = values.get(name), f"{prefix}{name}"
    if block is None and choice.default:
        block = values[name] = {}
    if isinstance(block, str):
        block = values[name] = {"name": block}
    if not isinstance(block, dict):
        return Any
    if choice.default:
        block.setdefault("name", choice.default)
    registry = Registry(choice.package)
    if "name" not in block:
        problems.setdefault(f"{key}.name", f"missing{nearest('', registry.names())}")
    elif block["name"] not in registry.names():
        known = registry.names()
        problems.setdefault(f"{key}.name", f"no {name} is called {block['name']!r}{nearest(str(block['name']), known)}")
    else:
        return concrete(registry.get(block["name"]).Config, block, problems, f"{key}.")
    values.pop(name)
    return Any | None


def _configs_type(package: str, name: str, values: dict[str, Any], problems: dict[str, str], prefix: str) -> Any:
    registry, kinds = Registry(package), {}
    blocks = values.get(name)
    if not isinstance(blocks, dict):
        return dict[str, Any] | None
    for key in list(blocks):
        if key in registry.names():
            kinds[key] = (registry.get(key).Config | None, None)
            if blocks[key] is True:
                blocks[key] = {}
        else:
            problems.setdefault(f"{prefix}{name}.{key}", f"no {name} is called {key!r}{nearest(key, registry.names())}")
            blocks.pop(key)
    return create_model(name, __base__=Block, **kinds)  # type: ignore[call-overload]


def _drop(values: Any, key: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(values, dict) or parent not in values:
            return
        if not isinstance(values[parent], dict):
            values.pop(parent)
            return
        values = values[parent]
    if isinstance(values, dict):
        values.pop(last, None)


# Showing --------------------------------------------------------------------------------------


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of nested dictionaries."""
    for key, value in values.items() if isinstance(values, dict) else ():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from flatten(value, dotted + ".")
        else:
            yield dotted, value


def resolved(recipe: Block) -> dict[str, Any]:
    """Every value of a checked recipe as plain YAML types; loading it again gives an equal recipe."""
    return recipe.model_dump(mode="json")


def to_yaml(recipe: Block) -> str:
    return yaml.safe_dump(resolved(recipe), sort_keys=False, default_flow_style=None, width=110)


def difference(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ between two resolved recipes: (old, new)."""
    a, b = dict(flatten(old)), dict(flatten(new))
    return {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}
