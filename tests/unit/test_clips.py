"""Files to clips: the right frames, or the right reason, whatever the file does."""

import os
import subprocess
import sys
import time
from pathlib import Path

import av
import media_zoo
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistill.errors import MediaError
from raydistill.world import decode_child
from raydistill.world.clips import Cut, cut_image, cut_video, fit, plan_clips
from raydistill.world.decoder import Decoder
from raydistill.world.media import Limits, Probe, is_constant

CUT = Cut(num_frames=16, out_fps=8, height=32, width=48)
NATIVE = Cut(num_frames=16, out_fps=8, height=media_zoo.HEIGHT, width=media_zoo.WIDTH)
STUB = str(Path(__file__).with_name("decode_stub.py"))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    return folder, media_zoo.build(folder)


@pytest.fixture(scope="module")
def decoder():
    with Decoder(deadline_s=20) as child:
        yield child


def outcome(decoder: Decoder, path: Path) -> str:
    """The reason for which a file is refused, '' if it is not."""
    try:
        list(cut_video(decoder, str(path), CUT, Limits(), audit=True))
    except MediaError as bad:
        return bad.reason
    return ""


def test_every_animal_gets_the_right_reason(zoo, decoder):
    folder, expected = zoo
    assert {name: outcome(decoder, folder / name) for name in expected} == expected


def test_reasons_survive_bad_company(zoo, decoder):
    folder, _ = zoo
    names = ["scrambled.mp4", "h264.mp4", "bomb.mp4", "av1.mp4", "garbage.mp4", "edit_list.mp4"]
    assert [outcome(decoder, folder / name) for name in names[1::2]] == ["", "", ""]


@pytest.mark.parametrize(
    ("name", "first", "step"),
    [
        ("h264.mp4", 0, 3),
        ("lossless.mp4", 0, 3),
        ("matroska.mkv", 0, 3),
        ("hevc.mp4", 0, 3),
        ("vp9.webm", 0, 3),
        ("mpeg4.avi", 0, 3),
        ("av1.mp4", 0, 3),
        ("ten_bit.mp4", 0, 3),
        ("edit_list.mp4", 20, 3),
    ],
)
def test_frames_are_those_of_their_time(zoo, decoder, name, first, step):
    folder, expected = zoo
    if name not in expected:
        pytest.skip(f"no encoder here for {name}")
    (clip,) = cut_video(decoder, str(folder / name), CUT, Limits())
    assert media_zoo.numbers_in(clip.frames) == [first + step * n for n in range(16)]
    assert clip.frames.shape == (16, 32, 48, 3)
    assert (clip.start_s, clip.end_s) == (0.0, 2.0)
    assert clip.fps_src == pytest.approx(24, rel=0.02)


def test_uneven_frames_are_picked_as_a_player_shows_them(zoo, decoder):
    (clip,) = cut_video(decoder, str(zoo[0] / "vfr.mp4"), CUT, Limits())
    shown = [n + n // 3 * 2 for n in range(48)]  # 24ths of a second
    assert media_zoo.numbers_in(clip.frames) == [sum(t <= 3 * k for t in shown) - 1 for k in range(16)]


@pytest.mark.parametrize("name", ["h264.mp4", "lossless.mp4", "vp9.webm", "edit_list.mp4", "rotated.mp4"])
def test_native_frames_equal_a_plain_pyav_loop(zoo, decoder, name):
    path = str(zoo[0] / name)
    with av.open(path) as container:
        every = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    turned = name == "rotated.mp4"
    cut = Cut(num_frames=16, out_fps=8, height=96, width=64) if turned else NATIVE
    (clip,) = cut_video(decoder, path, cut, Limits())
    expected = np.rot90(every, -1, axes=(1, 2)) if turned else every  # as a player shows it
    assert np.array_equal(clip.frames, expected[0:48:3])


def test_decord_reads_clean_files_and_pyav_the_rest(zoo, decoder):
    folder, expected = zoo
    why = {n: decoder.probe(str(folder / n), Limits()).why for n, reason in expected.items() if not reason}
    assert {n for n, reasons in why.items() if not reasons} >= {"h264.mp4", "matroska.mkv", "lossless.mp4"}
    assert why["playlist_too.ts"] == why["transport.ts"] == ("container",)
    assert why["edit_list.mp4"] == ("edit_list",)
    assert why["vfr.mp4"] == ("vfr",)
    assert why["rotated.mp4"] == ("rotated",)
    assert why["ten_bit.mp4"] == ("pixel_format",)
    assert why.get("av1.mp4", ("codec",)) == ("codec",)


def test_a_video_that_is_a_playlist_too_shows_only_itself(zoo, decoder):
    """decord would show the file that the playlist names."""
    (clip,) = cut_video(decoder, str(zoo[0] / "playlist_too.ts"), NATIVE, Limits())
    assert media_zoo.numbers_in(clip.frames) == list(range(0, 48, 3))


def test_a_file_that_decord_cannot_open_is_no_bug_of_ours(zoo, decoder, tmp_path):
    """It raises a bare RuntimeError then; PyAV stands in, or says what is wrong."""
    honest = decoder.probe(str(zoo[0] / "h264.mp4"), Limits())
    lost = tmp_path / "lost.mp4"
    lost.write_text("#EXTM3U\n#EXTINF:1,\nnowhere.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(MediaError, match="before that, decord"):
        decoder.frames(str(lost), trusted(honest), honest.pts[:3], "decord")


HIDE_DECORD = """
import sys
sys.modules["decord"] = None  # as where it is not installed: the finder and the import statement find nothing
from raydistill.world import decode_child
decode_child.main(sys.argv[1:])
"""


def test_where_decord_is_not_installed_pyav_reads_everything(zoo, decoder, tmp_path):
    folder, expected = zoo
    (tmp_path / "child.py").write_text(HIDE_DECORD)
    with Decoder(deadline_s=20, child=str(tmp_path / "child.py")) as child:
        found = child.probe(str(folder / "h264.mp4"), Limits())
        assert (found.decoder, found.why) == ("pyav", ("no_decord",))
        assert {name: outcome(child, folder / name) for name in expected} == expected
        clips = [list(cut_video(d, str(folder / "h264.mp4"), CUT, Limits())) for d in (child, decoder)]
    assert np.array_equal(clips[0][0].frames, clips[1][0].frames)


def trusted(found: Probe, **changes) -> Probe:
    """The same finding, but sent to decord."""
    return Probe(**{**vars(found), "decoder": "decord", "why": (), **changes})


@pytest.mark.parametrize("name", ["edit_list.mp4", "av1.mp4"])
def test_what_decord_cannot_read_pyav_reads(zoo, decoder, name):
    folder, expected = zoo
    if name not in expected:
        pytest.skip(f"no encoder here for {name}")
    path = str(folder / name)
    honest = decoder.probe(path, Limits())
    frames, why = decoder.frames(path, trusted(honest), honest.pts[:5], "decord")
    assert np.array_equal(frames, decoder.frames(path, honest, honest.pts[:5], "pyav")[0])
    assert why


def test_frames_that_are_all_late_by_the_same_time_are_noticed(zoo, decoder):
    """Decord's table of times is compared from the file's first frame on, not from the first wanted one."""
    path = str(zoo[0] / "h264.mp4")
    honest = decoder.probe(path, Limits())
    tick = honest.pts[1] - honest.pts[0]
    early = trusted(honest, pts=[honest.pts[0] - 10 * tick, *honest.pts[1:]])
    assert decoder.frames(path, trusted(honest), honest.pts[5:9], "decord")[1] == ""
    frames, why = decoder.frames(path, early, honest.pts[5:9], "decord")
    assert "frame_mismatch" in why
    assert media_zoo.numbers_in(frames) == [5, 6, 7, 8]


def test_what_neither_reads_goes_to_quarantine_with_both_messages(zoo, decoder):
    folder, _ = zoo
    honest = decoder.probe(str(folder / "h264.mp4"), Limits())
    with pytest.raises(MediaError, match=r"decode_error: .*; before that, decord: ") as caught:
        decoder.frames(str(folder / "scrambled.mp4"), honest, honest.pts[:5], "decord")
    assert caught.value.reason == "decode_error"


def test_a_crash_of_decord_is_no_fault_of_the_file(zoo, tmp_path):
    bad = tmp_path / "decord_dies.mp4"
    bad.symlink_to(zoo[0] / "h264.mp4")
    with Decoder(deadline_s=20, child=STUB) as child:
        found = child.probe(str(zoo[0] / "h264.mp4"), Limits())
        frames, why = child.frames(str(bad), found, found.pts[:3], "decord")
    assert media_zoo.numbers_in(frames) == [0, 1, 2]
    assert "crash" in why


class Trusting(Decoder):
    """A decoder whose probe sends every file to decord."""

    def probe(self, path: str, limits: Limits) -> Probe:
        return trusted(super().probe(path, limits))


def test_clips_say_when_pyav_stood_in(zoo, decoder):
    path = str(zoo[0] / "edit_list.mp4")
    (clip,) = cut_video(decoder, path, CUT, Limits(), audit=True)
    assert clip.fallback == ""  # sent to PyAV in the first place
    with Trusting(deadline_s=20) as child:
        (stand_in,) = cut_video(child, path, CUT, Limits(), audit=True)
    assert "frame_mismatch" in stand_in.fallback
    assert np.array_equal(stand_in.frames, clip.frames)


def test_the_audit_sees_a_wrong_frame(zoo):
    """In 10-bit video decord's values differ from PyAV's, which is why such files are not sent to it."""
    with Trusting(deadline_s=20) as child, pytest.raises(MediaError, match="disagree"):
        list(cut_video(child, str(zoo[0] / "ten_bit.mp4"), CUT, Limits(), audit=True))


@pytest.mark.parametrize(("name", "reason"), [("hang", "timeout"), ("crash", "crash"), ("greedy", "oom")])
def test_a_decoder_that_misbehaves_is_replaced(zoo, tmp_path, name, reason):
    bad = tmp_path / f"{name}.mp4"
    bad.symlink_to(zoo[0] / "h264.mp4")
    with Decoder(deadline_s=1.5, memory_bytes=2 * 2**30, child=STUB) as child:
        began = time.monotonic()
        assert outcome(child, bad) == reason
        assert time.monotonic() - began < 15  # the deadline, and slow starts of two children
        assert outcome(child, zoo[0] / "h264.mp4") == ""


def test_our_own_bugs_are_not_the_files_fault(zoo):
    with Decoder(child=STUB) as child, pytest.raises(RuntimeError, match="KeyError: 'ours'"):
        child.probe("bug.mp4", Limits())


def test_child_never_imports_torch_or_ray():
    check = "import sys, raydistill.world.decode_child; print({'torch', 'ray'} & set(sys.modules))"
    root = str(Path(decode_child.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.check_output([sys.executable, "-c", check], env=environment, text=True)
    assert done == "set()\n"


def test_children_are_recycled_and_leave_nothing(zoo):
    before, pids = set(os.listdir("/proc/self/fd")), set()
    with Decoder(recycle_after=2) as child:
        for _ in range(3):
            outcome(child, zoo[0] / "h264.mp4")
            pids.add(child._process.pid if child._process else None)
        assert len(pids) > 1
    assert set(os.listdir("/proc/self/fd")) == before
    alive = [pid for pid in pids - {None} if Path(f"/proc/{pid}").exists()]
    assert not alive


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (Limits(max_bytes=100), "bytes"),
        (Limits(max_duration_s=1), "s, at most"),
        (Limits(max_pixels=1000), "pixels"),
        (Limits(max_packets=10), "packets"),
    ],
)
def test_limits(zoo, decoder, limits, says):
    with pytest.raises(MediaError, match=says) as caught:
        decoder.probe(str(zoo[0] / "h264.mp4"), limits)
    assert caught.value.reason == "too_large"


def test_a_long_video_gives_several_clips_spread_over_it(decoder, tmp_path):
    path = str(media_zoo.write(tmp_path / "long.mp4", media_zoo.numbered(240), fps=24))
    every = list(cut_video(decoder, path, Cut(**{**vars(CUT), "max_clips": 9}), Limits()))
    assert [clip.start_s for clip in every] == [0, 2, 4, 6, 8]
    some = list(cut_video(decoder, path, Cut(**{**vars(CUT), "max_clips": 3}), Limits()))
    assert [clip.start_s for clip in some] == [0, 4, 8]
    assert [media_zoo.numbers_in(clip.frames)[0] for clip in some] == [0, 96, 192]


def test_images(decoder, tmp_path):
    for name, (reason, make) in media_zoo.BAD_IMAGES.items():
        make(tmp_path / name)
        with pytest.raises(MediaError) as caught:
            list(cut_image(decoder, str(tmp_path / name), NATIVE, Limits()))
        assert caught.value.reason == reason, name
    media_zoo.picture(tmp_path / "good.png")
    (clip,) = cut_image(decoder, str(tmp_path / "good.png"), NATIVE, Limits())
    assert np.array_equal(clip.frames, media_zoo.numbered(3)[2:3])


def probe_of(times: list[float]) -> Probe:
    """A probe of frames at given seconds, in microseconds."""
    pts = sorted({round(t * 1_000_000) for t in times})
    return Probe(64, 64, "h264", (1, 1_000_000), pts, "pyav")


@given(
    times=st.lists(st.floats(0, 20), min_size=2, max_size=60, unique=True),
    fps=st.sampled_from([1.0, 8.0, 12.5, 24.0, 30000 / 1001]),
    frames=st.integers(1, 20),
    most=st.integers(1, 5),
)
def test_every_picked_frame_is_on_screen_at_its_moment(times, fps, frames, most):
    found, cut = probe_of(times), Cut(num_frames=frames, out_fps=fps, height=8, width=8, max_clips=most)
    if found.duration_s <= (frames - 1) / fps:
        with pytest.raises(MediaError, match="too_short"):
            plan_clips(found, cut)
        return
    plans = plan_clips(found, cut)
    assert 1 <= len(plans) <= most
    for start, pts in plans:
        assert len(pts) == frames
        for k, value in enumerate(pts):
            moment = found.pts[0] / 1e6 + start + k / fps
            assert value / 1e6 <= moment + 2e-6
            later = [p for p in found.pts if p > value]
            assert not later or later[0] / 1e6 > moment - 2e-6
        assert start + (frames - 1) / fps < found.duration_s + 1e-6


@given(st.integers(1, 90), st.fractions(1, 120), st.sampled_from([1000, 12800, 90000]))
def test_constant_rate_is_recognised_through_rounding(count, fps, ticks_per_s):
    assert is_constant([round(n * ticks_per_s / fps) for n in range(count)])


def test_uneven_rate_is_recognised():
    assert not is_constant([0, 1000, 2000, 3500, 4000])
    assert not is_constant([0, 41, 83, 125, 500])


@given(st.integers(4, 40), st.integers(4, 40), st.integers(4, 40), st.integers(4, 40))
def test_fit_keeps_shape_and_flat_colour(rows, columns, height, width):
    frames = np.full((2, rows, columns, 3), (10, 100, 200), np.uint8)
    fitted = fit(frames, height, width)
    assert fitted.shape == (2, height, width, 3)
    assert (fitted == frames[0, 0, 0]).all()


def test_fit_crops_the_middle():
    frames = np.zeros((1, 8, 24, 3), np.uint8)
    frames[:, :, 8:16] = 255
    assert (fit(frames, 8, 8) == 255).all()
    assert (fit(frames.transpose(0, 2, 1, 3), 8, 8) == 255).all()
