"""Line plots as SVG, without a library: panels below each other, axes from zero, a legend at the right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 720, 300  # of a panel
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 190, 40, 50
_COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8d6a9f", "#c98a1b", "#4d4d4d")
_STEPS = 5


class Line(NamedTuple):
    """What is drawn in one colour: (x, y) in order of x."""

    name: str
    points: Sequence[tuple[float, float]]


class Panel(NamedTuple):
    """One plot."""

    title: str
    x_name: str
    y_name: str
    lines: Sequence[Line]


def svg(panels: Sequence[Panel]) -> str:
    """The panels as one SVG document."""
    height = _HEIGHT * len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
    ]
    for number, panel in enumerate(panels):
        parts.append(f'<g transform="translate(0 {number * _HEIGHT})">')
        parts += _drawn(panel)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5 or 10 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    # A hair of tolerance: 0.3 / 0.1 is more than 3.
    return next(step * power for step in (1.0, 2.0, 2.5, 5.0, 10.0) if step * power >= value * (1 - 1e-9))


def _drawn(panel: Panel) -> list[str]:
    points = [point for line in panel.lines for point in line.points]
    x_most = round_up(max((x for x, _ in points), default=0.0))
    y_most = round_up(max((y for _, y in points), default=0.0))
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + x / x_most * (right - _LEFT), bottom - y / y_most * (bottom - _TOP)

    parts = [_text(_LEFT, _TOP - 16, panel.title, weight="bold")]
    for step in range(_STEPS + 1):
        x, y = place(x_most * step / _STEPS, y_most * step / _STEPS)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="#ddd"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{y_most * step / _STEPS:.4g}", anchor="end"))
        parts.append(_text(x, bottom + 18, f"{x_most * step / _STEPS:.4g}", anchor="middle"))
    parts.append(f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="black"/>')
    parts.append(_text((_LEFT + right) / 2, bottom + 38, panel.x_name, anchor="middle"))
    turned = f'transform="rotate(-90 16 {(_TOP + bottom) / 2})"'
    parts.append(_text(16, (_TOP + bottom) / 2, panel.y_name, anchor="middle", more=turned))
    for number, line in enumerate(panel.lines):
        colour = _COLOURS[number % len(_COLOURS)]
        places = [place(*point) for point in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        at = _TOP + 10 + 18 * number
        parts.append(f'<path d="M{right + 14} {at - 4}h18" stroke="{colour}" stroke-width="2"/>')
        parts.append(_text(right + 38, at, line.name))
    return parts


def _text(
    x: float, y: float, text: str, anchor: str = "start", weight: str = "normal", more: str = ""
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" {more}'
    return f"<text {place.strip()}>{escape(text)}</text>"
