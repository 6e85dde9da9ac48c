#!/usr/bin/env python3
"""Checks that dashboard and alert rules ask for metrics that the daemons have, by names and labels that
are in the sources: monitoring_check.py TOP"""
import json
import re
import sys
from pathlib import Path

top = Path(sys.argv[1])
known = set()
for crate in ("common", "runc", "vmm", "gvisor", "quark", "wasm", "ctl"):
    for file in (top / crate).rglob("*.rs"):
        # Tests make names of their own.
        text = file.read_text().split("#[cfg(test)]")[0]
        known |= set(re.findall(r'"(kuasar_[a-z_]+)(?:"|_bucket\{)', text))
        known |= set(re.findall(r'"(kuasar_[a-z_]+)\{\{', text))
assert "kuasar_sandboxes" in known and "kuasar_phase_seconds_sum" in known, known
dashboard = json.loads((top / "packaging/monitoring/grafana-dashboard.json").read_text())
panels = dashboard["panels"]
asked = [t["expr"] for p in panels for t in p["targets"]]
asked += [v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
assert len({p["id"] for p in panels}) == len(panels), "two panels have one id"
cells = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels]
assert len(set(cells)) == len(cells), "two panels are at one place"
rules = (top / "packaging/monitoring/alerts.yml").read_text()
expressions = re.findall(r"^ +expr: (.+)$", rules, re.MULTILINE)
names = re.findall(r"- alert: (\w+)", rules)
assert len(names) == len(expressions) == len(set(names)), names
asked += expressions
for expression in asked:
    for name in re.findall(r"kuasar_[a-z_]+", expression):
        plain = name.removesuffix("_bucket")
        assert name in known or plain in known, f"no daemon has {name}: {expression}"
    assert expression.count("(") == expression.count(")"), expression
    assert expression.count("{") == expression.count("}"), expression
shown = {n.removesuffix("_bucket") for e in asked for n in re.findall(r"kuasar_[a-z_]+", e)}
# The other way round: what a daemon measures is looked at somewhere.
unseen = known - shown - {f"{n}_{part}" for n in shown for part in ("bucket", "sum", "count")}
assert not unseen, f"neither a panel nor an alert asks for {sorted(unseen)}"
print(f"{len(panels)} panels and {len(names)} alerts ask for {len(shown)} metrics")
