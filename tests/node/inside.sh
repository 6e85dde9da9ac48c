#!/bin/bash
# Runs in the machine of tests/node.sh, as a service of its systemd: installs the packages, sets containerd
# up as docs/operations.md says, and looks at what pods get from systemd and from cgroup v2.
# Each check says `test node::NAME ... ok`, as the other suites do.
set -uo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
export PATH=/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin HOME=/root TERM=dumb DEBIAN_FRONTEND=noninteractive
T=/run/node-test
mkdir -p $T
passed=0 failed=0
fail() { echo "  $*" >&2; exit 1; }
check() { # FUNCTION…: each in a shell of its own
  local name begun
  for name; do
    begun=$SECONDS
    # In a condition bash would not stop at what fails.
    (set -eu; "$name") > "$T/said" 2>&1 &
    if wait $!; then
      passed=$((passed + 1)); echo "test node::$name ... ok ($((SECONDS - begun)) s)"
    else
      failed=$((failed + 1)); tail -n 30 "$T/said"; echo "test node::$name ... FAILED"
    fi
  done
}
wait_for() { # SECONDS COMMAND…
  local until=$((SECONDS + $1)); shift
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $until ] || fail "not in time: $*"
    sleep 0.2
  done
}
active() { [ "$(systemctl is-active "$1")" = active ]; }
crictl() { "$HERE/crictl" "$@"; }
# Those of the packages that are here.
KINDS=$(for kind in runc wasm vmm; do ! compgen -G "$HERE/debs/kuasar-${kind}_*" >/dev/null || echo "$kind"; done)
printf 'runtime-endpoint: unix:///run/containerd/containerd.sock\nimage-endpoint: unix:///run/containerd/containerd.sock\ntimeout: 900\n' > /etc/crictl.yaml
# pod NAME HANDLER PARENT [NAMESPACES]: its id
pod() {
  cat > "$T/$1.json" <<JSON
{ "metadata": { "name": "$1", "namespace": "node", "uid": "uid-$1", "attempt": 1 }, "hostname": "$1", "log_directory": "$T/logs/$1",
  "linux": { "cgroup_parent": "$3", "security_context": { "namespace_options": { "pid": 1${4:+, $4} } } } }
JSON
  crictl runp --runtime "$2" "$T/$1.json"
}
# container POD-ID POD NAME LINUX-RESOURCES COMMAND…: its id, started
container() {
  local id=$1 pod=$2 name=$3 resources=$4 words; shift 4
  words=$(printf '"%s",' "$@")
  cat > "$T/$name.json" <<JSON
{ "metadata": { "name": "$name" }, "image": { "image": "localhost/busybox:latest" }, "log_path": "$name.log",
  "command": [${words%,}], "linux": { "resources": { $resources } } }
JSON
  id=$(crictl create "$id" "$T/$name.json" "$T/$pod.json")
  crictl start "$id" >/dev/null
  echo "$id"
}
group() { find /sys/fs/cgroup -type d -name "*$1*" | grep .; }
pid() { head -n 1 "$(group "$1")/cgroup.procs"; }
# In the container c of the pod `first`. (Not crictl: a second of processor time each, emulated.)
in_first() { kuasar-ctl exec -c c first "$@"; }
is_first() { [ "$(in_first hostname)" = first ] || fail "no exec $*"; }

it_is_a_node_with_systemd_and_cgroup_v2() {
  [ "$(cat /proc/1/comm)" = systemd ] || fail "no systemd as PID 1"
  [ "$(stat -fc %T /sys/fs/cgroup)" = cgroup2fs ] || fail "no cgroup v2"
}
packages_start_their_daemons() {
  dpkg -i "$HERE"/debs/*.deb
  local kind
  for kind in $KINDS; do
    wait_for 60 active "kuasar-$kind"
    systemctl is-enabled "kuasar-$kind"
    [ "$(systemctl show -P Type "kuasar-$kind")" = notify ]
    [ "$(systemctl show -P NRestarts "kuasar-$kind")" = 0 ] || fail "kuasar-$kind was started again"
  done
}
containerd_takes_the_lines_of_the_package() {
  mkdir -p /etc/containerd /etc/cni/net.d
  cat > /etc/cni/net.d/10-node.conflist <<JSON
{ "cniVersion": "1.0.0", "name": "node", "plugins": [ { "type": "bridge", "bridge": "cni0", "isGateway": true,
  "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.77.0.0/24" }]] } } ] }
JSON
  {
    echo "version = 3"
    echo "[plugins.'io.containerd.cri.v1.images'.pinned_images]"
    echo "sandbox = 'registry.k8s.io/pause:3.10'"
    echo "[plugins.'io.containerd.cri.v1.runtime'.cni]"
    echo "bin_dirs = ['/usr/lib/cni']"
    echo "conf_dir = '/etc/cni/net.d'"
    # kubelet's and containerd's cgroup driver: as kubeadm sets nodes up.
    echo "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]"
    echo "runtime_type = 'io.containerd.runc.v2'"
    echo "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]"
    echo "SystemdCgroup = true"
    for kind in $KINDS; do cat "/usr/share/doc/kuasar-$kind/containerd.toml"; done
  } > /etc/containerd/config.toml
  cat /etc/containerd/config.toml
  systemctl restart containerd
  wait_for 60 crictl info
  local image
  for image in "$HERE"/images/*.tar; do ctr -n k8s.io images import --local "$image"; done
}
a_pod_runs_below_its_slice() {
  # As kubelet does it with its systemd driver: a slice for each pod, with accounting, whose name it gives.
  local slice
  for slice in kubepods-burstable-poduid1 kubepods-burstable-poduid2 kubepods-burstable-poduid3; do
    systemd-run --quiet --unit="hold-$slice" --slice="$slice.slice" sleep infinity
    systemctl set-property --runtime "$slice.slice" CPUAccounting=yes MemoryAccounting=yes TasksAccounting=yes IOAccounting=yes
  done
  local id c at
  id=$(pod first kuasar-runc kubepods-burstable-poduid1.slice)
  c=$(container "$id" first c '"memory_limit_in_bytes": 67108864, "cpu_quota": 50000, "cpu_period": 100000' sleep 1000)
  echo "$id" > $T/first; echo "$c" > $T/first-c
  at=$(group "$c")
  echo "$at"
  case $at in *kubepods.slice/kubepods-burstable.slice/kubepods-burstable-poduid1.slice/*) ;; *) fail "not below the pod's slice" ;; esac
  [ "$(cat "$at/memory.max")" = 67108864 ] || fail "memory.max is $(cat "$at/memory.max")"
  [ "$(cat "$at/cpu.max")" = "50000 100000" ] || fail "cpu.max is $(cat "$at/cpu.max")"
  is_first "in a new container"
  crictl stats -o json "$c" | tee $T/stats
  grep -q '"usageCoreNanoSeconds"' $T/stats || fail "no statistics"
}
a_container_that_takes_too_much_memory_is_oom_killed() {
  local c reason
  # shellcheck disable=SC2016 # the container's shell's
  c=$(container "$(cat $T/first)" first oom '"memory_limit_in_bytes": 16777216' sh -c 'x=a; while :; do x=$x$x; done')
  wait_for 60 sh -c "! [ -e '$(group "$c")' ] || [ -z \"\$(cat '$(group "$c")/cgroup.procs')\" ]"
  reason=$(crictl inspect -o go-template --template '{{.status.reason}} {{.status.exitCode}}' "$c")
  [ "$reason" = "OOMKilled 137" ] || fail "$reason"
}
limits_are_changed_and_devices_are_refused() {
  local c at; c=$(cat $T/first-c); at=$(group "$c")
  crictl update --memory 134217728 "$c"
  [ "$(cat "$at/memory.max")" = 134217728 ] || fail "memory.max is $(cat "$at/memory.max")"
  # Rules for devices are a BPF program on cgroup v2.
  ! in_first sh -c 'mknod /tmp/d b 254 0 && cat /tmp/d' || fail "the root disk can be read"
}
pods_outlive_the_daemon() {
  local c before; c=$(cat $T/first-c); before=$(pid "$c")
  systemctl restart kuasar-runc
  is_first after a restart
  systemctl kill --kill-whom=main -s KILL kuasar-runc
  wait_for 30 active kuasar-runc
  is_first after kill -9
  [ "$(pid "$c")" = "$before" ] || fail "another process"
}
a_daemon_that_hangs_is_started_again_by_its_watchdog() {
  mkdir -p /run/systemd/system/kuasar-runc.service.d
  printf '[Service]\nWatchdogSec=4s\n' > /run/systemd/system/kuasar-runc.service.d/watchdog.conf
  systemctl daemon-reload
  systemctl restart kuasar-runc
  local main; main=$(systemctl show -P MainPID kuasar-runc)
  kill -STOP "$main"
  wait_for 60 sh -c "[ \$(systemctl show -P MainPID kuasar-runc) != $main ] && [ \$(systemctl is-active kuasar-runc) = active ]"
  is_first after the watchdog
  rm -r /run/systemd/system/kuasar-runc.service.d
  systemctl daemon-reload
}
pods_outlive_containerd() {
  systemctl restart containerd
  wait_for 60 crictl info
  is_first after a restart of containerd
}
systemd_reloads_without_touching_pods() {
  systemctl daemon-reload
  systemctl daemon-reexec
  local at; at=$(group "$(cat $T/first-c)")
  [ "$(cat "$at/memory.max")" = 134217728 ] || fail "memory.max is $(cat "$at/memory.max")"
  is_first after daemon-reexec
}
runc_asks_systemd_where_it_is_told_to() {
  cat > /etc/kuasar/runc-sandboxer.toml.d/runc.toml <<TOML
engine = "runc"
[engines.runc]
path = "/usr/sbin/runc"
systemd_cgroup = true
TOML
  systemctl restart kuasar-runc
  is_first "on the engine that it was made with"
  local id c at
  id=$(pod second kuasar-runc kubepods-burstable-poduid2.slice)
  c=$(container "$id" second s '"memory_limit_in_bytes": 67108864' sleep 1000)
  at=$(group "$c")
  case $at in *kubepods-burstable-poduid2.slice/cri-containerd-$c.scope) ;; *) fail "$at" ;; esac
  [ "$(systemctl show -P MemoryMax "cri-containerd-$c.scope")" = 67108864 ] || fail "systemd does not know its limit"
  [ "$(kuasar-ctl exec second hostname)" = second ] || fail "no exec"
  crictl rmp -f "$id"
  ! systemctl is-active "cri-containerd-$c.scope" || fail "its scope is left"
  rm /etc/kuasar/runc-sandboxer.toml.d/runc.toml
  systemctl restart kuasar-runc
}
a_module_runs_with_its_limits() {
  # (module (import "wasi_snapshot_preview1" "proc_exit" (func (param i32))) (memory (export "memory") 1)
  #   (func (export "_start") i32.const 7 call 0))
  base64 -d > $T/seven.wasm <<WASM
AGFzbQEAAAABCAJgAX8AYAAAAiQBFndhc2lfc25hcHNob3RfcHJldmlldzEJcHJvY19leGl0AAADAgEBBQMBAAEHEwIGbWVtb3J5AgAGX3N0YXJ0AAEKCAEGAEEHEAAL
WASM
  local code=0
  kuasar-ctl run --sandboxer wasm $T/seven.wasm || code=$?
  [ $code = 7 ] || fail "exit code $code"
  # A container that is none, in a pod of wasm-sandboxer and below a slice.
  local id c at
  id=$(pod third kuasar-wasm kubepods-burstable-poduid3.slice)
  c=$(container "$id" third w '"memory_limit_in_bytes": 67108864' sleep 1000)
  at=$(group "$c")
  [ "$(cat "$at/memory.max")" = 67108864 ] || fail "memory.max is $(cat "$at/memory.max")"
  crictl rmp -f "$id"
}
metrics_come_from_one_socket() {
  systemctl enable --now kuasar-metrics.socket
  curl -sS --retry 3 http://127.0.0.1:9755/metrics > $T/metrics
  grep -q '^kuasar_daemon_up{sandboxer="runc"} 1$' $T/metrics || fail "runc is not up: $(cat $T/metrics)"
  grep -q '^kuasar_sandboxes{sandboxer="runc"} 1$' $T/metrics || fail "its pod is not counted"
  systemctl show -P MainPID kuasar-metrics
}
check_finds_nothing_wrong() { kuasar-ctl check --sandboxer runc || [ $? = 5 ]; }
an_upgrade_keeps_pods() {
  local before; before=$(pid "$(cat $T/first-c)")
  dpkg -i "$HERE"/debs/kuasar-common*.deb "$HERE"/debs/kuasar-runc*.deb
  active kuasar-runc
  is_first after the upgrade
  [ "$(pid "$(cat $T/first-c)")" = "$before" ] || fail "another process"
}
a_removed_pod_leaves_nothing() {
  crictl rmp -f "$(cat $T/first)"
  systemctl stop hold-kubepods-burstable-poduid1
  ! find /sys/fs/cgroup -path '*cri-containerd*' -type d | grep . || fail "cgroups are left"
  ! find /sys/fs/cgroup -name "*$(cat $T/first)*" -type d | grep . || fail "cgroups are left"
  ! grep kuasar-runc/ /proc/self/mounts || fail "mounts are left"
}
packages_are_removed() {
  dpkg -P kuasar-runc kuasar-wasm kuasar-gvisor kuasar-ctl kuasar-common
  ! systemctl list-units --all --no-legend 'kuasar*' | grep -v not-found | grep loaded || fail "units are left"
  ! pgrep -f 'sandboxer|sandbox-parent' || fail "processes are left"
}
# Of each program that a machine consists of, its cgroup.
groups_of_machines() {
  local name pid
  for name in qemu-system virtiofsd vhost-device; do
    for pid in $(pgrep -f "$name"); do
      [ "$(readlink "/proc/$pid/exe" | grep -c "$name")" = 0 ] || echo "$name $(cut -d: -f3 "/proc/$pid/cgroup")"
    done
  done
}
a_machine_is_below_its_pods_slice() {
  # A guest that an emulated processor emulates.
  # The kernel of this node, which is our guests', has none of what redirects packets to a tap.
  cat > /etc/kuasar/vmm-sandboxer.toml.d/slow.toml <<TOML
host_network = "none"
[qemu]
accel = "tcg"
[timeouts]
start = "900s"
stuck = "1800s"
[guest_timeouts]
boot = "800s"
connect = "300s"
call = "300s"
create = "300s"
health = "0s"
TOML
  systemctl restart kuasar-vmm
  local slice=kubepods-burstable-poduid1 id c name
  systemd-run --quiet --unit="hold-$slice" --slice="$slice.slice" sleep infinity
  systemctl set-property --runtime "$slice.slice" CPUAccounting=yes MemoryAccounting=yes TasksAccounting=yes IOAccounting=yes
  id=$(pod first kuasar-vmm "$slice.slice" '"network": 2')
  c=$(container "$id" first c '"memory_limit_in_bytes": 67108864, "cpu_quota": 50000, "cpu_period": 100000' sleep 10000)
  echo "$id" > $T/first; echo "$c" > $T/first-c
  groups_of_machines | tee $T/groups
  for name in qemu-system virtiofsd vhost-device; do grep -q "^$name" $T/groups || fail "no $name"; done
  ! grep -v "/kubepods.slice/kubepods-burstable.slice/$slice.slice/" $T/groups || fail "not below the pod's slice"
  # The limits hold in the guest, whose cgroups the host does not see.
  [ "$(in_first cat /sys/fs/cgroup/memory.max)" = 67108864 ] || fail "memory.max in the guest"
  [ "$(in_first cat /sys/fs/cgroup/cpu.max)" = "50000 100000" ] || fail "cpu.max in the guest"
  is_first "in a machine"
}
a_machines_limit_is_changed() {
  crictl update --memory 134217728 "$(cat $T/first-c)"
  [ "$(in_first cat /sys/fs/cgroup/memory.max)" = 134217728 ] || fail "memory.max in the guest"
}
machines_outlive_the_daemon() {
  local before; before=$(pgrep -f qemu-system)
  systemctl kill --kill-whom=main -s KILL kuasar-vmm
  wait_for 60 active kuasar-vmm
  is_first after kill -9
  systemctl restart kuasar-vmm
  is_first after a restart
  [ "$(pgrep -f qemu-system)" = "$before" ] || fail "another machine"
}
a_removed_machine_leaves_nothing() {
  crictl rmp -f "$(cat $T/first)"
  systemctl stop hold-kubepods-burstable-poduid1
  [ -z "$(groups_of_machines)" ] || fail "processes are left"
  ! find /sys/fs/cgroup -name "*$(cat $T/first)*" -type d | grep . || fail "cgroups are left"
  ! grep kuasar-vmm/ /proc/self/mounts || fail "mounts are left"
}
if [[ $KINDS = *vmm* ]]; then
  check it_is_a_node_with_systemd_and_cgroup_v2 packages_start_their_daemons containerd_takes_the_lines_of_the_package \
    a_machine_is_below_its_pods_slice a_machines_limit_is_changed machines_outlive_the_daemon a_removed_machine_leaves_nothing
else
  check it_is_a_node_with_systemd_and_cgroup_v2 packages_start_their_daemons containerd_takes_the_lines_of_the_package \
    a_pod_runs_below_its_slice a_container_that_takes_too_much_memory_is_oom_killed limits_are_changed_and_devices_are_refused \
    pods_outlive_the_daemon a_daemon_that_hangs_is_started_again_by_its_watchdog pods_outlive_containerd \
    systemd_reloads_without_touching_pods runc_asks_systemd_where_it_is_told_to a_module_runs_with_its_limits \
    metrics_come_from_one_socket check_finds_nothing_wrong an_upgrade_keeps_pods a_removed_pod_leaves_nothing packages_are_removed
fi
word=ok; [ $failed = 0 ] || word=FAILED
echo "test result: $word. $passed passed; $failed failed; 0 ignored; node"
[ -z "${KEEP:-}" ] && systemctl reboot --force --force
