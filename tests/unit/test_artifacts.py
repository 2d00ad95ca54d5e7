"""Artifacts: every byte that differs from what was written is noticed before it is used."""

import errno
import json
import pickle
import shutil
from contextlib import suppress

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistill.artifacts import (
    LatentRow,
    LatentStore,
    Manifest,
    canonical_json,
    differences,
    file_entry,
    fingerprint,
    resolve_pointer,
    tree_digest,
    write_atomically,
    write_json,
)
from raydistill.errors import ArtifactError, CorruptArtifact, MissingArtifact, StaleArtifact
from raydistill.latents.shards import latent_row, write_shard
from raydistill.shards import point_to, write_artifact

IDENTITY = {"models": {"codec": {"digest": "a" * 64}, "text": {"kind": "word_vectors"}}, "dtype": "float32"}

values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-2, 2) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def make_rows(shard: int, count: int) -> list[dict]:
    rng = np.random.default_rng(shard)
    return [
        latent_row(
            rng.standard_normal((4, 16, 4, 4), dtype=np.float32),
            rng.standard_normal((8, 32), dtype=np.float32),
            f"caption {shard} {i}",
            f"{shard:02d}{i:02d}",
            source_uri=f"clip{i}.mp4",
        )
        for i in range(count)
    ]


def make_store(folder, sizes=(5, 0, 9), identity=IDENTITY):
    """Write an artifact of several shards, one of them empty; return its rows."""
    every = [make_rows(shard, count) for shard, count in enumerate(sizes)]
    shards = [
        write_shard(folder / "abc", f"{n:05d}", rows, identity, order=n, rows_per_group=4)
        for n, rows in enumerate(every)
    ]
    write_artifact(folder / "abc", shards, identity)
    point_to(folder, "abc", fingerprint(identity))
    return [row for rows in every for row in rows]


def equal(a: LatentRow, b: LatentRow) -> bool:
    same = np.array_equal(a.latents, b.latents) and np.array_equal(a.text, b.text)
    return same and (a.caption, a.sample_id) == (b.caption, b.sample_id)


@pytest.fixture
def store(tmp_path):
    make_store(tmp_path)
    return LatentStore(tmp_path)


@given(values)
def test_canonical_json_forgets_order_and_nothing_else(value):
    assert json.loads(canonical_json(value)) == value
    if isinstance(value, dict):
        assert canonical_json(dict(reversed(value.items()))) == canonical_json(value)


def test_canonical_json_refuses_what_json_cannot_say():
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


@given(values, values)
def test_fingerprints_and_differences_agree(a, b):
    assert (fingerprint(a) == fingerprint(b)) == (differences(a, b) == [])


def test_differences_name_the_leaf():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == ["a.c: 2 != 3"]
    assert differences({"a": 1}, {}) == ["a: 1 != '(absent)'"]


def test_tree_digest_sees_names_and_contents_but_not_places(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "weights").write_bytes(b"12")
        (tmp_path / name / ".hidden").write_bytes(name.encode())
    before = tree_digest(tmp_path / "one")
    assert before == tree_digest(tmp_path / "two")
    (tmp_path / "two" / "deep" / "weights").write_bytes(b"13")
    assert before != tree_digest(tmp_path / "two")
    (tmp_path / "one" / "deep" / "weights").rename(tmp_path / "one" / "deep" / "weight")
    assert before != tree_digest(tmp_path / "one")
    with pytest.raises(MissingArtifact):
        tree_digest(tmp_path / "nowhere")


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("inf")})
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "x.json", "no bytes")  # fails after the temporary file was opened
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_manifest_round_trip_and_every_flip(tmp_path):
    (tmp_path / "data").write_bytes(b"0123456789")
    manifest = Manifest(kind="k", identity={"a": 1}, files={"data": file_entry(tmp_path / "data")}, facts={})
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    good = (tmp_path / "manifest.json").read_bytes()
    for at in range(len(good) - 1):  # the last byte ends the line
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        (tmp_path / "manifest.json").write_bytes(bad)
        with suppress(CorruptArtifact):
            assert Manifest.read(tmp_path) == manifest, at  # white space
        (tmp_path / "manifest.json").write_bytes(good[:at])
        with pytest.raises(CorruptArtifact):
            Manifest.read(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(MissingArtifact):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("name", ["../data", "/etc/passwd", "a/../../data"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    Manifest(kind="k", identity={}, files={name: {"bytes": 1, "sha256": ""}}).write(tmp_path / "made")
    with pytest.raises(CorruptArtifact, match="not inside its own folder"):
        Manifest.read(tmp_path / "made")
    write_json(tmp_path / "all" / "latents.json", {"folder": name})
    with pytest.raises(CorruptArtifact, match="not inside its own folder"):
        resolve_pointer(tmp_path / "all", "latents.json")
    write_json(tmp_path / "all" / "latents.json", {"folder": "one/two"})
    assert resolve_pointer(tmp_path / "all", "latents.json") == tmp_path / "all" / "one" / "two"


def test_manifest_verifies_its_files(tmp_path):
    data = tmp_path / "data"
    data.write_bytes(b"0123456789")
    manifest = Manifest(kind="k", identity={}, files={"data": file_entry(data)})
    manifest.verify(tmp_path)
    data.write_bytes(b"0123456780")
    manifest.verify(tmp_path, contents=False)
    with pytest.raises(CorruptArtifact, match="sha256"):
        manifest.verify(tmp_path)
    data.write_bytes(b"012345678")
    with pytest.raises(CorruptArtifact, match="9 bytes"):
        manifest.verify(tmp_path, contents=False)
    data.unlink()
    with pytest.raises(MissingArtifact):
        manifest.verify(tmp_path, contents=False)


def test_rows_come_back_as_written_in_any_order(tmp_path):
    rows = make_store(tmp_path)
    store = pickle.loads(pickle.dumps(LatentStore(tmp_path)))
    assert len(store) == len(rows) == 14
    order = np.random.default_rng(0).permutation(14)
    for i, got in zip(order, store.rows(order), strict=True):
        assert (got.caption, got.sample_id) == (rows[i]["caption"], rows[i]["sample_id"])
        assert got.latents.tobytes() == rows[i]["latents_bytes"]
        assert got.text.tobytes() == rows[i]["text_bytes"]
        assert (got.latents.shape, got.text.shape) == ((4, 16, 4, 4), (8, 32))
        assert got.latents.flags.writeable
        assert np.array_equal(store.row(i).latents, got.latents)
    assert [row.sample_id for row in store] == store.column("sample_id") == [r["sample_id"] for r in rows]
    for outside in (-1, 14):
        with pytest.raises(IndexError):
            store.row(outside)


def test_half_precision_is_read_as_float32(tmp_path):
    half = np.arange(8, dtype=np.float16).reshape(2, 1, 2, 2)
    rows = [latent_row(half, half[0, 0], "", "x")]
    write_artifact(tmp_path, [write_shard(tmp_path, "0", rows, IDENTITY)], IDENTITY)
    latents = LatentStore(tmp_path).row(0).latents
    assert latents.dtype == np.float32
    assert np.array_equal(latents, half)


def test_files_that_no_manifest_names_do_not_exist(tmp_path):
    make_store(tmp_path)
    before = LatentStore(tmp_path)
    write_shard(tmp_path / "abc", "99999", make_rows(9, 3), IDENTITY)
    assert len(LatentStore(tmp_path)) == len(before)
    assert LatentStore(tmp_path).fingerprint == before.fingerprint


def test_fingerprint_follows_settings_and_rows(tmp_path):
    prints = set()
    for name, sizes, identity in (
        ("a", (5, 9), IDENTITY),
        ("b", (5, 9), IDENTITY),
        ("c", (5, 8), IDENTITY),
        ("d", (9, 5), IDENTITY),
        ("e", (5, 9), {**IDENTITY, "dtype": "float16"}),
    ):
        make_store(tmp_path / name, sizes, identity)
        prints.add(LatentStore(tmp_path / name).fingerprint)
    assert len(prints) == 4


def test_latents_of_another_codec_are_refused(store, tmp_path):
    store.require_codec("a" * 64)
    with pytest.raises(StaleArtifact, match=r"models\.codec\.digest: 'aaaa.*' != 'bbbb.*'"):
        store.require_codec("b" * 64)
    LatentStore(tmp_path, expect={"dtype": "float32"})
    with pytest.raises(StaleArtifact, match="dtype: 'float32' != 'float16'"):
        LatentStore(tmp_path, expect={"dtype": "float16"})
    with pytest.raises(StaleArtifact, match=r"models\.judge: '\(absent\)' != 1|models: "):
        LatentStore(tmp_path, expect={"models": {"judge": 1}})


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(MissingArtifact, match="manifest"):
        LatentStore(tmp_path)
    Manifest(kind="weights", identity={}, files={}).write(tmp_path)
    with pytest.raises(StaleArtifact, match="weights, not latents"):
        LatentStore(tmp_path)
    make_store(tmp_path / "x")
    next((tmp_path / "x" / "abc").glob("*.parquet")).unlink()
    with pytest.raises(MissingArtifact):
        LatentStore(tmp_path / "x")


def test_every_flipped_bit_of_a_shard_is_noticed(tmp_path):
    """One bit anywhere: reading fails, or gives what was written and the full check fails."""
    make_store(tmp_path, sizes=(3,))
    path = tmp_path / "abc" / "00000.parquet"
    good, expected = path.read_bytes(), list(LatentStore(tmp_path))
    rng, noticed, tried = np.random.default_rng(0), 0, 250
    for at in rng.choice(len(good), tried, replace=False):
        bad = bytearray(good)
        bad[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        store = LatentStore(tmp_path)
        try:
            assert all(equal(a, b) for a, b in zip(store, expected, strict=True)), at
        except CorruptArtifact:
            noticed += 1
        with pytest.raises(CorruptArtifact):
            store.verify()
    assert noticed > tried / 2  # most of the file is tensors and footer
    path.write_bytes(good)
    LatentStore(tmp_path).verify()


def test_storage_that_fails_is_not_taken_for_wrong_bytes(tmp_path, monkeypatch):
    # Another row takes a damaged one's place; for one that is out of reach just now that would be wrong.
    make_store(tmp_path, sizes=(3,))
    store = LatentStore(tmp_path)
    (tmp_path / "abc" / "00000.parquet").rename(tmp_path / "aside")
    with pytest.raises(MissingArtifact, match="prepare again"):
        store.row(0)
    (tmp_path / "aside").rename(tmp_path / "abc" / "00000.parquet")
    store.row(0)

    def fails(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fails)
    with pytest.raises(ArtifactError, match="see to the storage") as failed:
        store.row(1)
    assert not isinstance(failed.value, CorruptArtifact)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_shard_is_noticed(store, tmp_path, share):
    path = tmp_path / "abc" / "00002.parquet"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CorruptArtifact, match="bytes"):
        LatentStore(tmp_path)


def test_a_shard_swapped_for_another_is_noticed(store, tmp_path):
    folder = tmp_path / "abc"
    shutil.copy(folder / "00002.parquet", folder / "00000.parquet")
    with pytest.raises(CorruptArtifact):
        list(LatentStore(tmp_path))


def test_page_checksums_are_written_and_verified(store, tmp_path):
    """Without the checksums a flip in a tensor reads back silently: this is what they are for."""
    path = tmp_path / "abc" / "00000.parquet"
    latents = store.row(0).latents
    data = bytearray(path.read_bytes())
    data[data.index(latents.tobytes()) + 77] ^= 4
    path.write_bytes(data)
    careless = pq.ParquetFile(path).read(columns=["latents_bytes"])["latents_bytes"][0].as_py()
    assert careless != latents.tobytes()
    with pytest.raises(CorruptArtifact, match=r"CRC|row group 0"):
        LatentStore(tmp_path).row(0)


def test_columns_are_readable_without_us(store, tmp_path):
    table = pq.read_table(tmp_path / "abc" / "00000.parquet")
    row = table.to_pylist()[0]
    latents = np.frombuffer(row["latents_bytes"], row["latents_dtype"]).reshape(row["latents_shape"])
    assert np.array_equal(latents, store.row(0).latents)
    assert table.schema.metadata[b"fingerprint"].decode() == fingerprint(IDENTITY)
    assert pq.ParquetFile(tmp_path / "abc" / "00000.parquet").metadata.row_group(0).num_rows <= 4
