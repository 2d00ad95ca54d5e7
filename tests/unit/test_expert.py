"""The detail branch over shared weights, copies of what it trains, and routing."""

import pytest
import torch

from raydistill.errors import MissingArtifact, StaleArtifact
from raydistill.models.expert import DualExpert, add_detail, copy_trainable, own_state
from raydistill.models.lora import merge
from raydistill.models.teacher import load_teacher, read_teacher_config, require_fit
from raydistill.models.wan import build_tiny_teacher


def _inputs(batch=5):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, 4, 4, 4, generator=rng)
    return (
        x,
        torch.tensor([0.9, 0.6, 0.3, 0.61, 0.05])[:batch].double(),
        torch.randn(batch, 3, 32, generator=rng),
    )


def _shaken(seed=0, **sizes):
    """A tiny teacher off its start, where gates are closed and many parts do nothing."""
    field = build_tiny_teacher(seed, **{"dim_head": 12, "num_heads": 2, "num_layers": 2, **sizes})
    rng = torch.Generator().manual_seed(seed)
    for p in field.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=rng))
    return field.eval()


def _train(detail, steps=2):
    optimiser = torch.optim.AdamW([p for p in detail.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        detail(*_inputs()).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()


def test_detail_equals_semantic_at_its_step_0_bit_for_bit():
    semantic = _shaken()
    expected = semantic(*_inputs())
    assert torch.equal(add_detail(semantic, 4, 8.0, seed=3)(*_inputs()), expected)


def test_training_the_detail_expert_leaves_the_semantic_path_bit_identical():
    semantic = _shaken()
    before = semantic(*_inputs())
    weights = {n: p.clone() for n, p in semantic.named_parameters()}
    detail = add_detail(semantic, 4, 8.0, seed=3)
    _train(detail)
    assert torch.equal(semantic(*_inputs()), before)
    assert all(torch.equal(p, weights[n]) for n, p in semantic.named_parameters())
    assert not torch.allclose(detail(*_inputs()), before)


def test_merged_lora_computes_the_same_and_leaves_the_semantic_expert_alone():
    semantic = _shaken()
    before = semantic(*_inputs())
    detail = add_detail(semantic, 4, 8.0, seed=3)
    _train(detail)
    expected = detail(*_inputs())
    merged = merge(detail)
    assert not any("lora" in n for n, _ in merged.named_modules())
    torch.testing.assert_close(merged(*_inputs()), expected)
    assert torch.equal(semantic(*_inputs()), before)


def test_trainable_parameters_are_lora_and_copied_layers_only():
    semantic = _shaken()
    detail = add_detail(semantic, 4, 8.0, seed=3)
    trainable = {n for n, p in detail.named_parameters() if p.requires_grad}
    assert trainable == set(own_state(detail))
    assert all(".lora_" in n or n.split(".")[1] in ("condition_embedder", "proj_out") for n in trainable)
    assert not any(p.requires_grad for p in semantic.parameters())
    shared = {id(p) for p in semantic.parameters()}
    assert all((id(p) in shared) == (n not in trainable) for n, p in detail.named_parameters())


def test_a_mixed_batch_is_routed_per_sample_and_the_boundary_is_the_detail_experts():
    semantic = _shaken()
    detail = add_detail(semantic, 4, 8.0, seed=3)
    _train(detail)
    x, t, text = _inputs()
    with torch.no_grad():
        mixed = DualExpert(semantic, detail, 0.6)(x, t, text)
        alone = [
            (semantic if at > 0.6 else detail)(x[i : i + 1], t[i : i + 1], text[i : i + 1])
            for i, at in enumerate((0.9, 0.6, 0.3, 0.61, 0.05))
        ]
    torch.testing.assert_close(mixed, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_a_copy_shares_what_is_frozen_and_owns_what_is_trained():
    semantic = _shaken()
    detail = add_detail(semantic, 4, 8.0, seed=3)
    slow = copy_trainable(detail)
    own = {n for n, p in detail.named_parameters() if p.requires_grad}
    pairs = dict(detail.named_parameters())
    assert all((p is pairs[n]) == (n not in own) for n, p in slow.named_parameters())
    before = slow(*_inputs())
    _train(detail)
    assert torch.equal(slow(*_inputs()), before)


def test_a_teachers_sizes_are_read_without_its_weights(tmp_path):
    _shaken().transformer.save_config(tmp_path)  # no weights there
    config = read_teacher_config(tmp_path)
    assert (config["in_channels"], config["num_layers"], tuple(config["patch_size"])) == (4, 2, (4, 2, 2))
    require_fit(tmp_path, (4, 8, 4, 6), (3, 32))


@pytest.mark.parametrize(
    ("latents", "text", "why"),
    [
        ((16, 4, 4, 4), (3, 32), "the data has 16 and 32"),
        ((4, 4, 4, 4), (3, 64), "the data has 4 and 64"),
        ((4, 6, 4, 4), (3, 32), "patches of"),
        ((4, 4, 4, 5), (3, 32), "patches of"),
    ],
)
def test_latents_that_a_teacher_cannot_take_are_refused(tmp_path, latents, text, why):
    _shaken().transformer.save_config(tmp_path)
    with pytest.raises(StaleArtifact, match=why):
        require_fit(tmp_path, latents, text)


def test_a_folder_of_something_else_is_no_teacher(tmp_path):
    with pytest.raises(MissingArtifact, match="FileNotFoundError"):
        read_teacher_config(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    for read in (read_teacher_config, load_teacher):
        with pytest.raises(MissingArtifact, match="found UNet2DModel"):
            read(tmp_path)


def test_features_of_the_last_block_project_to_the_velocity():
    field = _shaken()
    x, t, text = _inputs()
    maps, seen = field.features(x, t, text, (0, 1))
    assert [m.shape for m in maps] == [(5, 4, 24)] * 2
    torch.testing.assert_close(seen[-1], field(x, t, text))
    assert not torch.allclose(seen[0], seen[1])
