"""Every error crosses process boundaries with its type, its fields and its notes."""

import copy
import pickle
from dataclasses import fields, is_dataclass

import pytest

from raydistill import errors
from raydistill.errors import InvalidValue, RaydistillError, UnknownKey

SAMPLES = {"str": "text", "int": 3, "float": 0.5, "object": {"a": 1}, "tuple[str, ...]": ("a", "b")}


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
