"""The student on disk: weights, card and plans come back as saved, and nothing else is accepted."""

import json

import pytest
import torch

from raydistill.artifacts import fingerprint, tree_digest
from raydistill.consistency.schedule import TimeGrid
from raydistill.errors import CorruptArtifact, MissingArtifact, SamplingError, StaleArtifact
from raydistill.models.expert import add_detail
from raydistill.models.wan import build_tiny_teacher
from raydistill.sampler import build_plan, keyed_noise, sample, with_tail
from raydistill.student import Card, Student, load_student, read_card, save_student

GRID = TimeGrid(10)


def _inputs():
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 4, 4, 4, generator=rng)
    return x, torch.tensor([0.9, 0.3]).double(), torch.randn(2, 3, 32, generator=rng)


def _shaken(seed=0):
    """A tiny network off its start, where gates are closed and many parts do nothing."""
    field = build_tiny_teacher(seed, dim_head=12, num_heads=2, num_layers=2)
    rng = torch.Generator().manual_seed(seed)
    for p in field.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=rng))
    return field.eval()


def _trained_detail(semantic):
    detail = add_detail(semantic, 4, 8.0, seed=3)
    rng = torch.Generator().manual_seed(4)
    for p in detail.parameters():
        if p.requires_grad:
            p.data.add_(0.1 * torch.randn(p.shape, generator=rng))
    return detail.requires_grad_(False)


def _card(kind="dual", **changes):
    lora = (4, 8.0) if kind == "dual" else None
    boundary = None if kind == "single" else 0.6
    values = {"latent_shape": (4, 4, 4, 4), "text_shape": (3, 32), "lora": lora, **changes}
    return Card(kind=kind, boundary=boundary, grid=GRID, guidance_scale=2.0, **values)


def _save(folder, kind="dual", **changes):
    semantic = _shaken()
    details = {
        "dual": lambda: _trained_detail(semantic),
        "dual_full": lambda: _shaken(5),
        "single": lambda: None,
    }
    detail = details[kind]()
    card = _card(kind, **changes)
    plans = {str(n): build_plan(n, card.boundary, GRID) for n in (1, 2, 4)}
    if card.boundary is not None:
        plans["2+tail"] = with_tail(2, card.boundary, GRID)
    save_student(folder, card, semantic, detail, plans)
    return semantic, detail


@pytest.mark.parametrize("kind", ["dual", "dual_full", "single"])
def test_a_student_comes_back_as_it_was_saved(tmp_path, kind):
    semantic, detail = _save(tmp_path, kind)
    student = load_student(tmp_path, merged=False)
    assert student.kind == kind
    assert student.card == _card(kind)
    assert set(student.fields) == ({"semantic"} if detail is None else {"semantic", "detail"})
    with torch.no_grad():
        assert torch.equal(student.fields["semantic"](*_inputs()), semantic(*_inputs()))
        if detail is not None:
            assert torch.equal(student.fields["detail"](*_inputs()), detail(*_inputs()))
    assert student.plan(4) == student.plan("4") == build_plan(4, student.card.boundary, GRID)
    with pytest.raises(SamplingError, match="no plan '3'; it has 1, 2, "):
        student.plan(3)


def test_a_plan_with_a_teachers_tail_is_stored_and_needs_the_teacher(tmp_path):
    _save(tmp_path / "student")
    _shaken(1).transformer.save_pretrained(tmp_path / "teacher")
    with pytest.raises(SamplingError, match=r"'2\+tail' needs the teacher: load_student"):
        load_student(tmp_path / "student").plan("2+tail")
    student = load_student(tmp_path / "student", tmp_path / "teacher")
    plan = student.plan("2+tail")
    assert plan == with_tail(2, 0.6, GRID)
    noise_at = keyed_noise(1, torch.arange(2))
    text = torch.randn(2, *student.card.text_shape, generator=torch.Generator().manual_seed(2))
    noise = noise_at(0, (2, *student.card.latent_shape))
    made = sample(student.fields, student.schedule, plan, noise, text)
    dual = sample(student.fields, student.schedule, student.plan(4), noise, text)
    assert made.isfinite().all()
    assert not torch.allclose(made, dual)


@pytest.mark.parametrize("kind", ["dual", "dual_full", "single"])
def test_every_network_of_a_student_is_on_the_device_asked_for(tmp_path, kind):
    # `meta` stands for an accelerator: it refuses to meet tensors of the CPU.
    _save(tmp_path / "student", kind)
    _shaken(1).transformer.save_pretrained(tmp_path / "teacher")
    student = load_student(tmp_path / "student", tmp_path / "teacher", device="meta")
    shapes = (2, *student.card.latent_shape), (2, *student.card.text_shape)
    noise, text = (torch.empty(shape, device="meta") for shape in shapes)
    noise_at = keyed_noise(1, torch.arange(2))
    for plan in student.plans.values():
        assert sample(student.fields, student.schedule, plan, noise, text, noise_at=noise_at).is_meta


def test_a_changed_file_a_missing_card_and_another_teacher_are_refused(tmp_path):
    _save(tmp_path / "a")
    weights = tmp_path / "a" / "detail.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CorruptArtifact, match=r"detail\.safetensors"):
        load_student(tmp_path / "a")
    (tmp_path / "a" / "student.json").unlink()
    with pytest.raises(MissingArtifact, match="writes it last"):
        load_student(tmp_path / "a")
    _save(tmp_path / "b", sources={"teacher": "another"})
    _shaken().transformer.save_pretrained(tmp_path / "teacher")
    with pytest.raises(StaleArtifact, match="another teacher"):
        load_student(tmp_path / "b", tmp_path / "teacher")


def _rewrite(card, **changes):
    """Change a card and give it a right checksum, as another program would."""
    values = {**json.loads(card.read_text()), **changes}
    del values["checksum"]
    card.write_text(json.dumps({**values, "checksum": fingerprint(values)}))


def test_a_codec_that_did_not_make_its_latents_is_refused(tmp_path):
    """It would decode them all the same, to other pictures."""
    for name in ("codec", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    card = _card(sources={"codec": tree_digest(tmp_path / "codec")})
    student = Student(card, {}, {})
    student.require_codec(tmp_path / "codec")
    with pytest.raises(StaleArtifact, match="another codec"):
        student.require_codec(tmp_path / "other")


def test_a_student_of_another_release_is_refused(tmp_path):
    _save(tmp_path)
    card = tmp_path / "student.json"
    plans = json.loads(card.read_text())["plans"]
    _rewrite(card, version=99)
    with pytest.raises(StaleArtifact, match="not of version 1"):
        load_student(tmp_path)
    _rewrite(card, version=1, colour="blue")
    with pytest.raises(StaleArtifact, match=r"another release.*colour"):
        load_student(tmp_path)
    _save(tmp_path)
    _rewrite(card, plans={"4": {**plans["4"], "colour": "blue"}})
    with pytest.raises(StaleArtifact, match=r"another release.*colour"):
        load_student(tmp_path)
    _save(tmp_path)
    _rewrite(card, plans=plans)
    assert load_student(tmp_path).plan(4)


def test_a_changed_or_cut_card_is_refused(tmp_path):
    _save(tmp_path)
    card = tmp_path / "student.json"
    text = card.read_text()
    for right, wrong in (('"boundary": 0.6', '"boundary": 0.7'), ('"t": 0.8', '"t": 0.9')):
        assert right in text
        card.write_text(text.replace(right, wrong))
        with pytest.raises(CorruptArtifact, match="its own checksum"):
            read_card(tmp_path)
    for end in (0, 1, len(text) // 2, len(text) - 3):
        card.write_text(text[:end])
        with pytest.raises(CorruptArtifact, match="not a whole card"):
            read_card(tmp_path)
    card.write_text("[]")
    with pytest.raises(CorruptArtifact, match="not a whole card"):
        read_card(tmp_path)
    card.write_text(text)
    read_card(tmp_path)
