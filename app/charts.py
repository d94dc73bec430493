"""Charts as SVG text: pure functions, the same arguments give the same bytes, and nothing but the standard library.

They stand in pages whose Content-Security-Policy forbids inline styles and scripts, so there are presentation
attributes and class names only. The attributes look right on white; a page's stylesheet recolours by class: ``stroke``
of ``c-s1``…``c-s4``, ``c-axis``, ``c-grid``, ``c-limit``, and ``fill`` of ``c-text``, ``c-before``, ``c-after``
(``STYLESHEET``). A mark never has both. ``<title>`` and ``<desc>`` say in words what the picture shows.

Numbers that are not finite, or too large to draw (1e12), are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

WIDTH = 640
STYLESHEET = """\
.chart { max-width: 100%; height: auto; }
@media (prefers-color-scheme: dark) {
  .c-text { fill: #e2e6ea; }
  .c-axis { stroke: #9aa5b1; }
  .c-grid { stroke: #39424d; }
  .c-limit { stroke: #ff8a80; }
  .c-before { fill: #6f7c8a; }
  .c-after { fill: #6ba6e8; }
  .c-s1 { stroke: #6ba6e8; }
  .c-s2 { stroke: #f0a35e; }
  .c-s3 { stroke: #4fc1ad; }
  .c-s4 { stroke: #c39af5; }
}
@media print {
  .c-text { fill: #1f2933; }
  .c-axis { stroke: #52606d; }
  .c-grid { stroke: #d9dee4; }
  .c-limit { stroke: #b42318; }
  .c-before { fill: #7d8995; }
  .c-after { fill: #1f5fa8; }
  .c-s1 { stroke: #1f5fa8; }
  .c-s2 { stroke: #b45309; }
  .c-s3 { stroke: #0f766e; }
  .c-s4 { stroke: #6d28d9; }
}
"""
"""What a page may take as it is: charts fit their column, and have colours of their own where it is dark."""

_TEXT, _AXIS, _GRID, _LIMIT, _BEFORE, _AFTER = "#1f2933", "#52606d", "#d9dee4", "#b42318", "#7d8995", "#1f5fa8"
_SERIES = ("#1f5fa8", "#b45309", "#0f766e", "#6d28d9")
_DASHES = ("", "7 4", "2 3", "9 3 2 3")  # colour alone must not carry the meaning
_SIZE = 12.0
_FAR = 1e12
_NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

Point = tuple[float, float]
Marker = Literal["circle", "ring", "triangle", "cross", "plus", "star"]


@dataclass(frozen=True)
class Series:
    """A line: its name in the legend, and its points from left to right."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Bar:
    """A rate before and after, 0..1; the interval and the limit are about ``after``.

    ``at_least``: the limit is the least that it may be, else the most.
    """

    label: str
    before: float | None
    after: float | None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    at_least: bool = True


@dataclass(frozen=True)
class Dots:
    """A cloud of points under one name."""

    name: str
    points: Sequence[Point]
    marker: Marker


def line_chart(
    series: Sequence[Series], *, title: str, x: str, y: str, begin: float | None = None, small: bool = False
) -> str:
    """Lines over a common pair of axes, named ``x`` and ``y``; at most four are told apart.

    ``begin``: the least of ``x`` that is shown, whatever the points are. ``small``: without a word or a number to see.
    """
    lines = [(one.name, _drawable(one.points)) for one in series]
    everything = [point for _, points in lines for point in points]
    said = "; ".join(_line_said(name, points) for name, points in lines) or "No data."
    keys = [_line_key(i, name) for i, (name, _) in enumerate(lines)] if len(lines) > 1 else []
    head, top = ([], -10.0) if small else _head(title, keys)
    if not everything:
        return _svg(title, said, [*head, _text(WIDTH / 2, top + 40, "no data", anchor="middle")], top + 80)
    left, right, bottom = 1.0 if small else 64.0, WIDTH - (1.0 if small else 16.0), top + 250.0
    xs = [p[0] for p in everything] + ([] if begin is None else [begin])
    x_ticks, y_ticks = _ticks(xs, 8), _ticks([p[1] for p in everything], 5)
    across, up = _scale(x_ticks, left, right), _scale(y_ticks, bottom, top + 18)
    parts = [*head, _text(left, top + 6, y)]
    for tick in y_ticks:
        parts += [_line(left, up(tick), right, up(tick), "c-grid", _GRID)]
        parts += [_text(left - 8, up(tick) + 4, _number(tick), anchor="end")]
    for tick in x_ticks:
        parts += [_line(across(tick), bottom, across(tick), bottom + 5, "c-axis", _AXIS)]
        parts += [_text(across(tick), bottom + 19, _number(tick), anchor="middle")]
    parts += [_line(left, bottom, right, bottom, "c-axis", _AXIS), _text(right, bottom + 37, x, anchor="end")]
    parts = [part for part in parts if not (small and part.startswith("<text"))]
    for i, (_, points) in enumerate(lines):
        parts += _polyline(i, [(across(a), up(b)) for a, b in points])
    return _svg(title, f"{y} over {x}. {said}", parts, bottom + (6 if small else 46))


def bar_chart(bars: Sequence[Bar], *, title: str) -> str:
    """Rates as horizontal bars from 0 to 100 %: before and after, interval, and the limit that must be kept."""
    rows = [_bar_in_range(bar) for bar in bars]
    keys = []
    if any(bar.before is not None for bar in rows):
        keys.append((_rect(0, -9, 14, 10, "c-before", _BEFORE), "before"))
    if any(bar.after is not None for bar in rows):
        keys.append((_rect(0, -9, 14, 10, "c-after", _AFTER), "after"))
    if any(bar.low is not None and bar.high is not None for bar in rows):
        keys.append((_whisker(0, 14, -4), "95 % interval"))
    if any(bar.limit is not None for bar in rows):
        keys.append((_line(7, -11, 7, 3, "c-limit", _LIMIT, 2.0), "limit"))
    head, top = _head(title, keys)
    left, right = 208.0, 470.0
    plot_top, height = top + 4, 44.0
    bottom = plot_top + height * max(1, len(rows))
    parts = list(head)
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        at = left + tick * (right - left)
        parts += [_line(at, plot_top, at, bottom, "c-grid", _GRID)]
        parts += [_text(at, bottom + 16, percent(tick), anchor="middle", size=11)]
    for i, bar in enumerate(rows):
        parts += _bar(bar, plot_top + i * height + height / 2, left, right)
    parts += [_line(left, plot_top, left, bottom, "c-axis", _AXIS)]
    if not rows:
        parts += [_text((left + right) / 2, plot_top + height / 2, "no data", anchor="middle")]
    said = " ".join(_bar_said(bar) for bar in rows) or "No data."
    return _svg(title, said, parts, bottom + 26)


def scatter_chart(groups: Sequence[Dots], *, title: str, caption: str, small: bool = False) -> str:
    """Clouds of points on axes without a scale, both stretched alike; ``caption`` stands below.

    ``small``: without a word to see.
    """
    clouds = [(one, _drawable(one.points)) for one in groups]
    everything = [point for _, points in clouds for point in points]
    keys = [(_cloud(i, one.marker, [(9.0, -4.0)], size=1.8), one.name) for i, (one, _) in enumerate(clouds)]
    head, top = ([], 1.0) if small else _head(title, keys)
    left, right, bottom, margin = 1.0, WIDTH - 1.0, top + 380.0, 14.0
    parts = [*head, _frame(left, top, right, bottom)]
    if everything:
        xs, ys = [p[0] for p in everything], [p[1] for p in everything]
        room = (right - left - 2 * margin, bottom - top - 2 * margin)
        wide, tall = max(xs) - min(xs), max(ys) - min(ys)
        # Half a room where all is on one spot: there is no size to stretch.
        scale = min(room[0] / wide if wide > _tiny(xs) else math.inf, room[1] / tall if tall > _tiny(ys) else math.inf)
        scale = scale if math.isfinite(scale) else 0.0
        middle = (min(xs) + wide / 2, min(ys) + tall / 2)
        at = ((left + right) / 2, (top + bottom) / 2)
        for i, (one, points) in enumerate(clouds):
            spots = [(at[0] + (a - middle[0]) * scale, at[1] - (b - middle[1]) * scale) for a, b in points]
            parts += [_cloud(i, one.marker, spots)] if spots else []
    else:
        parts += [_text(WIDTH / 2, (top + bottom) / 2, "no data", anchor="middle")]
    lines = [] if small else _wrap(caption, 100)
    parts += [_text(left, bottom + 20 + 16 * i, line) for i, line in enumerate(lines)]
    counts = ", ".join(f"{one.name}: {len(points)} points" for one, points in clouds) or "no data"
    return _svg(title, f"{counts}. {caption}", parts, bottom + (1 if small else 12 + 16 * len(lines)))


def percent(rate: float) -> str:
    """A rate in percent; near 0 and 100 with digits enough to tell it from them."""
    value = 100 * rate
    if value in (0, 100) or not math.isfinite(value):
        return f"{value:.0f} %" if math.isfinite(value) else "–"
    if 0 < value < 1:
        return f"{_plain(float(f'{value:.2g}'), 6)} %" if value >= 1e-6 else "<0.000001 %"
    if 99 < value < 100:
        return f"{_plain(100 - float(f'{100 - value:.2g}'), 6)} %" if 100 - value >= 1e-6 else ">99.999999 %"
    return f"{_plain(value, 1)} %"


# --- parts -----------------------------------------------------------------------------------------------------------


def _svg(title: str, description: str, parts: Iterable[str], height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" class="chart" viewBox="0 0 {WIDTH} {_at(height)}" '
        f'width="{WIDTH}" height="{_at(height)}" font-family="sans-serif" font-size="{_at(_SIZE)}">'
        f"<title>{_safe(title)}</title><desc>{_safe(description)}</desc>{''.join(parts)}</svg>"
    )


def _head(title: str, keys: Sequence[tuple[str, str]]) -> tuple[list[str], float]:
    """Title and legend, and where the plot may begin."""
    parts, y = [], 18.0
    for line in _wrap(title, 72):
        parts.append(_text(0, y, line, size=14, weight="bold"))
        y += 20
    x = 0.0
    for mark, name in keys:
        name = _cut(name, 60)
        room = 22 + _SIZE * 0.58 * len(name) + 22
        if x > 0 and x + room > WIDTH:
            x, y = 0.0, y + 20
        parts.append(f'<g transform="translate({_at(x)} {_at(y)})">{mark}{_text(22, 0, name)}</g>')
        x += room
    return parts, y + (14 if keys else 0)


def _line_key(number: int, name: str) -> tuple[str, str]:
    return "".join(_polyline(number, [(0.0, -4.0), (16.0, -4.0)])), name


def _bar(bar: Bar, middle: float, left: float, right: float) -> Iterable[str]:
    def at(rate: float) -> float:
        return left + rate * (right - left)

    lines = _wrap(bar.label, 32)[:2]
    for i, line in enumerate(lines):
        yield _text(left - 10, middle + 4 + 15 * (i - (len(lines) - 1) / 2), line, anchor="end")
    shown = [(bar.before, "c-before", _BEFORE), (bar.after, "c-after", _AFTER)]
    shown = [one for one in shown if one[0] is not None]
    for i, (rate, name, colour) in enumerate(shown):
        y = middle - 16 + 13 * i + (6.5 if len(shown) == 1 else 0)
        yield _rect(left, y, max(0.5, at(rate or 0.0) - left), 12, name, colour)
    if bar.low is not None and bar.high is not None:
        yield _whisker(at(bar.low), at(bar.high), middle + 14)  # below: on the bar nobody would see it
    if bar.limit is not None:
        yield _line(at(bar.limit), middle - 18, at(bar.limit), middle + 18, "c-limit", _LIMIT, 2.0)
    values = " → ".join(percent(rate) for rate, _, _ in shown if rate is not None) or "not measured"
    yield _text(right + 14, middle + (4 if bar.limit is None else -4), values)
    if bar.limit is not None:
        yield _text(right + 14, middle + 12, _limit_said(bar), size=11)


def _limit_said(bar: Bar) -> str:
    return f"limit: {'at least' if bar.at_least else 'at most'} {percent(bar.limit or 0.0)}"


def _bar_said(bar: Bar) -> str:
    parts = [
        f"{name} {percent(rate)}" for name, rate in (("before", bar.before), ("after", bar.after)) if rate is not None
    ]
    if bar.low is not None and bar.high is not None:
        parts.append(f"95 % interval {percent(bar.low)} to {percent(bar.high)}")
    if bar.limit is not None:
        parts.append(_limit_said(bar))
    return f"{bar.label}: {', '.join(parts) or 'not measured'}."


def _bar_in_range(bar: Bar) -> Bar:
    def kept(rate: float | None) -> float | None:
        return None if rate is None or not math.isfinite(rate) else min(1.0, max(0.0, rate))

    low, high = kept(bar.low), kept(bar.high)
    return Bar(bar.label, kept(bar.before), kept(bar.after), low, high, kept(bar.limit), bar.at_least)


def _line_said(name: str, points: Sequence[Point]) -> str:
    if not points:
        return f"{name}: no data"
    (x1, y1), (x2, y2) = points[0], points[-1]
    ends = f"from {_number(y1)} at {_number(x1)} to {_number(y2)} at {_number(x2)}"
    return f"{name}: {len(points)} points, {ends}"


def _polyline(number: int, points: Sequence[Point]) -> list[str]:
    if not points:
        return []
    name, colour, dash = f"c-s{number % 4 + 1}", _SERIES[number % 4], _DASHES[number % 4]
    if len(points) == 1:
        return [_cloud(number, "circle", points)]
    path = "M" + "L".join(f"{_at(x)} {_at(y)}" for x, y in points)
    look = 'stroke-width="2" stroke-linejoin="round"' + (f' stroke-dasharray="{dash}"' if dash else "")
    return [f'<path class="{name}" d="{path}" fill="none" stroke="{colour}" {look}/>']


def _cloud(number: int, marker: Marker, points: Sequence[Point], *, size: float = 1.0) -> str:
    """All points of a group as one path: a circle is a line of no length with a round end, every other mark is drawn.

    ``size``: of a mark, in a legend that has room for larger ones.
    """
    name, colour = f"c-s{number % 4 + 1}", _SERIES[number % 4]
    arm, whole = _at(3 * size), _at(6 * size)
    if marker == "circle":
        look = f'stroke-width="{_at(5 * size)}" stroke-linecap="round"'
        left, up, mark = 0.0, 0.0, "h0"
    else:
        look = f'stroke-width="{_at(1.5 * size**0.5)}"'
        left, up, mark = {
            "ring": (3.0, 0.0, f"a{arm} {arm} 0 1 0 {whole} 0a{arm} {arm} 0 1 0 -{whole} 0"),
            "triangle": (3.0, -3.0, f"h{whole}l-{arm} -{whole}z"),
            "cross": (3.0, 3.0, f"l{whole} {whole}m0 -{whole}l-{whole} {whole}"),
            "plus": (3.0, 0.0, f"h{whole}m-{arm} -{arm}v{whole}"),
            "star": (3.0, 3.0, f"l{whole} {whole}m0 -{whole}l-{whole} {whole}m0 -{arm}h{whole}"),
        }[marker]
    path = "".join(f"M{_at(x - left * size)} {_at(y - up * size)}{mark}" for x, y in points)
    return f'<path class="{name}" d="{path}" fill="none" stroke="{colour}" stroke-opacity="0.8" {look}/>'


def _whisker(low: float, high: float, y: float) -> str:
    path = f"M{_at(low)} {_at(y - 4)}v8m0 -4H{_at(high)}m0 -4v8"
    return f'<path class="c-axis c-whisker" d="{path}" fill="none" stroke="{_AXIS}" stroke-width="1.5"/>'


def _line(
    x1: float, y1: float, x2: float, y2: float, name: str, colour: str, width: float = 1.0, dash: str = ""
) -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<path class="{name}" d="M{_at(x1)} {_at(y1)}L{_at(x2)} {_at(y2)}" fill="none" stroke="{colour}" '
        f'stroke-width="{_at(width)}"{dashes}/>'
    )


def _frame(left: float, top: float, right: float, bottom: float) -> str:
    path = f"M{_at(left)} {_at(top)}H{_at(right)}V{_at(bottom)}H{_at(left)}Z"
    return f'<path class="c-axis" d="{path}" fill="none" stroke="{_AXIS}" stroke-width="1"/>'


def _rect(x: float, y: float, width: float, height: float, name: str, colour: str) -> str:
    size = f'width="{_at(width)}" height="{_at(height)}"'
    return f'<rect class="{name}" x="{_at(x)}" y="{_at(y)}" {size} fill="{colour}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: float = _SIZE, weight: str = "") -> str:
    look = f' text-anchor="{anchor}"' if anchor != "start" else ""
    look += f' font-size="{_at(size)}"' if size != _SIZE else ""
    look += f' font-weight="{weight}"' if weight else ""
    return f'<text class="c-text" x="{_at(x)}" y="{_at(y)}" fill="{_TEXT}"{look}>{_safe(text)}</text>'


# --- numbers and words -----------------------------------------------------------------------------------------------


def _drawable(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if abs(x) < _FAR and abs(y) < _FAR]  # false for what is not a number, too


def _tiny(values: Sequence[float]) -> float:
    """Below this a difference is rounding."""
    return 1e-9 * max(1e-3, max(abs(value) for value in values))


def _ticks(values: Sequence[float], count: int) -> list[float]:
    """Round numbers, evenly spaced, from at most the least of the values to at least the greatest."""
    low, high = min(values), max(values)
    if high - low <= _tiny(values):
        room = abs(low) / 2 or 0.5
        low, high = low - room, high + room
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * one for one in (1, 2, 5, 10) if power * one >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def _scale(ticks: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    """From a value to a place on the picture."""
    low, span = ticks[0], ticks[-1] - ticks[0]
    return lambda value: start + (value - low) / span * (end - start)


def _number(value: float) -> str:
    return f"{value:.6g}" if value else "0"


def _plain(value: float, digits: int) -> str:
    """Without an exponent and without zeros at the end."""
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _at(value: float) -> str:
    text = _plain(value, 1)
    return "0" if text == "-0" else text


def _wrap(text: str, width: int) -> list[str]:
    """Lines of about so many characters, broken at spaces; a word that is longer is cut."""
    lines: list[str] = []
    for word in text.split():
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += " " + word
        else:
            lines.append(_cut(word, width))
    return lines


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _safe(text: str) -> str:
    """For XML, in which most control characters cannot be written at all."""
    return escape(_NOT_XML.sub("�", text), quote=True)
