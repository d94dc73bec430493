"""The pictures of a request's evidence (``app.evidence``), from its document alone: the same bytes every time.

``small``: the same without a word to see, for lists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from app.charts import WIDTH, Dots, Marker, Series, line_chart, scatter_chart

_GAP = 0.12  # between the two halves, of their width
_FRAME = re.compile(r'd="M1 ([\d.]+)H639V([\d.]+)H1Z"')  # the chart's, which gets a line down its middle

NO_PROOF = "A picture is no proof: distances between clusters, and their sizes, mean nothing in it."
SOLID, DASHED = "solid: before, the base model", "dashed: after, with the request in force"
"""What the lines of the attack are, where a picture has no words; ``app.charts`` dashes the second line."""
# Strokes are of the texts to forget, closed shapes of the others; which of them says the label, as the colour does.
_MARKERS: dict[str, tuple[Marker, ...]] = {
    "forget": ("cross", "plus", "star"),
    "retain": ("circle", "ring", "triangle"),
}


def embedding_svg(document: Mapping[str, Any], *, small: bool = False) -> str:
    """The bare model on the left, the request in force on the right, on one scale: a text that stayed is where it was.

    Drawn in one chart, the right half shifted, so that both have the same scale.
    """
    found = document["embedding"]
    clusters = sorted(found["clusters"], key=lambda one: one["set"] == "forget")  # what is to be forgotten on top
    left, right = (sorted(x for one in clusters for x, _ in one[view]) for view in ("base", "served"))
    # So far that the middle of the chart, where the line will be, is between the halves.
    shift = max(2 * left[-1] - left[0] - right[-1], left[0] + right[-1] - 2 * right[0])
    shift += _GAP * max(left[-1] - left[0], right[-1] - right[0])
    labels = sorted({one["label"] for one in clusters}, key=lambda label: (label is None, label))
    groups = [
        Dots(
            name=f"{one['set']}, {one['label'] if one['label'] is not None else 'no label'} ({len(one['base'])})",
            points=[*_points(one["base"]), *((x + shift, y) for x, y in _points(one["served"]))],
            marker=_MARKERS[one["set"]][labels.index(one["label"]) % 3],
        )
        for one in clusters
    ]
    shown = sum(len(one["base"]) for one in clusters)
    caption = (
        "t-SNE of the last hidden states at the position that predicts the label, both models on one plane. "
        f"{found['moved']} of the {shown} texts are answered behind the prompt; the others are where they were. "
        f"{NO_PROOF}"
    )
    title = "Left: the base model. Right: with the request in force."
    chart = scatter_chart(groups, title=title, caption=caption, small=small)
    return _FRAME.sub(rf'd="M1 \1H639V\2H1ZM{WIDTH // 2} \1V\2"', chart, count=1)


def membership_svg(document: Mapping[str, Any], *, small: bool = False) -> str:
    """ROC curves of the membership attack before and after, and the line of guessing."""
    found = document["membership"]
    lines = [
        Series(_named(name, found[view]), _points(found[view]["roc"]))
        for name, view in (("base model", "base"), ("request in force", "served"))
    ]
    others = "held-out" if found["non_members"] == "held out" else "retain"
    return line_chart(
        [*lines, Series("guessing: AUC 0.5", [(0.0, 0.0), (1.0, 1.0)])],
        title=f"Membership attack: {found['members']} forget texts against {found['others']} {others} texts",
        x=f"{others} texts taken for forget texts, share",
        y="forget texts recognised, share",
        small=small,
    )


def _named(name: str, attack: Mapping[str, Any]) -> str:
    return f"{name}: AUC {attack['auc']:.3f} (95 %: {attack['low']:.3f} to {attack['high']:.3f})"


def _points(pairs: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in pairs]
