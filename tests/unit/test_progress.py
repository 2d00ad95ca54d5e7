"""The record of a run's figures, and what a restart may rely on."""

import json

import pytest

from raydistill.experts.progress import forget_after, read_metrics
from raydistill.experts.tracking import METRICS


def write(run_dir, *records, tail=b""):
    lines = b"".join(json.dumps(r).encode() + b"\n" for r in records)
    (run_dir / METRICS).write_bytes(lines + tail)


SEMANTIC = [{"stage": "semantic", "step": n} for n in (1, 2, 3)]
TAILS = {
    "half": b'{"stage": "semantic", "st',
    "zeros": b"\0" * 40,
    "no text": b'{"\xff\x1c\xfe',
    "one brace": b"{",
}


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_a_torn_line_never_meets_the_next_record(tmp_path, tail):
    """Also where nothing else is dropped: what is appended to it would be lost, and break every later run."""
    write(tmp_path, *SEMANTIC, tail=tail)
    assert read_metrics(tmp_path) == SEMANTIC
    forget_after(tmp_path, "semantic", 3)
    with (tmp_path / METRICS).open("a") as stream:
        stream.write('{"stage": "semantic", "step": 4}\n')
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_only_what_is_done_again_is_forgotten(tmp_path):
    """Of this stage and after this step; an untouched file is not even written again."""
    forget_after(tmp_path, "semantic", 0)
    assert read_metrics(tmp_path) == []
    detail = [{"stage": "detail", "step": n} for n in (1, 2)]
    write(tmp_path, *SEMANTIC, *detail)
    before = (tmp_path / METRICS).stat()
    forget_after(tmp_path, "detail", 2)
    assert (tmp_path / METRICS).stat() == before
    forget_after(tmp_path, "semantic", 2)
    assert read_metrics(tmp_path, "semantic") == SEMANTIC[:2]
    assert read_metrics(tmp_path, "detail") == detail
