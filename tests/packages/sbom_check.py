#!/usr/bin/env python3
"""Checks bills of materials against Cargo.lock, deny.toml and CycloneDX's rules: sbom_check.py TOP FILE..."""
import json
import re
import sys
import tomllib
from pathlib import Path

top = Path(sys.argv[1])
locked = {(p["name"], p["version"]): p.get("checksum") for p in tomllib.loads((top / "Cargo.lock").read_text())["package"]}
# Programs also carry C libraries and a kernel, which cargo does not know.
allowed = set(tomllib.loads((top / "deny.toml").read_text())["licenses"]["allow"])
allowed |= {"LGPL-2.1-only", "LGPL-2.1-or-later", "GPL-2.0-only WITH Linux-syscall-note"}
for name in sys.argv[2:]:
    bill = json.loads(Path(name).read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5"), name
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", bill["serialNumber"]), name
    references = [c["bom-ref"] for c in bill["components"]] + [bill["metadata"]["component"]["bom-ref"]]
    assert len(references) == len(set(references)), f"{name}: a part stands twice"
    crates = [c for c in bill["components"] if c["purl"].startswith("pkg:cargo/")]
    assert crates, f"{name}: no crate"
    for part in crates:
        key = (part["name"], part["version"])
        assert key in locked, f"{name}: {key} is not in Cargo.lock"
        sums = [h["content"] for h in part.get("hashes", [])]
        assert sums == ([locked[key]] if locked[key] else []), f"{name}: {key}: another checksum"
    for part in bill["components"]:
        expression = part["licenses"][0]["expression"]
        words = {w.strip("() ") for w in re.split(r" (?:OR|AND) ", expression)}
        assert words & allowed, f"{name}: {part['name']}: {expression}"
    for edge in bill["dependencies"]:
        assert {edge["ref"], *edge["dependsOn"]} <= set(references), f"{name}: {edge['ref']} needs what is not listed"
    # Everything is there because something needs it.
    reached, todo = set(), [bill["dependencies"][0]["ref"]]
    edges = {e["ref"]: e["dependsOn"] for e in bill["dependencies"]}
    while todo:
        ref = todo.pop()
        if ref not in reached:
            reached.add(ref)
            todo += edges.get(ref, [])
    orphans = [c["bom-ref"] for c in crates if c["bom-ref"] not in reached]
    assert not orphans, f"{name}: nothing needs {orphans}"
print(f"{len(sys.argv) - 2} bills, each part of them in Cargo.lock")
