"""A frozen teacher that is read one tensor at a time is the one that diffusers loads."""

import gc
import logging

import pipeline_cases
import pytest
import torch
from safetensors.torch import load_file, save_file

from raydistill.errors import MissingArtifact
from raydistill.experts.plain_engine import cast_parameters
from raydistill.models.teacher import load_frozen, load_teacher

TEXTS = {
    "wan21": (20, 16),
    "wan22": (20, 16),
    "hunyuan": (21, 16),
    "cogvideox": (10, 16),
    "modelscope": (7, 8),
    "animatediff": (7, 8),
}
CPU = torch.device("cpu")


def require_same(found, expected, text):
    """Names, numbers and dtypes, tables included, and what comes of them."""
    ours, theirs = dict(found.named_parameters()), dict(expected.named_parameters())
    assert ours.keys() == theirs.keys()
    assert not any(p.requires_grad for p in ours.values())
    ours, theirs = ours | dict(found.named_buffers()), theirs | dict(expected.named_buffers())
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert (ours[name].dtype, ours[name].device) == (x.dtype, x.device), name
        assert torch.equal(ours[name], x), name
    assert not any(module.training for module in found.modules())
    kind = next(kind for kind, shape in TEXTS.items() if shape == text)
    x, t = pipeline_cases.latents_of(kind), torch.tensor([0.9, 0.3], dtype=torch.float64)
    words = torch.randn(2, *text)
    with torch.no_grad():
        torch.testing.assert_close(found(x, t, words), expected(x, t, words))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", TEXTS)
def test_it_is_the_network_that_diffusers_loads(tmp_path, kind, dtype):
    folder = pipeline_cases.save(tmp_path, kind)
    found = load_frozen(folder, "detail", 3.0, dtype=dtype, device=CPU)
    expected = cast_parameters(load_teacher(folder, "detail", 3.0), dtype)
    require_same(found, expected, TEXTS[kind])
    if kind == "hunyuan":
        assert found.guidance == 3.0


def test_never_more_is_held_than_what_is_kept_and_a_tensor(tmp_path):
    """Of a network in several files, in bfloat16."""
    net = pipeline_cases.wan_transformer(layers=8)
    net.save_pretrained(tmp_path, safe_serialization=True, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    count, largest = sum(p.numel() for p in net.parameters()), max(p.numel() for p in net.parameters())
    tables = sum(x.numel() * x.element_size() for x in net.buffers())
    seen = []
    gc.collect()
    gc.freeze()  # what is there already is many objects, and none of them counts
    take = lambda parameter: seen.append(pipeline_cases.live())  # noqa: E731
    found = load_frozen(tmp_path, dtype=torch.bfloat16, device=CPU, take=take)
    assert len(seen) == len(list(net.parameters()))
    gc.collect()
    kept = pipeline_cases.live()
    gc.unfreeze()
    assert kept == 2 * count + tables
    assert max(seen) <= 2 * count + tables + 4 * largest < 0.7 * 4 * count
    assert seen[len(seen) // 4] < 0.5 * seen[-1]
    require_same(found, cast_parameters(load_teacher(tmp_path), torch.bfloat16), TEXTS["wan21"])


def test_names_that_diffusers_must_translate_are_its_business(tmp_path, caplog):
    net = pipeline_cases.wan_transformer()
    net.save_pretrained(tmp_path, safe_serialization=True)
    (path,) = tmp_path.glob("*.safetensors")
    save_file(load_file(path) | {"of.another.release": torch.zeros(1)}, path, {"format": "pt"})
    taken = []
    with caplog.at_level(logging.WARNING):
        found = load_frozen(tmp_path, dtype=torch.bfloat16, device=CPU, take=taken.append)
    assert "loaded whole first" in caplog.text
    own = dict(found.network.named_parameters())  # in the order of names, as where nothing is translated
    assert [id(p) for p in taken] == [id(own[name]) for name in sorted(own)]
    require_same(found, cast_parameters(load_teacher(tmp_path), torch.bfloat16), TEXTS["wan21"])
    path.unlink()
    with pytest.raises(MissingArtifact, match="no safetensors"):
        load_frozen(tmp_path, dtype=torch.bfloat16, device=CPU)
