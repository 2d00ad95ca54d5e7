"""The benchmark of real sizes, at the smallest: its figures are of what they say, no failure is hidden."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from job_cases import ROOT

sys.path.append(str(ROOT / "tests" / "bench"))
import gpu
import gpu_sections
import gpu_setup

from raydistill.models.teacher import empty_network
from raydistill.models.wan import WanField

TINY = replace(
    gpu_setup.TOY,
    network=gpu_setup.TOY.network | {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2},
    latents=(16, 4, 4, 4),
    text=(3, 32),
    matmul=64,
    repeats=1,
    frames_kept=4,
    attention=("native", "_native_math"),
    settings=("grid.num_intervals=50", "detail.critic.channels=8", "detail.lora_rank=2"),
)


@pytest.fixture
def setup(tmp_path):
    return gpu_setup.Setup(TINY, tmp_path, "cpu")


def test_sections_run_and_are_reported(tmp_path, capsys):
    names = ["semantic", "detail", "sampling"]
    assert gpu.bench(TINY, "cpu", names, tmp_path / "out") == 0
    kept = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert {row["section"] for row in kept["rows"]} == set(names)
    assert all(row["figures"]["seconds"] > 0 and not row["failed"] for row in kept["rows"])
    assert (tmp_path / "out" / "gpu.png").stat().st_size > 10_000
    assert set(kept["goals"]) == {
        "semantic step, share of the matmul rate, attention native",
        "sampling, teacher over student",
    }
    said = capsys.readouterr().out
    assert "matmul of 64^2" in said
    assert "not for a CPU" in said
    planned = [row["figures"] for row in kept["rows"] if "planned_gib" in row["figures"]]
    assert len(planned) == 2
    assert all(0.8 < f["planned_gib"] / f["peak_gib"] < 1.25 for f in planned), planned


def passes_of(setup, name, **how):
    """Forward passes of the teacher, in samples, of one step, and the step's loss."""
    stage, teacher = setup.stage(name, setup.config())
    batch, seen = replace(setup.batch(), latents=torch.ones(1, *TINY.latents)), []
    teacher.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    if "change" in how:
        how["change"](stage, teacher, batch)
    losses, _ = how.get("drawn", gpu_setup.draw)(stage, batch)
    seen.clear()
    gpu_setup.take_step(stage, batch, how.get("drawn", gpu_setup.draw))
    return seen, losses.total.detach(), stage


def test_the_ways_of_a_section_do_the_work_that_they_name(setup):
    one, two = (passes_of(setup, "semantic", **how) for how in ({}, {"change": gpu_sections.two_passes}))
    assert (one[0], two[0]) == ([2], [1, 1])
    torch.testing.assert_close(one[1], two[1])
    reused, again = (passes_of(setup, "detail", **how) for how in ({}, {"change": gpu_sections.seen_again}))
    assert (reused[0], again[0]) == ([2, 1, 1], [2, 1, 1, 1, 1])


def test_graphs_held_until_the_end_give_the_same_gradients(setup):
    torch.manual_seed(0)
    batch = setup.batch()
    found = []
    for drawn in (gpu_setup.draw, gpu_sections.draw_at_once):
        stage, _ = setup.stage("detail", setup.config())
        losses, kept = drawn(stage, batch)
        stage.engine.backward(losses.total)
        assert all(p.grad is None for p in stage.companions["critic"].engine.module.parameters())
        turn = stage.companions["critic"].turn(kept["critic"])
        found.append((losses.total, turn.total, [p.grad for p in stage.engine.trainable_parameters.values()]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_way_that_fails_is_a_row_and_the_exit_status(setup, tmp_path, monkeypatch, capsys):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    ways = {
        "fits": lambda: {"seconds": 2.0, "first_seconds": 2.0, "peak_gib": 1.0},
        "does not": full,
        "wrong": lambda: 1 / 0,
    }
    monkeypatch.setitem(gpu.SECTIONS, "semantic", lambda _: ways)
    assert gpu.bench(TINY, "cpu", ["semantic"], tmp_path) == 1
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [row["failed"].split(":")[0] for row in rows] == ["", "out of memory", "ZeroDivisionError"]
    assert "out of memory: CUDA out of memory" in capsys.readouterr().out


def test_what_was_measured_is_kept_when_it_is_cut_short(setup, tmp_path, monkeypatch):
    def killed():
        raise KeyboardInterrupt

    ways = {"done": lambda: {"seconds": 2.0, "first_seconds": 2.0, "peak_gib": 1.0}, "killed": killed}
    monkeypatch.setitem(gpu.SECTIONS, "semantic", lambda _: ways)
    with pytest.raises(KeyboardInterrupt):
        gpu.bench(TINY, "cpu", ["semantic"], tmp_path)
    assert [row["way"] for row in json.loads((tmp_path / "gpu.json").read_text())["rows"]] == ["done"]


def test_ratios_are_to_the_first_way_and_goals_are_of_their_sections():
    rows = [
        gpu.Row("semantic", "step", {"seconds": 1.0, "share": 0.4}),
        gpu.Row("sampling", "student, 4 steps", {"seconds": 2.0}),
        gpu.Row("sampling", "teacher, 50 steps", {"seconds": 50.0}),
        gpu.Row("attention", "native", {"seconds": 1.0, "share": 0.4}),
        gpu.Row("attention", "_native_cudnn", {"seconds": 0.5, "share": 0.6}),
        gpu.Row("reuse", "features reused", failed="out of memory"),
        gpu.Row("reuse", "computed again", {"seconds": 3.0}),
    ]
    assert gpu.relative(rows, "seconds") == {
        ("semantic", "step"): 1.0,
        ("sampling", "student, 4 steps"): 1.0,
        ("sampling", "teacher, 50 steps"): 25.0,
        ("attention", "native"): 1.0,
        ("attention", "_native_cudnn"): 0.5,
    }
    assert list(gpu.goals(rows).values()) == [(0.6, 0.5), (25.0, 24.0)]
    assert "attention _native_cudnn" in next(iter(gpu.goals(rows)))


def test_the_same_way_is_measured_once(setup, monkeypatch):
    taken = []
    monkeypatch.setattr(setup, "repeated", lambda *_: taken.append(1) or {"seconds": 1.0, "peak_gib": 1.0})
    first = setup.step("semantic")
    assert setup.step("semantic", planned=True).keys() - first.keys() == {"planned_gib"}
    setup.step("semantic", frames=5)
    setup.step("semantic", change=gpu_sections.two_passes)
    assert len(taken) == 3
    assert setup.plan("semantic", frames=5).tokens > setup.plan("semantic").tokens


def test_the_real_size_is_the_published_network_and_its_job(tmp_path):
    """32,760 tokens and 1.42 billion weights, in the settings of jobs/wan21_1_3b."""
    setup = gpu_setup.Setup(gpu_setup.REAL, tmp_path, "meta")
    config = setup.config()
    net = empty_network(config.teacher)
    assert sum(p.numel() for p in net.parameters()) == 1_418_996_800
    assert WanField(net).token_grid(torch.empty(1, *setup.size.latents, device="meta")) == (21, 30, 52)
    assert (config.engine.activation_checkpointing, config.engine.precision) == (True, "bf16")
    assert (config.plan.latents, config.plan.text) == (setup.size.latents, setup.size.text)


def test_every_section_has_a_reference_and_settings_that_are_allowed(setup, monkeypatch):
    asked = []
    monkeypatch.setattr(
        setup, "step", lambda name, *changes, **_: asked.append(setup.config(*changes).engine)
    )
    for name in set(gpu.SECTIONS) - {"sampling"}:
        ways = gpu.SECTIONS[name](setup)
        assert len(ways) >= (1 if name in ("semantic", "detail") else 2)
        for work in ways.values():
            work()
    assert len(asked) == 16
    assert sum(how.compile_frozen for how in asked) == 1
    assert sum(how.backend == "deepspeed" for how in asked) == 1
    assert sum(not how.activation_checkpointing for how in asked) == 1
    assert {how.attention.frozen for how in asked} == set(TINY.attention)


@pytest.mark.parametrize(
    ("argv", "says"), [(["--toy", "--only", "semantics"], "no section semantics"), ([], "--toy")]
)
def test_what_cannot_be_measured_is_refused(argv, says, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu.main(argv)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err
