#!/bin/bash
# A pod on stock runc and on each sandboxer that runs here, with timings. Cleans up behind itself.
set -euo pipefail
TOP=$(cd "$(dirname "$0")/.." && pwd)
B=${BED:-$TOP/target/bed}
BED_SH=$TOP/tests/bed/bed.sh
K=${KUASAR_BIN_DIR:-$TOP/target/release}
# The pods' parent cgroup is ours, as kubelet's are kubelet's: nobody else takes it away.
clean_up() {
  "$BED_SH" down || true
  find /sys/fs/cgroup -depth -type d -path '*/kuasar-demo*' -exec rmdir {} + 2>/dev/null || true
}
trap clean_up EXIT
"$BED_SH" up
T=$(mktemp -d "$B/run/demo.XXXXXX")
crictl() { CRI_CONFIG_FILE=$B/etc/crictl.yaml "$BED_SH" run "$B/bin/crictl" "$@"; }
ms() { echo $(($(date +%s%N) / 1000000)); }
handlers="runc kuasar-runc"
[ ! -S "$B/run/kuasar-gvisor.sock" ] || handlers="$handlers kuasar-gvisor"
[ ! -S "$B/run/kuasar-wasm.sock" ] || handlers="$handlers kuasar-wasm"
# a virtual machine, by QEMU without the help of KVM: slow, but the same everywhere
[ ! -S "$B/run/kuasar-vmm.sock" ] || handlers="$handlers kuasar-vmm"
case $handlers in *kuasar-wasm*)
  # A program of its own, in an image that has busybox, too.
  mkdir "$T/wasm"
  python3 "$TOP/tests/bed/wasmhello.py" "$T/wasm/hello.wasm"
  python3 "$TOP/tests/bed/wasmimage.py" localhost/wasm-demo:latest "$B/src/busybox" "$T/wasm" "$T/wasm.tar"
  "$BED_SH" run "$B/root/usr/bin/ctr" -a "$B/run/containerd.sock" -n k8s.io images import "$T/wasm.tar" >/dev/null
esac
for handler in $handlers; do
  image=busybox command='"sleep", "1000"'
  [ "$handler" != kuasar-wasm ] || { image=wasm-demo command='"/hello.wasm"'; }
  cat > "$T/pod.json" <<EOF
{ "metadata": { "name": "demo", "namespace": "demo", "uid": "$handler", "attempt": 1 },
  "hostname": "demo", "log_directory": "$T/logs",
  "linux": { "cgroup_parent": "/kuasar-demo", "security_context": { "namespace_options": { "pid": 1 } } } }
EOF
  cat > "$T/container.json" <<EOF
{ "metadata": { "name": "hello" }, "image": { "image": "localhost/$image:latest" },
  "command": [$command], "log_path": "$handler.log", "linux": {} }
EOF
  a=$(ms)
  if [ "$handler" = runc ]; then pod=$(crictl runp "$T/pod.json"); else pod=$(crictl runp --runtime "$handler" "$T/pod.json"); fi
  b=$(ms)
  container=$(crictl create "$pod" "$T/container.json" "$T/pod.json")
  crictl start "$container" >/dev/null
  c=$(ms)
  # There is no other program to be executed in a container of WebAssembly: what it has said.
  if [ "$handler" = kuasar-wasm ]; then
    out=$(cut -d' ' -f4- "$T/logs/$handler.log")
  else
    out=$(crictl exec "$container" hostname)
  fi
  d=$(ms)
  case $handler in
    runc) processes=$(pgrep -fc "containerd-shim.*$pod|^/pause" || true) ;;
    kuasar-gvisor) processes="$(pgrep -fc '^runsc-(sandbox|gofer) ' || true), all gVisor's" ;;
    kuasar-vmm) processes="$(pgrep -fc "qemu-system.* -name $pod|virtiofsd .*$pod|vhost-device-vsock .*$pod" || true)" ;;
    *) processes=$(pgrep -fc "^\[sandbox-${pod:0:8}" || true) ;;
  esac
  crictl rmp -f "$pod" >/dev/null
  printf '%-13s pod %4d ms   container %4d ms   exec %4d ms (%s)   remove %4d ms   processes of its own: %s\n' \
    "$handler" $((b - a)) $((c - b)) $((d - c)) "$out" $(($(ms) - d)) "$processes"
done
echo "times include one crictl command each (about 20 ms); see 'make bench' for the daemon's own share"
echo "daemon: $("$K/runc-sandboxer" --version); sandbox-parent: private memory $(awk '/^Anonymous/ { print $2, $3 }' "/proc/$(pgrep -x sandbox-parent -n || pgrep -f '^\[sandbox-parent' | head -1)/smaps_rollup")"
