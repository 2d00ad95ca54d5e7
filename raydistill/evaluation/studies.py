"""What a study decides: differences between variants, each with its interval and a plain word."""

from collections.abc import Mapping, Sequence

from raydistill.config.ablate import CompareConfig
from raydistill.evaluation.measures import BY_NAME
from raydistill.evaluation.summary import Row
from raydistill.evaluation.verdicts import Side, Verdict, apart, said


def decide(
    rows: Mapping[str, Row], compare: Sequence[CompareConfig], anchors: Mapping[str, str]
) -> list[Verdict]:
    """Return a verdict per comparison: held where `left` is better, or worse by less than the margin.

    `anchors`: the label of each teacher's row, by its name. "Better" is the measure's own word; where 1 is
    best, the distances from 1 are compared.
    """
    return [_decided(rows, one, anchors) for one in compare]


def _decided(rows: Mapping[str, Row], one: CompareConfig, anchors: Mapping[str, str]) -> Verdict:
    labels = [anchors.get(side, f"{side} {one.num_steps}") for side in (one.left, one.right)]
    measure = BY_NAME[one.measure]
    side, limit = _asked(measure.better == "higher", one.margin)
    claim = f"{labels[0]}: {said(one.measure, measure.label)}, less {labels[1]}'s"
    absent = [label for label in labels if label not in rows or one.measure not in rows[label].figures]
    if absent:
        return Verdict(claim, limit, side, "", None, f"{' and '.join(absent)} not measured")
    figures = [rows[label].figures[one.measure] for label in labels]
    figure, unit = apart(one.measure, *figures), " points" if measure.scale == 100 else ""
    seeds = min(
        rows[label].figures[one.measure].num_seeds for label in labels if label not in anchors.values()
    )
    note = f"{seeds} training seeds" if seeds > 1 else "one training seed: its own spread is not in it"
    return Verdict(claim, limit, side, unit, figure, note)


def _asked(higher: bool, margin: float) -> tuple[Side, float]:
    """Side and limit of a difference in a measure of which more, or less, is better."""
    if not margin:
        return ("more than" if higher else "less than"), 0.0
    return ("at least", -margin) if higher else ("at most", margin)
