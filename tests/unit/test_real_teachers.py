"""Every real teacher beside its diffusers pipeline: captions, one step, whole runs, codec, hidden maps."""

import pytest
import torch
import unet_cases
from pipeline_cases import (
    GUIDANCE,
    KINDS,
    PROMPTS,
    build,
    cached,
    cogvideox_transformer,
    hunyuan_transformer,
    latents_of,
    sampled,
    save,
    stirred,
    times_of,
)

from raydistill.artifacts import tree_digest
from raydistill.consistency.solver import solve
from raydistill.models.casting import cast_parameters
from raydistill.models.codec import load_codec
from raydistill.models.cogvideox import CogVideoXField
from raydistill.models.folders import boundary_ratio, network_folders, teacher_digest
from raydistill.models.guidance import guide_teacher, guide_teacher_by, has_own_guidance
from raydistill.models.hunyuan import HunyuanField, pack_text
from raydistill.models.pair import PairField
from raydistill.models.prompts import PromptEncoder
from raydistill.models.teacher import (
    embeds_guidance,
    load_schedule,
    load_teacher,
    load_whole_teacher,
)
from raydistill.models.unet import UNetField

CLOSE = {"rtol": 2e-4, "atol": 2e-4}
"""Of latents of about unit size: diffusers computes schedules in float32, we in float64."""


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    folder = save(tmp_path_factory.mktemp(request.param), request.param)
    return request.param, folder, PromptEncoder(folder, 10 if request.param == "cogvideox" else 0)


@pytest.fixture(scope="module")
def pipeline(case):
    return cached(case[0])


def own_captions(pipeline, kind):
    """As the pipeline gives captions to its network."""
    if kind in ("modelscope", "animatediff"):
        return pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    if kind == "hunyuan":
        return pack_text(*_two(pipeline))
    how = {"do_classifier_free_guidance": False, "max_sequence_length": 10 if kind == "cogvideox" else 512}
    return pipeline.encode_prompt(PROMPTS, **how)[0]


def _two(pipeline):
    states, pooled, mask = pipeline.encode_prompt(PROMPTS, max_sequence_length=256)
    return states, pooled, mask.bool()


def passes(pipeline, kind, x_t, steps, text):
    """One pass of the pipeline's network as its own loop makes it, sample by sample."""
    net = pipeline.unet if kind in ("modelscope", "animatediff") else pipeline.transformer
    made = []
    for i, step in enumerate(steps):
        x, one, t = x_t[i : i + 1], text[i : i + 1], torch.tensor([step])
        if kind in ("modelscope", "animatediff"):
            made.append(unet_cases.ask(net, x, t, one))
        elif kind == "hunyuan":
            states, pooled, mask = (given[i : i + 1] for given in _two(pipeline))
            w = torch.tensor([1000 * GUIDANCE])
            made.append(net(x, t, states, mask, pooled, guidance=w, return_dict=False)[0])
        elif kind == "cogvideox":
            made.append(net(x.transpose(1, 2), one, t, return_dict=False)[0].transpose(1, 2))
        else:
            made.append(net(x, t, one, return_dict=False)[0])
    return torch.cat(made)


def test_captions_are_embedded_as_the_pipeline_does(case, pipeline):
    kind, _, encode = case
    assert torch.equal(encode(PROMPTS), own_captions(pipeline, kind))
    torch.testing.assert_close(encode(PROMPTS[:1]), encode(PROMPTS)[:1])


def test_one_pass_is_the_pipelines_at_each_samples_own_time(case, pipeline):
    kind, folder, encode = case
    field = load_teacher(folder, guidance_scale=GUIDANCE)
    x, text, t = latents_of(kind), encode(PROMPTS), torch.tensor([0.9, 0.3], dtype=torch.float64)
    flow = kind in ("wan21", "wan22", "hunyuan")
    steps = [900.0, 300.0] if flow else [899, 299]
    with torch.no_grad():
        torch.testing.assert_close(field(x, t, text), passes(pipeline, kind, x, steps, text), **CLOSE)


def test_a_whole_run_is_the_pipelines(case, pipeline):
    """Four steps with guidance: noise schedule, timesteps, null text, guidance, routing, solver at once."""
    kind, folder, encode = case
    noise = latents_of(kind)
    theirs = sampled(pipeline, kind, noise, 4, **({"max_sequence_length": 10} if kind == "cogvideox" else {}))
    teacher = load_whole_teacher(folder, GUIDANCE).requires_grad_(False)
    field = guide_teacher(teacher, encode([""])[0], GUIDANCE)
    times = torch.tensor(times_of(pipeline, kind), dtype=torch.float64)
    with torch.no_grad():
        ours = solve(load_schedule(folder), field, noise, times, encode(PROMPTS))
    assert (theirs - noise).abs().mean() > 0.1
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_each_of_two_networks_may_have_its_own_guidance(case, pipeline):
    kind, folder, encode = case
    if kind != "wan22":
        assert boundary_ratio(folder) is None
        return
    noise = latents_of(kind)
    theirs = sampled(pipeline, kind, noise, 4, guidance_scale_2=20.0)
    teacher = load_whole_teacher(folder, GUIDANCE).requires_grad_(False)
    field = guide_teacher(teacher, encode([""])[0], GUIDANCE, 20.0)
    times = torch.tensor(times_of(pipeline, kind), dtype=torch.float64)
    with torch.no_grad():
        ours = solve(load_schedule(folder), field, noise, times, encode(PROMPTS))
    assert (ours - sampled(pipeline, kind, noise, 4)).abs().max() > 1e-2
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_latents_are_normalised_as_the_pipeline_does(case, pipeline):
    kind, folder, _ = case
    codec, z, vae = load_codec(folder), latents_of(kind, batch=1), pipeline.vae
    if kind in ("wan21", "wan22"):
        mean, scale = (
            torch.tensor(vae.config[n]).view(1, -1, 1, 1, 1) for n in ("latents_mean", "latents_std")
        )
    else:
        mean, scale = 0.0, 1 / vae.config.scaling_factor
    by_frame = kind in ("modelscope", "animatediff")
    with torch.no_grad():
        if by_frame:
            theirs = pipeline.decode_latents(z)
        else:
            theirs = vae.decode(z * scale + mean, return_dict=False)[0]
        torch.testing.assert_close(codec.decode(z), theirs.clamp(-1, 1), **CLOSE)
        assert theirs.shape[2] == codec.num_frames(z.shape[2])
        frames = torch.rand(theirs.shape, generator=torch.Generator().manual_seed(4)) * 2 - 1
        raw = vae.encode(frames[0].transpose(0, 1) if by_frame else frames).latent_dist.mode()
        raw = raw.transpose(0, 1)[None] if by_frame else raw
        torch.testing.assert_close(codec.encode(frames), (raw - mean) / scale, **CLOSE)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_codec_says_how_many_frames_it_makes(case, count):
    """CogVideoX's makes 32 of the 8 latent frames of 29."""
    kind, folder, _ = case
    codec = load_codec(folder)
    channels = 4 if kind in ("modelscope", "animatediff") else 16
    with torch.no_grad():
        frames = codec.decode(torch.zeros(1, channels, count, 2, 2))
    assert frames.shape[2] == codec.num_frames(count)


def test_picked_frames_are_those_of_the_whole_clip(case):
    kind, folder, _ = case
    codec, z = load_codec(folder), latents_of(kind, batch=2)
    picked = torch.tensor([[3, 0], [1, 2]])
    with torch.no_grad():
        some, whole = codec.decode_frames(z, picked), codec.decode(z)
    for i in range(2):
        torch.testing.assert_close(some[i].clamp(-1, 1), whole[i][:, picked[i]], rtol=1e-3, atol=1e-3)


def test_the_last_hidden_map_projects_to_the_prediction(case):
    kind, folder, encode = case
    field = load_teacher(folder)
    if isinstance(field, UNetField):
        assert not hasattr(field, "features")
        return
    x, text, t = latents_of(kind), encode(PROMPTS), torch.tensor([0.9, 0.3], dtype=torch.float64)
    with torch.no_grad():
        maps, seen = field.features(x, t, text, range(field.num_blocks))
        torch.testing.assert_close(seen[-1], field(x, t, text))
    frames, height, width = field.token_grid(x)
    assert [m.shape for m in maps] == [(2, frames * height * width, field.hidden_size)] * field.num_blocks
    assert not torch.allclose(seen[0], seen[-1])


def test_guidance_that_is_embedded_is_detected(case):
    kind, folder, encode = case
    field = load_teacher(folder)
    assert has_own_guidance(field) == (kind == "hunyuan") == embeds_guidance(folder)
    x, text, t = latents_of(kind), encode(PROMPTS), torch.tensor([0.9, 0.3], dtype=torch.float64)
    null, batches = encode([""])[0], []
    field.network.register_forward_pre_hook(lambda _m, args: batches.append(len(args[0])))
    with torch.no_grad():
        one, other = (guide_teacher(field, null, w)(x, t, text) for w in (3.0, 7.0))
        each = guide_teacher_by(field, null)(x, t, text, torch.tensor([3.0, 7.0]).double())
    assert batches == [2 if kind == "hunyuan" else 4] * 3
    torch.testing.assert_close(each, torch.cat([one[:1], other[1:]]), **CLOSE)
    assert not torch.allclose(one, other)


def test_weights_in_bfloat16_are_all_that_is_cast(case):
    """As engines cast: positions and rotary tables stay, and the prediction is near that of float32."""
    _, folder, encode = case
    field = load_teacher(folder).requires_grad_(False)
    x, text, t = latents_of(case[0]), encode(PROMPTS), torch.tensor([0.9, 0.3], dtype=torch.float64)
    exact = field(x, t, text)
    made = cast_parameters(field, torch.bfloat16)(x, t, text)
    assert made.dtype == torch.float32
    assert (made - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_token_of_embedded_guidance_is_the_published_models(dtype):
    field = cast_parameters(HunyuanField(hunyuan_transformer()), dtype)
    given = []
    field.network.time_text_embed.register_forward_pre_hook(lambda _layer, args: given.append(args[2]))
    text = pack_text(torch.randn(1, 4, 16), torch.randn(1, 8), torch.ones(1, 4, dtype=torch.bool))
    field(latents_of("hunyuan", batch=1), torch.ones(1), text)
    assert field.guidance == 6.0
    assert [float(token) for token in given] == [6016.0]


def test_a_pair_routes_as_wan22_does_and_each_expert_has_its_own(case):
    kind, folder, encode = case
    pair = load_whole_teacher(folder)
    assert isinstance(pair, PairField) == (kind == "wan22") == (boundary_ratio(folder) is not None)
    if not isinstance(pair, PairField):
        assert teacher_digest(folder) == tree_digest(network_folders(folder)[0])
        return
    x, text, t = latents_of(kind), encode(PROMPTS), torch.tensor([0.875, 0.8749], dtype=torch.float64)
    first, second = load_teacher(folder, "semantic"), load_teacher(folder, "detail")
    with torch.no_grad():
        mixed, (noisy, clean) = pair(x, t, text), (field(x, t, text) for field in (first, second))
    torch.testing.assert_close(mixed, torch.stack([noisy[0], clean[1]]), **CLOSE)
    assert not torch.allclose(noisy, clean)


def test_rotary_positions_are_those_of_cogvideox_5b():
    pipeline = build("cogvideox")
    pipeline.transformer = stirred(cogvideox_transformer(rotary=True)).eval().requires_grad_(False)
    x = latents_of("cogvideox")
    text = torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(2))
    made = []
    pipeline.transformer.register_forward_hook(lambda *args: made.append(args[2][0]))
    given = {"prompt_embeds": text, "latents": x.transpose(1, 2), "height": 32, "width": 48, "num_frames": 9}
    pipeline.set_progress_bar_config(disable=True)
    pipeline(**given, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    with torch.no_grad():
        ours = CogVideoXField(pipeline.transformer)(x, torch.ones(2, dtype=torch.float64), text)
    torch.testing.assert_close(ours, made[0].transpose(1, 2))
