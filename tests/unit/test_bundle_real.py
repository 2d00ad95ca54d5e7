"""Bundles of real teachers' students: their text encoders go along, and the server makes what we make."""

import shutil

import pytest
import torch
from export_cases import save_real_student, text_length

from raydistill.config.serve import WorkerConfig
from raydistill.errors import InvalidValue, MissingValue, StaleArtifact
from raydistill.models.codec import load_codec
from raydistill.models.prompts import PromptEncoder
from raydistill.sampler import keyed_noise, sample
from raydistill.service.bundle import verify_bundle
from raydistill.service.engine import Engine
from raydistill.service.export import export_bundle
from raydistill.student import load_student

CASES = (("wan21", "dual"), ("wan22", "dual_full"), ("hunyuan", "dual"), ("cogvideox", "dual"))
CASES += (("modelscope", "motion"), ("animatediff", "motion"))
PROMPT = "a dog runs along a beach"


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, tmp_path_factory):
    kind, method = request.param
    folder = tmp_path_factory.mktemp(kind)
    student, pipeline = save_real_student(folder, kind, method)
    made = export_bundle(student, pipeline, folder / "small", name="small", fps=8, teacher=pipeline)
    return kind, student, pipeline, made


def test_a_bundle_makes_what_its_student_makes(case):
    kind, student, pipeline, made = case
    assert made.left_out == ()
    card = verify_bundle(made.folder)
    engine, loaded = Engine(made.folder, WorkerConfig()), load_student(student, pipeline)
    text = PromptEncoder(pipeline, text_length(kind))([PROMPT])
    assert torch.equal(engine.encode(PROMPT), text)
    for name in card.plans:
        request = {"seed": 3, "plan": name, "latent": card.shapes[0].latent}
        x = noise = engine.noise(request)
        for i in range(card.plans[name].num_steps):
            x, _ = engine.step(request, i, x, text)
        plan, noise_at = loaded.plan(name), keyed_noise(3, torch.zeros(1, dtype=torch.int64))
        ours = sample(loaded.fields, loaded.schedule, plan, noise, text, noise_at=noise_at)
        torch.testing.assert_close(x, ours, rtol=1e-3, atol=1e-3)  # branches apart there, folded here
        assert (x - noise).abs().mean() > 0.1
    frames = engine.decode(x)
    with torch.no_grad():
        assert frames.shape[0] == load_codec(pipeline).decode(x).shape[2] == card.shapes[0].frames
    assert engine.preview(x) is not None


def test_half_precision_halves_the_weights_and_keeps_the_state(case):
    _, _, _, made = case
    exact, half = (Engine(made.folder, WorkerConfig(precision=one)) for one in ("fp32", "bf16"))
    networks = [field for field in half.student.fields.values() if isinstance(field, torch.nn.Module)]
    assert networks
    assert all(p.dtype == torch.bfloat16 for one in networks for p in one.parameters())
    card, text = exact.card, exact.encode(PROMPT)
    request = {"seed": 3, "plan": "2", "latent": card.shapes[0].latent}
    noise = exact.noise(request)
    ours, theirs = (engine.step(request, 0, noise, text)[1] for engine in (exact, half))
    assert theirs.dtype == torch.float32
    assert 0 < (theirs - ours).norm() < 0.05 * ours.norm()


def test_a_bundle_holds_what_is_needed_and_no_more(case):
    kind, _, _, made = case
    tops = {name.partition("/")[0] for name in made.card.files}
    assert tops == {"student", "codec", "teacher", "text"}
    parts = {name.split("/")[1] for name in made.card.files if name.startswith("text/")}
    assert parts <= {"model_index.json", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}
    assert not any(name.startswith(("teacher/text", "teacher/vae")) for name in made.card.files)
    assert made.card.text["length"] == {"wan21": 512, "wan22": 512, "hunyuan": 256, "cogvideox": 10}.get(
        kind, 0
    )
    assert not any(name.endswith(".bin") for name in made.card.files)


def test_a_bundle_needs_the_students_own_text_encoder(case, tmp_path):
    _, student, pipeline, _ = case
    given = {"name": "small", "fps": 8}
    with pytest.raises(MissingValue, match=r"name .*folder"):
        export_bundle(student, pipeline, tmp_path / "b", **given)
    other = shutil.copytree(pipeline, tmp_path / "other")
    config = other / "text_encoder" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(StaleArtifact, match="another text encoder"):
        export_bundle(student, pipeline, tmp_path / "b", **given, teacher=pipeline, text=other)
    with pytest.raises(InvalidValue, match="default_plan"):
        export_bundle(student, pipeline, tmp_path / "b", **given, teacher=pipeline, default_plan="64")
    assert not (tmp_path / "b").exists()


def test_a_bundle_may_do_without_the_linear_map(case, tmp_path):
    _, student, pipeline, _ = case
    given = {"name": "small", "fps": 8, "teacher": pipeline}
    done = export_bundle(student, pipeline, tmp_path / "b", preview=False, **given)
    assert done.card.preview is None
    with pytest.raises(StaleArtifact, match="no linear map"):
        Engine(done.folder, WorkerConfig(previews="linear"))
