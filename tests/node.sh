#!/bin/bash
# A node as operators have it: a machine with Debian's next release, systemd as PID 1 and cgroup v2, on
# which our packages are installed and stock containerd makes pods. QEMU boots it, without the help of KVM,
# on the kernel of our own guests. What is checked there is in tests/node/inside.sh.
# node.sh [make]: with `make`, only makes the image, below target/bed/node.
# With NODE_VMM=1 microVMs are tried there in place of all that: QEMU inside of QEMU, both emulated, which takes
# minutes for one pod. Not part of `make test`.
set -euo pipefail
TOP=$(cd "$(dirname "$0")/.." && pwd)
B=${BED:-$TOP/target/bed}
N=$B/node
SUITE=${NODE_SUITE:-forky}
# Seconds that all of it may take.
LIMIT=${NODE_LIMIT:-1800}
QEMU=$B/vmm/bin/qemu-system-x86_64
PACKAGES=systemd,systemd-sysv,dbus,containerd,runc,containernetworking-plugins,iproute2,kmod,procps,curl,ca-certificates
OURS=(kuasar-common kuasar-runc kuasar-wasm kuasar-ctl)
if [ -n "${NODE_VMM:-}" ]; then
  N=$B/node-vmm
  PACKAGES=$PACKAGES,qemu-system-x86,virtiofsd,vhost-device-vsock
  OURS=(kuasar-common kuasar-guest kuasar-vmm kuasar-ctl)
fi
# shellcheck source=tests/bed/apt.sh
. "$TOP/tests/bed/apt.sh"

skip() { # REASON
  echo "skipped: $1"
  mkdir -p "$B/run"
  echo "$1" >> "$B/run/skipped"
  exit 0
}
[ "$(uname -m)" = x86_64 ] || skip "node: the machine is made for x86_64 alone"
[ "$(id -u)" = 0 ] || skip "node: making its image needs root"

stamp=$N/stamp-$({ cat "$TOP/tests/node.sh"; echo "$SUITE $PACKAGES"; } | sha256sum | cut -c1-12)
image() {
  local unit m
  command -v mmdebstrap >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends mmdebstrap; } >/dev/null
  m=$(debian_mirror)
  rm -rf "$N"; mkdir -p "$N"
  # Snapshots of the archive are older than they say they live; their signatures are checked.
  mmdebstrap --quiet --mode=root --variant=minbase --include="$PACKAGES" --aptopt='Acquire::Check-Valid-Until "false"' \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/share/doc/*' "$SUITE" "$N/root" \
    "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $m $SUITE main"
  # Our own documents have the lines that go into containerd's configuration.
  rm -rf "$N"/root/etc/dpkg/dpkg.cfg.d/* "$N"/root/var/cache/apt/* "$N"/root/var/lib/apt/lists/*
  for unit in getty@tty1.service serial-getty@ttyS0.service {apt-daily,apt-daily-upgrade,dpkg-db-backup,e2scrub_all}.timer; do
    ln -sf /dev/null "$N/root/etc/systemd/system/$unit"
  done
  install -d "$N/root/mnt/node" "$N/root/etc/systemd/system/default.target.wants"
  install -m 0644 "$TOP/tests/node/node-test.service" "$N/root/etc/systemd/system/"
  ln -s ../node-test.service "$N/root/etc/systemd/system/default.target.wants/"
  echo "share /mnt/node 9p ro,trans=virtio,version=9p2000.L,msize=262144 0 0" > "$N/root/etc/fstab"
  echo node > "$N/root/etc/hostname"
  truncate -s 2G "$N/disk.img"
  mkfs.ext4 -q -F -O ^has_journal -d "$N/root" "$N/disk.img"
  rm -rf "$N/root"
  touch "$stamp"
}
[ -e "$stamp" ] || { begun=$SECONDS; image; echo "node: image made in $((SECONDS - begun)) s, $(du -sh "$N/disk.img" | cut -f1)"; }
[ "${1:-}" != make ] || exit 0

[ -x "$QEMU" ] || skip "node: no QEMU in the test bed"
[ -e "$TOP/target/guest/vmlinux" ] || skip "node: no guest kernel: run \`make guest\`"
[ -x "$TOP/target/release/runc-sandboxer" ] || skip "node: no programs: run \`make build\`"
T=$(mktemp -d "$N/run.XXXXXX")
trap 'rm -rf "$T"' EXIT
mkdir -p "$T/share/images"
cp "$TOP/tests/node/inside.sh" "$B/bin/crictl" "$T/share/"
cp "$B"/images/*.tar "$T/share/images/"
COMPRESSION=none OUT=$T/share/debs RELEASE=1 "$TOP/packaging/build.sh" deb "${OURS[@]}" >/dev/null
# Nothing is written to the image, and the machine has no network but its own.
timeout --kill-after=5 "$LIMIT" "$QEMU" -machine microvm,acpi=off,pcie=off,rtc=on -accel tcg,thread=multi -cpu Nehalem \
  -smp 2 -m 2G -nodefaults -no-user-config -display none -no-reboot -kernel "$TOP/target/guest/vmlinux" \
  -append "console=ttyS0 root=/dev/vda rw panic=-1 reboot=t quiet loglevel=4 TERM=dumb SYSTEMD_COLORS=0 systemd.show_status=0 systemd.log_target=console systemd.log_level=warning" \
  -drive "id=root,file=$N/disk.img,format=raw,if=none,snapshot=on" -device virtio-blk-device,drive=root \
  -fsdev "local,id=share,path=$T/share,security_model=none,readonly=on" -device virtio-9p-device,fsdev=share,mount_tag=share \
  -device virtio-rng-device -serial stdio </dev/null 2>&1 | sed -u 's/\r//' | tee "$T/console" || true
grep -q '^test result: ok\.' "$T/console"
