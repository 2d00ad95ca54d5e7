"""Networks on demand: loaded once where all may stay, one sampler's at a time where they may not."""

import weakref

import pytest
from torch import nn

from raydistill.evaluation.networks import OnDemand, Part, Shelf


class Loads:
    """Parts that count their loads, and know what of them is still alive."""

    def __init__(self):
        self.counted, self.alive = [], weakref.WeakSet()

    def part(self, key):
        def load():
            assert self.most is None or len(self.alive) < self.most, "another is still held"
            self.counted.append(key)
            self.alive.add(made := nn.Linear(1, 1))
            return {"field": made}

        return Part(key, load)

    most = None


def test_nothing_is_loaded_before_a_field_is_asked_for():
    loads = Loads()
    fields = OnDemand(Shelf(keeps_all=True), {"semantic": (loads.part("a"), "field")})
    assert (set(fields), len(fields), fields.keys_of_parts) == ({"semantic"}, 1, {"a"})
    assert "detail" not in fields
    assert loads.counted == []
    assert fields["semantic"] is fields["semantic"]
    assert loads.counted == ["a"]


@pytest.mark.parametrize(("keeps_all", "counted"), [(True, ["a", "b"]), (False, ["a", "b", "a"])])
def test_all_stay_or_one_samplers_alone(keeps_all, counted):
    loads, shelf = Loads(), Shelf(keeps_all=keeps_all)
    loads.most = None if keeps_all else 1
    first, second = (OnDemand(shelf, {"semantic": (loads.part(key), "field")}) for key in "ab")
    for fields in (first, second, first):
        assert isinstance(fields["semantic"], nn.Linear)
    assert loads.counted == counted
    assert len(loads.alive) == (2 if keeps_all else 1)


def test_a_mixture_holds_both_of_its_parts_and_leaves_them_to_the_next():
    loads, shelf = Loads(), Shelf(keeps_all=False)
    loads.most = 2
    a, b = loads.part("a"), loads.part("b")
    both = OnDemand(shelf, {"semantic": (a, "field"), "teacher": (b, "field")})
    for expert in ("semantic", "teacher", "semantic", "teacher"):
        assert isinstance(both[expert], nn.Linear)
    assert OnDemand(shelf, {"teacher": (b, "field")})["teacher"] is not None
    assert loads.counted == ["a", "b"]
    assert len(loads.alive) == 1
