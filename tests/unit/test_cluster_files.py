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
import yaml

import raydistill
from raydistill.config.load import from_command_line

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
