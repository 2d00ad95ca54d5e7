"""A checkpoint is whole or it is not chosen."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from raydistill.artifacts import Manifest
from raydistill.config.distill import EngineConfig
from raydistill.config.stages import OptimizerConfig
from raydistill.errors import DistillError, IncompatibleCheckpoint
from raydistill.experts import checkpoint
from raydistill.experts.averages import Averages, kept_average
from raydistill.experts.checkpoint import TrainState, newest_verified
from raydistill.experts.engine import build_engine
from raydistill.experts.protocols import Engine

SETTINGS = {"seed": 7, "boundary": 0.6}
FILES = [
    "student/part-00000-of-00001.safetensors",
    "critic/part-00000-of-00001.safetensors",
    "averages/part-00000-of-00001.safetensors",
    "state.json",
    "manifest.json",
]


def roles() -> dict[str, Engine]:
    """Student and critic over plain torch."""
    torch.manual_seed(0)
    nets = {"student": nn.Linear(3, 2), "critic": nn.Linear(2, 1)}
    settings = (EngineConfig(backend="torch"), OptimizerConfig(learning_rate=0.1, warmup_steps=0))
    return {role: build_engine(net, *settings, num_steps=10) for role, net in nets.items()}


def advance(engines: dict[str, Engine]) -> None:
    """One optimizer step of every role."""
    for engine in engines.values():
        x = torch.linspace(-1, 1, engine.module.in_features)[None] + engine.steps
        engine.backward(engine.module(x).square().mean())
        engine.step()


def save(run_dir, engines, *, stage="semantic", keep=9):
    """A checkpoint at the step where the student stands."""
    state = TrainState(stage=stage, step=engines["student"].steps, settings=SETTINGS, plan={"seed": 7})
    return checkpoint.save(run_dir, state, parts=with_averages(engines), keep=keep)


def with_averages(engines, slow=None):
    """What a stage keeps: here an average that stands where the student does, unless another is given."""
    slow = slow or kept_average(engines["student"], 0.9)
    return {**engines, "averages": Averages({"average": (engines["student"], slow)})}


def asked_for(**others) -> TrainState:
    """What a run that resumes says of itself."""
    return TrainState(
        **({"stage": "semantic", "step": 0, "settings": SETTINGS, "plan": {"seed": 7}} | others)
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 1 and 2 of one run."""
    run_dir = tmp_path_factory.mktemp("run")
    engines = roles()
    for _ in range(2):
        advance(engines)
        save(run_dir, engines)
    return run_dir


@pytest.fixture
def run_dir(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "run")


def test_newest_is_chosen(run_dir):
    """The layout is as documented; stages do not see each other."""
    newest = newest_verified(run_dir, "semantic")
    assert newest.name == "semantic-step-000002"
    assert sorted(p.relative_to(newest).as_posix() for p in newest.rglob("*") if p.is_file()) == sorted(FILES)
    assert checkpoint.read_state(newest).step == 2
    assert newest_verified(run_dir, "detail") is None
    assert newest_verified(run_dir / "nowhere", "semantic") is None


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "emptied": lambda path: path.write_bytes(b""),
    "flipped": lambda path: path.write_bytes(_flip(path.read_bytes())),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "missing": lambda path: path.unlink(),
}


def _flip(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damaged_is_never_chosen(run_dir, caplog, name, damage):
    """Whatever happens to whichever file: the one before is taken, and the log says why."""
    path = run_dir / "checkpoints" / "semantic-step-000002" / name
    DAMAGE[damage](path)
    with caplog.at_level(logging.WARNING):
        newest = newest_verified(run_dir, "semantic")
    if name == "manifest.json" and damage == "longer":  # a space after the JSON changes nothing
        assert newest.name == "semantic-step-000002"
        return
    assert newest.name == "semantic-step-000001"
    assert "semantic-step-000002 is passed over" in caplog.text
    assert path.name in caplog.text
    DAMAGE[damage](run_dir / "checkpoints" / "semantic-step-000001" / name)
    assert newest_verified(run_dir, "semantic") is None


def test_every_flipped_bit_of_the_small_files_is_seen(run_dir):
    """Manifest and state, byte by byte."""
    folder = run_dir / "checkpoints" / "semantic-step-000002"
    for name in ("manifest.json", "state.json"):
        whole = (folder / name).read_bytes()
        for at in range(len(whole)):
            (folder / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            same = _json(folder / name) == json.loads(whole)
            assert same or newest_verified(run_dir, "semantic").name == "semantic-step-000001", at
        (folder / name).write_bytes(whole)


def _json(path):
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def test_a_renamed_folder_is_not_chosen(run_dir):
    """The manifest knows its name: an old checkpoint cannot pose as a newer one."""
    folder = run_dir / "checkpoints" / "semantic-step-000001"
    folder.rename(folder.with_name("semantic-step-000009"))
    assert newest_verified(run_dir, "semantic").name == "semantic-step-000002"


def test_restores_what_was_saved(run_dir):
    """Both roles go on as if nothing had happened, bit for bit."""
    unbroken, taken_up = roles(), roles()
    for _ in range(4):
        advance(unbroken)
    slow = kept_average(taken_up["student"], 0.9)
    folder = newest_verified(run_dir, "semantic")
    assert checkpoint.load(folder, asked_for(), parts=with_averages(taken_up, slow)).step == 2
    assert all(torch.equal(w, slow.weights[n]) for n, w in taken_up["student"].weights().items())
    for _ in range(2):
        advance(taken_up)
    for role, engine in unbroken.items():
        for name, weight in engine.weights().items():
            assert torch.equal(weight, taken_up[role].weights()[name])


OTHERS = {
    "settings.boundary: 0.6 != 0.7": {"settings": SETTINGS | {"boundary": 0.7}},
    "plan.seed: 7 != 8": {"plan": {"seed": 8}},
    "stage: 'semantic' != 'detail'": {"stage": "detail"},
}


@pytest.mark.parametrize("difference", OTHERS)
def test_another_runs_checkpoint_is_refused(run_dir, difference):
    """With the difference by name, and before any weight is touched."""
    engines = roles()
    before = engines["student"].weights()
    with pytest.raises(IncompatibleCheckpoint, match="output folder of its own") as caught:
        checkpoint.load(newest_verified(run_dir, "semantic"), asked_for(**OTHERS[difference]), parts=engines)
    assert difference in str(caught.value)
    assert all(torch.equal(w, before[n]) for n, w in engines["student"].weights().items())


def test_a_missing_role_is_refused(run_dir):
    """A stage with a critic cannot go on from one without."""
    folder = newest_verified(run_dir, "semantic")
    engines = roles()
    with pytest.raises(IncompatibleCheckpoint, match="no 'judge'"):
        checkpoint.load(folder, asked_for(), parts={"judge": engines["critic"]})


def test_a_student_of_another_step_is_refused(run_dir):
    """The step that a checkpoint states is its student's."""
    folder = newest_verified(run_dir, "semantic")
    about = json.loads((folder / "state.json").read_bytes())
    (folder / "state.json").write_text(json.dumps(about | {"step": 7}))
    with pytest.raises(IncompatibleCheckpoint, match="of step 2, not 7"):
        checkpoint.load(folder, asked_for(), parts=roles())


def test_prune_keeps_the_newest_sound_ones(run_dir):
    """A damaged one does not count as kept; other stages are left alone."""
    engines = roles()
    advance(engines)
    save(run_dir, engines, stage="detail")
    for _ in range(3):
        advance(engines)
        save(run_dir, engines)
    (run_dir / "checkpoints" / "semantic-step-000004" / "state.json").unlink()
    checkpoint.prune(run_dir, asked_for(step=5), keep=2)
    left = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    assert left == ["detail-step-000001", "semantic-step-000002", "semantic-step-000003"]


def test_a_damaged_one_ahead_never_costs_the_one_just_written(run_dir):
    """A flipped bit that sizes do not show: the run begins anew before it, and keeps what it writes."""
    part = run_dir / "checkpoints" / "semantic-step-000002" / FILES[0]
    part.write_bytes(part.read_bytes()[:-1] + b"\xff")
    shutil.rmtree(run_dir / "checkpoints" / "semantic-step-000001")
    engines = roles()
    advance(engines)
    save(run_dir, engines, keep=1)
    assert newest_verified(run_dir, "semantic").name == "semantic-step-000001"


def test_steps_are_told_by_names(run_dir):
    """Which the manifest vouches for, as it does for what the state says."""
    newest = newest_verified(run_dir, "semantic")
    assert checkpoint.step_of(newest) == checkpoint.read_state(newest).step == 2
    assert checkpoint.step_of(None) == 0


def test_two_runs_cannot_have_one_folder(tmp_path):
    again = checkpoint.alone_in(tmp_path)
    with checkpoint.alone_in(tmp_path), pytest.raises(DistillError, match="another run is going on"):
        again.__enter__()
    with checkpoint.alone_in(tmp_path):
        pass


def test_no_space_leaves_the_older_ones(run_dir):
    """A writer that fails leaves nothing that could be chosen, and its debris is removed."""
    engines = roles()
    for _ in range(3):
        advance(engines)

    class Full:
        def save(self, folder):
            raise OSError(28, "No space left on device")

    state = TrainState(stage="semantic", step=3, settings=SETTINGS)
    with pytest.raises(DistillError, match="semantic-step-000003: no space left"):
        checkpoint.save(run_dir, state, parts={**engines, "averages": Full()})
    assert newest_verified(run_dir, "semantic").name == "semantic-step-000002"
    checkpoint.remove_unfinished(run_dir)
    names = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    assert names == ["semantic-step-000001", "semantic-step-000002"]


def test_a_stale_listing_costs_no_file(tmp_path, monkeypatch):
    """Network storage may list a folder as it was: what was written is known without looking."""
    engines = roles()
    for _ in range(2):
        advance(engines)
    with monkeypatch.context() as stale:
        stale.setattr(Path, "rglob", lambda self, pattern: iter(()))
        folder = save(tmp_path, engines)
    assert set(Manifest.read(folder).files) == set(FILES) - {"manifest.json"}
    # And the other way round: a part that no manifest names does not exist.
    shutil.copy(folder / FILES[0], folder / "student" / "part-00001-of-00002.safetensors")
    taken_up = roles()
    with monkeypatch.context() as stale:
        stale.setattr(Path, "glob", lambda self, pattern: iter(()))
        assert checkpoint.load(folder, asked_for(), parts=taken_up).step == 2


KILLED_EVERYWHERE = """
import os, shutil, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_checkpoint_torn import FILES, advance, checkpoint, newest_verified, roles, save

run_dir, kept = Path(sys.argv[1]), Path(sys.argv[1] + ".kept")
shutil.copytree(run_dir, kept)
TOUCHES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir"}

def die_at(moment):
    left = [moment]
    def hook(event, arguments):
        if event in TOUCHES:
            left[0] -= 1
            if not left[0]:
                os._exit(9)
    sys.addaudithook(hook)

engines, outcomes, moment = roles(), [], 0
for _ in range(2):
    advance(engines)
while True:  # step 2 is saved again over a damaged step 2, and step 1 is pruned after it
    moment += 1
    shutil.rmtree(run_dir)
    shutil.copytree(kept, run_dir)
    (run_dir / "checkpoints" / "semantic-step-000002" / FILES[2]).write_bytes(b"")
    child = os.fork()
    if not child:
        die_at(moment)
        save(run_dir, engines, keep=1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    newest = newest_verified(run_dir, "semantic")
    outcomes.append(newest and newest.name[-1])
    if code == 0:
        break
print(moment, "".join(str(o) for o in outcomes))
"""


def test_killed_between_any_two_touches_of_the_disk(run_dir):
    """A process dies at every file operation of a save in turn: the old one is whole, then the new one."""
    here = __file__.rpartition("/")[0]
    command = [sys.executable, "-c", KILLED_EVERYWHERE, str(run_dir), here, *(p for p in sys.path if p)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert run.returncode == 0, run.stderr
    moments, outcomes = run.stdout.split()
    assert int(moments) > 20
    assert set(outcomes) == {"1", "2"}
    assert outcomes == "1" * outcomes.count("1") + "2" * outcomes.count("2")
