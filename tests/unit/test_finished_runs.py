"""What a start looks at: a finished run is read once and belongs to its own settings; the rest is checked."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
from test_checkpoint_torn import advance, asked_for, roles, save

from raydistill.artifacts import Manifest
from raydistill.config.distill import DistillConfig, EngineConfig, GridConfig, ScaleConfig
from raydistill.config.stages import DetailConfig, ObjectiveConfig, OptimizerConfig, SemanticConfig
from raydistill.errors import IncompatibleCheckpoint, InvalidValue
from raydistill.experts.launch import launch
from raydistill.experts.stages import build_segment
from raydistill.experts.worker import SETTINGS, settings_of

ROOT = Path(__file__).parents[2]
NUM_STEPS = 2
SIZES = {"num_steps": NUM_STEPS, "optimizer": OptimizerConfig(warmup_steps=0)}


@pytest.fixture(scope="module")
def distill():
    """jobs/distill.py as a module."""
    spec = importlib.util.spec_from_file_location("distill_job", ROOT / "jobs" / "distill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_dir(tmp_path):
    """Both stages at their last step."""
    for stage in ("semantic", "detail"):
        engines = roles()
        for _ in range(NUM_STEPS):
            advance(engines)
        save(tmp_path, engines, stage=stage)
    return tmp_path


class Latents:
    """As much of a store as a start looks at."""

    fingerprint = "0" * 64
    manifest = SimpleNamespace(identity={})

    def __len__(self):
        return 64

    def row(self, i):
        return SimpleNamespace(latents=np.zeros((4, 2, 4, 4), np.float32), text=np.zeros((8, 32), np.float32))


def nobody(worker):
    raise AssertionError("a worker was started")


def again(run_dir, **others):
    """Launch the semantic stage that is done."""
    asked = {"state": asked_for(), "num_steps": NUM_STEPS} | others
    return launch(nobody, config=None, scale=ScaleConfig(num_workers=1), run_dir=run_dir, **asked)


def test_a_stage_that_is_done_starts_nothing_and_is_read_once(run_dir, monkeypatch):
    read, verify = [], Manifest.verify

    def watched(self, folder, *, contents=True):
        read.append((folder.name, contents))
        return verify(self, folder, contents=contents)

    monkeypatch.setattr(Manifest, "verify", watched)
    last = again(run_dir)
    assert last == run_dir / "checkpoints" / f"semantic-step-{NUM_STEPS:06d}"
    assert read == [(last.name, True)]
    assert not ray.is_initialized()


def test_a_stage_that_is_done_belongs_to_its_run(run_dir):
    with pytest.raises(IncompatibleCheckpoint, match="boundary"):
        again(run_dir, state=asked_for(settings={"seed": 7, "boundary": 0.7}))
    with pytest.raises(IncompatibleCheckpoint, match="resume, or choose another output"):
        again(run_dir, resume=False)


def test_finished_is_both_stages_at_their_last_step(distill, run_dir):
    config = DistillConfig(
        output=str(run_dir), semantic=SemanticConfig(**SIZES), detail=DetailConfig(**SIZES)
    )
    assert distill.finished(config)
    assert not distill.finished(replace(config, semantic=replace(config.semantic, num_steps=NUM_STEPS + 1)))
    (run_dir / "checkpoints" / f"semantic-step-{NUM_STEPS:06d}" / "state.json").write_bytes(b"?" * 200)
    (part,) = run_dir.glob("checkpoints/detail-*/student/*.safetensors")
    part.write_bytes(part.read_bytes()[:-1])
    assert not distill.finished(config)


def test_a_refused_command_leaves_the_settings_of_the_run_alone(distill, run_dir):
    (run_dir / SETTINGS).write_text("the settings of this run", encoding="utf-8")
    stranger = DistillConfig(
        output=str(run_dir), semantic=SemanticConfig(**SIZES), detail=DetailConfig(**SIZES)
    )
    with pytest.raises(IncompatibleCheckpoint, match="belongs to another run"):
        distill.distil(stranger, distill.Stores(Latents()), {"teacher": "1" * 64})
    assert (run_dir / SETTINGS).read_text(encoding="utf-8") == "the settings of this run"
    assert not (run_dir / "student").exists()


def test_all_that_shapes_the_detail_expert_is_in_its_identity(run_dir, tmp_path_factory):
    config, semantic = DistillConfig(), run_dir / "checkpoints" / f"semantic-step-{NUM_STEPS:06d}"
    mine = settings_of(config, "detail", {}, semantic)
    assert settings_of(config, "detail", {}, semantic) == mine
    small = {"semantic": SemanticConfig(micro_batch=4), "detail": DetailConfig(micro_batch=4)}
    parts = replace(config, **small, scale=ScaleConfig(num_workers=4))
    assert settings_of(parts, "detail", {}, semantic) == mine
    extra = replace(config, engine=EngineConfig(extra={"gradient_clipping": 0}))
    assert settings_of(extra, "detail", {}, semantic) != mine
    engines = roles()
    advance(engines)
    another = save(tmp_path_factory.mktemp("another"), engines)
    assert settings_of(config, "detail", {}, another) != mine


def test_a_boundary_between_two_nodes_is_refused_by_its_name():
    with pytest.raises(InvalidValue, match="node of the grid") as refused:
        build_segment(DistillConfig(grid=GridConfig(shift=17.0)), "semantic")
    assert refused.value.key == "boundary"


def test_temporal_coherence_needs_frames_that_far_apart(distill):
    config = DistillConfig(semantic=SemanticConfig(objective=ObjectiveConfig(temporal_coherence=1.0)))
    distill.require_frames(config, "semantic", 4)
    with pytest.raises(InvalidValue, match="below the 3 frames"):
        distill.require_frames(config, "semantic", 3)
