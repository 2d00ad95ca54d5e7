"""MCM's student as a LoRA: the teacher is never touched, merged is as apart, what is saved comes back."""

import pytest
import torch
import unet_cases
from lora_cases import ALPHA, KINDS, RANK, T, field_of, student_of
from torch import nn

from raydistill.errors import CorruptArtifact, MissingArtifact
from raydistill.models.expert import copy_trainable
from raydistill.models.lora import add_lora, load_lora, lora_state, merge, save_lora, shared_copy, targets_of
from raydistill.models.unet import UNetField


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    teacher, inputs = field_of(request.param)
    x, text = inputs
    with torch.no_grad():
        return teacher, (x, T, text), teacher(x, T, text)


@pytest.fixture(scope="module")
def student(case):
    return student_of(case[0])


def test_only_branches_are_trained_and_the_teacher_stays_bit_for_bit(case):
    teacher, inputs, before = case
    weights = {n: p.detach().clone() for n, p in teacher.named_parameters()}
    student = add_lora(teacher, RANK, ALPHA, seed=0)
    with torch.no_grad():
        assert torch.equal(student(*inputs), before)  # B begins at zero
    trained = [n for n, p in student.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    optimiser = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimiser.zero_grad()
        student(*inputs).square().mean().backward()
        optimiser.step()
    with torch.no_grad():
        assert torch.equal(teacher(*inputs), before)
        assert not torch.allclose(student(*inputs), before, rtol=1e-3)
    assert all(torch.equal(p, weights[n]) and p.grad is None for n, p in teacher.named_parameters())
    held = {p.data_ptr() for p in (*teacher.parameters(), *teacher.buffers())}
    own = {p.data_ptr() for n, p in student.named_parameters() if ".lora_" not in n}
    assert own | {p.data_ptr() for p in student.buffers()} == held  # one copy of the weights


def test_merged_is_apart_up_to_rounding_and_leaves_the_teacher_alone(case, student):
    teacher, inputs, before = case
    with torch.no_grad():
        apart = student(*inputs)
        merged = merge(shared_copy(student))
        torch.testing.assert_close(merged(*inputs), apart, rtol=1e-5, atol=1e-5)
        assert torch.equal(teacher(*inputs), before)
        assert torch.equal(student(*inputs), apart)
    assert not torch.allclose(apart, before, rtol=1e-2)
    assert not any(".lora_" in name for name, _ in merged.named_parameters())


def test_a_copy_for_targets_owns_its_branches_alone(case):
    teacher, inputs, before = case
    student = add_lora(teacher, RANK, ALPHA, seed=0)
    target = copy_trainable(student)
    for weight in lora_state(student).values():
        weight.add_(0.1)
    with torch.no_grad():
        assert torch.equal(target(*inputs), before)
        assert not torch.equal(student(*inputs), before)
    assert not any(p.requires_grad for p in target.parameters())
    shared = {p.data_ptr() for p in target.parameters()} & {p.data_ptr() for p in student.parameters()}
    assert shared == {p.data_ptr() for p in teacher.parameters()}


def test_what_is_saved_comes_back(case, student, tmp_path):
    teacher, inputs, _ = case
    save_lora(student, tmp_path, RANK, ALPHA)
    again = load_lora(teacher, tmp_path, RANK, ALPHA)
    with torch.no_grad():
        assert torch.equal(again(*inputs), student(*inputs))


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    teacher, _ = field_of("wan")
    with pytest.raises(MissingArtifact, match="no LoRA"):
        load_lora(teacher, tmp_path, RANK, ALPHA)
    save_lora(student_of(teacher), tmp_path, RANK, ALPHA)
    with pytest.raises(CorruptArtifact, match="rank 3"):
        load_lora(teacher, tmp_path, 3, ALPHA)
    with pytest.raises(CorruptArtifact, match=r"alpha 4\.0, not 1\.0"):
        load_lora(teacher, tmp_path, RANK, 1.0)


def test_mcms_layers_are_adapted():
    net = unet_cases.unet3d()
    names = targets_of(UNetField(net))
    mcm = {"to_q", "to_k", "to_v", "0", "proj", "2", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut"}
    assert {name.rpartition(".")[2] for name in names} == mcm | {"conv", "time_emb_proj"}
    assert any("temp_attentions" in name for name in names)
    assert any("temp_convs" in name for name, _ in net.named_modules())
    assert not any("temp_convs" in name for name in names)
    assert all(isinstance(net.get_submodule(name), nn.Linear | nn.Conv2d) for name in names)
    motion = targets_of(UNetField(unet_cases.unet_motion()))
    assert any("motion_modules" in name and name.endswith("to_q") for name in motion)
    assert not any("motion_modules" in name and name.endswith(("proj_in", "proj_out")) for name in motion)
