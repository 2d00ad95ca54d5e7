"""The settings loader: precedence, messages, `--help`, and files that can be run again."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import MISSING

from raydistill.config.load import dump, field_docs, from_command_line, help_text, key_names, load, run
from raydistill.errors import DistillError, InvalidValue, MissingValue, UnknownKey

JOBS = Path(__file__).parents[2] / "jobs"


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A section."""

    radius: float = 0.5
    """In metres,
    positive."""
    spokes: tuple[int, ...] = (3, 4)
    """Counts."""

    def __post_init__(self):
        """Knows its field, not the section it is in."""
        if self.radius <= 0:
            raise InvalidValue("wheel.radius", self.radius, "a positive number")


@dataclass(frozen=True, kw_only=True)
class BigWheel(Wheel):
    """Inherits fields and their documentation."""

    tyre: Literal["air", "solid"] = "air"
    """What it is filled with."""


@dataclass(frozen=True, kw_only=True)
class Cart:
    """A cart."""

    name: str = "cart"
    """What it is called."""
    seed: int = 7
    """Any number."""
    front: Wheel = field(default_factory=Wheel)
    """The front wheel."""
    rear: BigWheel = field(default_factory=lambda: BigWheel(radius=2.0))
    """The rear wheel."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Anything."""
    loads: dict[str, list[str]] = field(default_factory=dict)
    """Names by place."""
    limits: tuple[float, float] = (0.0, 1.0)
    """Two numbers."""


@dataclass(frozen=True, kw_only=True)
class Mandatory:
    """One field has no default."""

    inner: Cart = field(default_factory=Cart)
    """A section."""
    path: str = MISSING
    """Where to look."""


def read(*argv: str, schema: type = Cart) -> Any:
    return from_command_line(schema, argv)[0]


@pytest.fixture
def write(tmp_path):
    def to_file(text: str) -> str:
        path = tmp_path / "cart.yaml"
        path.write_text(text)
        return str(path)

    return to_file


def test_nothing_given_is_the_defaults():
    assert read() == Cart()


def test_command_line_beats_file_beats_default(write):
    file = write("seed: 1\nname: from file\nrear: {tyre: solid}\n")
    got = read("seed=2", "--config", file, "rear.spokes=[9]")
    assert got == Cart(seed=2, name="from file", rear=BigWheel(radius=2.0, tyre="solid", spokes=(9,)))
    assert read(f"--config={file}").seed == 1


def test_the_last_of_two_equal_keys_wins():
    assert read("seed=1", "seed=2").seed == 2


def test_sections_defaults_of_the_parent_stay_when_one_of_their_fields_is_given():
    assert read("rear.tyre=solid").rear == BigWheel(radius=2.0, tyre="solid")


def test_a_mapping_is_added_to_and_a_list_replaced(write):
    file = write("loads: {left: [a, b]}\nextra: {x: {y: 1}}\n")
    got = read("--config", file, "loads.right=[c]", "loads.left=[d]", "extra.x.z=2")
    assert got.loads == {"left": ["d"], "right": ["c"]}
    assert got.extra == {"x": {"y": 1, "z": 2}}


def test_one_value_may_refer_to_another():
    assert read("name=${seed}").name == "7"


def test_switches_come_back_as_a_set():
    config, given_switches = from_command_line(
        Cart, ["--roll", "seed=3"], switches={"roll": "roll on", "stop": ""}
    )
    assert (config.seed, given_switches) == (3, {"roll"})


@pytest.mark.parametrize(
    ("argv", "key", "near"),
    [
        (["sead=1"], "sead", "seed"),
        (["front.spoke=[1]"], "front.spoke", "front.spokes"),
        (["front.tyre=air"], "front.tyre", "rear.tyre"),
        (["radius=1"], "radius", "rear.radius"),
        (["spoke=1"], "spoke", "rear.spokes"),
        (["--rol"], "--rol", "--roll"),
        (["--seed=3"], "--seed", "seed"),
        (["-x"], "-x", None),
        (["=3"], "", None),
    ],
)
def test_unknown_keys_are_errors_that_name_the_nearest(argv, key, near):
    with pytest.raises(UnknownKey) as caught:
        from_command_line(Cart, argv, switches={"roll": ""})
    assert caught.value.key == key
    assert f"did you mean '{near}'" in str(caught.value) if near else "did you mean" not in str(caught.value)


def test_an_unknown_key_in_a_file_names_the_file(write):
    file = write("front: {radios: 1}\n")
    with pytest.raises(UnknownKey, match=r"front\.radios.*front\.radius") as caught:
        load(Cart, file)
    assert caught.value.__notes__ == [f"in {file}"]


@pytest.mark.parametrize(
    ("argument", "key", "expected"),
    [
        ("seed=abc", "seed", "expected int"),
        ("seed=1.5", "seed", "expected int"),
        ("seed=", "seed", "expected int"),
        ("seed.x=1", "seed", "expected int"),
        ("front=3", "front", "section"),
        ("front.spokes=3", "front.spokes", "list of int"),
        ("front.spokes=[a]", "front.spokes", "list of int"),
        ("limits=[1]", "limits", "list of 2 float"),
        ("rear.tyre=water", "rear.tyre", "one of air, solid"),
        ("loads.left=a", "loads", "mapping of str to list of str"),
        ("rear.radius=-1", "rear.radius", "a positive number"),
        ("name=${nobody}", "name", "nobody"),
        ("name=[", "name", "YAML"),
    ],
)
def test_wrong_values_are_named_in_full_with_what_was_expected(argument, key, expected):
    with pytest.raises(InvalidValue) as caught:
        read(argument)
    assert caught.value.key == key
    assert expected in str(caught.value)


def test_a_value_out_of_range_says_where_it_was_given(write):
    file = write("front: {radius: -1}\n")
    with pytest.raises(InvalidValue) as caught:
        load(Cart, file)
    assert caught.value.key == "front.radius"
    assert caught.value.__notes__ == [f"in {file}"]


@pytest.mark.parametrize("text", ["- 1\n", "seed: 1\nseed: 2\n", "seed: [\n", "name: '${'\n", "front:\n"])
def test_files_that_are_no_settings(write, text):
    with pytest.raises(InvalidValue):
        load(Cart, write(text))


def test_an_empty_file_gives_the_defaults(write):
    assert load(Cart, write("")) == Cart()


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(InvalidValue, match="no such file"):
        load(Cart, tmp_path / "nothing.yaml")
    with pytest.raises(InvalidValue, match="cannot be read"):
        load(Cart, tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InvalidValue, match="cannot be read"):
        load(Cart, tmp_path / "bytes")


@pytest.mark.parametrize("argv", [["--config"], ["--config="]])
def test_config_without_a_path(argv):
    with pytest.raises(MissingValue, match="--config"):
        read(*argv)


def test_words_that_are_neither_and_two_files(write):
    with pytest.raises(InvalidValue, match="key=value"):
        read("seed")
    with pytest.raises(InvalidValue, match="only one"):
        read("--config", write(""), "--config", write(""))


def test_a_mandatory_value_that_is_not_given():
    with pytest.raises(MissingValue, match=r"path must be given.*Where to look"):
        read(schema=Mandatory)
    assert read("path=x", schema=Mandatory).path == "x"


def test_help_lists_every_field_with_type_default_and_documentation(capsys):
    with pytest.raises(SystemExit) as caught:
        from_command_line(Mandatory, ["path=x", "--help"], switches={"roll": "Roll on."})
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert "--roll\n      Roll on." in said
    for line in (
        "path: str  (must be given)\n      Where to look.",
        "inner.rear.radius: float = 2.0\n      In metres, positive.",
        "inner.rear.tyre: one of air, solid = air",
        "inner.front.spokes: list of int = [3, 4]",
        "inner.limits: list of 2 float = [0.0, 1.0]",
        "inner.extra: mapping of str to Any = {}",
    ):
        assert line in said
    assert all(key in said for key in key_names(Mandatory))


def test_documentation_of_inherited_fields():
    assert field_docs(BigWheel) == {
        "radius": "In metres, positive.",
        "spokes": "Counts.",
        "tyre": "What it is filled with.",
    }
    assert help_text(Cart, {}).startswith("A cart.")


texts = st.text(st.sampled_from("ab ${}\\:#-'\"\n[]?\u00e9"), max_size=8).filter(lambda text: text != "???")
wheels = st.builds(Wheel, radius=st.floats(0.1, 1e9), spokes=st.lists(st.integers(), max_size=3).map(tuple))
carts = st.builds(
    Cart,
    name=texts,
    seed=st.integers(-(2**63), 2**63),
    front=wheels,
    extra=st.dictionaries(texts.filter(bool), texts | st.none() | st.booleans() | st.floats(allow_nan=False)),
    loads=st.dictionaries(texts.filter(bool), st.lists(texts, max_size=2)),
)


@given(cart=carts)
@example(
    cart=Cart(
        name="${seed}", loads={"${seed}": ["\\${seed}", "a\\\\${seed}b", "\\n", "null", "1e3"], "2e5": []}
    )
)
def test_dump_then_load_is_identity(tmp_path_factory, cart):
    path = tmp_path_factory.mktemp("cart") / "cart.yaml"
    dump(cart, path)
    assert load(Cart, path) == cart


@pytest.mark.parametrize(
    ("error", "status"), [(InvalidValue("seed", 3, "two\nlines"), 2), (DistillError("stopped"), 1)]
)
def test_errors_raised_on_purpose_are_one_line_and_an_exit_status(capsys, error, status):
    error.add_note("in cart.yaml")

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == status
    said = capsys.readouterr().err
    assert said.startswith(type(error).__name__)
    assert said.endswith("(in cart.yaml)\n")
    assert said.count("\n") == 1


def test_an_interrupt_is_one_line_too(capsys):
    def main() -> None:
        stop = KeyboardInterrupt()
        stop.add_note("'cart' from step 7 of 9")
        raise stop

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == 130
    said = "interrupted: the same command goes on with what is finished ('cart' from step 7 of 9)\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("job", sorted(path.name for path in JOBS.glob("*.py")))
def test_a_typo_is_told_before_torch_is_imported(job, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    told = subprocess.run(
        [sys.executable, str(JOBS / job), "zzzz=1"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (told.returncode, told.stderr) == (2, "UnknownKey: unknown key 'zzzz' (on the command line)\n")


def test_other_errors_are_not_hidden():
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main)
