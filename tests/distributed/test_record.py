"""A teacher's paths recorded by a pool of actors: whole, resumable, refused where they do not belong."""

import json
import shutil

import numpy as np
import pytest
import ray
import torch
from motion_cases import TEXT, teacher
from shared_memory import left_since, shared_memory

from raydistill.artifacts import LatentStore
from raydistill.config.grid import GridConfig
from raydistill.config.prepare import RecordConfig
from raydistill.consistency.schedule import RECTIFIED_FLOW, TimeGrid
from raydistill.consistency.solver import euler, guided
from raydistill.errors import StaleArtifact
from raydistill.flow import connect
from raydistill.latents.shards import latent_row, write_shard
from raydistill.models.teacher import load_teacher
from raydistill.models.text import WordVectors, null_text
from raydistill.shards import write_artifact
from raydistill.trajectories.record.flow import record_trajectories
from raydistill.trajectories.record.recorder import Recorder, Told, asked_of_paths, identity_of, shards_of
from raydistill.trajectories.store import TrajectoryStore, node_column

pytestmark = pytest.mark.distributed
GRID = GridConfig(num_intervals=4)
SHAPE = (4, 4, 4, 4)


@pytest.fixture(scope="module")
def cluster():
    before, ours = shared_memory(), not ray.is_initialized()
    with connect(num_cpus=2, object_store_mib=100):
        yield
    if ours:
        assert not left_since(before)


@pytest.fixture(scope="module")
def made(cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    teacher().network.save_pretrained(folder / "teacher")
    text = WordVectors(*TEXT)(["red square", "blue circle", "green"]).numpy()
    rows = [latent_row(torch.zeros(SHAPE).numpy(), text[i], f"row {i}", str(i)) for i in range(3)]
    write_artifact(folder / "latents", [write_shard(folder / "latents", "part", rows, {"t": 1})], {"t": 1})
    seen = []
    path = record_trajectories(config(folder), folder / "latents", folder / "paths", report=seen.append)
    assert seen[0] == 0
    assert seen[-1] == 5
    return folder, path


def config(folder, **changed):
    fields = {"teacher": str(folder / "teacher"), "num_paths": 5, "guidance_range": (1.5, 3.0), "grid": GRID}
    return RecordConfig(**{**fields, "paths_per_shard": 2, "batch_size": 2, "num_actors": 2, **changed})


def test_a_recorded_pair_is_a_step_of_the_guided_teacher(made):
    folder, _ = made
    store, net = TrajectoryStore(folder / "paths"), load_teacher(folder / "teacher")
    assert (len(store), store.num_nodes) == (5, 5)
    nodes, scales = TimeGrid(4).times, store.column("guidance_scale")
    assert len({round(w, 6) for w in scales}) == 5
    assert all(1.5 <= w <= 3.0 for w in scales)
    for i in range(5):
        for k in range(4):
            row, x_r = store.pair(i, k)
            x_t, text = (torch.from_numpy(v.copy())[None] for v in (row.latents, row.text))
            field = guided(net, null_text(text), scales[i])
            t, r = (node.expand(1) for node in nodes[k : k + 2])
            with torch.no_grad():
                fresh = euler(RECTIFIED_FLOW, field, x_t, t, r, text)
            torch.testing.assert_close(torch.from_numpy(x_r.copy())[None], fresh, rtol=1e-4, atol=1e-4)
            assert row.caption == f"row {i % 3}"
    first, _ = store.pair(0, 0)
    assert 0.7 < first.latents.std() < 1.3  # the path begins at noise


def test_a_stopped_run_goes_on_and_a_finished_one_does_nothing(made):
    folder, path = made
    before = {f.name: f.stat().st_mtime_ns for f in path.glob("*.parquet")}
    fingerprint = TrajectoryStore(path).fingerprint
    (path / "paths-0000002-0000003.manifest.json").unlink()
    (path / "manifest.json").unlink()
    seen = []
    again = record_trajectories(config(folder), folder / "latents", folder / "paths", report=seen.append)
    assert again == path
    assert seen == [3, 5]
    after = {f.name: f.stat().st_mtime_ns for f in path.glob("*.parquet")}
    assert [name for name in before if before[name] != after[name]] == ["paths-0000002-0000003.parquet"]
    assert TrajectoryStore(path).fingerprint == fingerprint
    seen.clear()
    record_trajectories(config(folder), folder / "latents", folder / "paths", report=seen.append)
    assert seen == [5]


def test_a_path_depends_on_its_number_alone(made):
    folder, path = made
    store = TrajectoryStore(path)
    whole = recorded(folder, path, config(folder, batch_size=5), range(5))
    alike = recorded(folder, path, config(folder), range(2, 4))
    for i in range(5):
        for k in range(4):
            x_r = store.pair(i, k)[1]
            np.testing.assert_allclose(
                whole[i][k + 1], x_r, rtol=1e-4, atol=1e-5
            )  # batches round differently
            if i in (2, 3):
                np.testing.assert_array_equal(alike[i - 2][k + 1], x_r)


def recorded(folder, path, settings, numbers):
    """States of paths, (path, node, c, f, h, w), followed in this process."""
    told = Told(settings, str(folder / "latents"), str(path), TrajectoryStore(path).manifest.identity)
    rows = Recorder(told).record(numbers)
    states = [[np.frombuffer(row[f"{node_column(k)}_bytes"], np.float32) for k in range(5)] for row in rows]
    return np.array(states).reshape(len(rows), 5, *SHAPE)


def test_batches_actors_shards_and_the_teachers_place_are_not_what_paths_are_made_of(made, tmp_path):
    folder, path = made
    shutil.copytree(folder / "teacher", tmp_path / "moved")
    how = {"batch_size": 5, "num_actors": 1, "paths_per_shard": 4, "teacher": str(tmp_path / "moved")}
    latents, identity = LatentStore(folder / "latents"), TrajectoryStore(path).manifest.identity
    assert identity_of(config(folder, **how), latents) == identity
    for changed in ({"seed": 1}, {"dtype": "float16"}, {"num_paths": 6}, {"guidance_range": (1.5, 2.0)}):
        assert identity_of(config(folder, **changed), latents) != identity


def test_a_shards_name_means_the_same_paths_under_every_division(tmp_path):
    meant = {}
    for per in range(1, 9):
        shards = shards_of(config(tmp_path, num_paths=7, paths_per_shard=per))
        assert [n for part in shards.values() for n in part] == list(range(7))
        assert all(meant.setdefault(name, part) == part for name, part in shards.items())


def test_paths_of_another_teacher_guidance_or_grid_are_refused(made, tmp_path):
    folder, path = made
    store = TrajectoryStore(path)
    store.require_run(asked_of_paths(folder / "teacher", (1.5, 3.0), GRID))
    teacher(1).network.save_pretrained(tmp_path / "other")
    for asked, what in (
        (asked_of_paths(tmp_path / "other", (1.5, 3.0), GRID), "teacher"),
        (asked_of_paths(folder / "teacher", (1.5, 2.0), GRID), "guidance_range"),
        (asked_of_paths(folder / "teacher", (1.5, 3.0), GridConfig(num_intervals=5)), "grid"),
    ):
        with pytest.raises(StaleArtifact, match=what):
            store.require_run(asked)


def test_latents_that_the_teacher_does_not_take_are_refused(made, tmp_path):
    folder, _ = made
    text = WordVectors(3, 16)(["red"]).numpy()
    row = latent_row(torch.zeros(SHAPE).numpy(), text[0], "row", "0")
    write_artifact(tmp_path, [write_shard(tmp_path, "part", [row], {"t": 1})], {"t": 1})
    assert len(LatentStore(tmp_path)) == 1
    with pytest.raises(StaleArtifact, match="text of width 32"):
        record_trajectories(config(folder), tmp_path, tmp_path / "paths", report=lambda n: None)


def test_the_pointer_names_the_artifact(made):
    folder, path = made
    assert json.loads((folder / "paths" / "trajectories.json").read_text())["folder"] == path.name
