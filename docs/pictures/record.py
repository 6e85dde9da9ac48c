#!/usr/bin/env python3
"""Records what the panels of the Grafana dashboard are drawn from: record.py OUT SECONDS EVERY SOCKET…

Scrapes the daemons' `metrics_listen` sockets EVERY seconds, for SECONDS, as Prometheus would, and
writes the series that the dashboard asks for. The picture in docs is drawn from such a file; it is
made again by hand, with pods that come and go meanwhile: what a daemon measures is no test's business.
"""
import json
import re
import socket
import sys
import time
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
DASHBOARD = TOP / "packaging/monitoring/grafana-dashboard.json"


def scrape(path):
    """The text of a daemon's metrics; none when it does not answer."""
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(5)
        s.connect(path)
        s.sendall(b"GET /metrics HTTP/1.1\r\nHost: kuasar\r\nConnection: close\r\n\r\n")
        answer = b""
        while part := s.recv(1 << 16):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n")[0]:
        raise OSError(f"{path}: {head[:80]!r}")
    return body.decode()


def wanted():
    """The names of metrics that the dashboard asks for, and the phases of the histogram."""
    expressions = [t["expr"] for p in json.loads(DASHBOARD.read_text())["panels"] for t in p["targets"]]
    names = {name for e in expressions for name in re.findall(r"kuasar_[a-z_]+", e)}
    phases = {p for e in expressions for found in re.findall(r'phase=~"([^"]+)"', e) for p in found.split("|")}
    return names, phases


def main():
    out, seconds, every, *sockets = sys.argv[1:]
    names, phases = wanted()
    times, series = [], {}
    begun = time.monotonic()
    while (now := time.monotonic() - begun) <= float(seconds):
        times.append(round(now))
        for path in sockets:
            try:
                text = scrape(path)
            except OSError as e:
                print(e, file=sys.stderr)
                continue
            for line in text.splitlines():
                name, _, value = line.rpartition(" ")
                phase = re.search(r'phase="([^"]+)"', name)
                if name.split("{")[0] not in names or (phase and phase[1] not in phases):
                    continue
                values = series.setdefault(name, [])
                # None: it was not there yet.
                values += [None] * (len(times) - 1 - len(values))
                number = float(value)
                values.append(int(number) if number.is_integer() else number)
        time.sleep(max(0.0, begun + len(times) * float(every) - time.monotonic()))
    for values in series.values():
        values += [None] * (len(times) - len(values))
    lines = [f"{json.dumps(name)}: {json.dumps(values, separators=(',', ':'))}" for name, values in sorted(series.items())]
    text = '{"seconds": ' + json.dumps(times, separators=(",", ":")) + ',\n"series": {\n' + ",\n".join(lines) + "\n}}\n"
    Path(out).write_text(text)
    print(f"{len(series)} series, {len(times)} scrapes")


main()
