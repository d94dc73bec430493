"""The README's pictures, from the recorded results: ``python -m bench.plots``. Needs matplotlib (extra ``bench``)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot as plt

COLOURS = {
    "routed": "#1f6feb",
    "routed, prompts decide all": "#2da44e",
    "gate-and-refuse": "#d29922",
    "concatenate": "#8250df",
    "routed prompts concatenated": "#cf222e",
}
SERVED = 0.002  # of the frontier's rates: the service's default
STYLE: Any = {
    "svg.hashsalt": "letheon",  # the same file for the same numbers
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("docs/bench"))
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in (("sequence", sequence), ("frontier", frontier)):
        if not (args.results / f"{name}.json").exists():
            print(f"{args.results / name}.json is not there")
            continue
        found = json.loads((args.results / f"{name}.json").read_text(encoding="utf-8"))
        with mpl.rc_context(STYLE):
            figure = draw(found)
            figure.savefig(args.out / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)
        print(args.out / f"{name}.svg")


def sequence(found: dict[str, Any]) -> Any:
    """Curves over the number of requests in force."""
    figure, panels = plt.subplots(1, 4, figsize=(12, 3.1), layout="constrained")
    titles = {
        "own_worst": "own texts answered unknown,\nworst request",
        "unseen_worst": "unseen texts on the person\nanswered unknown, worst request",
        "false_abstain_other_people": "texts on other people\nanswered unknown",
        "retain_drop": "retain accuracy lost,\npercentage points",
    }
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        for name, colour in COLOURS.items():
            curve = found["curves"].get(name)
            if not curve:
                continue
            values = [100 * point[key] for point in curve.values()]
            panel.plot([int(k) for k in curve], values, marker="o", markersize=3, color=colour, label=name)
        panel.set_title(title, fontsize=9)
        panel.set_xscale("log", base=2)
        panel.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
        panel.set_xlabel("requests in force")
        if key != "retain_drop":
            panel.set_ylim(-4, 104)
            panel.set_ylabel("%")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def frontier(found: dict[str, Any]) -> Any:
    """Unseen recall against false abstain; a column per size, a row per kind."""
    means = found["averages"]
    kinds = [kind for kind in ("people", "topics") if any(row["kind"] == kind for row in means)]
    sizes = sorted({row["texts"] for row in means})
    figure, panels = plt.subplots(len(kinds), len(sizes), figsize=(12, 2.7 * len(kinds)), layout="constrained")
    for kind, line in zip(kinds, panels.reshape(len(kinds), -1), strict=True):
        for size, panel in zip(sizes, line, strict=True):
            rows = [row for row in means if row["kind"] == kind and row["texts"] == size]
            curve = [row for row in rows if row["rate"] is not None]
            for who, label, colour in (("gate", "gate alone", "#d29922"), ("both", "gate, then prompt", "#1f6feb")):
                x = [100 * row[f"{who}_false"] for row in curve]
                y = [100 * row[f"{who}_unseen"] for row in curve]
                panel.plot(x, y, marker="o", markersize=3, color=colour, label=label)
            for row in (row for row in rows if row["rate"] is None):
                x, y = [100 * row["prompt_false"]], [100 * row["prompt_unseen"]]
                panel.plot(x, y, "X", color="#cf222e", label="prompt alone")
            for row in (row for row in curve if row["rate"] == SERVED):
                x, y = [100 * row["routed_false"]], [100 * row["routed_unseen"]]
                panel.plot(x, y, "*", markersize=10, color="#2da44e", label="the service's default")
            panel.set_title(f"{kind}, {size} text{'s' if size > 1 else ''}", fontsize=9)
            panel.set_xscale("symlog", linthresh=0.05)
            panel.set_xlim(-0.01, 40)
            panel.set_xticks([0, 0.1, 1, 10], ["0", "0.1", "1", "10"])
            panel.set_ylim(-4, 104)
        line[0].set_ylabel("unseen recall, %")
    figure.supxlabel("false abstain on held-out texts, %", fontsize=9)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


if __name__ == "__main__":
    main()
