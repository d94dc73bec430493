"""What the demo says of itself; the demo as a whole is run by hand, it takes minutes and the network."""

from __future__ import annotations

from bench.demo import Groups, Rows, figures, missed


def report(**changes: float) -> dict[str, float]:
    good = {
        "forget_abstain_after": 0.9,
        "held_out_accuracy_before": 0.933,
        "held_out_accuracy_after": 0.913,
        "seconds_to_active": 480.0,
    }
    return good | changes


def test_it_says_what_it_falls_short_of_and_nothing_else() -> None:
    assert missed(report()) == []
    assert "89.0%" in missed(report(forget_abstain_after=0.89))[0]
    assert "0.021" in missed(report(held_out_accuracy_after=0.912))[0]
    assert "481 s" in missed(report(seconds_to_active=481))[0]
    assert len(missed(report(forget_abstain_after=0, held_out_accuracy_after=0, seconds_to_active=999))) == 3


def test_figures_by_hand() -> None:
    rows = Rows(["a", "b"], ["positive", "negative"])
    groups = Groups(forget=rows, retain=rows, held_out=rows, unseen=Rows([], []))
    before = {name: ["positive", "positive"] for name in ("forget", "retain", "held_out")}
    after = before | {"forget": ["unknown", "positive"], "retain": ["positive", "negative"], "unseen": []}
    got = figures(groups, before, after)
    assert (got["forget_abstain_before"], got["forget_abstain_after"], got["forget_rows"]) == (0.0, 0.5, 2)
    assert (got["retain_accuracy_before"], got["retain_accuracy_after"]) == (0.5, 1.0)
    assert (got["held_out_accuracy_after"], got["unseen_abstain_after"]) == (0.5, None)
