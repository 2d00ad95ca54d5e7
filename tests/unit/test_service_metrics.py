"""/metrics, computed from the store, and what shows it: the dashboard asks for nothing that is not there."""

import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE
from store_cases import BUNDLE, SAVED, Store, finish, new_database, new_job, postgres

from raydistill.config.keys import KeysConfig
from raydistill.config.load import from_command_line
from raydistill.service.journal import BUCKETS
from raydistill.service.keys import ApiKeys
from raydistill.service.metrics import COUNTERS, HISTOGRAMS, LABELS, exposition

SERVE = Path(__file__).resolve().parents[2] / "serve"
DASHBOARD = json.loads((SERVE / "grafana.json").read_text(encoding="utf-8"))
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
OTHER = "tiny@fedcba987654"
OURS = {"model": "tiny", "bundle": BUNDLE}
TARGET_LABELS = {"job"}
"""Put on every sample by Prometheus; `instance` is, too, and no expression may keep it."""


def samples(store) -> dict[tuple[str, frozenset], float]:
    """Every sample of the page by name and labels."""
    found = {}
    for family in text_string_to_metric_families(exposition(store).decode()):
        assert family.documentation, family.name
        for one in family.samples:
            key = one.name.removeprefix("raydistill_"), frozenset(one.labels.items())
            assert key not in found, f"{key} twice"
            found[key] = one.value
    return found


def value(store, name, **labels) -> float:
    return samples(store)[name, frozenset(labels.items())]


def total(store, name, **labels) -> float:
    """Sum over the labels that are not given."""
    return sum(
        held for (found, all_of), held in samples(store).items() if found == name and labels.items() <= all_of
    )


def claimed(worker, stage="encode"):
    return worker.claim(stage, [BUNDLE])


def let_everything_happen(store) -> None:
    """Three published, one failed, two cancelled, one taken over that still runs, one that waits."""
    jobs, worker = store.jobs(), store.worker("a", encode_ahead=100)
    for _ in range(2):
        jobs.create(new_job())
        finish(worker)
    jobs.create(new_job(bundle=OTHER))
    finish(store.worker("b"), (OTHER,))
    jobs.create(new_job())
    worker.fail(claimed(worker), "out_of_memory", "too large")
    for end in (jobs.cancel, jobs.delete):
        end(jobs.create(new_job()).id, None)
    jobs.create(new_job())
    lease = claimed(worker)
    worker.advance(lease, "denoise", saved=SAVED, timings={}, seconds=0.3)
    lease = claimed(worker, "denoise")
    worker.progress(lease, step=1, expert="semantic", timings={})
    store.silence()
    assert claimed(store.worker("c"), "denoise") is not None
    jobs.create(new_job(cost=2.0))


@pytest.fixture(scope="module")
def server():
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def store(request, tmp_path):
    url = f"sqlite:///{tmp_path}/jobs.sqlite"
    if request.param == "postgres":
        url = new_database(request.getfixturevalue("server"))
    store = Store(url)
    yield store
    store.database.engine.dispose()


def test_counters_say_what_was_done(store):
    let_everything_happen(store)
    jobs = store.jobs()
    assert value(jobs, "jobs_accepted_total", **OURS) == 7
    assert value(jobs, "jobs_accepted_total", model="tiny", bundle=OTHER) == 1
    assert value(jobs, "jobs_completed_total", **OURS) == 2
    assert value(jobs, "jobs_completed_total", model="tiny", bundle=OTHER) == 1
    assert value(jobs, "jobs_failed_total", **OURS, code="out_of_memory") == 1
    assert value(jobs, "jobs_cancelled_total", **OURS) == 2
    assert value(jobs, "takeovers_total", **OURS) == 1
    assert value(jobs, "passes_total", **OURS, expert="detail") == 2
    assert value(jobs, "passes_total", **OURS, expert="semantic") == 1
    ended = sum(total(jobs, f"jobs_{how}_total") for how in ("completed", "failed", "cancelled"))
    active = value(jobs, "queued_jobs") + value(jobs, "running_jobs")
    assert total(jobs, "jobs_accepted_total") == ended + active


def test_gauges_say_how_things_are(store):
    jobs = store.jobs()
    idle = ("queued_jobs", "running_jobs", "leased_jobs", "remaining_cost", "oldest_wait_seconds", "replicas")
    assert [value(jobs, name) for name in idle] == [0] * len(idle)
    let_everything_happen(store)
    assert [value(jobs, name) for name in ("queued_jobs", "running_jobs", "leased_jobs")] == [1, 1, 1]
    assert value(jobs, "stage_cost", stage="encode") == 2.0
    assert value(jobs, "stage_cost", stage="denoise") == pytest.approx(1 - 1 / 5)  # a step of four is done
    assert value(jobs, "remaining_cost") == pytest.approx(2.8)
    assert 0 < value(jobs, "oldest_wait_seconds") < 60
    assert value(jobs, "replicas") == 3


def histograms(store) -> dict[tuple[str, frozenset], list[float]]:
    """Buckets by name and labels, in the order of their bounds, which are all there."""
    found = {}
    for (name, labels), count in samples(store).items():
        if name.endswith("_bucket"):
            rest, bound = dict(labels), float(dict(labels)["le"])
            del rest["le"]
            found.setdefault((name.removesuffix("_bucket"), frozenset(rest.items())), {})[bound] = count
    for buckets in found.values():
        assert sorted(buckets) == [*BUCKETS, float("inf")]
    return {key: [buckets[bound] for bound in sorted(buckets)] for key, buckets in found.items()}


def test_histograms_count_each_job_once_and_add_up(store):
    let_everything_happen(store)
    jobs = store.jobs()
    found, counted = samples(jobs), histograms(jobs)
    assert {name for name, _ in counted} == set(HISTOGRAMS)
    for (name, labels), buckets in counted.items():
        assert buckets == sorted(buckets), f"{name} {labels}"
        assert buckets[-1] == found[f"{name}_count", labels] > 0
    assert value(jobs, "wait_seconds_count", **OURS) == 4  # claimed: two published, one failed, one running
    assert value(jobs, "wait_seconds_count", model="tiny", bundle=OTHER) == 1
    for state, count in {"completed": 2, "failed": 1, "cancelled": 2}.items():
        assert value(jobs, "job_seconds_count", **OURS, state=state) == count
    for name, count in {"encode": 3, "denoise": 2, "decode": 2}.items():
        assert value(jobs, "stage_seconds_count", **OURS, stage=name) == count


def test_seconds_fall_into_the_buckets_that_hold_them(store):
    jobs, worker = store.jobs(), store.worker("a", encode_ahead=100)
    taken = (0.001, 0.1, 0.11, 7.0, 9999.0)
    for seconds in taken:
        jobs.create(new_job())
        worker.advance(claimed(worker), "denoise", saved=SAVED, timings={}, seconds=seconds)
    stage = {**OURS, "stage": "encode"}
    buckets = histograms(jobs)["stage_seconds", frozenset(stage.items())]
    assert buckets == [sum(one <= bound for one in taken) for bound in (*BUCKETS, float("inf"))]
    assert value(jobs, "stage_seconds_sum", **stage) == pytest.approx(sum(taken))


def test_no_counter_falls_when_jobs_go(store):
    let_everything_happen(store)
    jobs = store.jobs()
    before = samples(jobs)
    for job in jobs.page(None, 100, "asc", None)[0]:
        jobs.delete(job.id, None)
    after = samples(jobs)
    assert jobs.page(None, 100, "asc", None)[0] == []
    kept = {
        key: count
        for key, count in before.items()
        if key[0].endswith(("_total", "_bucket", "_count", "_sum"))
    }
    assert len(kept) > 100
    assert [key for key, count in kept.items() if after.get(key, 0) < count] == []
    moved = {key[0] for key, count in kept.items() if after[key] > count}
    assert "jobs_cancelled_total" in moved  # what still ran or waited
    assert "jobs_accepted_total" not in moved


def test_every_process_answers_with_the_same_figures(store):
    let_everything_happen(store)
    other = Store(store.url)
    ours, theirs = samples(store.jobs()), samples(other.jobs())
    other.database.engine.dispose()
    age = ("oldest_wait_seconds", frozenset())
    assert ours.pop(age) <= theirs.pop(age)
    assert ours == theirs


def test_labels_hold_what_clients_cannot_break(store):
    jobs = store.jobs()
    odd = 'a"b\\c\nd{e="f"}'
    jobs.create(new_job(model=odd))
    assert value(jobs, "jobs_accepted_total", model=odd, bundle=BUNDLE) == 1


def test_every_figure_has_the_labels_that_are_declared(store):
    let_everything_happen(store)
    of = {}
    for name, labels in samples(store.jobs()):
        of.setdefault(name, set()).add(frozenset(key for key, _ in labels))
    for name in COUNTERS:
        assert of[f"{name}_total"] == {frozenset(LABELS[name])}
    for name in HISTOGRAMS:
        assert of[f"{name}_bucket"] == {frozenset((*LABELS[name], "le"))}
        assert of[f"{name}_sum"] == of[f"{name}_count"] == {frozenset(LABELS[name])}


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, set[str]]:
    """Labels by name, of a store where everything happened."""
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('told')}/jobs.sqlite")
    let_everything_happen(store)
    found = {f"raydistill_{name}": {key for key, _ in labels} for name, labels in samples(store.jobs())}
    store.database.engine.dispose()
    return found


def selectors(expression: str) -> list[tuple[str, str]]:
    """Metrics of an expression with what is in their braces."""
    return re.findall(r"\b(raydistill_\w+)(?:\{([^}]*)\})?", expression)


def matched(braces: str) -> dict[str, str]:
    """Labels of a selector with how they are matched: =, =~."""
    return dict(re.findall(r'(\w+)\s*(=~|!=|!~|=)\s*"[^"]*"', braces))


def words(clause: str | None) -> set[str]:
    """What stands in `by (...)`."""
    return set(re.findall(r"\w+", clause or ""))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_the_dashboard_asks_for_metrics_and_labels_that_exist(expression, told):
    ((name, braces),) = selectors(expression)
    assert name in told
    assert words(" ".join(re.findall(r"by \(([^)]*)\)", expression))) <= told[name]
    assert matched(braces).keys() <= told[name] | TARGET_LABELS
    assert matched(braces)["job"] == "="
    if "model" in told[name]:
        assert {"$model", "$bundle"} <= set(re.findall(r"\$\w+", braces))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_the_dashboard_adds_nothing_up_over_instances(expression, told):
    """Around each metric, or its rate, is a maximum that keeps every label but the instance."""
    ((name, braces),) = selectors(expression)
    inner = re.search(r"max(?: by \(([^)]*)\))? \(?(?:rate\()?" + name, expression.replace("max(", "max ("))
    assert inner, "no maximum around it"
    pinned = {label for label, how in matched(braces).items() if how == "="}
    assert words(inner[1]) == told[name] - pinned
    assert ("rate(" in expression) == ("[$__rate_interval]" in expression)
    if name.endswith("_bucket"):
        assert expression.startswith("histogram_quantile(0.")


def test_the_dashboard_shows_all_that_is_counted(told):
    shown = {name for expression in EXPRESSIONS for name, _ in selectors(expression)}
    assert {name for name in told if not name.endswith(("_sum", "_count"))} <= shown
    quantiles = {}
    for expression in EXPRESSIONS:
        for quantile in re.findall(r"histogram_quantile\(([\d.]+)", expression):
            quantiles.setdefault(selectors(expression)[0][0], []).append(float(quantile))
    assert quantiles == {
        "raydistill_wait_seconds_bucket": [0.5, 0.95, 0.99],
        "raydistill_job_seconds_bucket": [0.5, 0.95, 0.99],
        "raydistill_stage_seconds_bucket": [0.5, 0.95],
    }


def test_a_legend_names_labels_that_are_left_and_the_quantile_that_is_shown():
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            expression, legend = target["expr"], target["legendFormat"]
            outer = re.search(r"by \(([^)]*)\)", expression)
            left = words(outer and outer[1]) - {"le"}
            assert set(re.findall(r"\{\{(\w+)\}\}", legend)) == left, legend
            quantile = re.match(r"histogram_quantile\(0\.(\d+)", expression)
            assert not quantile or legend.startswith(f"p{quantile[1].ljust(2, '0')} ")


def test_the_dashboard_can_be_imported_anywhere():
    assert DASHBOARD["id"] is None
    assert {"uid", "title", "schemaVersion", "version", "time", "refresh"} <= DASHBOARD.keys()
    assert "once per instance" in DASHBOARD["description"]
    variables = {one["name"]: one for one in DASHBOARD["templating"]["list"]}
    assert [one["type"] for one in variables.values()].count("datasource") == 1
    assert variables["datasource"]["query"] == "prometheus"
    assert variables.keys() == {"datasource", "job", "model", "bundle"}
    text = json.dumps(DASHBOARD)
    assert set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval", "__all"} == variables.keys()
    assert not re.search(r"https?://|localhost|127\.0\.0\.1|\b\d+\.\d+\.\d+\.\d+\b", text)
    uids = re.findall(r'"uid": "([^"]*)"', text)
    assert set(uids) == {DASHBOARD["uid"], "${datasource}"}


def test_variables_are_filled_from_labels_that_exist(told):
    for one in DASHBOARD["templating"]["list"]:
        if one["type"] != "query":
            continue
        asked = re.fullmatch(r"label_values\((\w+)(?:\{(.*)\})?, (\w+)\)", one["definition"])
        name, braces, label = asked.groups()
        assert one["query"]["query"] == one["definition"]
        assert label == one["name"]
        assert {label, *matched(braces or "")} <= told[name] | TARGET_LABELS


def test_panels_stand_side_by_side():
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + k) for i in range(at["w"]) for k in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    assert len(taken) == 24 * max(row + 1 for _, row in taken), "a hole"


def test_prometheus_collects_from_the_server_and_from_ray():
    text = (SERVE / "prometheus.yml").read_text(encoding="utf-8")
    server, ray = yaml.safe_load(text)["scrape_configs"]
    tiny = yaml.safe_load((SERVE / "tiny.yaml").read_text(encoding="utf-8"))
    http = tiny["http_options"]
    assert server["metrics_path"] == "/metrics"
    assert server["static_configs"] == [{"targets": [f"{http['host']}:{http['port']}"]}]
    assert "authorization" in server or not tiny["applications"][0]["args"]["auth"]["required"]
    with_key = yaml.safe_load(text.replace("# authorization", "authorization"))["scrape_configs"][0]
    assert with_key["authorization"].pop("type") == "Bearer"
    key = (SERVE / with_key["authorization"].pop("credentials_file")).resolve()
    assert f"> {key.relative_to(SERVE.parent)}\n" in text
    assert ray["file_sd_configs"] == [{"files": [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]}]


def test_the_key_that_prometheus_is_told_to_have_is_enough(tmp_path):
    text = (SERVE / "prometheus.yml").read_text(encoding="utf-8")
    (command,) = re.findall(r"python jobs/keys\.py (.*) > \S+$", text, re.MULTILINE)
    config, _ = from_command_line(KeysConfig, command.split())
    store = Store(f"sqlite:///{tmp_path}/jobs.sqlite")
    keys = ApiKeys(store.database)
    keys.find(keys.create(config.name, config.scopes)).require("admin")  # what /metrics asks for
    store.database.engine.dispose()
