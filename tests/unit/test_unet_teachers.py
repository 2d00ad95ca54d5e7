"""Video U-Nets as teachers: their timestep, their schedule, DDIM and LCM sampling as diffusers does it."""

import json
from itertools import pairwise

import pytest
import torch
import unet_cases
from diffusers import LCMScheduler

from raydistill.consistency.schedule import RECTIFIED_FLOW, TimeGrid, VariancePreserving
from raydistill.consistency.solver import solve
from raydistill.errors import InvalidValue, MissingArtifact, StaleArtifact
from raydistill.models.lora import add_lora
from raydistill.models.teacher import load_schedule, load_teacher, read_schedule, require_fit
from raydistill.models.unet import UNetField
from raydistill.sampler import plan_lcm, sample

KINDS = ["ms", "ad"]


@pytest.fixture(scope="module", params=KINDS)
def unet(request, tmp_path_factory):
    folder = unet_cases.save(tmp_path_factory.mktemp(request.param), request.param)
    return request.param, folder, load_teacher(folder).requires_grad_(False)


def test_a_folder_says_what_teacher_it_is(unet):
    kind, folder, field = unet
    assert isinstance(field, UNetField)
    schedule = load_schedule(folder)
    make = {"ms": VariancePreserving.scaled_linear, "ad": VariancePreserving.linear}[kind]
    assert schedule == make(0.00085, 0.012)
    require_fit(folder, unet_cases.SHAPE, unet_cases.TEXT)
    for latents, text in (((3, 3, 4, 4), (5, 8)), ((4, 3, 4, 4), (5, 7)), ((4, 3, 3, 4), (5, 8))):
        with pytest.raises(StaleArtifact):
            require_fit(folder, latents, text)


def test_t_is_the_timestep_above_it(unet):
    """At clean data the first; in the network's dtype, and back in that of the latents."""
    _, _, field = unet
    x, text = unet_cases.inputs()
    for times, steps in (((1.0, 0.26), (999, 259)), ((0.0, 0.001), (0, 0))):
        with torch.no_grad():
            ours = field(x.double(), torch.tensor(times), text.double())
        alone = [
            unet_cases.ask(field.network, x[i : i + 1], step, text[i : i + 1]) for i, step in enumerate(steps)
        ]
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours.float(), torch.cat(alone), rtol=1e-5, atol=1e-5)


def exact(scheduler, folder):
    """diffusers keeps its table in float32; ours is float64."""
    scheduler.alphas_cumprod = torch.tensor(load_schedule(folder).alphas_cumprod, dtype=torch.float64)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


def test_a_path_of_the_ode_is_diffusers_ddim(unet):
    """Driven by hand over the same timesteps; the last step goes to timestep 0, as its scheduler ends."""
    kind, folder, field = unet
    grid, (x, text) = TimeGrid(10, last=0.001), unet_cases.inputs()
    with torch.no_grad():
        ours = solve(load_schedule(folder), field, x.double(), grid.times, text)
    scheduler, theirs = exact(unet_cases.scheduler(kind), folder), x.double()
    scheduler.set_timesteps(10)
    for t, _ in pairwise(grid.nodes):
        step = round(1000 * t) - 1
        noise = unet_cases.ask(field.network, theirs.float(), step, text).double()
        theirs = scheduler.step(noise, step, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_samples_are_those_of_diffusers_lcm_scheduler(unet, num_steps):
    kind, folder, field = unet
    x, text = (one.double() for one in unet_cases.inputs())
    drawn = torch.Generator().manual_seed(5)

    def noise_at(_, shape):
        return torch.randn(shape, generator=drawn, dtype=torch.float64)

    plan = plan_lcm(num_steps, TimeGrid(50))
    ours = sample({"semantic": field}, load_schedule(folder), plan, x, text, noise_at=noise_at)
    # No scalings: they are 1 and 0 but for rounding, see the paper's boundary condition.
    theirs, scheduler = x, LCMScheduler.from_config(unet_cases.scheduler(kind).config, timestep_scaling=1e6)
    exact(scheduler, folder).set_timesteps(num_steps, original_inference_steps=50)
    drawn.manual_seed(5)
    for step in scheduler.timesteps:
        noise = unet_cases.ask(field.network, theirs.float(), int(step), text.float()).double()
        theirs = scheduler.step(noise, step, theirs, generator=drawn).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_unet_without_a_known_schedule_is_refused(tmp_path):
    folder = unet_cases.save(tmp_path, "ms")
    about = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    for name, value in (
        ("beta_schedule", "cosine"),
        ("prediction_type", "sample"),
        ("num_train_timesteps", 500),
    ):
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({**about, name: value}))
        with pytest.raises(InvalidValue, match=f"{name} = .*known here"):
            load_schedule(folder)
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(MissingArtifact, match="copy the scheduler folder"):
        read_schedule(folder)


def test_what_is_no_teacher_is_named(tmp_path):
    with pytest.raises(MissingArtifact, match="UNetMotionModel"):
        load_teacher(tmp_path)


def test_wan_is_rectified_flow():
    assert load_schedule("raydistill/world/weights/teacher") == RECTIFIED_FLOW


def test_checkpointing_is_refused_by_its_setting_where_diffusers_has_none():
    with pytest.raises(InvalidValue, match=r"engine\.activation_checkpointing.*UNet3DConditionModel"):
        UNetField(unet_cases.unet3d()).enable_checkpointing()


def test_checkpointing_changes_no_gradient_of_a_branch():
    student = add_lora(UNetField(unet_cases.unet_motion()), 2, 4.0, seed=0)
    trained = [p for p in student.parameters() if p.requires_grad]
    x, text = unet_cases.inputs()

    def gradients():
        loss = student(x, torch.tensor([0.9, 0.3]), text).square().mean()
        return torch.autograd.grad(loss, trained)

    kept = gradients()
    student.enable_checkpointing()
    assert student.network.is_gradient_checkpointing
    assert any(float(g.abs().max()) > 0 for g in kept)
    for once, again in zip(kept, gradients(), strict=True):
        torch.testing.assert_close(again, once)
