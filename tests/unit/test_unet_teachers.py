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
    _, _, field = unet
    x, text = unet_cases.inputs()
    with torch.no_grad():
        ours = field(x, torch.tensor([1.0, 0.26]), text)
        alone = [
            unet_cases.ask(field.network, x[i : i + 1], step, text[i : i + 1])
            for i, step in enumerate((999, 259))
        ]
    torch.testing.assert_close(ours, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_step_of_the_ode_is_diffusers_ddim(unet):
    """Driven by hand over the same timesteps; the last step goes to timestep 0, as its scheduler ends."""
    kind, folder, field = unet
    grid, (x, text) = TimeGrid(10, last=0.001), unet_cases.inputs()
    with torch.no_grad():
        ours = solve(load_schedule(folder), field, x.double(), grid.times, text)
    scheduler, theirs = unet_cases.scheduler(kind), x.double()
    scheduler.alphas_cumprod = torch.tensor(
        load_schedule(folder).alphas_cumprod, dtype=torch.float64
    )  # diffusers' own are float32
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(10)
    for t, _ in pairwise(grid.nodes):
        step = round(1000 * t) - 1
        noise = unet_cases.ask(field.network, theirs.float(), step, text).double()
        theirs = scheduler.step(noise, step, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_samples_are_those_of_diffusers_lcm_scheduler(unet, num_steps):
    kind, folder, field = unet
    x, text = unet_cases.inputs()
    drawn = {}

    def noise_at(k, shape):
        drawn[k] = torch.randn(shape, generator=torch.Generator().manual_seed(k))
        return drawn[k]

    plan = plan_lcm(num_steps, TimeGrid(50))
    ours = sample({"semantic": field}, load_schedule(folder), plan, x, text, noise_at=noise_at)
    # No scalings: they are 1 and 0 but for rounding, see the paper's boundary condition.
    theirs, scheduler = x, LCMScheduler.from_config(unet_cases.scheduler(kind).config, timestep_scaling=1e6)
    scheduler.set_timesteps(num_steps, original_inference_steps=50)
    for k, step in enumerate(scheduler.timesteps):
        noise = unet_cases.ask(field.network, theirs, int(step), text)
        made = scheduler.step(noise, step, theirs, generator=torch.Generator().manual_seed(k + 1))
        theirs = made.prev_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


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


def test_checkpointing_that_diffusers_lacks_is_refused_by_its_setting():
    fields = {"ms": UNetField(unet_cases.unet3d()), "ad": UNetField(unet_cases.unet_motion())}
    for field in fields.values():
        if field.network._supports_gradient_checkpointing:
            field.enable_checkpointing()
            assert field.network.is_gradient_checkpointing
        else:
            with pytest.raises(InvalidValue, match=r"engine\.activation_checkpointing"):
                field.enable_checkpointing()
