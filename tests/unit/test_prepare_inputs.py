"""What a folder holds: captions, refusals, duplicates, and the dealing of files to shards."""

import hashlib
import json
import os
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistill.artifacts import fingerprint
from raydistill.errors import InvalidValue, MediaError, MissingArtifact
from raydistill.world.folder import list_sources, read_caption, read_captions_file
from raydistill.world.inputs import Input, deal, examine, inputs_identity, mark_duplicates, require_unchanged


def put(folder, **files):
    for name, data in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())


def look(folder, **options):
    sources, _ = list_sources(folder, "videos")
    return {s.uri: examine(folder, s, **{"policy": "filter", **options}) for s in sources}


def test_listing_is_recursive_sorted_and_passes_over_the_rest(tmp_path):
    put(
        tmp_path,
        b_MP4="b",
        deep__a_mov="a",
        deep__a_txt="words",
        notes_pdf="",
        _hidden_mp4="x",
        _cache__c_mp4="x",
    )
    sources, others = list_sources(tmp_path, "videos")
    assert [s.uri for s in sources] == ["b.MP4", "deep/a.mov"]
    assert others == 2  # the caption is none of them


def test_links_and_pipes_are_listed_but_never_opened(tmp_path):
    put(tmp_path, a_mp4="a")
    (tmp_path / "link.mp4").symlink_to("/etc/passwd")
    (tmp_path / "broken.mp4").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder").symlink_to("/etc", target_is_directory=True)
    found = look(tmp_path, policy="empty")
    assert {uri: i.reason for uri, i in found.items()} == {
        "a.mp4": "",
        "broken.mp4": "policy",
        "link.mp4": "policy",
        "pipe.mp4": "policy",
    }


def test_empty_files_are_no_duplicates_of_each_other(tmp_path):
    put(tmp_path, a_mp4="", b_mp4="", c_mp4="c")
    marked = mark_duplicates(look(tmp_path, policy="empty").values())
    assert [i.reason for i in marked] == ["zero_bytes", "zero_bytes", ""]


def test_what_is_no_text_is_refused_by_name(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.mp4")).write_bytes(b"a")
    put(tmp_path, b_mp4="b", b_json='{"caption": "a \\ud800 cat"}')
    found = look(tmp_path)
    assert {uri: i.reason for uri, i in found.items()} == {"caf\\xe9.mp4": "policy", "b.mp4": "bad_caption"}
    assert "not UTF-8" in found["caf\\xe9.mp4"].message


def test_an_empty_folder_says_what_to_do(tmp_path):
    put(tmp_path, notes_txt="")
    with pytest.raises(MissingArtifact, match=r"no videos below .*1 other files.*\.mp4.*source\.path"):
        list_sources(tmp_path, "videos")
    with pytest.raises(MissingArtifact, match="no folder"):
        list_sources(tmp_path / "nowhere", "images")


@pytest.mark.parametrize(
    ("name", "text", "caption"),
    [
        ("a.txt", "  a cat\n runs ", "a cat runs"),
        ("a.txt", "\ufeffa cat", "a cat"),
        ("a.json", '{"caption": "a cat"}', "a cat"),
        ("a.json", '{"text": "a cat", "fps": 3}', "a cat"),
        ("a.json", '"a cat"', "a cat"),
        ("a.mp4.txt", "a cat", "a cat"),
        ("a.txt", " \n", None),
        ("b.txt", "a dog", None),
    ],
)
def test_captions_beside_the_file(tmp_path, name, text, caption):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_caption(tmp_path / "a.mp4") == caption


def test_json_comes_before_text(tmp_path):
    put(tmp_path, a_txt="text", a_json='{"caption": "json"}')
    assert read_caption(tmp_path / "a.mp4") == "json"


@pytest.mark.parametrize("text", ["{", "[1]", '{"title": "x"}', '{"caption": 3}', "\xff\xfe"])
def test_a_caption_that_cannot_be_read_is_the_files_fault(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(MediaError) as caught:
        read_caption(tmp_path / "a.mp4")
    assert caught.value.reason == "bad_caption"


def test_missing_captions_follow_the_policy(tmp_path):
    put(tmp_path, a_mp4="a")
    assert look(tmp_path)["a.mp4"].reason == "missing_caption"
    assert look(tmp_path, policy="error")["a.mp4"].reason == "missing_caption"
    found = look(tmp_path, policy="empty")["a.mp4"]
    assert (found.reason, found.caption) == ("", "")


def test_captions_from_one_file(tmp_path):
    put(tmp_path, a_mp4="a", deep__b_mp4="b", c_mp4="c", a_txt="not this one")
    lines = [{"file": "a.mp4", "caption": "A"}, {"file_name": "./deep/b.mp4", "text": " B "}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    captions = read_captions_file(tmp_path / "captions.jsonl")
    assert captions == {"a.mp4": "A", "deep/b.mp4": "B"}
    found = look(tmp_path, captions=captions)
    assert {uri: (i.caption, i.reason) for uri, i in found.items()} == {
        "a.mp4": ("A", ""),
        "deep/b.mp4": ("B", ""),
        "c.mp4": ("", "missing_caption"),
    }


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"caption": "x"}', '{"file": "a.mp4"}', '{"file": 3, "caption": "x"}']
)
def test_a_bad_line_is_named(tmp_path, line):
    (tmp_path / "captions.jsonl").write_text('{"file": "a", "caption": "b"}\n' + line)
    with pytest.raises(InvalidValue, match="line 2"):
        read_captions_file(tmp_path / "captions.jsonl")


def test_known_hashes_are_believed_and_files_not_read(tmp_path):
    put(tmp_path, a_mp4="a", a_txt="words")
    (source,), _ = list_sources(tmp_path, "videos")
    (tmp_path / "a.mp4").unlink()
    assert examine(tmp_path, source, policy="filter", sha256="known").sha256 == "known"
    assert examine(tmp_path, source, policy="filter").reason == "unreadable"


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path):
    put(tmp_path, a_mp4="a", a_txt="words")
    found = look(tmp_path)["a.mp4"]
    require_unchanged(tmp_path, found)
    put(tmp_path, a_mp4="ab")
    with pytest.raises(MediaError, match="changed"):
        require_unchanged(tmp_path, found)
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(MediaError, match="changed"):
        require_unchanged(tmp_path, found)


def test_equal_bytes_count_once(tmp_path):
    put(tmp_path, a_mp4="same", b_mp4="same", c_mp4="other", a_txt="A", b_txt="B", c_txt="C")
    marked = {i.uri: i.reason for i in mark_duplicates(look(tmp_path).values())}
    assert marked == {"a.mp4": "", "b.mp4": "duplicate", "c.mp4": ""}


names = st.lists(st.integers(0, 999), unique=True, max_size=30)


@given(names, st.integers(1, 7), st.randoms(use_true_random=False))
def test_dealing_follows_contents_not_names_and_order(numbers, size, rng: random.Random):
    inputs = [Input(f"{n}.mp4", 1, 1, sha256=f"{n:064x}", caption="c") for n in numbers]
    moved = [Input(f"other/{i.uri}", 1, 2, i.sha256, i.caption) for i in rng.sample(inputs, len(inputs))]
    shards, again = deal(inputs, size), deal(moved, size)
    assert [[i.sha256 for i in s.inputs] for s in shards] == [[i.sha256 for i in s.inputs] for s in again]
    assert [i.sha256 for s in shards for i in s.inputs] == sorted(i.sha256 for i in inputs)
    assert all(1 <= len(s.inputs) <= size for s in shards)
    assert [s.order for s in shards] == list(range(len(shards)))
    assert [s.name for s in shards] == [s.name for s in deal(rng.sample(inputs, len(inputs)), size)]


def hashed(number: int) -> Input:
    return Input(f"{number}.mp4", 1, 1, hashlib.sha256(str(number).encode()).hexdigest(), "c")


def test_another_file_leaves_most_shards_alone():
    inputs, changed = [hashed(n) for n in range(400)], []
    before = {s.name for s in deal(inputs, 8)}
    for number in range(400, 440):
        after = {s.name for s in deal([*inputs, hashed(number)], 8)}
        changed.append(len(after - before))
    assert 50 <= len(before) < 110
    assert sum(changed) / len(changed) < 3


@pytest.mark.parametrize("change", [{"uri": "b"}, {"sha256": "1" * 64}, {"caption": "a dog"}])
def test_another_name_caption_or_content_makes_another_shard_and_artifact(change):
    base = Input("a", 1, 1, "0" * 64, "a cat")
    other = replace(base, **change)
    assert deal([base], 4)[0].name != deal([other], 4)[0].name
    assert inputs_identity([base]) != inputs_identity([other])


def test_the_artifact_knows_what_was_left_out_too():
    kept, bad = Input("a", 1, 1, "0" * 64, "a cat"), Input("b", 0, 1, reason="policy")
    prints = [fingerprint(inputs_identity(found)) for found in ([kept], [kept, bad], [bad, kept])]
    assert prints[0] != prints[1] == prints[2]
    assert inputs_identity([replace(kept, mtime_ns=2)]) == inputs_identity([kept])


def test_settled_files_are_not_dealt():
    assert deal([Input("a", 1, 1, reason="policy")], 4) == []
