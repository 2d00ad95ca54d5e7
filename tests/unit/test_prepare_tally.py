"""Every input is counted once, and too many bad ones stop the run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistill.errors import PrepareError
from raydistill.latents.tally import Tally

OUTCOMES = st.sampled_from([("clip", ""), ("filtered", "too_short"), ("quarantined", "timeout")])


@given(st.lists(OUTCOMES, max_size=30))
def test_inputs_are_kept_filtered_or_quarantined(outcomes):
    tally = Tally(len(outcomes), max_bad_in_a_row=100)
    tally.add(outcomes, clips=1)
    tally.require_complete()
    counts = tally.counts()
    assert counts["inputs"] == counts["kept"] + sum(counts["filtered"].values()) + sum(
        counts["quarantined"].values()
    )


def test_a_lost_file_is_noticed():
    tally = Tally(3)
    tally.add([("clip", ""), ("clip", "")], clips=2)
    with pytest.raises(AssertionError, match="3 inputs, but 2 outcomes"):
        tally.require_complete()


def test_a_run_without_a_clip_fails():
    tally = Tally(1)
    tally.add([("filtered", "too_short")])
    with pytest.raises(PrepareError, match="1 too_short"):
        tally.require_complete()


def test_files_that_lack_nothing_but_captions_are_told_where_to_put_them():
    tally = Tally(2, where="some")
    tally.add([("filtered", "missing_caption")] * 2)
    with pytest.raises(PrepareError, match=r"2 missing_caption.*NAME\.txt.*source\.captions") as caught:
        tally.require_complete()
    assert "quarantine" not in str(caught.value)


def test_the_share_of_bad_files_is_limited():
    tally = Tally(100, max_bad_fraction=0.05, where="some")
    tally.add([("quarantined", "timeout"), ("clip", "")] * 5)
    with pytest.raises(PrepareError, match=r"6 of 100 files.*6 timeout.*some/quarantine.*max_bad_fraction"):
        tally.add([("quarantined", "timeout")])


@pytest.mark.parametrize(("inputs", "fine"), [(1, 1), (19, 1), (40, 2), (100, 5)])
def test_a_few_bad_files_stop_nothing_however_few_there_are(inputs, fine):
    tally = Tally(inputs, max_bad_fraction=0.05, allowed_bad_files=1)
    tally.add([("quarantined", "timeout")] * fine)
    with pytest.raises(PrepareError, match="are bad, more than"):
        tally.add([("quarantined", "timeout")])


def test_bad_files_in_a_row_are_limited_across_shards():
    tally = Tally(1000, max_bad_in_a_row=4)
    tally.add([("quarantined", "oom")] * 3 + [("clip", "")] + [("quarantined", "oom")] * 2)
    tally.add([("filtered", "too_short")] + [("quarantined", "oom")] * 2)
    with pytest.raises(PrepareError, match="4 bad files in a row"):
        tally.add([("quarantined", "crash")] * 2)


def test_bad_files_picked_out_of_a_listing_are_not_in_a_row():
    tally = Tally(1000, max_bad_in_a_row=4)
    tally.add([("quarantined", "bad_caption")] * 6, neighbours=False)
    tally.add([("quarantined", "oom")] * 3)
    assert (tally.bad, tally.bad_in_a_row) == (9, 3)


def test_shards_are_added_by_their_facts():
    tally = Tally(2)
    files = [["a", "sha", "clip", ""], ["b", "sha", "filtered", "too_short"]]
    tally.add_shard({"files": files, "clips": 3, "video_s": 6.0, "fallbacks": 1})
    assert tally.summary().splitlines()[0] == "2 files = 1 kept + 1 filtered + 0 quarantined"
    assert tally.counts()["video_s"] == 6.0
    assert tally.counts()["fallbacks"] == 1
    assert "1 files read by PyAV where decord failed" in tally.summary()
