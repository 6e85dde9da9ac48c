"""As much of PromQL as the dashboard uses, over recorded scrapes: `sum by`, `rate`, `increase`,
`histogram_quantile` and selectors. Unlike Prometheus it does not extrapolate to the edges of a window.
Whatever else is asked for is an error, so that no panel is drawn wrong in silence.
"""
import json
import math
import re

TOKEN = re.compile(r'\s*(\[\d+[smh]\]|"[^"]*"|=~|!~|!=|[a-zA-Z_]\w*|\d+(?:\.\d+)?|[(){},=])')


class Recording:
    """What record.py has written."""

    def __init__(self, text):
        read = json.loads(text)
        self.times = read["seconds"]
        self.series = []
        for name, values in read["series"].items():
            metric, _, labels = name.partition("{")
            self.series.append((metric, dict(re.findall(r'(\w+)="([^"]*)"', labels)), values))


def query(expression, recording):
    """The series of an expression: pairs of labels and one value, or None, for each scrape."""
    tokens, at = [], 0
    expression = re.sub(r"\$\w+", ".*", expression).strip()
    while at < len(expression):
        found = TOKEN.match(expression, at)
        if not found:
            raise ValueError(f"not understood: {expression[at:]}")
        tokens.append(found[1])
        at = found.end()
    parser = Parser(tokens, recording)
    result = parser.expression()
    if parser.tokens:
        raise ValueError(f"not understood: {' '.join(parser.tokens)}")
    return result


class Parser:
    """Reads and evaluates in one go."""

    def __init__(self, tokens, recording):
        self.tokens, self.recording = tokens, recording

    def take(self, wanted=None):
        token = self.tokens.pop(0) if self.tokens else "the end"
        if wanted and token != wanted:
            raise ValueError(f"{wanted} was expected, and not {token}")
        return token

    def list_of_names(self):
        self.take("(")
        names = [self.take()]
        while (token := self.take()) == ",":
            names.append(self.take())
        if token != ")":
            raise ValueError(f"{token} in a list of labels")
        return names

    def expression(self):
        name = self.take()
        if name == "sum":
            self.take("by")
            by = self.list_of_names()
            self.take("(")
            inner = self.expression()
            self.take(")")
            return total(inner, by)
        if name in ("rate", "increase"):
            self.take("(")
            series = self.selector(self.take())
            window = seconds(self.take())
            self.take(")")
            return [(l, grown(v, self.recording.times, window, name == "rate")) for l, v in series]
        if name == "histogram_quantile":
            self.take("(")
            part = float(self.take())
            self.take(",")
            inner = self.expression()
            self.take(")")
            return quantiles(inner, part)
        return self.selector(name)

    def selector(self, name):
        matchers = []
        if self.tokens and self.tokens[0] == "{":
            self.take("{")
            while True:
                label, operator, value = self.take(), self.take(), self.take().strip('"')
                matchers.append((label, operator, value))
                if self.take() == "}":
                    break
        return [(l, v) for m, l, v in self.recording.series if m == name and all(matches(l, x) for x in matchers)]


def matches(labels, matcher):
    label, operator, value = matcher
    found = labels.get(label, "")
    if operator in ("=", "!="):
        return (found == value) == (operator == "=")
    return bool(re.fullmatch(value, found)) == (operator == "=~")


def seconds(window):
    return int(window[1:-2]) * {"s": 1, "m": 60, "h": 3600}[window[-2]]


def grown(values, times, window, per_second):
    """How much a counter has grown in the window before each scrape; a smaller value is a new start."""
    out = []
    for now, t in enumerate(times):
        inside = [i for i in range(now + 1) if times[i] > t - window and values[i] is not None]
        if len(inside) < 2 or inside[-1] != now:
            out.append(None)
            continue
        steps = zip(inside, inside[1:])
        more = sum(values[b] - values[a] if values[b] >= values[a] else values[b] for a, b in steps)
        out.append(more / (times[inside[-1]] - times[inside[0]]) if per_second else more)
    return out


def total(series, by):
    groups = {}
    for labels, values in series:
        key = tuple((name, labels[name]) for name in by if name in labels)
        sums = groups.setdefault(key, [None] * len(values))
        for i, value in enumerate(values):
            if value is not None:
                sums[i] = value + (sums[i] or 0)
    return [(dict(key), values) for key, values in sorted(groups.items())]


def quantiles(series, part):
    groups = {}
    for labels, values in series:
        key = tuple(sorted((k, v) for k, v in labels.items() if k != "le"))
        groups.setdefault(key, []).append((float(labels["le"].replace("+Inf", "inf")), values))
    out = []
    for key, buckets in sorted(groups.items()):
        buckets.sort()
        out.append((dict(key), [quantile([(le, v[i]) for le, v in buckets], part) for i in range(len(buckets[0][1]))]))
    return out


def quantile(buckets, part):
    """As Prometheus has it: even within a bucket; the highest bound for what is above it."""
    if any(count is None for _, count in buckets) or not buckets[-1][1]:
        return None
    rank = part * buckets[-1][1]
    low, below = 0.0, 0.0
    for bound, count in buckets:
        if count >= rank:
            if math.isinf(bound):
                return low
            return low + (bound - low) * ((rank - below) / (count - below) if count > below else 1)
        low, below = bound, count
    return low
