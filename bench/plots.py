"""Pictures of the recorded results: ``python -m bench.plots``. Needs matplotlib (extra ``bench``)."""

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
    for name, draw in PICTURES.items():
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
    for panel in panels.reshape(len(kinds), -1)[-1]:
        panel.set_xlabel("false abstain on held-out texts, %")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def quality(found: dict[str, Any]) -> Any:
    """Every method on the two test sets; the states of forget and retain texts, before and after; and the size of φ.

    Repetitions with another seed are left out.
    """
    methods = {name: sets for name, sets in found["methods"].items() if "p = " not in name and "run-" not in name}
    sizes = {int(name.split("p = ")[1]): sets for name, sets in found["methods"].items() if "p = " in name}
    widths = [1.6, 1, 1, 0.8] if sizes else [1.6, 1, 1]
    figure, (bars, *planes) = plt.subplots(
        1, len(widths), figsize=(12, 4), layout="constrained", gridspec_kw={"width_ratios": widths}
    )
    places = range(len(methods))
    kinds = (
        (0.2, "test_retain", "test retain (high is good)", "#1f6feb"),
        (-0.2, "test_forget", "test forget (low is good)", "#cf222e"),
    )
    if sizes:
        panel = planes.pop()
        sizes = dict(sorted((sizes | {found["tokens"]: methods["SPUL"]}).items()))
        for _, name, _, colour in kinds:
            panel.plot(list(sizes), [100 * sets[name]["accuracy"] for sets in sizes.values()], "o-", color=colour)
        panel.set_title("SPUL, by virtual tokens", fontsize=9)
        panel.set_xticks(list(sizes))
        panel.set_ylim(-4, 104)
    for offset, name, label, colour in kinds:
        sets = [method[name] for method in methods.values()]
        values = [100 * one["accuracy"] for one in sets]
        spread = [
            [100 * max(0.0, one["accuracy"] - one["accuracy_interval"][0]) for one in sets],
            [100 * max(0.0, one["accuracy_interval"][1] - one["accuracy"]) for one in sets],
        ]
        bars.barh([-p + offset for p in places], values, 0.38, xerr=spread, color=colour, label=label)
    bars.set_yticks([-p for p in places], list(methods))
    bars.set_xlabel("accuracy, %")
    bars.grid(False, axis="y")
    for model, plane in zip(("base", "unlearned"), planes, strict=True):
        for group, colours in (("train_retain", ("#79c0ff", "#1f6feb")), ("train_forget", ("#ff9b8e", "#cf222e"))):
            for label, colour in zip(("negative", "positive"), colours, strict=True):
                rows = [p for p in found["embedding"] if (p["model"], p["group"], p["label"]) == (model, group, label)]
                named = f"{group.removeprefix('train_')}, {label}" if model == "base" else None
                plane.scatter([p["x"] for p in rows], [p["y"] for p in rows], s=5, color=colour, label=named)
        plane.set_title(f"{model} (t-SNE; no proof)", fontsize=9)
        plane.set_xticks([])
        plane.set_yticks([])
    figure.legend(loc="outside lower center", ncols=6, frameon=False)
    return figure


def training(found: dict[str, Any]) -> Any:
    """Rows per second of one training step."""
    figure, panel = plt.subplots(figsize=(7, 3.2), layout="constrained")
    cases = [
        (template, size, sizes[size]) for template, sizes in found["templates"].items() for size in sizes if "+" in size
    ]
    ways = ("letheon", "letheon_cold", "naive_eager", "naive", "peft")
    for at, way in enumerate(ways):
        places = [place + 0.16 * at for place in range(len(cases))]
        panel.bar(places, [case[f"{way}_rows_per_second"] for *_, case in cases], 0.15, label=way.replace("_", ", "))
    panel.set_xticks([place + 0.32 for place in range(len(cases))], [f"{t}\n{s} rows" for t, s, _ in cases])
    panel.set_ylabel("rows per second")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return figure


def request_sizes(found: dict[str, Any]) -> Any:
    """What is forgotten, and the time to active, by the number of texts: every request a point."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    rows = [row for row in found["requests"] if "failure" not in row]
    for key, label, colour in (
        ("own_abstain", "the texts", "#1f6feb"),
        ("variants_abstain", "their variants", "#8250df"),
        ("unseen_abstain", "unseen texts on the person", "#d29922"),
        ("false_forget", "unrelated texts", "#cf222e"),
    ):
        left.plot([row["texts"] for row in rows], [100 * row[key] for row in rows], ".", color=colour, label=label)
    left.set_ylabel("answered unknown, %")
    right.plot([row["texts"] for row in rows], [row["seconds"] for row in rows], ".", color="#1f6feb", label="measured")
    asked = {int(size): by_size["asked_seconds"] for size, by_size in found["by_size"].items()}
    right.plot(list(asked), list(asked.values()), "_", markersize=14, color="#cf222e", label="asked")
    right.set_ylabel("seconds to active")
    for panel in (left, right):
        panel.set_xscale("log", base=2)
        panel.set_xticks(list(asked), [str(size) for size in asked])
        panel.set_xlabel("texts in the request")
        panel.legend(frameon=False, fontsize=8)
    return figure


def attacks(found: dict[str, Any]) -> Any:
    """What is still refused of the forget texts under each attack; and the precision matrix."""
    matrix = found["precision"]
    figure, panels = plt.subplots(1, 3 if matrix else 1, figsize=(11, 3.6), layout="constrained", squeeze=False)
    bars, *cells = panels[0]
    mean = found["mean"]
    rows = {name: mean[name]["unknown"] for name in mean if "unknown" in mean[name]}
    rows |= {f"variant: {rule}": share for rule, share in mean["variants"].items() if share is not None}
    bars.barh(range(len(rows)), [100 * share for share in rows.values()], color="#1f6feb")
    bars.set_yticks(range(len(rows)), [name.replace("_", " ") for name in rows])
    bars.invert_yaxis()
    bars.set_xlim(0, 100)
    bars.set_xlabel("forget texts answered unknown, %")
    bars.grid(False, axis="y")
    for panel, key, title in zip(
        cells, ("own_abstain", "retain_accuracy"), ("own texts answered unknown, %", "retain accuracy, %"), strict=False
    ):
        names = list(matrix["trained_under"])
        values = [[100 * matrix["trained_under"][a][b][key] for b in names if b != "bare"] for a in names]
        panel.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                panel.text(x, y, f"{value:.0f}", ha="center", va="center", color="white" if value > 55 else "black")
        panel.set_xticks(range(len(names) - 1), [n for n in names if n != "bare"])
        panel.set_yticks(range(len(names)), ["no prompt" if n == "bare" else n for n in names])
        panel.set_xlabel("answered under")
        panel.set_ylabel("trained under")
        panel.set_title(title, fontsize=9)
        panel.grid(False)
    return figure


def oracle(found: dict[str, Any]) -> Any:
    """Accuracy and refusals of the target, before and after, beside a model that never saw the texts; and LiRA."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    groups = ("members", "not_members", "held_out")
    colours = {"bare": "#8c959f", "prompt": "#8250df", "served": "#1f6feb", "oracle": "#d29922"}
    for at, (who, colour) in enumerate(colours.items()):
        places = [place + 0.2 * at for place in range(len(groups))]
        sets = [found["gap"][who][group] for group in groups]
        left.bar(places, [100 * one["accuracy"] for one in sets], 0.18, color=colour, label=who)
        left.bar(
            places,
            [100 * min(one["abstain"], 1 - one["accuracy"]) for one in sets],
            0.18,
            bottom=[100 * one["accuracy"] for one in sets],
            color=colour,
            alpha=0.3,
        )
        right.bar(at, found["membership"][who]["lira_auc"], 0.6, color=colour)
    left.set_xticks([place + 0.3 for place in range(len(groups))], [group.replace("_", " ") for group in groups])
    left.set_ylabel("right, and (pale) answered unknown, %")
    right.axhline(0.5, color="black", linewidth=0.8)
    right.set_xticks(range(4), list(colours))
    right.set_ylim(0, 1)
    right.set_ylabel("LiRA, area under the curve")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def starts(found: dict[str, Any]) -> Any:
    """Steps of every training, by what it began as."""
    figure, panel = plt.subplots(figsize=(7, 3), layout="constrained")
    names = list(found["by_start"])
    rows = found["trainings"]
    panel.plot([names.index(row["start"]) for row in rows], [row["steps"] for row in rows], "o", alpha=0.6)
    panel.set_xticks(range(len(names)), names)
    panel.set_ylabel("steps until it passes, or to the end")
    panel.set_ylim(0)
    return figure


def serving(found: dict[str, Any]) -> Any:
    """Texts a second: the engine's ways, and over HTTP."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 3), layout="constrained", gridspec_kw={"width_ratios": [2, 1]}
    )
    ways = ("no prompt", "one prompt", "PEFT, last logits", "PEFT")
    for place, (size, one) in enumerate(found["batches"].items()):
        active = one["texts_per_second"]
        rates = [one["texts_per_second_bare"], active, active / one["over_peft"], active / one["over_peft_plain"]]
        left.bar([x + 0.35 * place for x in range(4)], rates, 0.33, label=f"batches of {size}")
    left.set_xticks([x + 0.17 for x in range(4)], ways)
    left.set_ylabel("texts a second, in process")
    left.legend(frameon=False)
    left.set_title(found["date"], fontsize="medium")
    right.set_title(f"{found['date_http']}, maybe another machine", fontsize="medium")
    names = {"engine": "engine", "http": "HTTP", "http_unbatched": "HTTP,\none at a time"}
    right.bar(list(names.values()), [found[f"{name}_texts_per_second"] for name in names], 0.6)
    right.set_ylabel(f"texts a second, {found['clients']} clients")
    return figure


def load(found: dict[str, Any]) -> Any:
    """Resident memory over the time under load."""
    figure, panel = plt.subplots(figsize=(7, 2.6), layout="constrained")
    readings = found["rss_mb"]
    step = found["seconds"] / max(1, len(readings) - 1) / 60
    panel.plot([i * step for i in range(len(readings))], readings)
    panel.set_ylim(0)
    panel.set_xlabel(f"minutes under {found['clients']} clients")
    panel.set_ylabel("resident memory, MiB")
    return figure


PICTURES = {
    "sequence": sequence,
    "frontier": frontier,
    "quality": quality,
    "training": training,
    "request_sizes": request_sizes,
    "attacks": attacks,
    "oracle": oracle,
    "starts": starts,
    "serving": serving,
    "load": load,
}

if __name__ == "__main__":
    main()
