"""Settings from three places, later ones winning: the schema's defaults < --config FILE < key=value.

A schema is a frozen dataclass, with a docstring under every field: the only default, the only documentation
and the only check. Types are checked by OmegaConf, ranges by the dataclass's `__post_init__`; both are
reported as ConfigError's children, with the full key and where the value came from.
"""

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from raydistill.errors import ConfigError, InvalidValue, MissingValue, RaydistillError, UnknownKey

Schema = TypeVar("Schema")
Leaf = tuple[str, Any]
"""Full key and value."""


def from_command_line(
    schema: type[Schema], argv: Sequence[str], *, switches: Mapping[str, str] | None = None
) -> tuple[Schema, set[str]]:
    """Read `[--config FILE] [--switch ...] [key=value ...]`; return the settings and the switches given.

    `switches` maps names to their help. `--help` prints every field and exits with status 0.
    Raises UnknownKey, InvalidValue and MissingValue.
    """
    known = dict(switches or {})
    if "--help" in argv or "-h" in argv:
        sys.stdout.write(help_text(schema, known) + "\n")
        raise SystemExit(0)
    file, given, pairs = _split(schema, argv, known)
    sources = [(f"in {file}", _read(file))] if file else []
    sources += [("on the command line", _from_pair(pair)) for pair in pairs]
    return _build(schema, sources), given


def read_early(schema: type, switches: Mapping[str, str] | None = None) -> None:
    """Answer --help and refuse wrong settings, as `run` does, before a job imports torch and Ray: seconds."""

    def read() -> None:
        from_command_line(schema, sys.argv[1:], switches=switches)

    run(read)


def load(schema: type[Schema], path: str | Path) -> Schema:
    """Read a YAML file alone."""
    return from_command_line(schema, ["--config", str(path)])[0]


def from_mapping(schema: type[Schema], given: Mapping[str, Any], where: str) -> Schema:
    """Read settings that come as a mapping; errors say `where` it was."""
    return _build(schema, [(where, dict(given))])


def dump(config: Any, path: str | Path) -> None:
    """Write the settings in full, as YAML that `--config` takes as it is: `load` returns an equal object."""
    # OmegaConf's own writer: it quotes text that its reader, unlike plain YAML's, takes for a number (1e3).
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.create(_plain(asdict(config)))), encoding="utf-8")


def run(main: Callable[[], None]) -> None:
    """Call a job's `main`. An error raised on purpose: one line on stderr, exit status 1 (settings: 2).

    Ctrl-C: one line too, exit status 130, as shells have it.
    """
    try:
        main()
    except RaydistillError as error:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        line = " ".join(f"{type(error).__name__}: {error}{notes}".split())
        sys.stdout.flush()
        sys.stderr.write(line + "\n")
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from error
    except KeyboardInterrupt as interrupt:
        sys.stdout.flush()
        notes = "".join(f" ({note})" for note in getattr(interrupt, "__notes__", ()))
        sys.stderr.write(f"interrupted: the same command goes on with what is finished{notes}\n")
        raise SystemExit(130) from None


def _split(schema: type, argv: Sequence[str], switches: Mapping[str, str]) -> tuple[str, set[str], list[str]]:
    file, given, pairs = "", set[str](), list[str]()
    words = iter(argv)
    for word in words:
        name, _, value = word.partition("=")
        if name == "--config":
            if file:
                raise InvalidValue("--config", word, f"only one file; {file} is given already")
            file = value or next(words, "")
            if not file:
                raise MissingValue("--config", "the path of a YAML file")
        elif word.startswith("-"):
            if word.removeprefix("--") not in switches:
                raise UnknownKey(
                    name, ("--config", "--help", *(f"--{name}" for name in switches), *key_names(schema))
                )
            given.add(word.removeprefix("--"))
        elif "=" in word:
            pairs.append(word)
        else:
            raise InvalidValue("argument", word, "key=value, --config FILE, or a switch that --help lists")
    return file, given, pairs


def _read(file: str) -> dict[str, Any]:
    try:
        read = OmegaConf.load(file)
    except FileNotFoundError as error:
        raise InvalidValue("--config", file, "no such file") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InvalidValue("--config", file, f"not YAML{line}: {error.problem}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise InvalidValue("--config", file, f"cannot be read: {error}") from error
    if not isinstance(read, DictConfig):
        raise InvalidValue("--config", file, "a mapping of settings")
    return cast(dict[str, Any], OmegaConf.to_container(read, resolve=False))


def _from_pair(pair: str) -> dict[str, Any]:
    """`a.b=[1, 2]` becomes {"a": {"b": [1, 2]}}, its value read as YAML."""
    try:
        return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist([pair]), resolve=False))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        key, _, value = pair.partition("=")
        raise InvalidValue(
            key, value, f"cannot be read as YAML: quote it, write {{a: 1}} with a space, or {key}.a=1"
        ) from error


def _build(schema: type[Schema], sources: list[tuple[str, dict[str, Any]]]) -> Schema:
    leaves = list[tuple[str, Leaf]]()
    for where, given in sources:
        try:
            leaves += [(where, leaf) for leaf in _leaves(schema, given, key_names(schema))]
        except ConfigError as error:
            error.add_note(where)
            raise
    config = _merged(schema, leaves)
    origin = {key: where for where, (key, _) in leaves}
    try:
        for key, kind, _ in reversed(
            list(walk(schema))
        ):  # inner sections first: a wrong value is theirs to name
            if is_dataclass(kind):
                _object(schema, OmegaConf.select(config, key), key + ".")
        return cast(Schema, _object(schema, config, ""))
    except InvalidValue as error:
        if error.key in origin:
            error.add_note(origin[error.key])
        raise


def _leaves(
    schema: type, given: Mapping[str, Any], known: tuple[str, ...], prefix: str = ""
) -> Iterator[Leaf]:
    """Every value given, with its full key. Raises UnknownKey, or InvalidValue for a section that is none."""
    hints = get_type_hints(schema)
    for name, value in given.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise UnknownKey(key, known)
        if not is_dataclass(hints[name]):
            yield key, value
        elif isinstance(value, Mapping):
            yield from _leaves(cast(type, hints[name]), cast(dict[str, Any], value), known, f"{key}.")
        else:
            raise InvalidValue(key, value, f"a section: give its fields, such as {key}.NAME")


@cache
def _defaults(schema: type) -> DictConfig:
    """The schema's own values; shared, so not to be changed."""
    return OmegaConf.structured(schema)


def _merged(schema: type, leaves: list[tuple[str, Leaf]]) -> DictConfig:
    """The defaults with the leaves in them; all at once; one by one to name the wrong one."""
    try:
        return cast(DictConfig, OmegaConf.merge(_defaults(schema), *(_nested(leaf) for _, leaf in leaves)))
    except OmegaConfBaseException:
        kinds = {known: kind for known, kind, _ in walk(schema)}
        for where, leaf in leaves:
            try:
                OmegaConf.merge(_defaults(schema), _nested(leaf))
            except OmegaConfBaseException as error:
                wrong = InvalidValue(*leaf, f"expected {describe(kinds[leaf[0]])}")
                wrong.add_note(where)
                raise wrong from error
        raise


def _nested(leaf: Leaf) -> dict[str, Any]:
    key, value = leaf
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _object(schema: type, config: DictConfig, section: str) -> object:
    """Build one section; complete the key that its own check names: it knows the field, not the section."""
    try:
        return OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        key = section + str(error.full_key)
        docs = {known: doc for known, _, doc in walk(schema)}
        raise MissingValue(key, f"{key}=VALUE; {docs.get(key, '')}") from error
    except OmegaConfBaseException as error:
        raise InvalidValue(str(error.full_key), "${...}", str(error).splitlines()[0]) from error
    except InvalidValue as error:
        known, full = key_names(schema), section + error.key.rpartition(".")[2]
        if section and full in known and not (error.key.startswith(section) and error.key in known):
            error.key = full
        raise


def _plain(value: Any) -> Any:
    """Lists for tuples, and no text that OmegaConf would take for a reference."""
    if isinstance(value, dict):
        return {key: _plain(held) for key, held in cast(dict[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_plain(held) for held in cast(list[Any], value)]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def walk(schema: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield (full key, type, documentation) of every field; a section comes before its fields."""
    docs, hints = field_docs(schema), get_type_hints(schema)
    for field in fields(schema):
        kind = hints[field.name]
        yield prefix + field.name, kind, docs.get(field.name, "")
        if is_dataclass(kind):
            yield from walk(cast(type, kind), f"{prefix}{field.name}.")


def key_names(schema: type, prefix: str = "") -> tuple[str, ...]:
    """Every key of the schema in full, its sections' included."""
    return tuple(key for key, _, _ in walk(schema, prefix))


@cache
def field_docs(schema: type) -> dict[str, str]:
    """The docstring under each field, inherited ones too, on one line each; fields without are left out."""
    docs: dict[str, str] = {}
    for owner in reversed(schema.__mro__):
        if not is_dataclass(owner):
            continue
        body = cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]).body
        for before, after in pairwise(body):
            match before, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                    docs[name] = " ".join(doc.split())
                case _:
                    pass
    return docs


def describe(kind: Any) -> str:
    """A type in the words of `--help`: `int`, `one of a, b`, `list of str`."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    inner = [describe(arg) for arg in get_args(kind) if arg is not Ellipsis]
    if get_origin(kind) in (list, tuple):
        count = f"{len(inner)} " if get_origin(kind) is tuple and Ellipsis not in get_args(kind) else ""
        return f"list of {count}" + (inner[0] if len(set(inner)) == 1 else ", ".join(inner))
    if get_origin(kind) is dict:
        return f"mapping of {inner[0]} to {inner[1]}"
    return getattr(kind, "__name__", str(kind))


def help_text(schema: type, switches: Mapping[str, str]) -> str:
    """Usage, switches, and every field with its type, default and documentation."""
    defaults = OmegaConf.structured(schema)
    lines = [inspect.cleandoc(schema.__doc__ or ""), ""]
    lines += ["usage: python JOB.py [--config FILE.yaml] [--help] [switches] [key=value ...]", ""]
    lines += [f"  --{name}\n      {says}" for name, says in switches.items()]
    for key, kind, doc in walk(schema):
        head = f"\n  {key}" if is_dataclass(kind) else f"  {key}: {describe(kind)}"
        if _is_mandatory(defaults, key):
            head += "  (must be given)"
        elif not is_dataclass(kind):
            head += f" = {_shown(OmegaConf.select(defaults, key))}"
        wrapped = textwrap.fill(doc, 100, initial_indent="      ", subsequent_indent="      ")
        lines += [head, wrapped] if doc else [head]
    return "\n".join(lines)


def _is_mandatory(defaults: DictConfig, key: str) -> bool:
    section, _, name = key.rpartition(".")
    return OmegaConf.is_missing(OmegaConf.select(defaults, section) if section else defaults, name)


def _shown(value: Any) -> str:
    """A default as it would be typed."""
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return yaml.safe_dump(_plain(plain), default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
