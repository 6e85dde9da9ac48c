"""Shapes and text of a picture. No font is asked: widths are those of a common sans-serif, rounded up,
so that the same text gives the same bytes everywhere.
"""
from xml.sax.saxutils import escape, quoteattr

FONT = "Helvetica, Arial, 'Liberation Sans', sans-serif"
NARROW, WIDE = "fijltrI.,:;'|()[]!/ ", "mwMWQO@%→—"


def width(text, size):
    """An estimate that is rather too large."""
    ems = sum(0.33 if c in NARROW else 0.9 if c in WIDE else 0.69 if c.isupper() else 0.57 for c in text)
    return ems * size


def number(value):
    return f"{value:.1f}".rstrip("0").rstrip(".")


class Picture:
    """Collects the elements of one file."""

    def __init__(self, width, height, title, description, source):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {number(width)} {number(height)}" '
            f'width="{number(width)}" height="{number(height)}" role="img" font-family="{FONT}">',
            f"<!-- Made by docs/pictures/draw.py from {source}: change that, not this. -->",
            f"<title>{escape(title)}</title>",
            f"<desc>{escape(description)}</desc>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="#444"/></marker></defs>',
        ]
        self.rect(0, 0, width, height, fill="#fff")

    def rect(self, x, y, w, h, fill="none", stroke=None, radius=0, dash=None):
        more = f' stroke="{stroke}"' if stroke else ""
        more += f' rx="{radius}"' if radius else ""
        more += f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<rect x="{number(x)}" y="{number(y)}" width="{number(w)}" height="{number(h)}" fill="{fill}"{more}/>'
        )

    def line(self, points, stroke="#444", thickness=1.2, dash=None, ends=""):
        path = "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)
        more = f' stroke-dasharray="{dash}"' if dash else ""
        more += ' marker-end="url(#head)"' if ">" in ends else ""
        more += ' marker-start="url(#head)"' if "<" in ends else ""
        self.parts.append(f'<path d="{path}" fill="none" stroke="{stroke}" stroke-width="{thickness}"{more}/>')

    def text(self, x, y, text, size=13, anchor="start", bold=False, fill="#222", halo=False):
        more = ' font-weight="bold"' if bold else ""
        more += ' stroke="#fff" stroke-width="4" paint-order="stroke"' if halo else ""
        self.parts.append(
            f'<text x="{number(x)}" y="{number(y)}" font-size="{size}" text-anchor={quoteattr(anchor)} '
            f'fill="{fill}"{more}>{escape(text)}</text>'
        )

    def end(self):
        return "\n".join([*self.parts, "</svg>"]) + "\n"
