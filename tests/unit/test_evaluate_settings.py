"""What an evaluation refuses to start with, and how it takes the time."""

import pytest

from raydistill.config.evaluate import EvaluateConfig
from raydistill.errors import InvalidValue
from raydistill.evaluation.records import source_digest
from raydistill.evaluation.run import code_digest, time_in_turn


def test_samplers_are_timed_in_turn_after_a_warm_up():
    order = []
    timings = time_in_turn({name: lambda name=name: order.append(name) for name in "abc"}, rounds=2)
    assert "".join(order) == "abcabcabc"
    assert {name: len(seconds) for name, seconds in timings.items()} == {"a": 2, "b": 2, "c": 2}


def test_code_of_this_package_has_a_digest():
    assert len(code_digest()) == 64


SOURCE = 'def f(x):\n    """Say."""\n    return x + 1\n'


@pytest.mark.parametrize(
    ("written", "same"),
    [
        ('"""New."""\ndef f(x):  # why\n    """Say more."""\n\n    return (x +\n        1)\n', True),
        ("def f(x):\n    return x + 2\n", False),
        ("def f(x):\n    return x + 1\n\nf(2)\n", False),
    ],
)
def test_records_outlive_new_comments_but_not_new_code(tmp_path, written, same):
    place = tmp_path / "code.py"
    place.write_text(SOURCE, encoding="utf-8")
    before = source_digest([place])
    place.write_text(written, encoding="utf-8")
    assert (source_digest([place]) == before) is same


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("num_clips", {"num_clips": 1}),
        ("teacher_steps", {"teacher_steps": (4, 4)}),
        ("student_steps", {"student_steps": (0,)}),
        ("students", {"students": {"teacher": ["a"]}}),
        ("shift", {"shift": 0.0}),
    ],
)
def test_config_refuses(key, values):
    with pytest.raises(InvalidValue, match=key):
        EvaluateConfig(**values)
