"""Serve configs: serve/tiny.yaml for one machine, and the one in cluster/rayservice.yaml."""

import importlib
import inspect
import warnings
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from bundle_cases import save_untrained_bundle

from raydistill.config.serve import ServeConfig, read_args
from raydistill.service.scaling import ByRemainingCost

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own fields are deprecated in pydantic's eyes
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import ServeDeploySchema

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "serve" / "tiny.yaml"
POLICY = "raydistill.service.scaling:ByRemainingCost"
both = pytest.mark.parametrize("name", ["tiny", "rayservice"])


def serve_config(name: str) -> dict:
    if name == "tiny":
        return yaml.safe_load(TINY.read_text(encoding="utf-8"))
    service = yaml.safe_load((ROOT / "cluster" / "rayservice.yaml").read_text(encoding="utf-8"))
    return yaml.safe_load(service["spec"]["serveConfigV2"])


def application(name: str) -> dict:
    (only,) = serve_config(name)["applications"]
    return only


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return save_untrained_bundle(tmp_path_factory.mktemp("bundle"))


@both
def test_it_fits_rays_schema_and_says_nothing_that_ray_drops(name):
    config = serve_config(name)
    taken = ServeDeploySchema.model_validate(config)
    assert config.keys() <= type(taken).model_fields.keys()
    for key in ("http_options", "logging_config"):
        assert config[key].keys() <= type(getattr(taken, key)).model_fields.keys()
    for given, deployment in zip(
        application(name)["deployments"], taken.applications[0].deployments, strict=True
    ):
        assert given.keys() <= type(deployment).model_fields.keys()
        options = type(deployment.ray_actor_options).model_fields
        assert given["ray_actor_options"].keys() <= options.keys()


@both
def test_samplers_follow_what_waits_in_the_servers_own_store(name):
    one = application(name)
    scaled = {
        given["name"]: given["autoscaling_config"]
        for given in one["deployments"]
        if "num_replicas" not in given
    }
    assert scaled.keys() == {"Sampler"}
    assert scaled["Sampler"].keys() <= AutoscalingConfig.model_fields.keys()
    scaling = AutoscalingConfig(**scaled["Sampler"])
    assert (scaling.min_replicas, scaling.policy.policy_function) == (0, POLICY)
    inspect.signature(ByRemainingCost).bind(**scaling.policy.policy_kwargs)
    assert scaling.policy.policy_kwargs["store"] == one["args"]["store"]


@both
def test_it_builds_our_application_with_the_deployments_that_it_names(name, bundle, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))  # as PYTHONPATH has it
    one = application(name)
    config = read_args(one["args"])
    bundles = dict.fromkeys(config.bundle_table(), str(bundle))
    module, _, builder = one["import_path"].partition(":")
    built = getattr(importlib.import_module(module), builder)({**one["args"], "bundles": bundles})
    settings, *parts = built._bound_deployment.init_args
    assert read_args(settings).limits == config.limits
    bound = {built._bound_deployment.name, *(part._bound_deployment.name for part in parts)}
    assert {given["name"] for given in one["deployments"]} == bound


@both
def test_keys_are_required_where_others_reach_the_port(name):
    config = read_args(application(name)["args"])
    assert config.auth.required or serve_config(name)["http_options"]["host"] in config.auth.hosts


def test_tiny_yaml_explains_every_number_of_the_server():
    lines = TINY.read_text(encoding="utf-8").splitlines()
    given = application("tiny")["args"]
    assert given.keys() == {one.name for one in fields(ServeConfig)}
    bare = []
    for section, schema in get_type_hints(ServeConfig).items():
        if not is_dataclass(schema):
            continue
        assert given[section].keys() == {one.name for one in fields(schema)}, section
        start = lines.index(f"    {section}:")
        for name in given[section]:
            line = next(one for one in lines[start:] if one.startswith(f"      {name}:"))
            bare += [f"{section}.{name}"] if " # " not in line else []
    assert bare == []
