"""Two kinds of diagrams, each from a small language of its own. Words with blanks stand in quotes.

boxes:
    boxes TITLE / about TEXT / size COLUMNS ROWS    a cell is 20 by 20
    box ID X Y W H STYLE TITLE [LINE…]
    arrow FROM TO [LABEL] [both] [dashed]           FROM and TO are ID.left, .right, .top or .bottom,
                                                    with +N or -N cells along that side

sequence:
    sequence TITLE / about TEXT
    actor ID NAME [LINE]                            from left to right
    FROM -> TO TEXT                                 a call; --> an answer; FROM = TO: what it does alone
    part TEXT                                       a heading over what follows
"""
import re
import shlex

from svg import Picture, width

STYLES = {  # fill, border, dashes
    "engine": ("#e8eef7", "#4e79a7", None),
    "daemon": ("#e4f1e1", "#3f8a3b", None),
    "keeper": ("#fdf0dc", "#c67a12", None),
    "pod": ("#fbfbfb", "#888", None),
    "guest": ("#fbe6e6", "#c0504d", None),
    "plain": ("#f3f3f3", "#999", None),
    "area": ("none", "#999", "5 4"),
}
CELL = 20


class Wrong(Exception):
    """The text is not a diagram."""


def draw(text, source):
    statements = []
    for number, line in enumerate(text.splitlines(), 1):
        words = shlex.split(line, comments=True)
        if words:
            statements.append((number, words))
    kinds = {"boxes": boxes, "sequence": sequence}
    try:
        number, (kind, title) = statements[0]
        return kinds[kind](title, statements[1:], source)
    except (IndexError, KeyError, ValueError) as e:
        raise Wrong(f"{source}: {e!r}") from e


def fit(text, size, room, where):
    if width(text, size) > room:
        raise Wrong(f"{where}: too long for its place by {width(text, size) - room:.0f}: {text}")


# --- boxes


def boxes(title, statements, source):
    about, size, all_boxes, arrows = "", None, {}, []
    for number, words in statements:
        where = f"{source}:{number}"
        match words:
            case ["about", text]:
                about = text
            case ["size", w, h]:
                size = (int(w) * CELL, int(h) * CELL)
            case ["box", name, x, y, w, h, style, *lines]:
                all_boxes[name] = (*(float(v) * CELL for v in (x, y, w, h)), style, lines, where)
            case ["arrow", start, end, *more]:
                arrows.append((start, end, more, where))
            case _:
                raise Wrong(f"{where}: not understood")
    picture = Picture(*size, title, about, source)
    for x, y, w, h, style, lines, where in all_boxes.values():
        fill, stroke, dash = STYLES[style]
        picture.rect(x, y, w, h, fill=fill, stroke=stroke, radius=5, dash=dash)
        # An area has its name in its corner, others have theirs in the middle.
        inside = style in ("area", "pod")
        begin = y + 17 if inside else y + h / 2 - (len(lines) - 1) * 8 + 4.5
        for i, line in enumerate(lines):
            size_of = 13 if i == 0 else 11
            fit(line, size_of, w - 8, where)
            at = (x + 10, "start") if inside else (x + w / 2, "middle")
            picture.text(at[0], begin + 16 * i, line, size=size_of, anchor=at[1], bold=i == 0,
                         fill="#222" if i == 0 else "#555")
    labels = []
    for start, end, more, where in arrows:
        (ax, ay, horizontal), (bx, by, _) = side(all_boxes, start, where), side(all_boxes, end, where)
        flags = {w for w in more if w in ("both", "dashed")}
        label = next((w for w in more if w not in flags), "")
        if ax == bx or ay == by:
            points = [(ax, ay), (bx, by)]
        elif horizontal:
            points = [(ax, ay), ((ax + bx) / 2, ay), ((ax + bx) / 2, by), (bx, by)]
        else:
            points = [(ax, ay), (ax, (ay + by) / 2), (bx, (ay + by) / 2), (bx, by)]
        picture.line(points, dash="5 4" if "dashed" in flags else None, ends="<>" if "both" in flags else ">")
        labels.append(((points[0][0] + points[-1][0]) / 2, (points[0][1] + points[-1][1]) / 2, label, ax == bx))
    for x, y, label, straight in labels:
        for i, line in enumerate(label.split("\\n") if label else []):
            # Beside a line that goes down, above one that goes across.
            lift = 4 if straight else -6
            at = (x + 7, "start") if straight else (x, "middle")
            picture.text(at[0], y + lift + 14 * i, line, size=11, anchor=at[1], fill="#444", halo=straight)
    return picture.end()


def side(all_boxes, place, where):
    found = re.fullmatch(r"(\w+)\.(left|right|top|bottom)([+-][\d.]+)?", place)
    if not found or found[1] not in all_boxes:
        raise Wrong(f"{where}: no such place: {place}")
    x, y, w, h = all_boxes[found[1]][:4]
    along = float(found[3] or 0) * CELL
    if found[2] in ("left", "right"):
        return (x if found[2] == "left" else x + w), y + h / 2 + along, True
    return x + w / 2 + along, (y if found[2] == "top" else y + h), False


# --- sequences


def sequence(title, statements, source):
    about, actors, steps = "", {}, []
    for number, words in statements:
        where = f"{source}:{number}"
        match words:
            case ["about", text]:
                about = text
            case ["actor", name, *lines]:
                actors[name] = lines
            case ["part", text]:
                steps.append(("part", text, None, None, where))
            case [a, ("->" | "-->") as arrow, b, text] if a in actors and b in actors:
                steps.append((arrow, text, a, b, where))
            case _:
                raise Wrong(f"{where}: not understood")
    gap, top, step = 240, 64, 30
    at = {name: 90 + gap * i for i, name in enumerate(actors)}
    heights, y = [], top + 24
    for kind, *_ in steps:
        y += step + 8 if kind == "part" else step
        heights.append(y)
    picture = Picture(180 + gap * (len(actors) - 1), y + 28, title, about, source)
    for name, lines in actors.items():
        picture.line([(at[name], top), (at[name], y + 14)], stroke="#aaa", dash="3 4")
        picture.rect(at[name] - 78, 12, 156, top - 12, fill="#e8eef7", stroke="#4e79a7", radius=5)
        for i, line in enumerate(lines):
            fit(line, 13 if i == 0 else 11, 150, f"{source}: {name}")
            picture.text(at[name], 42 - 9 * (len(lines) - 1) + 17 * i, line, size=13 if i == 0 else 11,
                         anchor="middle", bold=i == 0, fill="#222" if i == 0 else "#555")
    for (kind, text, a, b, where), y in zip(steps, heights):
        if kind == "part":
            picture.rect(8, y - 15, 164 + gap * (len(actors) - 1), 21, fill="#f0f0f0", radius=3)
            picture.text(16, y, text, size=12, bold=True)
        elif a == b:
            fit(text, 11, 180 + gap * (len(actors) - 1) - at[a] - 12, where)
            picture.rect(at[a] - 4, y - 10, 8, 14, fill="#4e79a7")
            picture.text(at[a] + 10, y, text, size=11, fill="#222", halo=True)
        else:
            fit(text, 11, abs(at[b] - at[a]) - 16, where)
            picture.line([(at[a], y), (at[b], y)], dash="5 4" if kind == "-->" else None, ends=">")
            picture.text((at[a] + at[b]) / 2, y - 5, text, size=11, anchor="middle", halo=True)
    return picture.end()
