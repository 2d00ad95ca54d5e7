"""cluster/: what Ray, KubeRay and our own schemas say of the files."""

import importlib
import os
import re
import shlex
from functools import cache
from pathlib import Path
from zipfile import ZipFile

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

import raydistill
from raydistill.config.load import from_command_line
from raydistill.config.serve import read_args

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = Path(os.environ.get("RAYDISTILL_KUBERAY_SCHEMAS") or ROOT.parent / "shared" / "data" / "kuberay")


def read(name: str) -> dict:
    return yaml.safe_load((CLUSTER / name).read_text())


def pinned(package: str) -> str:
    return re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group(1)


@cache
def kuberay_schema(kind: str, version: str) -> dict:
    path = KUBERAY / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip(
            f"KubeRay's {path.name} is not in {KUBERAY}: set RAYDISTILL_KUBERAY_SCHEMAS to its folder"
        )
    versions = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]["versions"]
    return strict(
        next(one for one in versions if one["name"] == version.rpartition("/")[2])["schema"][
            "openAPIV3Schema"
        ]
    )


def strict(schema):
    """Kubernetes drops unknown fields without a word; here they are errors. int-or-string is its own."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if made.pop("x-kubernetes-int-or-string", False):
        made = {"type": ["integer", "string"]}
    free = made.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in made
    if made.get("type") == "object" and isinstance(made.get("properties"), dict) and not free:
        made["additionalProperties"] = False
    return made


def validate_manifest(manifest: dict) -> None:
    schema = kuberay_schema(manifest["kind"], manifest["apiVersion"])
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own
    jsonschema.Draft202012Validator(schema).validate(manifest)


def test_the_rayjob_fits_kuberays_schema():
    validate_manifest(read("rayjob.yaml"))


@pytest.mark.parametrize(
    "break_it",
    [
        lambda job: job["spec"].update(entryPoint="typo"),
        lambda job: job["spec"].update(backoffLimit="two"),
        lambda job: job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].pop("maxReplicas"),
        lambda job: job["spec"]["rayClusterSpec"]["authOptions"].update(mode="none"),
        lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0].pop(
            "name"
        ),
    ],
)
def test_a_broken_rayjob_is_found(break_it):
    job = read("rayjob.yaml")
    break_it(job)
    with pytest.raises(jsonschema.ValidationError):
        validate_manifest(job)


def test_the_rayjob_runs_our_job_with_settings_that_exist():
    spec = read("rayjob.yaml")["spec"]
    program, job, *arguments = shlex.split(spec["entrypoint"])
    assert program == "python"
    assert (ROOT / job).is_file()
    module = importlib.import_module(f"raydistill.config.{Path(job).stem}")
    config, _ = from_command_line(module.DistillConfig, arguments)
    groups = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert config.scale.num_workers <= sum(group["replicas"] for group in groups)
    mounts = {
        mount["mountPath"]
        for group in groups
        for container in group["template"]["spec"]["containers"]
        for mount in container["volumeMounts"]
    }
    for path in (config.data, config.output):
        assert any(path.startswith(f"{mount}/") for mount in mounts), f"{path} is lost with the pod"


def test_image_ray_and_working_folder_agree():
    spec = read("rayjob.yaml")["spec"]
    cluster = spec["rayClusterSpec"]
    recipe = (CLUSTER / "Dockerfile").read_text()
    assert cluster["rayVersion"] == pinned("ray")
    images = re.findall(r"raydistill:([\w.]+)", (CLUSTER / "rayjob.yaml").read_text() + recipe)
    assert set(images) == {raydistill.__version__}
    folder = re.search(r"^WORKDIR (\S+)$", recipe, re.MULTILINE).group(1)
    assert yaml.safe_load(spec["runtimeEnvYAML"])["working_dir"] == f"local://{folder}"
    for source in re.findall(r"^COPY (.+) \S+$", recipe, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split())


def test_the_list_of_machines_fits_rays_schema():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(read("machines.yaml"))
    validate_config(config)
    workers = config["available_node_types"]["local.cluster.node"]
    assert workers["max_workers"] == len(config["provider"]["worker_ips"])
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(read("machines.yaml") | {"head_start_commands": []}))


def test_machines_get_what_an_installation_needs_and_the_token():
    machines = read("machines.yaml")
    sent = {there.removeprefix("~/"): here for there, here in machines["file_mounts"].items()}
    assert sent.pop(".ray/auth_token") == "~/.ray/auth_token"
    assert {f"raydistill/{here}" for here in sent.values()} == set(sent)
    recipe = re.findall(r"^COPY (.+) \S+$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    needed = {name.split("/")[0] for names in recipe for name in names.split()} - {"cluster"}
    assert set(sent.values()) == needed | {"Makefile"}
    assert all((ROOT / here).exists() for here in sent.values())
    for kind in ("head", "worker"):
        assert "export RAY_AUTH_MODE=token " in machines[f"{kind}_start_ray_commands"][-1]


def test_nothing_in_the_pods_runs_as_root():
    cluster = read("rayjob.yaml")["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert not any(one["securityContext"]["allowPrivilegeEscalation"] for one in pod["containers"])


def test_a_submitted_folder_holds_code_and_weights_but_no_environment(tmp_path):
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    for name in (".venv/lib/a.py", "runs/tiny/latents/a.parquet", "build/a", ".git/config", "jobs/job.py"):
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    for name in (".gitignore", ".rayignore"):
        if (ROOT / name).exists():
            (tmp_path / "checkout" / name).write_text((ROOT / name).read_text())
    package = tmp_path / "package.zip"
    excludes = get_runtime_env_default_excludes()
    create_package(str(tmp_path / "checkout"), package, include_gitignore=True, excludes=excludes)
    with ZipFile(package) as archive:
        kept = {name.partition("/")[2] or name for name in archive.namelist() if not name.endswith("/")}
    assert {name for name in kept if not name.startswith(".")} == {"job.py"}


def service() -> dict:
    return read("rayservice.yaml")


def serve_config() -> dict:
    return yaml.safe_load(service()["spec"]["serveConfigV2"])


def application() -> dict:
    (only,) = serve_config()["applications"]
    return only


def groups() -> dict[str, dict]:
    """Head and worker groups of the service's cluster by name."""
    cluster = service()["spec"]["rayClusterConfig"]
    return {"head": cluster["headGroupSpec"]} | {one["groupName"]: one for one in cluster["workerGroupSpecs"]}


def container(group: dict) -> dict:
    (only,) = group["template"]["spec"]["containers"]
    return only


def environment(group: dict) -> dict[str, str | None]:
    """Variables by name; None for what a secret holds."""
    return {one["name"]: one.get("value") for one in container(group)["env"]}


def texts(value):
    """Every text in nested settings."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for one in value for text in texts(one)]
    return [value] if isinstance(value, str) else []


def bytes_of(quantity: str) -> int:
    return int(quantity.removesuffix("Gi")) * 2**30


def test_the_rayservice_fits_kuberays_schema():
    validate_manifest(service())


@pytest.mark.parametrize(
    "break_it",
    [
        lambda spec: spec.update(serveConfig="typo"),
        lambda spec: spec["rayClusterConfig"].update(enableInTreeAutoscaling="yes"),
        lambda spec: spec["rayClusterConfig"]["autoscalerOptions"].update(version="v3"),
        lambda spec: container(spec["rayClusterConfig"]["headGroupSpec"])["env"][0].update(vale="x"),
        lambda spec: container(spec["rayClusterConfig"]["headGroupSpec"])["lifecycle"].update(preStopp={}),
    ],
)
def test_a_broken_rayservice_is_found(break_it):
    manifest = service()
    break_it(manifest["spec"])
    with pytest.raises(jsonschema.ValidationError):
        validate_manifest(manifest)


def test_what_the_service_reads_from_the_environment_is_set_on_every_pod():
    wanted = {text.removeprefix("env:") for text in texts(application()) if text.startswith("env:")}
    assert wanted == {"RAYDISTILL_STORE"}
    assert read_args(application()["args"]).auth.required
    folder = re.search(r"^WORKDIR (\S+)$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE).group(1)
    sources = ("_private/ray_constants.py", "serve/_private/constants.py")
    known = "".join((Path(ray.__file__).parent / one).read_text(encoding="utf-8") for one in sources)
    for group in groups().values():
        found = environment(group)
        assert wanted <= found.keys()
        assert all(f'"{name}"' in known for name in found if name.startswith("RAY_"))
        assert found["PYTHONPATH"] == folder
        secrets = [one["valueFrom"]["secretKeyRef"] for one in container(group)["env"] if "valueFrom" in one]
        text = (CLUSTER / "rayservice.yaml").read_text()
        assert {one["name"] for one in secrets} == {"raydistill-serve"}
        assert all(f"--from-literal={one['key']}=" in text for one in secrets)


def test_the_guard_in_the_proxy_has_the_servers_own_limits(monkeypatch):
    limits = read_args(application()["args"]).limits
    for group in groups().values():
        found = environment(group)
        module, _, name = found["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].rpartition(".")
        monkeypatch.setenv("RAYDISTILL_GUARD", found["RAYDISTILL_GUARD"])
        (layer,) = getattr(importlib.import_module(module), name)()
        here = layer.kwargs["limits"]
        for one in ("body_kib", "body_timeout_s", "open_bodies"):
            assert getattr(here, one) == getattr(limits, one), one


def test_each_deployment_fits_one_group_and_samplers_alone_get_gpus():
    """As Ray's own autoscaler reads the groups: a replica that fits nowhere would wait for ever."""
    cluster = {"metadata": {"name": "x", "namespace": "x"}, "spec": service()["spec"]["rayClusterConfig"]}
    nodes = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    fits = {}
    for deployment in application()["deployments"]:
        options = deployment["ray_actor_options"]
        needs = {
            "CPU": options["num_cpus"],
            "GPU": options.get("num_gpus", 0),
            **options.get("resources", {}),
        }
        fits[deployment["name"]] = {
            name
            for name, node in nodes.items()
            if all(node["resources"].get(kind, 0) >= amount for kind, amount in needs.items())
        }
        if "autoscaling_config" in deployment:
            wanted = deployment["autoscaling_config"]
            (name,) = fits[deployment["name"]]
            per_pod = nodes[name]["resources"]["GPU"] // options["num_gpus"]
            assert nodes[name]["min_workers"] == wanted["min_replicas"] == 0
            assert nodes[name]["max_workers"] * per_pod >= wanted["max_replicas"]
    assert fits == {"Ingress": {"http"}, "Janitor": {"http"}, "Sampler": {"gpu"}}
    ingress = application()["deployments"][0]
    assert nodes["http"]["min_workers"] >= ingress["num_replicas"] / ingress["max_replicas_per_node"]


def test_a_pod_that_has_to_go_is_given_the_time_that_it_needs():
    sampler = application()["deployments"][-1]
    for group in groups().values():
        command, seconds = container(group)["lifecycle"]["preStop"]["exec"]["command"]
        drain = float(environment(group)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert command == "sleep"
        assert drain > sampler["graceful_shutdown_timeout_s"]
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > float(seconds) + drain


def test_pods_of_the_service_are_confined_alike_and_find_their_files():
    cluster = service()["spec"]["rayClusterConfig"]
    assert cluster["rayVersion"] == pinned("ray")
    config = read_args(application()["args"])
    for group in groups().values():
        pod, only = group["template"]["spec"], container(group)
        assert only["image"] == f"raydistill:{raydistill.__version__}"
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert only["securityContext"]["allowPrivilegeEscalation"] is False
        mounts = {mount["mountPath"]: mount for mount in only["volumeMounts"]}
        data = mounts["/mnt/raydistill"]
        assert all(path.startswith(f"{data['mountPath']}/") for path in config.bundles.values())
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert data["name"] in volumes
        shared = volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["sizeLimit"]
        assert int(group["rayStartParams"]["object-store-memory"]) < bytes_of(shared)
        assert bytes_of(shared) < bytes_of(only["resources"]["limits"]["memory"])
    ports = {port["name"]: port["containerPort"] for port in container(groups()["head"])["ports"]}
    assert ports["serve"] == serve_config()["http_options"]["port"]
    # KubeRay's readiness probe asks each worker's own proxy.
    assert serve_config()["proxy_location"] == "EveryNode"
