"""Students of real teachers measured on prepared clips, on small random models of the real classes."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_real_cases import CLIPS, SHIFT, make_config, save_twin, write_clip, write_inputs
from export_cases import save_real_student
from job_cases import job_here, load_job
from real_cases import write_real_latents

from raydistill.artifacts import LatentStore
from raydistill.config.evaluate import EvaluateConfig, LatencyConfig
from raydistill.config.load import dump
from raydistill.errors import InvalidValue, MissingArtifact, StaleArtifact, TooFewFrames
from raydistill.evaluation import appearance, intervals, measures, steadiness
from raydistill.evaluation.build import build_report
from raydistill.evaluation.ground import Anchor
from raydistill.evaluation.real import DISTANCE, likeness, make_real
from raydistill.evaluation.run import decode
from raydistill.models.codec import load_codec
from raydistill.models.folders import model_digest
from raydistill.models.frame_embedding import load_embedding

BOUNDS = {"clip/text": -0.475, "teacher/latent_rmse": 0.0, "right/all": 0.0}
CASES = (("wan21", "dual"), ("modelscope", "motion"))


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def made(request, tmp_path_factory):
    """A kind of teacher, how it was distilled, and the folder of all that is measured."""
    folder = tmp_path_factory.mktemp(request.param[0])
    write_inputs(folder, *request.param)
    write_clip(folder / "clip")
    return (*request.param, folder)


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    write_inputs(folder, "wan21", "dual")
    write_clip(folder / "clip")
    return folder


def evaluate(config):
    setting, lineup = make_real(config)
    return build_report(config, setting, lineup)


def test_a_student_is_measured_and_its_scores_reach_the_card_of_its_export(made):
    """Twice: the second run reads what the first has kept."""
    kind, method, folder = made
    config = make_config(folder, kind, method, features=f"{folder}/clip")
    first = evaluate(config)
    name = method.split()[0]
    labels = [row["label"] for row in first.results["rows"]]
    assert labels == ["teacher 4", "teacher 2", f"{name} 4", f"{name} 2"]
    rows = {row["label"]: row for row in [*first.results["rows"], *first.results["reference"]]}
    every = {DISTANCE, "clip/text", "sharpness", "spectrum", "vividness", "motion", "flicker", "black_clip"}
    pairs = {"teacher/latent_rmse", "teacher/psnr", "teacher/motion"}
    for label, row in rows.items():
        assert row["figures"].keys() - {"near_black"} == every | (set() if label == "teacher 4" else pairs)
        for figure in row["figures"].values():
            assert np.isfinite([figure["value"], figure["low"], figure["high"]]).all()
            assert figure["low"] <= figure["high"]
    real = rows["codec round trip"]["figures"]
    assert first.results["null"] == real[DISTANCE]["value"]
    assert [real[one]["value"] for one in ("sharpness", "vividness", "motion")] == pytest.approx([1, 1, 1])
    assert rows["teacher 2"]["figures"]["teacher/psnr"]["value"] > real["teacher/psnr"]["value"]
    again = evaluate(config)
    assert (len(first.computed), again.computed) == (4, [])
    assert again.results == first.results
    assert again.pictures == first.pictures
    given = [f"student={folder}/student", f"teacher={folder}/pipeline", f"scores={config.output}"]
    job_here("export", *given, f"pipeline={folder}/exported", "name=exported")
    card = (folder / "exported" / "README.md").read_text()
    far = rows[f"{name} 4"]["figures"]["teacher/latent_rmse"]
    interval = f"{far['low']:.4g} to {far['high']:.4g}"
    assert f"On {CLIPS} clips, 1 training(s)." in card
    assert f"| teacher/latent_rmse | {far['value']:.4g} | {interval} |" in card


def test_a_student_that_is_its_teacher_is_not_apart_from_it(wan, tmp_path):
    twin = save_twin(tmp_path / "twin", wan / "pipeline")
    asked = {"students": {"single": [twin]}, "teacher_steps": (4, 2), "student_steps": (4,)}
    config = make_config(wan, "wan21", "dual", guidance_scale=1.0, output=f"{tmp_path}/out", **asked)
    rows = {row["label"]: row for row in evaluate(config).results["rows"]}
    figures = {label: {n: f["value"] for n, f in row["figures"].items()} for label, row in rows.items()}
    own, teacher = figures["single 4"], figures["teacher 4"]
    assert (own["teacher/latent_rmse"], own["teacher/psnr"]) == (0, 60)
    assert own["teacher/motion"] == pytest.approx(1, abs=1e-12)
    assert {name: own[name] for name in teacher} == teacher
    assert figures["teacher 2"]["teacher/latent_rmse"] > 0.01
    assert (rows["single 4"]["passes"], rows["teacher 4"]["passes"]) == (4, 4)


@pytest.fixture(scope="module")
def ground(wan):
    return make_real(make_config(wan, "wan21", "dual", features=f"{wan}/clip"))


def test_figures_are_those_of_each_measure_on_decoded_clips(wan, ground):
    """Each measure is called here on all clips at once; the meter goes clip by clip."""
    setting, _ = ground
    latents = np.random.default_rng(1).standard_normal((CLIPS, *setting.latent_shape), np.float32)
    anchor = Anchor(np.random.default_rng(2).standard_normal(latents.shape, np.float32), {}, setting)
    seen, values = setting.meter.measure(latents, anchor)
    store, codec = LatentStore(wan / "data"), load_codec(wan / "pipeline")
    rows = store.rows(range(CLIPS))
    ours, theirs = decode(codec, latents), decode(codec, anchor.latents)
    real = decode(codec, np.stack([row.latents for row in rows]))
    spectrum = appearance.log_spectrum(real).mean(axis=0)
    wanted = {
        "sharpness": measures.gradient_energy(ours) / measures.gradient_energy(real).mean(),
        "vividness": appearance.saturation(ours) / appearance.saturation(real).mean(),
        "motion": steadiness.motion(ours) / steadiness.motion(real).mean(),
        "teacher/motion": steadiness.motion(ours) / steadiness.motion(theirs).mean(),
        "spectrum": appearance.spectral_distance(ours, spectrum),
        "flicker": steadiness.flicker(ours),
        "near_black": measures.near_black(ours),
        "black_clip": appearance.black_clip(ours),
        "teacher/latent_rmse": measures.latent_rmse(latents, anchor.latents),
        "teacher/psnr": measures.psnr(ours, theirs),
    }
    net = load_embedding(wan / "clip")
    spread = ours[:, [0, 1, 2, 3, 5, 6, 7, 8]]  # eight of nine
    pixels = torch.from_numpy(spread).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    vectors = net(pixels.flatten(0, 1)).view(CLIPS, 8, -1).double()
    said = net.embed_captions([row.caption for row in rows]).double()
    cosines = torch.nn.functional.cosine_similarity(vectors, said[:, None], dim=-1).mean(dim=1)
    wanted["clip/text"] = cosines.numpy()
    assert values.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(seen, vectors.mean(dim=1).numpy(), rtol=1e-3, atol=1e-4)


def test_the_reference_are_clips_that_are_not_sampled(wan, ground):
    setting, _ = ground
    store, codec = LatentStore(wan / "data"), load_codec(wan / "pipeline")
    rest = [row.latents for row in store.rows(range(CLIPS, 2 * CLIPS))]
    other = dataclasses.replace(setting)
    found, _ = other.meter.measure(np.stack(rest), None)
    np.testing.assert_allclose(setting.meter.real_features, found, rtol=1e-5)
    assert setting.captions == tuple(row.caption for row in store.rows(range(CLIPS)))
    label, frames = setting.real_frames(2)
    assert label == "codec round trip"
    assert (frames == decode(codec, setting.real_latents([0, 1]), 1)).all()


def test_an_interval_of_a_likeness_may_reach_below_zero_and_of_a_distance_may_not():
    wide = intervals.Bootstrapped(0.0, np.linspace(-0.5, 0.5, 100), 4)
    low = {n: dataclasses.replace(wide, limits=measures.BY_NAME[n].limits).estimate().low for n in BOUNDS}
    assert low == pytest.approx(BOUNDS, abs=0.05)


def test_likeness_is_a_cosine_by_hand():
    frames = np.array([[[3.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [-5.0, -5.0]]])
    assert likeness(frames, np.array([[7.0, 0.0], [2.0, 2.0]])) == pytest.approx([0.5, 0])


def loads_of(lineup):
    """Keys of what is loaded from here on; never more is held than one sampler needs."""
    shelf, loaded = lineup.candidates[0].fields.shelf, []
    take = shelf.take

    def noted(part, beside):
        loaded.extend([part.key] if part.key not in shelf._held else [])
        found = take(part, beside)
        assert shelf._held.keys() <= beside
        return found

    shelf.take = noted
    return loaded


def test_one_samplers_networks_are_held_at_a_time_and_none_where_all_is_known(wan, tmp_path):
    """The teacher's first, which a mixture asks for again."""
    save_real_student(tmp_path / "other", "wan21", "single", pipeline=wan / "pipeline")
    students = {"dual": [f"{wan}/student"], "single": [f"{tmp_path}/other/student"]}
    asked = {"students": students, "student_steps": (2,), "head_detail": (2,), "output": f"{tmp_path}/out"}
    config = make_config(wan, "wan21", "dual", **asked)
    setting, lineup = make_real(config)
    loaded = loads_of(lineup)
    assert len(build_report(config, setting, lineup).computed) == len(lineup.candidates) == 5
    dual, single = (f"student {folder}" for (folder,) in students.values())
    assert loaded == ["teacher", dual, "teacher", single]
    setting, lineup = make_real(config)
    assert build_report(config, setting, lineup).computed == []
    assert lineup.candidates[0].fields.shelf._held == {}


def test_both_networks_of_a_pair_sample_each_with_its_own_guidance(tmp_path):
    student, _ = save_real_student(tmp_path, "wan22", "dual_full", guidance_scale_2=3.0)
    write_real_latents(tmp_path / "data", tmp_path / "pipeline", frames=9)
    asked = {"guidance_scale_2": 3.0, "teacher_steps": (4,), "student_steps": (2,)}
    config = make_config(tmp_path, "wan22", "dual_full", **asked)
    config = dataclasses.replace(config, latency=LatencyConfig(rounds=1, batches=(1,)))
    setting, lineup = make_real(config)
    loaded = loads_of(lineup)
    results = build_report(config, setting, lineup).results
    assert loaded == ["teacher", f"student {student}"] * 2  # to sample, and to be timed
    rows = {row["label"]: row for row in results["rows"]}
    assert rows.keys() == {"teacher 4", "dual_full 2"}
    assert results["latency"]["1"].keys() == {"decode", *rows}
    assert rows["teacher 4"]["passes"] == 8
    other = dataclasses.replace(config, guidance_scale_2=0.0)
    with pytest.raises(StaleArtifact, match="guidance_scale_2 3, the teacher is measured with 0"):
        make_real(other)
    changed = dataclasses.replace(other, students={})
    assert make_real(changed)[1].candidates[0].identity != lineup.candidates[0].identity


def test_halved_weights_change_the_figures_a_little_and_the_record(wan, tmp_path):
    asked = {"students": {}, "teacher_steps": (2,), "output": f"{tmp_path}/out"}
    config = make_config(wan, "wan21", "dual", **asked)
    setting, lineup = make_real(config)
    whole = build_report(config, setting, lineup)
    half = dataclasses.replace(config, precision="bf16")
    other = evaluate(half)
    assert other.computed == whole.computed == ["teacher-2-0"]
    (a,), (b,) = (one.results["rows"] for one in (whole, other))
    sharp = [row["figures"]["sharpness"]["value"] for row in (a, b)]
    assert sharp[0] != sharp[1]
    assert sharp[0] == pytest.approx(sharp[1], rel=0.1)


def test_what_is_missing_is_skipped_with_its_reason_or_raised(wan, tmp_path):
    """Nothing named, nothing there, no captions in the network, no clips left for the reference."""
    gone, part = f"{tmp_path}/nowhere", shutil.copytree(wan / "clip", tmp_path / "mute")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (part / name).unlink(missing_ok=True)
    config = make_config(wan, "wan21", "dual", student_steps=(9,))

    def reasons(**changes):
        _, lineup = make_real(dataclasses.replace(config, **changes))
        return {one.what: one.reason for one in lineup.skipped}

    plain = reasons()
    assert "features=FOLDER" in plain["Frechet distance and likeness of captions"]
    assert "small world" in plain["attributes, paths, watermark"]
    assert "no plan '9'" in plain["dual 9"]
    assert f"no folder {gone}" in reasons(features=gone)["Frechet distance and likeness of captions"]
    assert "no whole CLIP" in reasons(features=str(part))["likeness of captions"]
    few = {"features": f"{wan}/clip", "num_clips": CLIPS + 1}
    assert f"{CLIPS + 1} further clips" in reasons(**few)["Frechet distance"]
    assert make_real(dataclasses.replace(config, **few))[0].meter.distance is None
    for changes in ({"features": gone}, {"features": str(part)}, few):
        with pytest.raises(MissingArtifact):
            make_real(dataclasses.replace(config, strict=True, **changes))
    make_real(dataclasses.replace(config, strict=True))


def test_without_a_network_no_distance_is_made_up(wan, tmp_path):
    asked = {"students": {}, "teacher_steps": (2, 1), "output": f"{tmp_path}/out"}
    report = evaluate(make_config(wan, "wan21", "dual", **asked))
    assert report.results["null"] is None
    for row in [*report.results["rows"], *report.results["reference"]]:
        assert not {DISTANCE, "frechet", "clip/text", "right/all"} & row["figures"].keys()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "features=FOLDER" in page
    assert "Frechet:" not in page


def test_a_network_of_another_digest_is_refused(wan):
    digest = model_digest(wan / "clip")
    config = make_config(wan, "wan21", "dual", features=f"{wan}/clip", features_digest=digest)
    assert make_real(config)[0].identity["features"] == digest
    with pytest.raises(StaleArtifact, match=digest):
        make_real(dataclasses.replace(config, features_digest="0" * 64))


def test_what_does_not_belong_together_is_refused(wan, tmp_path):
    config = make_config(wan, "wan21", "dual")

    def refused(error, words, **changes):
        with pytest.raises(error, match=words):
            make_real(dataclasses.replace(config, **changes))

    refused(InvalidValue, "num_clips = 99: at most the 8 clips", num_clips=99)
    refused(InvalidValue, "device = 'nonsense'", device="nonsense")
    if not torch.cuda.is_available():
        refused(InvalidValue, "device = 'cuda'", device="cuda")
    refused(MissingArtifact, "nowhere", data=f"{tmp_path}/nowhere")
    refused(StaleArtifact, r"found != expected", codec="raydistill/world/weights/codec")
    refused(StaleArtifact, "latent channels", teacher="raydistill/world/weights/teacher")
    refused(StaleArtifact, "shift 17, the teacher is measured with 1", shift=1.0)
    student, _ = save_real_student(tmp_path / "b", "cogvideox", "dual")
    refused(StaleArtifact, "another text encoder", students={"dual": [str(student)]})
    write_real_latents(tmp_path / "short", wan / "pipeline", count=2 * CLIPS, frames=5)
    refused(StaleArtifact, "prepare clips of the frames and size", data=f"{tmp_path}/short")
    write_real_latents(tmp_path / "images", wan / "pipeline", images=True)
    refused(TooFewFrames, "1 frames a clip", data=f"{tmp_path}/images")
    with pytest.raises(StaleArtifact, match=r"data=FOLDER"):
        load_job("evaluate").ground(
            EvaluateConfig(students={"dual": [f"{wan}/student"]}, guidance_scale=4.0, shift=SHIFT)
        )


@pytest.mark.parametrize(
    "changes",
    [{"features": "x"}, {"device": "cuda"}, {"precision": "bf16"}, {"guidance_scale_2": 2.0}],
    ids=lambda one: next(iter(one)),
)
def test_settings_without_effect_on_the_small_world_are_refused(changes):
    with pytest.raises(InvalidValue, match=f"{next(iter(changes))} = .*without data"):
        EvaluateConfig(**changes)
    with pytest.raises(InvalidValue, match="size = 64: 32 with data"):
        EvaluateConfig(data="x", size=64)


def test_clips_that_a_student_was_trained_on_are_said_to_be(wan, tmp_path):
    latents = LatentStore(wan / "data").fingerprint
    card = json.loads((wan / "student" / "student.json").read_text())
    sources = {**card["sources"], "latents": latents}
    student, _ = save_real_student(tmp_path, "wan21", "dual", pipeline=wan / "pipeline", sources=sources)
    config = make_config(wan, "wan21", "dual", students={"dual": [f"{wan}/student", str(student)]})
    assert "trained on" in make_real(config)[0].notes["captions_are"]
    config = make_config(wan, "wan21", "dual")
    assert "trained on" not in make_real(config)[0].notes["captions_are"]


def test_the_job_takes_a_settings_file(wan, tmp_path):
    config = make_config(wan, "wan21", "dual", teacher_steps=(4,), output=f"{tmp_path}/out")
    dump(config, tmp_path / "evaluate.yaml")
    said = job_here("evaluate", "--config", tmp_path / "evaluate.yaml")
    assert "| dual 4 | 4 |" in said
    assert "skipped attributes, paths, watermark" in said
    assert Path(config.output, "results.json").is_file()
