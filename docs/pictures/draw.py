#!/usr/bin/env python3
"""Makes the pictures of docs/ from the texts beside this file: draw.py [--check].

NAME.txt, a diagram (diagrams.py), becomes docs/NAME.svg; the Grafana dashboard becomes
docs/dashboard.svg, by the recording metrics.json (record.py). The same texts give the same bytes.
--check writes nothing and fails when a picture is not what its text gives.
"""
import sys
from pathlib import Path

sys.dont_write_bytecode = True

import dashboard
import diagrams

HERE = Path(__file__).resolve().parent
DOCS, TOP = HERE.parent, HERE.parents[1]


def pictures():
    for source in sorted(HERE.glob("*.txt")):
        yield f"{source.stem}.svg", diagrams.draw(source.read_text(), f"docs/pictures/{source.name}")
    board = TOP / "packaging/monitoring/grafana-dashboard.json"
    yield "dashboard.svg", dashboard.draw(
        board.read_text(), (HERE / "metrics.json").read_text(),
        f"{board.relative_to(TOP)} and docs/pictures/metrics.json")


def main():
    check = sys.argv[1:] == ["--check"]
    if sys.argv[1:] and not check:
        sys.exit(__doc__)
    stale, made = [], set()
    try:
        for name, svg in pictures():
            made.add(name)
            file = DOCS / name
            if file.is_file() and file.read_text() == svg:
                continue
            stale.append(name)
            if not check:
                file.write_text(svg)
    except diagrams.Wrong as e:
        sys.exit(f"draw.py: {e}")
    # One whose text is gone.
    stale += sorted(f"{f.name} (no text)" for f in DOCS.glob("*.svg") if f.name not in made)
    if check and stale:
        sys.exit(f"draw.py: not what the text gives: {', '.join(stale)}: run docs/pictures/draw.py")


main()
