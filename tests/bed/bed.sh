#!/bin/bash
# The test bed's switch: bed.sh up | down | daemon start|spawn|stop|kill|died | containerd start|kill | run CMD…
# Everything lives below target/bed, in a private network and mount namespace. KIND names the
# sandboxer that `daemon` is about: runc, which is the default, gvisor, quark, vmm or wasm.
set -euo pipefail
SRC=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
TOP=$(cd "$SRC/../.." && pwd)
B=${BED:-$TOP/target/bed}
K=${KUASAR_BIN_DIR:-$TOP/target/release}
# ENGINE is a directory with another containerd, CONTAINERD_CONFIG its configuration: tests/compat.sh.
export PATH="${ENGINE:+$ENGINE:}$B/bin:$B/root/usr/bin:$K:$PATH"
export CONTAINERD_ADDRESS=$B/run/containerd.sock CRI_CONFIG_FILE=$B/etc/crictl.yaml
export KUASAR_RUNC_SOCKET=$B/run/kuasar-runc.sock KUASAR_GVISOR_SOCKET=$B/run/kuasar-gvisor.sock
export KUASAR_VMM_SOCKET=$B/run/kuasar-vmm.sock KUASAR_QUARK_SOCKET=$B/run/kuasar-quark.sock
export KUASAR_WASM_SOCKET=$B/run/kuasar-wasm.sock
KIND=${KIND:-runc}

pid_of() { cat "$B/run/$1.pid" 2>/dev/null || true; }
alive() { [ -n "$1" ] && readlink "/proc/$1/exe" >/dev/null 2>&1; }
inside() { nsenter -t "$(pid_of ns)" -n -m -- "$@"; }
own_namespaces() {
  local p n; p=$(pid_of ns)
  for n in net mnt; do [ "$(readlink "/proc/$p/ns/$n")" != "$(readlink "/proc/self/ns/$n")" ] || return 1; done
  [ "$(cat "/proc/$p/comm")" = sleep ]
}
# wait_for SECONDS COMMAND…: until it succeeds
wait_for() {
  local until=$(($(date +%s) + $1)); shift
  until "$@" >/dev/null 2>&1; do
    [ "$(date +%s)" -lt "$until" ] || { echo "timed out: $*" >&2; return 1; }
    sleep 0.02
  done
}
start() { # NAME LOG COMMAND…
  local name=$1 log=$2; shift 2
  nsenter -t "$(pid_of ns)" -n -m -- setsid "$@" </dev/null >>"$B/run/$log" 2>&1 &
  echo $! > "$B/run/$name.pid"
}
gone() { ! alive "$1"; }
end() { # NAME SIGNAL
  local p; p=$(pid_of "$1")
  alive "$p" || return 0
  kill "-$2" "$p"
  wait_for 20 gone "$p"
}
# A connection waits while no daemon runs: only the server's first HTTP/2 frame is an answer.
answers() {
  python3 -c '
import socket, sys
s = socket.socket(socket.AF_UNIX)
s.settimeout(5)
s.connect(sys.argv[1])
s.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
sys.exit(0 if s.recv(9) else 1)' "$B/run/kuasar-$KIND.sock"
}
# Which sandboxers there are here.
kinds() {
  echo runc
  [ ! -x "$B/bin/runsc" ] || [ ! -x "$K/gvisor-sandboxer" ] || echo gvisor
  # Quark itself is packaged nowhere: a fake stands for it.
  [ ! -x "$K/fake-quark" ] || [ ! -x "$K/quark-sandboxer" ] || echo quark
  [ ! -x "$B/vmm/libexec/qemu-system-x86_64" ] || [ ! -x "$K/vmm-sandboxer" ] || echo vmm
  [ ! -x "$K/wasm-sandboxer" ] || [ ! -x "$K/wasm-worker" ] || echo wasm
}
# The capabilities that the daemon's unit takes from it, so that every suite runs under them.
taken() {
  sed -n 's/^CapabilityBoundingSet=~//p' "$TOP/packaging/systemd/kuasar-$KIND.service" |
    tr 'A-Z ' 'a-z,' | sed 's/cap_/-/g'
}
name() { [ "$KIND" = runc ] && echo daemon || echo "daemon-$KIND"; }
daemon() {
  case $1 in
    spawn) # does not wait until it serves
      local without; without=$(taken)
      start "$(name)" "kuasar-$KIND.log" ${without:+setpriv --bounding-set "$without"} \
        "$K/$KIND-sandboxer" --listen "$B/run/kuasar-$KIND.sock" \
        --dir "$B/run/kuasar-$KIND" --config "$B/etc/kuasar-$KIND.toml" ${LOG:+--log-level "$LOG"} ;;
    start)
      alive "$(pid_of "$(name)")" && return 0
      daemon spawn
      wait_for 30 answers ;;
    stop) end "$(name)" TERM ;;
    kill) end "$(name)" KILL ;;
    died) wait_for 30 gone "$(pid_of "$(name)")" ;;
  esac
}
containerd_() {
  case $1 in
    start)
      alive "$(pid_of containerd)" && return 0
      start containerd containerd.log containerd --config "${CONTAINERD_CONFIG:-$B/etc/config.toml}"
      wait_for 60 ctr version
      # CRI answers a little later.
      [ ! -x "$B/bin/crictl" ] || wait_for 60 inside crictl pods ;;
    stop) end containerd TERM ;;
    kill) end containerd KILL ;;
  esac
}
# A worker that is linked to this host's glibc gets the one that the bed's library wants, and the
# directory that has both.
loading_worker() { # PROGRAM LIBRARIES
  [ -d "$2" ] && [ -x "$K/$1" ] || return 0
  [ "$B/bin/$1" -nt "$K/$1" ] && return 0
  cp --remove-destination "$K/$1" "$B/bin/$1.new"
  patchelf --set-interpreter "$(patchelf --print-interpreter "$B/bin/runc13")" --force-rpath \
    --set-rpath "$2" "$B/bin/$1.new"
  mv "$B/bin/$1.new" "$B/bin/$1"
}
up() {
  mkdir -p "$B/run"
  loading_worker wasm-worker-wasmedge "$B/wasmedge/usr/lib/$(gcc -dumpmachine)"
  loading_worker wasm-worker-nn "$B/onnx/usr/lib/$(gcc -dumpmachine)"
  if ! alive "$(pid_of ns)"; then
    # A test that was cut off has left its own settings.
    [ ! -d "$B/etc/made" ] || cp "$B"/etc/made/*.toml "$B/etc/"
    rm -rf "$B/run/kuasar-runc" "$B/run/kuasar-gvisor" "$B/run/kuasar-quark" "$B/run/kuasar-vmm" "$B/run/kuasar-wasm" "$B/run/containerd" "$B/run/cni-ipam" "$B"/run/*.sock*
    setsid unshare --net --mount --propagation private sleep infinity </dev/null >/dev/null 2>&1 &
    echo $! > "$B/run/ns.pid"
    # Until it has its namespaces, `inside` would be the host.
    wait_for 5 own_namespaces
    inside ip link set lo up
    if [ "${BED_CGROUP:-}" = v2 ]; then
      # To measure: only v2 in here, with those controllers that the host's v1 leaves to it.
      inside umount -R /sys/fs/cgroup
      inside mount -t cgroup2 cgroup2 /sys/fs/cgroup
    else
      # A hybrid of cgroup v1 and v2 is v1 in here: crun refuses the hybrid.
      inside umount /sys/fs/cgroup/unified 2>/dev/null || true
    fi
    # its own tmpfs, so that a full disk can be tried without harm
    for KIND in $(kinds); do
      inside mkdir -p "$B/run/kuasar-$KIND"
      inside mount -t tmpfs -o mode=0700,size=64m tmpfs "$B/run/kuasar-$KIND"
    done
  fi
  alive "$(pid_of registry)" || start registry registry.log python3 "$SRC/registry.py" "$B/images" 5055
  for KIND in $(kinds); do daemon start; done
  containerd_ start
  ctr -n k8s.io images ls -q | grep -q pause:3.10 ||
    inside ctr -a "$CONTAINERD_ADDRESS" -n k8s.io images import "$B/images/base.tar" >/dev/null
}
# critest on stock runc leaves a shim behind now and then, whose pod containerd has forgotten: not
# ours, but not to stay either.
end_stock_shims() {
  local exe pid child groups group
  for exe in /proc/[0-9]*/exe; do
    [ "$(readlink "$exe" 2>/dev/null || true)" = "$B/root/usr/bin/containerd-shim-runc-v2" ] || continue
    pid=${exe#/proc/}; pid=${pid%/exe}
    groups=
    for child in $(pgrep -P "$pid" || true); do
      groups="$groups $(cut -d: -f3 "/proc/$child/cgroup" 2>/dev/null | sort -u || true)"
      kill -KILL "$child" 2>/dev/null || true
    done
    kill -KILL "$pid" 2>/dev/null || true
    wait_for 5 gone "$pid" || true
    for group in $groups; do
      [ "$group" = / ] || rmdir /sys/fs/cgroup/*/"$group" /sys/fs/cgroup/"$group" 2>/dev/null || true
    done
    echo "bed: ended a shim that stock containerd has left ($pid)"
  done
}
# What is left of a test that was cut off: machines and helpers outlive their daemon, and a daemon that
# was killed cannot end them. Ours are those that run a program of this bed or of this checkout's.
end_rest() {
  local exe pid path
  for exe in /proc/[0-9]*/exe; do
    path=$(readlink "$exe" 2>/dev/null || true)
    case $path in
      "$B"/* | "$K"/*) ;;
      *) continue ;;
    esac
    pid=${exe#/proc/}; pid=${pid%/exe}
    # The machine of tests/node.sh runs beside the bed, and is not of it.
    ! grep -qzF "file=$B/node" "/proc/$pid/cmdline" 2>/dev/null || continue
    kill -KILL "$pid" 2>/dev/null || continue
    wait_for 5 gone "$pid" || true
    echo "bed: ended what was left: ${path% (deleted)} ($pid)"
  done
}
down() {
  if alive "$(pid_of ns)"; then
    # What is left of a failed test may be past removing: the namespaces go all the same.
    if alive "$(pid_of containerd)"; then
      timeout 60 nsenter -t "$(pid_of ns)" -n -m -- crictl rmp -fa >/dev/null 2>&1 || true
    fi
    end containerd TERM || end containerd KILL || true
    for KIND in $(kinds); do
      daemon stop || daemon kill || true
      inside "$K/$KIND-sandboxer" --dir "$B/run/kuasar-$KIND" shutdown-parent --force >/dev/null 2>&1 || true
    done
    end_stock_shims
    end_rest
    end registry TERM || true
    end ns KILL || true
  else
    end_rest
  fi
  rm -f "$B"/run/*.pid
}
# A copy of another checkout's bed names that one's processes: nothing here may act on them.
if [ -e "$B/etc/crictl.yaml" ] && ! grep -qF "unix://$B/run/containerd.sock" "$B/etc/crictl.yaml"; then
  "$SRC/setup.sh"
fi
case ${1:-} in
  up) up ;;
  down) down ;;
  daemon) daemon "$2" ;;
  containerd) containerd_ "$2" ;;
  run) shift; inside "$@" ;;
  *) echo "usage: bed.sh up|down|daemon start|spawn|stop|kill|died|containerd start|stop|kill|run CMD" >&2; exit 2 ;;
esac
