"""Draws the Grafana dashboard from its JSON and a recording (record.py), without Grafana: the same
panels at the same places, with what their queries say of the recording.
"""
import json
import math
import re

from promql import Recording, query
from svg import Picture, width

COLOURS = ["#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#9c755f", "#edc948",
           "#af7aa1", "#ff9da7", "#86bcb6", "#8cd17d", "#bab0ac", "#d37295", "#499894", "#d4a6c8"]
CELL, ROW, MARGIN, HEAD = 40, 33, 12, 56


def shown(value, unit):
    """A value of an axis."""
    if unit == "bytes":
        for name, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
            if value >= size:
                return f"{value / size:.3g} {name}"
        return f"{value:.0f} B"
    if unit == "s":
        if value == 0:
            return "0 s"
        return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"
    return f"{value:.3g}" + {"reqps": " req/s", "cps": " c/s"}.get(unit, "")


def steps(top, unit):
    """Round values from 0 to at least `top`, four or five."""
    base = 2.0 if unit == "bytes" else 10.0
    raw = max(top, 1e-9) / 4
    power = base ** math.floor(math.log(raw, base))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    if unit == "short":
        step = max(1.0, float(math.ceil(step)))
    return [step * i for i in range(int(math.ceil(top / step - 1e-9)) + 1)] if top else [0.0, step]


def panel(picture, definition, recording):
    grid = definition["gridPos"]
    x, y = grid["x"] * CELL + MARGIN, grid["y"] * ROW + HEAD
    w, h = grid["w"] * CELL - 8, grid["h"] * ROW - 8
    unit = definition["fieldConfig"]["defaults"]["unit"]
    picture.rect(x, y, w, h, fill="#fafafa", stroke="#ccc", radius=3)
    picture.text(x + 10, y + 18, definition["title"], bold=True)
    lines = []
    for target in definition["targets"]:
        for labels, values in query(target["expr"], recording):
            name = re.sub(r"\{\{(\w+)\}\}", lambda m: labels.get(m[1], ""), target["legendFormat"])
            lines.append((name, values))
    # Names below, as many in a row as there is room for.
    rows, at = [[]], x + 10
    for i, (name, _) in enumerate(lines):
        needs = 16 + width(name, 10) + 8
        if rows[-1] and at + needs > x + w - 6:
            rows.append([])
            at = x + 10
        rows[-1].append((at, i, name))
        at += needs
    bottom = y + h - 20 - 13 * len(rows)
    left, top, right = x + 62, y + 32, x + w - 12
    values = [v for _, series in lines for v in series if v is not None]
    ticks = steps(max(values, default=0), unit)
    last = recording.times[-1]

    def place(t, v):
        return left + (right - left) * t / last, bottom - (bottom - top) * v / ticks[-1]

    for tick in ticks:
        height = place(0, tick)[1]
        picture.line([(left, height), (right, height)], stroke="#e2e2e2", thickness=1)
        picture.text(left - 6, height + 3.5, shown(tick, unit), size=10, anchor="end", fill="#666")
    for minute in range(0, last // 60 + 1, 3):
        at = place(minute * 60, 0)[0]
        picture.text(at, bottom + 13, f"{minute} min", size=10, anchor="middle", fill="#666")
    if not values:
        picture.text((left + right) / 2, (top + bottom) / 2, "No data", anchor="middle", fill="#888")
    for i, (_, series) in enumerate(lines):
        run = []
        for t, v in [*zip(recording.times, series), (0, None)]:
            if v is not None:
                run.append(place(t, v))
            elif run:
                # A single value is a dot.
                picture.line(run if len(run) > 1 else [run[0], (run[0][0] + 1, run[0][1])],
                             stroke=COLOURS[i % len(COLOURS)], thickness=1.5)
                run = []
    for r, row in enumerate(rows):
        for at, i, name in row:
            height = bottom + 29 + 13 * r
            picture.line([(at, height - 3.5), (at + 11, height - 3.5)], stroke=COLOURS[i % len(COLOURS)], thickness=2.5)
            picture.text(at + 15, height, name, size=10, fill="#444")


def draw(definition, recording, source):
    board, recorded = json.loads(definition), Recording(recording)
    height = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in board["panels"]) * ROW + HEAD + MARGIN
    kinds = sorted({labels["sandboxer"] for _, labels, _ in recorded.series})
    title = f"{board['title']}: dashboard"
    what = f"Drawn without Grafana, from {recorded.times[-1] // 60} minutes of the metrics of " + " and ".join(
        f"{kind}-sandboxer" for kind in kinds)
    picture = Picture(24 * CELL + 2 * MARGIN - 8, height, title, what, source)
    picture.text(MARGIN, 26, title, size=18, bold=True)
    picture.text(MARGIN, 44, what, size=12, fill="#666")
    for one in board["panels"]:
        panel(picture, one, recorded)
    return picture.end()
