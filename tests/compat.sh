#!/bin/bash
# Every containerd that we say we work with, one after the other, for real: compat.sh [VERSION…].
# `bed` is the bed's, `trixie` is 1.7, of Debian 13; newer ones are Go modules and are built once, into
# target/bed/engines (minutes each). Writes the table between the marks in docs/compatibility.md; rows of
# versions that were not asked for stay. Not part of `make test`.
#
# On each, with runc-sandboxer: a pod by the proxy plugin with FIFOs, one with streams, one in shim
# mode, one of plain CRI; each with an exec, an exit code, output, and kill -9 of containerd and of the
# daemon in the middle. Then containerd is upgraded, from the bed's version to each newer one, under a running pod.
set -euo pipefail
TOP=$(cd "$(dirname "$0")/.." && pwd)
B=${BED:-$TOP/target/bed}
BED_SH=$TOP/tests/bed/bed.sh
DOC=$TOP/docs/compatibility.md
VERSIONS=${*:-trixie bed v2.2.7 v2.3.4 v2.4.2}
T=$(mktemp -d "$B/run/compat.XXXXXX")
trap '"$BED_SH" down >/dev/null 2>&1 || true; rm -rf "$T"' EXIT

# engine VERSION: builds it unless it is there; sets ENGINE, or is false
engine() {
  unset ENGINE
  [ "$1" = bed ] && return 0
  if [ "$1" = trixie ]; then
    local d=$B/engines/trixie
    if [ ! -x "$d/root/usr/bin/containerd" ]; then
      mkdir -p "$d"
      (cd "$d" && APT_CONFIG=$B/apt/apt.conf apt-get download -qq containerd/trixie && dpkg -x containerd_*.deb root) || return 1
    fi
    export ENGINE=$d/root/usr/bin
    return 0
  fi
  if [ ! -x "$B/engines/$1/containerd" ]; then
    command -v go >/dev/null || { echo "compat: no go here: $1 left out" >&2; return 1; }
    mkdir -p "$B/engines/$1"
    GOBIN=$B/engines/$1 CGO_ENABLED=0 nice go install -trimpath -ldflags '-s -w' \
      "github.com/containerd/containerd/v2/cmd/containerd@$1" >"$B/engines/$1.log" 2>&1 ||
      { tail -n 3 "$B/engines/$1.log" >&2; return 1; }
  fi
  export ENGINE=$B/engines/$1
}
# Each engine has a store of its own: an older one does not read a newer one's.
config() {
  mkdir -p "$B/var-compat/$1"
  export CONTAINERD_CONFIG=$T/config-$1.toml
  if [ "$1" = trixie ]; then
    old_config > "$CONTAINERD_CONFIG"
    return 0
  fi
  sed "s|^root = .*|root = '$B/var-compat/$1'|" "$B/etc/config.toml" > "$CONTAINERD_CONFIG"
  # A runtime without a sandboxer: CRI's own way, with a pause container.
  cat >> "$CONTAINERD_CONFIG" <<EOF
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kuasar-runc-plain]
  runtime_type = 'io.containerd.kuasar-runc.v1'
EOF
}
# That of containerd 1.7, which knows no sandboxers.
old_config() {
  cat <<EOF
version = 2
root = '$B/var-compat/trixie'
state = '$B/run/containerd'
[grpc]
  address = '$B/run/containerd.sock'
[plugins.'io.containerd.grpc.v1.cri']
  sandbox_image = 'registry.k8s.io/pause:3.10'
  restrict_oom_score_adj = true
  [plugins.'io.containerd.grpc.v1.cri'.cni]
    bin_dir = '$B/root/usr/lib/cni'
    conf_dir = '$B/cni/net.d'
  # The default has to be there.
  [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]
    runtime_type = 'io.containerd.runc.v2'
  [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.kuasar-runc-shim]
    runtime_type = 'io.containerd.kuasar-runc.v1'
    sandbox_mode = 'shim'
  [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.kuasar-runc-plain]
    runtime_type = 'io.containerd.kuasar-runc.v1'
EOF
}
crictl() { CRI_CONFIG_FILE=$B/etc/crictl.yaml "$BED_SH" run "$B/bin/crictl" "$@"; }
version_of() { crictl version | sed -n 's/^RuntimeVersion: *//p'; }

begin() { # HANDLER: a pod with a container that ends with 7 at SIGTERM
  local handler=$1
  cat > "$T/pod.json" <<EOF
{ "metadata": { "name": "compat", "namespace": "compat", "uid": "$handler-$RANDOM", "attempt": 1 }, "hostname": "compat",
  "log_directory": "$T/logs", "linux": { "security_context": { "namespace_options": { "pid": 1 } } } }
EOF
  cat > "$T/container.json" <<EOF
{ "metadata": { "name": "c" }, "image": { "image": "localhost/busybox:latest" }, "log_path": "$handler.log", "linux": {},
  "command": ["sh", "-c", "trap 'echo bye; exit 7' TERM; echo begun; while :; do sleep 0.1; done"] }
EOF
  rm -f "$T/logs/$handler.log"
  pod=$(crictl runp --runtime "$handler" "$T/pod.json") || return 1
  container=$(crictl create "$pod" "$T/container.json" "$T/pod.json") || return 1
  crictl start "$container" >/dev/null || return 1
  pid=$(crictl inspect -o go-template --template '{{.info.pid}}' "$container")
}
goes_on() { # it is the same process still, and can be worked with
  [ "$(crictl inspect -o go-template --template '{{.status.state}} {{.info.pid}}' "$container")" = "CONTAINER_RUNNING $pid" ] ||
    { echo "the container is not what it was"; return 1; }
  [ "$(crictl exec "$container" hostname)" = compat ] || { echo "no exec"; return 1; }
}
finish() { # HANDLER: exit code and output are there, and the pod goes
  crictl stop --timeout 10 "$container" >/dev/null || return 1
  [ "$(crictl inspect -o go-template --template '{{.status.exitCode}}' "$container")" = 7 ] || { echo "another exit code"; return 1; }
  grep -q begun "$T/logs/$1.log" || { echo "no output"; return 1; }
  grep -q bye "$T/logs/$1.log" || { echo "the last output is lost"; return 1; }
  crictl rmp -f "$pod" >/dev/null || { echo "the pod cannot be removed"; return 1; }
}
again() { "$BED_SH" containerd kill && "$BED_SH" containerd start; }
replaced() { "$BED_SH" daemon kill && "$BED_SH" daemon start; }
life() { begin "$1" && goes_on && again && goes_on && replaced && goes_on && finish "$1"; }
# upgraded VERSION: from the bed's containerd to this one, with one store
upgraded() {
  unset ENGINE
  config "upgrade-$1"
  "$BED_SH" up && begin kuasar-runc && "$BED_SH" containerd stop || return 1
  engine "$1" && "$BED_SH" containerd start && goes_on && finish kuasar-runc
}
# What stands in the table for a step: `works`, or the last line that it has said.
cell() {
  local said
  if said=$("$@" 2>&1); then echo works; else
    echo "compat: $*: $said" >&2
    echo "**fails**: $(tail -n 1 <<<"$said" | tr '|\n' '/ ' | cut -c1-120)"
  fi
  crictl rmp -fa >/dev/null 2>&1 || true
}

rows=()
for v in $VERSIONS; do
  engine "$v" || { rows+=("| $v | could not be built here | | | | |"); continue; }
  config "$v"
  row=
  for handler in kuasar-runc kuasar-runc-streaming kuasar-runc-shim kuasar-runc-plain; do
    case $v-$handler in
      trixie-kuasar-runc | trixie-kuasar-runc-streaming) row="$row | –"; continue ;;
    esac
    # containerd 1.7 has sandboxes only when it is told so.
    case $v-$handler in
      trixie-kuasar-runc-shim) export ENABLE_CRI_SANDBOXES=1 ;;
      *) unset ENABLE_CRI_SANDBOXES ;;
    esac
    # Up already but for the first handler, and where the environment is another.
    case $v-$handler in
      *-kuasar-runc | trixie-*)
        "$BED_SH" down >/dev/null 2>&1 || true
        if ! "$BED_SH" up > "$T/up.log" 2>&1; then
          tail -n 5 "$B/run/containerd.log" >&2
          row="$row | **fails**: does not come up in the bed"
          plain="not tried"
          continue
        fi ;;
    esac
    version=$(version_of)
    said=$(cell life "$handler")
    echo "compat: $v: $handler: $said"
    # The last column.
    if [ $handler = kuasar-runc-plain ]; then plain=$said; else row="$row | $said"; fi
  done
  "$BED_SH" down >/dev/null
  case $v in
    bed | trixie) row="$row | –" ;;
    *)
      row="$row | $(cell upgraded "$v")"
      echo "compat: $v: upgrade: ${row##*| }"
      "$BED_SH" down >/dev/null ;;
  esac
  rows+=("| ${version:-$v}$row | $plain |")
done
# Rows of other versions stay; all in order.
others=$(sed -n '/^<!-- compat -->/,/^<!-- \/compat -->/p' "$DOC" | grep -E '^\| [0-9v]' || true)
for row in "${rows[@]}"; do
  version=$(cut -d'|' -f2 <<<"$row")
  others=$(grep -vF "|$version|" <<<"$others" || true)
done
{
  echo "| containerd | proxy plugin, FIFO | proxy plugin, streams | \`sandboxer = \"shim\"\` | upgraded to it from the bed's, under a pod | plain CRI |"
  echo "|---|---|---|---|---|---|"
  { printf '%s\n' "${rows[@]}"; [ -z "$others" ] || echo "$others"; } | sort -V
} > "$T/table.md"
cat "$T/table.md"
sed -i -e "/^<!-- compat -->/,/^<!-- \/compat -->/{//!d}" -e "/^<!-- compat -->/r $T/table.md" "$DOC"
rm -rf "$B"/var-compat
! printf '%s\n' "${rows[@]}" | grep -q '\*\*fails\*\*'
