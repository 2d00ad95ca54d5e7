"""Rules about the code's shape that no linter knows. CONTRIBUTING.md gives the reasons."""

import ast
import importlib
import re
import tomllib
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import cast, get_type_hints

import pytest

from raydistill.config.load import field_docs, load
from raydistill.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "raydistill").rglob("*.py"))
CODE = SOURCES + sorted((ROOT / "jobs").rglob("*.py")) + sorted((ROOT / "tests").rglob("*.py"))
MAX_FILE, MAX_FUNCTION, MAX_FUNCTION_IN_EXPERTS, MAX_POSITIONAL = 350, 60, 40, 6
BANNED = {"utils", "util", "helpers", "helper", "common", "misc", "base", "core", "manager", "managers"}
KNOW_RAY = {"flow.py", "launch.py", "app.py"}
KNOW_DEEPSPEED = {"engine.py"}


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(node: ast.stmt) -> int:
    """Lines from `def` to the end, without the docstring: nobody should save on that."""
    lines = cast(int, node.end_lineno) - node.lineno + 1
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
        lines -= cast(int, node.body[0].end_lineno) - node.body[0].lineno + 1
    return lines


def imported(path: Path) -> set[str]:
    """Top-level names of all packages that the file imports, inside functions too."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found


def test_the_rules_look_at_something():
    assert len(SOURCES) > 40
    assert {"flow.py", "launch.py", "engine.py"} <= {path.name for path in SOURCES}


@pytest.mark.parametrize("path", CODE, ids=named)
def test_files_are_short_and_plain(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE, f"more than {MAX_FILE} lines: split it by what it knows"
    assert text.isascii(), [line for line in text.splitlines() if not line.isascii()][:3]


@pytest.mark.parametrize("path", CODE, ids=named)
def test_functions_are_short_and_take_few_positional_parameters(path):
    limit = MAX_FUNCTION_IN_EXPERTS if "experts" in path.parts else MAX_FUNCTION
    for function in functions(path):
        lines = length(function)
        assert lines <= limit, f"{function.name} has {lines} lines, {limit} is the limit"
        positional = [arg.arg for arg in function.args.posonlyargs + function.args.args]
        positional = [name for name in positional if name not in ("self", "cls")]
        assert len(positional) <= MAX_POSITIONAL, (
            f"{function.name}{tuple(positional)}: make some keyword-only"
        )


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_module_names_say_what_is_inside(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    assert not BANNED & set(parts)


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_the_file_name_says_who_knows_the_cluster(path):
    names = imported(path)
    assert "ray" not in names or path.name in KNOW_RAY
    assert "deepspeed" not in names or path.name in KNOW_DEEPSPEED


def test_classes_inherit_from_one_concrete_class_at_most():
    """A class may have a parent of ours, but no grandparent. Errors are a tree by design."""
    bases = {}
    for path in SOURCES:
        if path.name == "errors.py":
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
    for name, parents in bases.items():
        grandparents = [grand for parent in parents for grand in bases.get(parent, []) if grand in bases]
        assert not grandparents, f"{name} -> {parents} -> {grandparents}: pass a function instead"


def schemas() -> list[type]:
    found = []
    for path in sorted((ROOT / "raydistill" / "config").glob("*.py")):
        module = (
            importlib.import_module(f"raydistill.config.{path.stem}") if path.stem != "__init__" else None
        )
        held = vars(module).values() if module else ()
        found += [one for one in held if isinstance(one, type) and one.__module__ == module.__name__]
    return [one for one in found if is_dataclass(one)]


@pytest.mark.parametrize("schema", schemas(), ids=lambda schema: schema.__name__)
def test_settings_are_frozen_and_documented(schema):
    assert schema.__dataclass_params__.frozen
    assert all(one.kw_only for one in fields(schema))
    assert set(get_type_hints(schema)) == set(field_docs(schema)), "a docstring under every field"
    assert schema.__doc__
    assert not schema.__doc__.startswith(f"{schema.__name__}(")


def schema_of(job: Path) -> type:
    """The schema that jobs/NAME.py reads, defined in raydistill/config/NAME.py."""
    module = importlib.import_module(f"raydistill.config.{job.stem}")
    names = re.findall(r"from_command_line\((\w+),", job.read_text(encoding="utf-8").partition("def main")[2])
    assert len(set(names)) == 1, f"{named(job)} reads {names}"
    return getattr(module, names[0])


JOBS = sorted((ROOT / "jobs").glob("*.py"))
YAMLS = sorted((ROOT / "jobs").rglob("*.yaml"))


@pytest.mark.parametrize("path", YAMLS, ids=named)
def test_every_job_file_fits_a_jobs_schema(path):
    """distill.yaml fits jobs/distill.py; a file with a name of its own fits at least one job."""
    jobs = [job for job in JOBS if job.stem == path.stem] or JOBS
    refused = []
    for job in jobs:
        try:
            load(schema_of(job), path)
        except ConfigError as error:
            refused.append(f"{named(job)}: {error}")
    assert len(refused) < len(jobs), "\n".join(refused)


@pytest.mark.parametrize("job", JOBS, ids=named)
def test_jobs_read_one_documented_schema_and_end_in_one_line(job):
    assert schema_of(job).__doc__
    text = job.read_text(encoding="utf-8")
    assert text.endswith('if __name__ == "__main__":\n    run(main)\n'), (
        "run(main) turns errors into one line"
    )


def test_the_runs_of_make_distill_find_one_another():
    from raydistill.config.distill import DistillConfig
    from raydistill.config.evaluate import EvaluateConfig
    from raydistill.config.export import ExportConfig
    from raydistill.config.prepare import PrepareConfig

    commands = re.findall(
        r"^\tpython (jobs/\w+\.py) --config (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    stems = ["prepare", "distill", "distill", "evaluate", "export"]  # the last of make serve
    assert [Path(job).stem for job, _ in commands] == stems
    tiny = [ROOT / config for _, config in commands]
    prepare, evaluate = load(PrepareConfig, tiny[0]), load(EvaluateConfig, tiny[3])
    dual, single = load(DistillConfig, tiny[1]), load(DistillConfig, tiny[2])
    assert dual.data == single.data == prepare.output
    assert evaluate.students == {"dual": [f"{dual.output}/student"], "single": [f"{single.output}/student"]}
    assert dual.teacher == single.teacher == evaluate.teacher
    export = load(ExportConfig, tiny[4])
    assert (export.student, export.teacher) == (f"{dual.output}/student", dual.teacher)
    assert prepare.encode.codec == export.codec
    assert prepare.encode.codec == dual.codec == single.codec == evaluate.codec


def test_versions_in_constraints_are_inside_the_ranges():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    for requirement in map(Requirement, wanted):
        assert pins[requirement.name.lower()] in requirement.specifier, requirement
    assert pins["torch"] == "2.13.0"
    assert not [line for line in lines if "@" in line or "/" in line.partition("#")[0]]
