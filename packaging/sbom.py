#!/usr/bin/env python3
"""What is linked into a package's programs: a bill of materials and the licence texts.

Writes into the directory --out:
  sbom.cdx.json            CycloneDX 1.5
  THIRD-PARTY-LICENCES     each licence text once, with the crates that it covers
  licence                  one SPDX expression for all of it

The crates are those that `cargo tree` finds for the package's programs on the target, without build
scripts and macros, which are not linked; what is said of them is from `cargo metadata` and
Cargo.lock. C libraries are those that the static programs carry. The same input gives the same
bytes.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import time
import tomllib
import uuid
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
TEXT = re.compile(r"^(licen[cs]e|copying|copyright|notice|unlicense)", re.IGNORECASE)
NAMESPACE = uuid.UUID("6b756173-6172-4775-8573-74526f6f7400")


def run(*words):
    return subprocess.run(words, cwd=TOP, check=True, text=True, stdout=subprocess.PIPE).stdout


def linked(roots, target):
    """(name, version) of all crates in the programs of `roots` (`crate` or `crate:flag`)."""
    found = set()
    for root in roots:
        crate, _, flag = root.partition(":")
        flags = [f"--{flag}"] if flag else []
        tree = run("cargo", "tree", "--locked", "-p", crate, *flags, "--target", target,
                   "-e", "normal,no-proc-macro", "--prefix", "none", "-f", "{p}")
        for line in tree.splitlines():
            words = line.split()
            if len(words) >= 2:
                found.add((words[0], words[1].removeprefix("v")))
    return found


def c_libraries(crates):
    """The C libraries in the programs: from the distribution that they were linked on."""
    def version(package, *other):
        try:
            return run("dpkg-query", "-W", "-f", "${source:Version}", package).strip()
        except (OSError, subprocess.CalledProcessError):
            try:
                return re.search(r"[0-9]+(\.[0-9]+)+", run(*other)).group()
            except (OSError, subprocess.CalledProcessError, AttributeError):
                return "unknown"
    yield "glibc", version("libc6-dev", "ldd", "--version"), "LGPL-2.1-or-later"
    if any(name == "libseccomp-sys" for name, _ in crates):
        yield "libseccomp", version("libseccomp-dev", "pkg-config", "--modversion", "libseccomp"), "LGPL-2.1-only"


def chosen(expression):
    """Of `A OR B` the one that we take, for the package's own expression."""
    parts = set()
    for part in expression.replace("/", " OR ").split(" AND "):
        options = [o.strip("() ") for o in part.split(" OR ")]
        for wanted in ("Apache-2.0", "MIT"):
            if wanted in options:
                parts.add(wanted)
                break
        else:
            parts.add(options[0])
    return parts


def named_by_text(package):
    """The SPDX name of a crate that has only a file."""
    text = (Path(package["manifest_path"]).parent / package["license_file"]).read_text(errors="replace")
    for mark, name in (("Apache License\n", "Apache-2.0"), ("Mozilla Public License Version 2.0", "MPL-2.0"),
                       ("Permission is hereby granted, free of charge", "MIT")):
        if mark in text:
            return name
    sys.exit(f"sbom: {package['name']}: no SPDX name, and its licence is not one that this program knows")


def main():
    arguments = argparse.ArgumentParser(description="Bill of materials and licences of a package")
    for name in ("--package", "--version", "--target", "--out"):
        arguments.add_argument(name, required=True)
    arguments.add_argument("--epoch", required=True, type=int, help="SOURCE_DATE_EPOCH")
    arguments.add_argument("--metadata", help="what `cargo metadata` has said, not to ask again")
    arguments.add_argument("--kernel", help="stamp of a guest kernel that is in the package")
    arguments.add_argument("roots", nargs="+", metavar="CRATE[:FLAG]")
    args = arguments.parse_args()

    metadata = json.loads(Path(args.metadata).read_text() if args.metadata else
                          run("cargo", "metadata", "--locked", "--format-version", "1",
                              "--filter-platform", args.target))
    of_id = {p["id"]: (p["name"], p["version"]) for p in metadata["packages"]}
    packages = {(p["name"], p["version"]): p for p in metadata["packages"]}
    sums = {(p["name"], p["version"]): p.get("checksum")
            for p in tomllib.loads((TOP / "Cargo.lock").read_text())["package"]}
    crates = sorted(linked(args.roots, args.target))

    components, texts, bare, licences = [], {}, [], {"Apache-2.0"}
    purl = {}
    for key in crates:
        package = packages[key]
        name, version = key
        ours = package["source"] is None
        purl[key] = f"pkg:cargo/{name}@{version}"
        component = {"type": "library", "bom-ref": purl[key], "name": name, "version": version,
                     "purl": purl[key], "scope": "required"}
        if package["description"]:
            component["description"] = " ".join(package["description"].split())
        expression = (package["license"] or named_by_text(package)).replace("/", " OR ")
        component["licenses"] = [{"expression": expression}]
        licences |= chosen(expression)
        if sums.get(key):
            component["hashes"] = [{"alg": "SHA-256", "content": sums[key]}]
        if package["repository"]:
            component["externalReferences"] = [{"type": "vcs", "url": package["repository"]}]
        components.append(component)
        if ours:
            continue
        files = sorted(f for f in Path(package["manifest_path"]).parent.iterdir() if TEXT.match(f.name) and f.is_file())
        if not files:
            bare.append(f"{name} {version}: {expression}")
        for file in files:
            text = file.read_text(errors="replace").replace("\r\n", "\n").strip()
            texts.setdefault(text, set()).add(f"{name} {version}")
    for name, version, licence in c_libraries(crates):
        reference = f"pkg:generic/{name}@{version}"
        components.append({"type": "library", "bom-ref": reference, "name": name, "version": version,
                           "purl": reference, "scope": "required", "licenses": [{"expression": licence}]})
        licences.add(licence)
    if args.kernel:
        version = Path(args.kernel).read_text().split()[0]
        reference = f"pkg:generic/linux@{version}"
        components.append({"type": "operating-system", "bom-ref": reference, "name": "linux", "version": version,
                           "purl": reference, "description": "Debian's package linux-source; see kernel.config",
                           "licenses": [{"expression": "GPL-2.0-only WITH Linux-syscall-note"}]})
        licences.add("GPL-2.0-only WITH Linux-syscall-note")

    inside = set(crates)
    edges = {}
    for node in metadata["resolve"]["nodes"]:
        key = of_id[node["id"]]
        if key in inside:
            needs = {of_id[d["pkg"]] for d in node["deps"] if any(k["kind"] is None for k in d["dep_kinds"])}
            edges[key] = sorted(purl[n] for n in needs & inside)
    top = f"pkg:generic/{args.package}@{args.version}"
    roots = sorted({purl[key] for key in crates if key[0] in {r.partition(":")[0] for r in args.roots}})
    dependencies = [{"ref": top, "dependsOn": roots}]
    dependencies += [{"ref": purl[key], "dependsOn": edges.get(key, [])} for key in crates]
    bill = {
        "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
        "metadata": {
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(args.epoch)),
            "component": {"type": "application", "bom-ref": top, "name": args.package,
                          "version": args.version, "purl": top, "licenses": [{"expression": "Apache-2.0"}]},
            "properties": [{"name": "kuasar:target", "value": args.target}],
        },
        "components": components, "dependencies": dependencies,
    }
    bill["serialNumber"] = f"urn:uuid:{uuid.uuid5(NAMESPACE, json.dumps(bill, sort_keys=True))}"

    out = Path(args.out)
    (out / "sbom.cdx.json").write_text(json.dumps(bill, indent=1, sort_keys=True) + "\n")
    (out / "licence").write_text(" AND ".join(sorted(licences)) + "\n")
    with (out / "THIRD-PARTY-LICENCES").open("w") as file:
        file.write(f"Licences of what is linked into the programs of {args.package} {args.version}.\n"
                   "sbom.cdx.json lists all of it with versions.\n")
        if bare:
            file.write("\nWithout a text of their own, licensed as said (SPDX):\n" + "".join(f"  {b}\n" for b in bare))
        for text, names in sorted(texts.items(), key=lambda t: (sorted(t[1]), t[0])):
            file.write(f"\n{'=' * 78}\n{', '.join(sorted(names))}\n{'=' * 78}\n\n{text}\n")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"sbom: `{' '.join(map(str, error.cmd))}` failed")
