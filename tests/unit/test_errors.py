"""Every error crosses process boundaries with its type, its fields and its notes."""

import copy
import pickle
import resource
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from raydistill import errors
from raydistill.errors import DistillError, InvalidValue, RaydistillError, UnknownKey, disk_full_explained

SAMPLES = {
    "str": "text",
    "str | None": "text",
    "int": 3,
    "float": 0.5,
    "float | None": 0.5,
    "object": {"a": 1},
    "tuple[str, ...]": ("a", "b"),
}


def children(error: type) -> list[type]:
    return [error] + [grand for child in error.__subclasses__() for grand in children(child)]


ERRORS = [error for error in children(RaydistillError) if error.__module__ == errors.__name__]


def make(error: type[RaydistillError], *, by_keyword: bool = False) -> RaydistillError:
    if not is_dataclass(error):
        return error("what happened")
    values = {
        field.name: SAMPLES[getattr(field.type, "__name__", str(field.type))]
        for field in fields(error)
        if "tuple" not in str(field.type)
    }
    values |= {field.name: ("a", "b") for field in fields(error) if "tuple" in str(field.type)}
    return error(**values) if by_keyword else error(*(values[field.name] for field in fields(error)))


@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_errors_survive_pickle_and_copy(error, by_keyword):
    one = make(error, by_keyword=by_keyword)
    one.add_note("in job.yaml")
    for other in (pickle.loads(pickle.dumps(one)), copy.copy(one)):
        assert type(other) is error
        assert str(other) == str(one)
        assert str(one)
        assert other.__notes__ == ["in job.yaml"]
        if is_dataclass(error):
            assert [getattr(other, f.name) for f in fields(error)] == [
                getattr(one, f.name) for f in fields(error)
            ]


def test_all_errors_are_defined_in_one_file():
    assert [error for error in children(RaydistillError) if error not in ERRORS] == []


def test_the_drawn_tree_is_the_tree():
    drawn = [
        line.split()[1] for line in errors.__doc__.splitlines() if line.strip()[:2] in ("* ", "x ", "+ ")
    ]
    indents = {
        line.split()[1]: len(line) - len(line.lstrip())
        for line in errors.__doc__.splitlines()
        if line.strip()[:2] in ("* ", "x ", "+ ")
    }
    assert set(drawn) == {error.__name__ for error in ERRORS}
    for error in ERRORS:
        assert indents[error.__name__] == 2 * (len(error.__mro__) - RaydistillError.__mro__.__len__())


def test_messages_name_the_culprit():
    assert (
        str(UnknownKey("hubber_c", ("huber_c", "seed"))) == "unknown key 'hubber_c': did you mean 'huber_c'?"
    )
    assert str(UnknownKey("zzz", ("huber_c",))) == "unknown key 'zzz'"
    assert str(InvalidValue("seed", "x", "expected int")) == "seed = 'x': expected int"


def test_a_full_disk_is_explained_whichever_library_met_it(tmp_path):
    """safetensors raises a type of its own, with the system's number in the text."""
    device = Path("/dev/full")
    for write in (lambda: device.write_bytes(b"x"), lambda: safetensors_into_little_room(tmp_path)):
        with (
            pytest.raises(DistillError, match=f"^{tmp_path}/run: no space left"),
            disk_full_explained(tmp_path / "run", DistillError),
        ):
            write()
    with pytest.raises(FileNotFoundError), disk_full_explained(tmp_path):
        (tmp_path / "nowhere" / "x").write_bytes(b"")
    with pytest.raises(SafetensorError), disk_full_explained(tmp_path):
        save_file({"x": np.zeros(3)}, tmp_path / "nowhere" / "x")


def safetensors_into_little_room(folder: Path) -> None:
    """No file may grow beyond 4 KiB, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        save_file({"x": np.zeros(10_000)}, folder / "x.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
