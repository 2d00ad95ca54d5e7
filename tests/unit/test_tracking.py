"""Where figures go: one run per run folder, whatever is restarted."""

import json
import resource
import sys
import threading
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from raydistill.config.distill import TrackingConfig
from raydistill.errors import ConfigError, DistillError
from raydistill.experts.tracking import METRICS, Tracker, require_installed

SETTINGS = {"seed": 7, "engine": {"zero_stage": 2, "extra": {}}}
PLAIN = TrackingConfig(tensorboard=False)


def events(folder):
    """Every event of a stage, in the order in which TensorBoard reads them."""
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):  # length, its checksum, event, its checksum
            size = int.from_bytes(data[at : at + 8], "little")
            yield Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16


def shown(folder):
    """Steps of the first figure as TensorBoard shows them: a new session hides what is done again."""
    steps = []
    for event in events(folder):
        if event.session_log.status == SessionLog.START:
            steps = [step for step in steps if step < event.step]
        steps += [event.step] * bool(event.summary.value)
    return steps


def test_figures_are_written_twice_by_default(tmp_path):
    tracker = Tracker(TrackingConfig(), tmp_path, SETTINGS)
    tracker.write("semantic", 10, {"loss/consistency": 0.5})
    tracker.write("detail", 10, {"loss/consistency": 0.25})
    tracker.close()
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert lines[1] == {"stage": "detail", "step": 10, "loss/consistency": 0.25}
    (value,) = [e.summary.value[0] for e in events(tmp_path / "tensorboard" / "detail") if e.summary.value]
    assert (value.tag, value.simple_value) == ("detail/loss/consistency", 0.25)


def test_tensorboard_hides_steps_that_are_done_again(tmp_path, monkeypatch):
    """Of the stage that is resumed; the other one keeps all of its own."""
    for start, steps in enumerate(((1, 2, 3, 4), (3, 4, 5))):
        monkeypatch.setattr("time.time", lambda start=start: 1.7e9 + 100 * start)  # file names have seconds
        tracker = Tracker(TrackingConfig(), tmp_path, SETTINGS)
        for step in steps:
            tracker.write("detail", step, {"loss": 1.0})
            if not start:
                tracker.write("semantic", step + 10, {"loss": 1.0})
        tracker.close()
    assert shown(tmp_path / "tensorboard" / "detail") == [1, 2, 3, 4, 5]
    assert shown(tmp_path / "tensorboard" / "semantic") == [11, 12, 13, 14]


@contextmanager
def little_room(size):
    """No file may grow beyond so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_much(tracker):
    for step in range(1, 1000):
        tracker.write("semantic", step, {f"x{n}": 1.0 for n in range(30)})


@pytest.mark.timeout(60)
@pytest.mark.parametrize("tensorboard", [False, True])
def test_no_room_is_a_clear_error(tmp_path, monkeypatch, tensorboard):
    """TensorBoard's events outgrow the lines; its thread dies, and its queue must not wait for it."""
    monkeypatch.setattr(threading, "excepthook", lambda died: None)
    tracker = Tracker(TrackingConfig(tensorboard=tensorboard), tmp_path, SETTINGS)
    with little_room(20_000), pytest.raises(DistillError, match="no space left"):
        write_much(tracker)
    if not tensorboard:
        tracker.close()
        return
    with little_room(20_000), pytest.raises(DistillError, match="no space left"):
        tracker.close()
    for thread in threading.enumerate():
        if type(thread).__name__ == "_EventLoggerThread":
            thread.join(0.2)


def test_a_missing_package_is_named_before_any_work(monkeypatch):
    require_installed(PLAIN)
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=f"pip install {name}"):
            require_installed(TrackingConfig(**{name: "mine"}))


def stand_in(monkeypatch, name, **functions):
    """A module that keeps the calls: the real one is an optional dependency and talks to a server."""
    calls, module = [], ModuleType(name)

    def recorded(call, answer):
        def record(*args, **kwargs):
            calls.append((call, *args, kwargs) if kwargs else (call, *args))
            return answer

        return record

    for call, answer in functions.items():
        setattr(module, call, recorded(call, answer))
    monkeypatch.setitem(sys.modules, name, module)
    return calls, recorded


def two_starts(run_dir, config):
    """A run, and the same command again."""
    for settings in (SETTINGS, SETTINGS | {"seed": 8}):
        tracker = Tracker(config, run_dir, settings)
        tracker.write("semantic", 10, {"loss": 0.5})
        tracker.write("detail", 10, {"loss": 0.25})
        tracker.close()


def test_wandb_knows_a_run_folder_as_one_run(tmp_path, monkeypatch):
    """Each stage has a step axis of its own: W&B's may only grow."""
    run = SimpleNamespace()
    calls, recorded = stand_in(monkeypatch, "wandb", init=run)
    for call in ("define_metric", "log", "finish"):
        setattr(run, call, recorded(call, None))
    two_starts(tmp_path / "run", TrackingConfig(tensorboard=False, wandb="mine"))
    two_starts(tmp_path / "other", TrackingConfig(tensorboard=False, wandb="mine"))
    told = [call[1] for call in calls if call[0] == "init"]
    assert told[0]["id"] == told[1]["id"] != told[2]["id"] == told[3]["id"]
    assert {one["resume"] for one in told} == {"allow"}
    assert told[0]["config"] == SETTINGS
    assert calls[1:6] == [
        ("define_metric", "semantic/*", {"step_metric": "semantic/step"}),
        ("log", {"semantic/loss": 0.5, "semantic/step": 10}),
        ("define_metric", "detail/*", {"step_metric": "detail/step"}),
        ("log", {"detail/loss": 0.25, "detail/step": 10}),
        ("finish",),
    ]


def test_mlflow_has_the_settings_and_knows_a_run_folder_as_one_run(tmp_path, monkeypatch):
    """Parameters are logged once: MLflow refuses to change them."""
    run = SimpleNamespace(info=SimpleNamespace(run_id="abc"))
    functions = dict.fromkeys(("set_experiment", "log_params", "log_metrics", "end_run"))
    calls, _ = stand_in(monkeypatch, "mlflow", start_run=run, **functions)
    two_starts(tmp_path, TrackingConfig(tensorboard=False, mlflow="mine"))
    figures = [("log_metrics", {"semantic/loss": 0.5}, {"step": 10})]
    figures += [("log_metrics", {"detail/loss": 0.25}, {"step": 10}), ("end_run",)]
    assert calls == [
        ("set_experiment", "mine"),
        ("start_run", {"run_id": None}),
        ("log_params", {"seed": 7, "engine.zero_stage": 2, "engine.extra": {}}),
        *figures,
        ("set_experiment", "mine"),
        ("start_run", {"run_id": "abc"}),
        *figures,
    ]
