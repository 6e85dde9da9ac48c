#!/bin/bash
# critest on stock runc and on HANDLER in one go: prints both totals and every spec that differs.
# usage: conformance.sh HANDLER   (env: FOCUS=regex, STOCK=0 to leave stock out)
# Fails when a spec that passes on stock does not pass on HANDLER, or when one fails there, but for
# those that tests/known/HANDLER.txt names with a reason. A spec that critest skipped on HANDLER alone
# is tried again on both: some skip themselves when they meet a race of containerd's own (NRI's plugin
# synchronization does on stock runc too, about every second time). A failure is never tried again.
set -euo pipefail
TOP=$(cd "$(dirname "$0")/.." && pwd)
H=${1:-kuasar-runc}
B=${BED:-$TOP/target/bed}
OUT=$TOP/target/conformance
BED_SH=$TOP/tests/bed/bed.sh
if [ ! -x "$B/bin/critest" ]; then
  echo "skipped: critest is a Go module and go is not here"
  exit 0
fi
mkdir -p "$OUT"
"$BED_SH" up
run() { # NAME OF THE REPORT, critest's arguments…
  local name=$1; shift
  rm -f "$OUT/$name.xml"
  # the digest spec names an image that only its own registry can serve
  "$BED_SH" run timeout "${LIMIT:-1200}" "$B/bin/critest" --runtime-endpoint "unix://$B/run/containerd.sock" \
    --config "$B/etc/crictl.yaml" --nri-socket "$B/run/nri.sock" --ginkgo.no-color --ginkgo.seed "${SEED:-1}" \
    --ginkgo.junit-report "$OUT/$name.xml" --ginkgo.skip "public image with digest|benchmark" \
    ${FOCUS:+--ginkgo.focus "$FOCUS"} "$@" >"$OUT/$name.log" 2>&1 || true
}
# not that of a run before: without stock there is nothing to compare with
rm -f "$OUT/stock.xml"
[ "${STOCK:-1}" = 0 ] || run stock
run "$H" --runtime-handler "$H"
compare() { python3 - "$OUT" "$H" "$TOP/tests/known/$H.txt" "$@" <<'EOF'
import os, re, sys, xml.etree.ElementTree as ET
out, handler, listed, *what = sys.argv[1:]
known = {}
if os.path.exists(listed):
    for line in open(listed):
        if "|" in line and not line.startswith("#"):
            name, reason = line.split("|", 1)
            known[name.strip()] = reason.strip()
def reason(n): return next((r for k, r in known.items() if k in n), None)
def read(name):
    specs = {}
    path = f"{out}/{name}.xml"
    if not os.path.exists(path): return specs
    for c in ET.parse(path).getroot().iter("testcase"):
        n = c.get("name")
        if not n.startswith("[It]") or "benchmark about" in n: continue
        bad = c.find("failure") if c.find("failure") is not None else c.find("error")
        if bad is not None: specs[n] = ("failed", (bad.get("message") or "")[:400].replace("\n", " "))
        elif c.find("skipped") is not None or c.get("status") == "skipped": specs[n] = ("skipped", "")
        else: specs[n] = ("passed", "")
    return specs
stock, ours = read("stock"), read(handler)
def again(*rounds):
    # What critest skipped on the handler alone, less what a later round has shown to be unsteady.
    names = {n for n, v in ours.items()
             if v[0] == "skipped" and stock.get(n, ("",))[0] == "passed" and not reason(n)}
    for r in rounds:
        a, b = read(f"stock-{r}"), read(f"{handler}-{r}")
        names = {n for n in names if a.get(n, ("",))[0] != "skipped" and b.get(n, ("",))[0] != "passed"}
    return names
if what:
    # For critest's focus, which knows no "[It] " in front of a name.
    print("|".join(re.escape(n.removeprefix("[It] ")) for n in sorted(again(*what[1:]))))
    sys.exit(0)
steady = again(*range(1, 4))
def total(s): return ", ".join(f"{sum(v[0] == k for v in s.values())} {k}" for k in ("passed", "failed", "skipped"))
if stock: print(f"stock runc:  {total(stock)}")
print(f"{handler}: {total(ours)}")
worse = 0
for n in sorted(set(stock) | set(ours)):
    a, b = stock.get(n, ("-", ""))[0], ours.get(n, ("-", ""))
    if (b[0] == "failed" or (a == "passed" and b[0] == "skipped")) and reason(n):
        print(f"  known: {n[5:]}: {reason(n)}")
        continue
    if a == "passed" and b[0] == "skipped" and n not in steady:
        print(f"  unsteady: {n[5:]}: skipped itself here and passed on stock; the other way round when tried again")
        continue
    if a != b[0] and stock: print(f"  differs: {n[5:]}: stock {a}, {handler} {b[0]} {b[1]}")
    elif b[0] == "failed": print(f"  failed: {n[5:]}: {b[1]}")
    if b[0] == "failed" or (a == "passed" and b[0] != "passed"): worse += 1
if not ours: sys.exit("critest has not run: see " + f"{out}/{handler}.log")
sys.exit(1 if worse else 0)
EOF
}
rm -f "$OUT"/stock-[0-9].xml "$OUT/$H"-[0-9].xml
rounds=()
for round in 1 2 3; do
  FOCUS=$(compare again "${rounds[@]}")
  [ -n "$FOCUS" ] || break
  run "stock-$round"
  run "$H-$round" --runtime-handler "$H"
  rounds+=("$round")
done
echo "critest: $SECONDS s"
compare
