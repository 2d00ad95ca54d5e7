"""Settings of the prepare job: ranges, and what the fingerprint covers."""

import dataclasses
import importlib.util
import shutil
from pathlib import Path

import pipeline_cases
import pytest

from raydistill.artifacts import fingerprint
from raydistill.config.load import load
from raydistill.config.prepare import (
    ClipConfig,
    DecodeConfig,
    EncodeConfig,
    LimitsConfig,
    PrepareConfig,
    ShardConfig,
    SourceConfig,
    ToleranceConfig,
)
from raydistill.errors import InvalidValue, MissingArtifact
from raydistill.latents.encode import require_codec
from raydistill.models.codec import build_tiny_codec

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("prepare_job", ROOT / "jobs" / "prepare.py")
job = importlib.util.module_from_spec(spec)
spec.loader.exec_module(job)


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "codec"
    build_tiny_codec(0, width=8).save(folder)
    return folder


def prints(codec, **sections) -> str:
    """The fingerprint of a config with changed sections."""
    sections.setdefault("encode", {})
    sections["encode"] = {"codec": str(codec), **sections["encode"]}
    config = PrepareConfig()
    for section, changes in sections.items():
        value = (
            dataclasses.replace(getattr(config, section), **changes) if isinstance(changes, dict) else changes
        )
        config = dataclasses.replace(config, **{section: value})
    return fingerprint(job.identity_of(config))


MATTERS = [
    {"clip": {"num_frames": 8}},
    {"clip": {"out_fps": 4.0}},
    {"clip": {"height": 40}},
    {"clip": {"width": 40}},
    {"clip": {"stride_s": 1.0}},
    {"clip": {"max_clips_per_video": 2}},
    {"limits": {"max_bytes": 10}},
    {"limits": {"max_duration_s": 10.0}},
    {"limits": {"max_pixels": 10}},
    {"limits": {"max_packets": 10}},
    {"encode": {"dtype": "float16"}},
    {"encode": {"text_tokens": 4}},
    {"encode": {"text_width": 4}},
    {"source": {"caption_policy": "empty"}},
    {"source": {"kind": "images"}},
]
DOES_NOT = [
    {"output": "elsewhere"},
    {"source": {"path": "elsewhere"}},
    {"source": {"kind": "videos"}},
    {"source": {"num_clips": 3}},
    {"source": {"seed": 3}},
    {"source": {"captions": "elsewhere"}},
    {"source": {"severity": 0.5}},  # the files tell
    {"source": {"size": 64}},
    {"limits": {"deadline_s": 1.0}},
    {"limits": {"memory_gib": 1.0}},
    {"decode": {"num_actors": 3}},
    {"decode": {"cpus_per_actor": 3.0}},
    {"decode": {"recycle_after": 3}},
    {"decode": {"audit_every": 3}},
    {"encode": {"batch_size": 3}},
    {"encode": {"num_actors": 3}},
    {"encode": {"cpus_per_actor": 3.0}},
    {"encode": {"gpus_per_actor": 1.0}},
    {"shard": {"files_per_shard": 3}},
    {"shard": {"rows_per_group": 3}},
    {"tolerance": {"max_bad_fraction": 0.5}},
    {"tolerance": {"max_bad_in_a_row": 3}},
    {"tolerance": {"allowed_bad_files": 3}},
    {"cluster": {"num_cpus": 3}},
    {"cluster": {"object_store_mib": 300}},
]


def test_fingerprint_changes_iff_something_that_matters_does(codec):
    before = prints(codec)
    assert prints(codec) == before
    matters = [prints(codec, **change) for change in MATTERS]
    assert len({before, *matters}) == 1 + len(MATTERS)
    assert {prints(codec, **change) for change in DOES_NOT} == {before}


def test_every_setting_is_on_one_of_the_two_lists():
    """A new setting must be thought about."""
    listed = {
        (section, key) for change in MATTERS + DOES_NOT for section, keys in change.items() for key in keys
    }
    listed |= {("encode", "codec"), *(("encode", key) for key in WITH_PIPELINE)}
    sections = [f for f in dataclasses.fields(PrepareConfig) if f.name not in ("output", "record")]
    every = {(s.name, f.name) for s in sections for f in dataclasses.fields(s.default_factory)}
    assert {pair for pair in listed if pair[0] != "output"} == every


WITH_PIPELINE = ("text", "text_length", "text_precision")


def test_captions_by_a_pipeline_follow_its_files_and_settings(codec, tmp_path):
    folder = pipeline_cases.save(tmp_path / "p", "wan21")
    before, text = prints(codec), {"text": str(folder)}
    by_pipeline = prints(codec, encode=text)
    others = [{**text, "text_length": 8}, {**text, "text_precision": "bf16"}]
    made = [prints(codec, encode=one) for one in others]
    assert len({before, by_pipeline, *made}) == 4
    assert prints(codec, encode={**text, "text_tokens": 3, "text_width": 5}) == by_pipeline
    assert prints(codec, encode={"text": shutil.copytree(folder, tmp_path / "moved")}) == by_pipeline
    (folder / "tokenizer" / "tokenizer_config.json").write_text("{}")
    assert prints(codec, encode=text) != by_pipeline


def test_fingerprint_follows_the_codecs_contents_not_its_place(codec, tmp_path):
    before = prints(codec)
    moved = tmp_path / "elsewhere"
    shutil.copytree(codec, moved)
    assert prints(moved) == before
    weights = moved / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert prints(moved) != before


def test_fingerprint_names_decoders_and_resize(codec):
    identity = job.identity_of(PrepareConfig(encode=EncodeConfig(codec=str(codec))))
    assert {"av", "decord", "libavcodec", "pillow", "resize"} <= set(identity["decoders"])


def test_a_codec_that_is_not_there(tmp_path):
    with pytest.raises(MissingArtifact, match=r"encode\.codec"):
        prints(tmp_path)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: SourceConfig(path=""), "source.path"),
        (lambda: SourceConfig(num_clips=0), "source.num_clips"),
        (lambda: ClipConfig(num_frames=0), "clip.num_frames"),
        (lambda: ClipConfig(out_fps=0), "clip.out_fps"),
        (lambda: ClipConfig(out_fps=float("nan")), "clip.out_fps"),
        (lambda: ClipConfig(stride_s=-1), "clip.stride_s"),
        (lambda: LimitsConfig(deadline_s=0), "limits.deadline_s"),
        (lambda: DecodeConfig(num_actors=0), "decode.num_actors"),
        (lambda: EncodeConfig(batch_size=0), "encode.batch_size"),
        (lambda: ShardConfig(rows_per_group=0), "shard.rows_per_group"),
        (lambda: ToleranceConfig(max_bad_fraction=1.1), "tolerance.max_bad_fraction"),
        (lambda: ToleranceConfig(allowed_bad_files=-1), "tolerance.allowed_bad_files"),
        (lambda: PrepareConfig(output=""), "output"),
        (
            lambda: PrepareConfig(clip=ClipConfig(num_frames=81, height=480, width=832)),
            "shard.files_per_shard",
        ),
    ],
)
def test_values_out_of_range_are_named(make, key):
    with pytest.raises(InvalidValue) as caught:
        make()
    assert caught.value.key == key


def test_clips_must_suit_the_codec(codec, tmp_path):
    require_codec(codec, ClipConfig())
    with pytest.raises(InvalidValue, match=r"clip\.width = 33: a multiple of 8"):
        require_codec(codec, ClipConfig(width=33))
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKLWan", "scale_factor_temporal": 4}')
    require_codec(tmp_path, ClipConfig(num_frames=81))
    require_codec(tmp_path, ClipConfig(num_frames=80), images=True)
    with pytest.raises(InvalidValue, match=r"e\.g\. 77"):
        require_codec(tmp_path, ClipConfig(num_frames=80))
    (tmp_path / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    with pytest.raises(MissingArtifact, match="holds a WanTransformer3DModel: known codecs are"):
        require_codec(tmp_path, ClipConfig())


def test_the_shipped_job_file_is_valid():
    config = load(PrepareConfig, ROOT / "jobs" / "tiny" / "prepare.yaml")
    assert config.source.kind == "sprites"
