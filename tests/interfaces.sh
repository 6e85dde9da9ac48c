#!/bin/bash
# The tests of pods' networks (`network` in vmm-sandboxer) once more, on the distribution's kernel in a machine
# that QEMU boots: it has kinds of interfaces that the kernel of this host may lack (macvlan, macvtap, ipvlan).
# Without KVM's help: a minute.
# interfaces.sh make: only makes kernel and modules, below target/interfaces.
# interfaces.sh PROGRAM: with the test program of vmm-sandboxer's library.
set -euo pipefail
TOP=$(cd "$(dirname "$0")/.." && pwd)
B=${BED:-$TOP/target/bed}
QEMU=$B/vmm/bin/qemu-system-x86_64
PROGRAM=${1:?make, or the test program of the library of vmm-sandboxer}
N=$TOP/target/interfaces
# In the kernel's order of loading, what they depend on comes by itself.
export MODULES="tun veth macvlan macvtap ipvlan sch_ingress cls_matchall cls_u32 act_mirred"

if [ "$(uname -m)" != x86_64 ] || [ ! -x "$QEMU" ]; then
  echo "skipped: interfaces: no QEMU in the test bed, which has one for x86_64"
  exit 0
fi
mkdir -p "$N"
GUEST=$N "$TOP/vmm/guest/build.sh" distribution "$B/src/busybox"
[ "$PROGRAM" != make ] || exit 0
T=$(mktemp -d "$N/run.XXXXXX")
trap 'rm -rf "$T"' EXIT
mkdir -p "$T/root"/{bin,proc,sys,dev,tmp}
cp "$B/src/busybox" "$T/root/bin/"
cp "$PROGRAM" "$T/root/bin/tests"
cp "$(command -v ip)" "$T/root/bin/ip"
for program in "$PROGRAM" "$(command -v ip)"; do ldd "$program"; done | grep -oE '/[^ ]+' | sort -u | while read -r library; do
  install -D -m 0755 "$library" "$T/root$library"
done
cat > "$T/root/start" <<'EOF'
#!/bin/busybox sh
/bin/busybox --install /bin
export PATH=/bin HOME=/ RUST_BACKTRACE=0
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
for module in /modules/*; do insmod "$module" || echo "no $module"; done
tests network:: --test-threads=1 --show-output
poweroff -f
EOF
chmod 0755 "$T/root/start"
# The kernel unpacks one archive after the other.
{
  cat "$N/initramfs-distribution.cpio"
  (cd "$T/root" && find . | "$B/src/busybox" cpio -o -H newc 2>/dev/null)
} > "$T/initramfs"
timeout --kill-after=5 "${LIMIT:-300}" "$QEMU" -machine q35 -accel tcg -cpu Nehalem -m 512M -nodefaults -no-user-config \
  -display none -no-reboot -kernel "$N/vmlinux-distribution" -initrd "$T/initramfs" \
  -append "console=ttyS0 rdinit=/start panic=-1 quiet loglevel=3" -serial stdio </dev/null 2>&1 |
  sed -u 's/\r//' | tee "$T/console" || true
grep -q '^test result: ok\. [1-9]' "$T/console"
