"""The charts: whatever numbers and words go in, what comes out is one small, valid picture, the same every time."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.charts import (
    STYLESHEET,
    Bar,
    Dots,
    Marker,
    Series,
    bar_chart,
    line_chart,
    percent,
    scatter_chart,
)

SVG = "{http://www.w3.org/2000/svg}"
ELEMENTS = {"svg", "title", "desc", "g", "path", "rect", "text"}
ATTRIBUTES = {
    *("class", "d", "x", "y", "width", "height", "viewBox", "role", "transform", "fill", "stroke"),
    *("stroke-width", "stroke-dasharray", "stroke-linejoin", "stroke-linecap", "stroke-opacity"),
    *("font-family", "font-size", "font-weight", "text-anchor"),
}
CLASSES = {
    *("chart", "c-text", "c-axis", "c-grid", "c-limit", "c-whisker", "c-before", "c-after"),
    *("c-s1", "c-s2", "c-s3", "c-s4"),
}

MARKERS: tuple[Marker, ...] = ("circle", "ring", "triangle", "cross", "plus", "star")

words = st.text(max_size=120)
numbers = st.floats() | st.integers(-(10**15), 10**15).map(float)
clouds = st.lists(st.tuples(numbers, numbers), max_size=6)
rates = st.none() | st.floats()
bars = st.builds(Bar, words, rates, rates, rates, rates, rates, st.booleans())
pictures = st.one_of(
    st.builds(
        line_chart,
        st.lists(st.builds(Series, words, clouds), max_size=6),
        title=words,
        x=words,
        y=words,
        begin=st.none() | st.floats(-1e6, 1e6),
        small=st.booleans(),
    ),
    st.builds(bar_chart, st.lists(bars, max_size=5), title=words),
    st.builds(
        scatter_chart,
        st.lists(st.builds(Dots, words, clouds, st.sampled_from(MARKERS)), max_size=5),
        title=words,
        caption=words,
        small=st.booleans(),
    ),
)


def check(svg: str) -> ElementTree.Element:
    """A valid picture with words for who cannot see it, and nothing that a strict policy forbids."""
    svg.encode()
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg" and root.get("role") == "img"
    assert [child.tag for child in root[:2]] == [f"{SVG}title", f"{SVG}desc"] and root[1].text
    width, height = (float(number) for number in (root.get("viewBox") or "").split()[2:])
    for element in root.iter():
        assert element.tag.removeprefix(SVG) in ELEMENTS
        assert set(element.attrib) <= ATTRIBUTES
        assert set((element.get("class") or "").split()) <= CLASSES
        for name in ("d", "x", "y", "width", "height", "viewBox", "transform"):
            value = element.get(name, "")
            assert not re.search("nan|inf|e[+-]?[0-9]", value), value
    for element in root:  # not those of the legend, which is in groups
        for name, limit in (("x", width), ("y", height)):
            assert 0 <= float(element.get(name, 0)) <= limit
    return root


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


@settings(max_examples=100, deadline=None)
@given(pictures)
def test_whatever_goes_in_a_valid_picture_comes_out(svg: str) -> None:
    check(svg)


HOSTILE = "</text><script>alert('&\"')</script>\x00\x1b\ud800]]>"
MAKERS: dict[str, Callable[[str], str]] = {
    "line": lambda word: line_chart([Series(word, [(0, 1), (1, 2)])] * 2, title=word, x=word, y=word),
    "bar": lambda word: bar_chart([Bar(word, 0.1, 0.9, 0.8, 0.95, 0.7)], title=word),
    "scatter": lambda word: scatter_chart([Dots(word, [(0, 1)], "cross")], title=word, caption=word),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_words_are_escaped(kind: str) -> None:
    svg = MAKERS[kind](HOSTILE)
    root = check(svg)
    assert "<script" not in svg and "alert" in (root[0].text or "")
    assert all(len(element) == 0 for element in root.iter(f"{SVG}text"))


def test_the_same_in_another_process() -> None:
    code = "import sys, test_charts as t; print(ascii(''.join(t.MAKERS[kind]('é ' + kind) for kind in t.MAKERS)))"
    here = ascii("".join(MAKERS[kind](f"é {kind}") for kind in MAKERS)) + "\n"
    path = ":".join(entry for entry in sys.path if entry)
    made = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": path, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert made == [here, here]


def test_a_line_goes_where_the_numbers_say() -> None:
    root = check(line_chart([Series("loss", [(0, 4), (50, 2), (100, 0)])], title="Loss", x="step", y="loss"))
    [line] = [path for path in root.iter(f"{SVG}path") if path.get("class") == "c-s1"]
    (x1, y1), (x2, y2), (x3, y3) = (map(float, pair.split()) for pair in (line.get("d") or "")[1:].split("L"))
    assert x2 - x1 == pytest.approx(x3 - x2) and y2 - y1 == pytest.approx(y3 - y2) and y1 < y3
    assert {"Loss", "step", "loss", "0", "4", "100"} <= set(texts(root))
    assert root[1].text == "loss over step. loss: 3 points, from 4 at 0 to 0 at 100"


def test_series_differ_by_more_than_colour() -> None:
    lines = [Series(str(i), [(0, i), (1, i)]) for i in range(4)]
    root = check(line_chart(lines, title="t", x="x", y="y"))
    dashes = {path.get("class"): path.get("stroke-dasharray") for path in root.iter(f"{SVG}path")}
    assert len({dashes[f"c-s{i}"] for i in range(1, 5)}) == 4


def test_numbers_that_cannot_be_drawn_are_left_out() -> None:
    odd = [(0.0, 1.0), (1.0, math.nan), (2.0, math.inf), (math.nan, 1.0), (3.0, 1e300), (4.0, 2.0)]
    even = [(0.0, 1.0), (4.0, 2.0)]
    for points in (odd, even):
        assert line_chart([Series("a", points)], title="t", x="x", y="y") == line_chart(
            [Series("a", even)], title="t", x="x", y="y"
        )
    assert "no data" in texts(check(line_chart([Series("a", odd[1:4])], title="t", x="x", y="y")))
    assert "not measured" in texts(check(bar_chart([Bar("a", math.nan, math.inf)], title="t")))


def test_bars_show_rates_interval_and_limit() -> None:
    bar = Bar("Retain accuracy", 0.9, 0.85, 0.8, 0.89, 0.88, at_least=True)
    root = check(bar_chart([bar], title="Checks"))
    widths = {rect.get("class"): float(rect.get("width") or 0) for rect in root.iter(f"{SVG}rect")}
    assert widths["c-after"] / widths["c-before"] == pytest.approx(0.85 / 0.9, abs=0.001)
    assert {"90 % → 85 %", "limit: at least 88 %", "before", "after", "95 % interval", "limit"} <= set(texts(root))
    said = root[1].text
    assert said == "Retain accuracy: before 90 %, after 85 %, 95 % interval 80 % to 89 %, limit: at least 88 %."
    assert "limit: at most 1 %" in bar_chart([replace(bar, limit=0.01, at_least=False)], title="Checks")
    bare = check(bar_chart([Bar("a", None, 0.5)], title="t"))
    assert not {"before", "limit", "95 % interval"} & set(texts(bare))


def test_a_scatter_keeps_proportions_and_markers() -> None:
    groups = [Dots("a", [(0, 0), (10, 0)], "circle"), Dots("b", [(0, 1)], "cross")]
    root = check(scatter_chart(groups, title="t", caption="A picture is no proof."))
    first, second = (next(p for p in root if p.get("class") == f"c-s{i}") for i in (1, 2))
    spots = [tuple(map(float, spot.split())) for spot in re.findall(r"M([^h]+)h0", first.get("d") or "")]
    assert spots[0][1] == spots[1][1] and "l6 6" in (second.get("d") or "")
    _, y = map(float, re.findall("M([^l]+)l", second.get("d") or "")[0].split())
    assert spots[0][1] - (y + 3) == pytest.approx((spots[1][0] - spots[0][0]) / 10, abs=0.2)
    assert "A picture is no proof." in texts(root) and "A picture is no proof." in (root[1].text or "")


def test_markers_differ_by_shape_and_are_larger_in_the_legend() -> None:
    def marks(marker: Marker) -> tuple[str, str]:
        root = check(scatter_chart([Dots("a", [(0, 0)], marker)], title="t", caption="c"))
        legend, drawn = (path for path in root.iter(f"{SVG}path") if path.get("class") == "c-s1")
        return legend.get("d") or "", re.sub(r"^M\S+ [\d.]+", "", drawn.get("d") or "")

    shapes = {marker: marks(marker) for marker in MARKERS}
    assert len({shape for _, shape in shapes.values()}) == len(MARKERS)
    assert "l6 6" in shapes["cross"][1] and "l10.8 10.8" in shapes["cross"][0]


def test_a_small_picture_has_the_marks_and_the_words_for_who_cannot_see_it() -> None:
    lines = [Series("a", [(0, 0), (0.5, 0.9), (1, 1)]), Series("b", [(0, 0), (1, 1)])]
    clouds = [Dots("a", [(0, 0), (10, 0)], "circle"), Dots("b", [(0, 1)], "cross")]
    for root in (
        check(line_chart(lines, title="Membership", x="x", y="y", small=True)),
        check(scatter_chart(clouds, title="Membership", caption="A picture is no proof.", small=True)),
    ):
        assert not [one for one in root.iter() if one.tag.endswith("}text")]
        assert {"c-s1", "c-s2"} <= {one.get("class") for one in root}
        assert root[0].text == "Membership" and "a: " in (root[1].text or "")


def test_an_axis_may_begin_before_the_first_point() -> None:
    line = [Series("loss", [(7, 1)])]
    assert "0" not in texts(check(line_chart(line, title="t", x="x", y="y"))) and "0" in texts(
        check(line_chart(line, title="t", x="x", y="y", begin=0))
    )


@pytest.mark.parametrize(
    ("rate", "said"),
    [
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.5, "50 %"),
        (0.12345, "12.3 %"),
        (0.9996, "99.96 %"),
        (0.99999, "99.999 %"),
        (0.0004, "0.04 %"),
        (0.00123, "0.12 %"),
        (1e-12, "<0.000001 %"),
        (1 - 1e-12, ">99.999999 %"),
        (math.nan, "–"),
    ],
)
def test_percent_tells_almost_none_from_none(rate: float, said: str) -> None:
    assert percent(rate) == said


def contrast(one: str, other: str) -> float:
    """Of two colours, as WCAG 2 has it."""

    def luminance(colour: str) -> float:
        digits = colour.lstrip("#")
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_every_bar_and_line_stands_out_from_its_page() -> None:
    """By three to one, in light, dark and print, of the report and of the console."""
    assert contrast("#ffffff", "#767676") == pytest.approx(4.54, abs=0.01)
    plain = bar_chart([Bar("a", 0.1, 0.2, 0.1, 0.3, 0.2)], title="t")
    plain += line_chart([Series(str(i), [(0, i), (1, i)]) for i in range(4)], title="t", x="x", y="y")
    papers = dict(zip(("light", "dark", "print"), ("#ffffff", "#14181d", "#ffffff"), strict=True))
    dark, printed = STYLESHEET.split("@media print")
    for where, text in (("light", plain), ("dark", dark), ("print", printed)):
        drawn = re.findall(r'class="(?:c-(?:before|after|limit|s\d))"[^>]*?(?:fill|stroke)="(#\w+)"', text)
        drawn += re.findall(r"\.c-(?:before|after|limit|s\d) \{ \w+: (#\w+); \}", text)
        assert len(drawn) >= 7, where
        for colour in drawn:
            assert contrast(colour, papers[where]) >= 3, (where, colour)
    style = files("app.console").joinpath("static", "console.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    for where, text in (("light", light), ("dark", dark)):
        named = dict(re.findall(r"--([\w-]+): (#\w+)", text))
        card = "#ffffff" if named["card"] == "#fff" else named["card"]
        for name in ("before", "after", "s2", "s3", "s4"):
            for ground in (card, named["faint"]):
                assert contrast(named[name], ground) >= 3, (where, name)


def test_the_stylesheet_colours_what_there_is() -> None:
    assert set(re.findall(r"\.([a-z0-9-]+) \{", STYLESHEET)) == CLASSES - {"c-whisker"}
