"""A recipe: YAML merged by OmegaConf, checked by pydantic models that sit inside the components they configure.

`load` merges a file, what it extends and the command line, and remembers where each value was written. `check` turns
the result into a validated model, or into one InputError that lists everything that is wrong.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic_core import ErrorDetails

from penstock.errors import InputError, nearest
from penstock.registry import Registry

DEFAULT, COMMAND_LINE = "default", "command line"


class Block(BaseModel):
    """Base of every component's `Config`: unknown keys are errors, values do not change, defaults are checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


@dataclass(frozen=True)
class Choice:
    """Marks a recipe field that holds one component of a registry, chosen by the block's `name`."""

    package: str


@dataclass(frozen=True)
class Choices:
    """Marks a recipe field that maps names of a registry's components to their blocks (or to null)."""

    package: str


def one_of(package: str) -> Any:
    return Annotated[Any, Choice(package)]


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
    for override in overrides:
        _override(source, override)
    try:
        source.values = OmegaConf.to_container(OmegaConf.create(source.values), resolve=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise InputError(f"{path}: {error}") from error
    return source


def _load_file(path: Path, above: tuple[Path, ...]) -> Source:
    path = path.resolve()
    if path in above:
        raise InputError(f"{path} extends itself, through {' -> '.join(p.name for p in above)}")
    if not path.is_file():
        wanted = f" (extended by {above[-1]})" if above else ""
        near = nearest(path.name, [p.name for p in path.parent.glob("*.yaml")]) if path.parent.is_dir() else ""
        raise InputError(f"no recipe at {_short(path)}{wanted}{near}")
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        loaded = OmegaConf.create(text) if tree is not None else OmegaConf.create({})
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise InputError(f"{_short(path)} is not valid YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise InputError(f"{_short(path)} must be a mapping of keys to values")
    values: dict[str, Any] = OmegaConf.to_container(loaded, resolve=False)  # type: ignore[assignment]
    extends = values.pop("extends", None) or []
    source = Source(path=path)
    for parent in [extends] if isinstance(extends, str) else extends:
        below = _load_file(path.parent / parent, (*above, path))
        _merge(source, below.values, below.origins)
    _merge(source, values, dict(_lines(tree, _short(path))))
    return source


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


def check(model: type[Block], source: Source) -> Any:
    """A validated `model`, or one InputError with every mistake: its key, where it was written, and what to write."""
    problems: dict[str, str] = {}
    values: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(source.values))  # type: ignore[assignment]
    for _ in range(8):  # what is wrong is taken out and the rest checked again, so that later checks run, too
        made = concrete(model, values, problems)
        try:
            valid = made(**values)
        except ValidationError as error:
            found = error.errors()
            before = len(problems)
            for detail in found:
                place = _dotted(detail["loc"])
                for key, text in _conflicts(detail) if not place else [(place, _say(detail, place, made))]:
                    problems.setdefault(key, text)
                    _drop(values, key)
            if len(problems) == before:
                break
            continue
        if not problems:
            return valid
        break
    lines = [f"  {key}: {text} [{source.origin(key)}]" for key, text in sorted(problems.items())]
    where = _short(source.path) if source.path else "the recipe"
    raise InputError(f"{where} has {len(lines)} mistake{'s' * (len(lines) > 1)}:\n" + "\n".join(lines))


def concrete(model: type[Block], values: dict[str, Any], problems: dict[str, str]) -> type[Block]:
    """`model` with each component field typed by the component that `values` names."""
    fields: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        for mark in info.metadata:
            if isinstance(mark, Choice):
                fields[name] = (_config_type(mark.package, name, values, problems), info)
            elif isinstance(mark, Choices):
                fields[name] = (_configs_type(mark.package, name, values, problems), info)
    if not fields:
        return model
    for name, (kind, info) in fields.items():
        fields[name] = (kind, info.default if not info.is_required() else ...)
    return create_model(model.__name__, __base__=model, __module__=model.__module__, **fields)


def _config_type(package: str, name: str, values: dict[str, Any], problems: dict[str, str]) -> Any:
    block = values.get(name)
    if isinstance(block, str):
        block = values[name] = {"name": block}
    if not isinstance(block, dict):
        return Any
    registry = Registry(package)
    if "name" not in block:
        problems.setdefault(f"{name}.name", f"missing{nearest('', registry.names())}")
    elif block["name"] not in registry.names():
        known = registry.names()
        problems.setdefault(
            f"{name}.name", f"no {name} is called {block['name']!r}{nearest(str(block['name']), known)}"
        )
    else:
        return registry.get(block["name"]).Config
    values.pop(name)
    return Any | None


def _configs_type(package: str, name: str, values: dict[str, Any], problems: dict[str, str]) -> Any:
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
            problems.setdefault(f"{name}.{key}", f"no {name} is called {key!r}{nearest(key, registry.names())}")
            blocks.pop(key)
    return create_model(name, __base__=Block, **kinds)  # type: ignore[call-overload]


def _say(detail: ErrorDetails, key: str, model: type[BaseModel]) -> str:
    if detail["type"] == "extra_forbidden":
        parent, _, last = key.rpartition(".")
        depth = key.count(".")
        known = {
            k.split(".")[depth] for k, _, _ in fields_of(model) if f".{k}".startswith(f".{parent}." if parent else ".")
        }
        elsewhere = [k for k, _, _ in fields_of(model) if k.rpartition(".")[2] == last]
        hint = nearest(last, known) if not elsewhere else f"; did you mean {elsewhere[0]}?"
        return f"unknown key{hint}"
    if detail["type"] == "missing":
        return "missing; the recipe must give it"
    given = detail["input"]
    shown = f", not {given!r}" if isinstance(given, (str, int, float, bool)) else ""
    message = detail["msg"].removeprefix("Value error, ")
    return message if "not" in message and repr(given) in message else f"{message}{shown}"


def _conflicts(detail: ErrorDetails) -> list[tuple[str, str]]:
    """What a recipe's own validator found, `key: text` a line: combinations that cannot work."""
    lines = detail["msg"].removeprefix("Value error, ").splitlines()
    return [(key, text.strip()) for key, _, text in (line.partition(":") for line in lines)]


def _dotted(place: tuple[int | str, ...]) -> str:
    """pydantic's location without the tags of unions, as the recipe writes it."""
    tags = {"float", "int", "str", "bool", "constrained-float", "constrained-int"}
    kept = [str(part) for part in place if not (isinstance(part, str) and (part in tags or "[" in part))]
    return ".".join(kept)


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


def fields_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, field, enclosing model) of every value that a recipe of this model may hold."""
    for name, info in model.model_fields.items():
        key = prefix + name
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields_of(kind, key + ".")
        else:
            yield key, info, model


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
