#!/bin/bash
# Puts what boots virtual machines in the tests below target/bed/vmm, unpacked and not installed:
# bin/qemu-system-x86_64, bin/virtiofsd, bin/vhost-device-vsock. They come from a newer Debian with that
# release's loader and libraries beside them, so they run by their plain paths, on Debian 12 and 13.
# Prints the versions. A second run finds everything made and only prints.
#
# QEMU has the place of its firmware compiled in, so bin/qemu-system-x86_64 is a line of shell that runs
# libexec/qemu-system-x86_64 with -L. Whoever cannot have a shell runs that with -L share/qemu.
#
# Debian 12's own QEMU 7.2 has no vhost-user-vsock, and Debian 13 has no vhost-device-vsock.
set -euo pipefail
SRC=$(cd "$(dirname "$0")" && pwd)
TOP=$(cd "$SRC/../.." && pwd)
V=${BED:-$TOP/target/bed}/vmm
SUITE=${VMM_SUITE:-forky}
ROOTS=(qemu-system-x86 virtiofsd vhost-device-vsock)
PROGRAMS=(qemu-system-x86_64 virtiofsd vhost-device-vsock)
# shellcheck source=tests/bed/apt.sh
. "$SRC/apt.sh"

versions() {
  local p
  for p in "${PROGRAMS[@]}"; do echo "vmm: $p: $("$V/bin/$p" --version | head -n 1)"; done
}

# Not the place: setup.sh writes the paths of a bed that was copied anew.
stamp=$V/stamp-$({ cat "$SRC/vmm.sh" "$SRC/apt.sh"; echo "$SUITE"; } | sha256sum | cut -c1-12)
[ ! -e "$stamp" ] || { versions; exit 0; }

[ "$(uname -m)" = x86_64 ] || { echo "vmm: only x86_64 is served" >&2; exit 1; }
if ! command -v patchelf >/dev/null; then
  [ "$(id -u)" = 0 ] || { echo "vmm: patchelf is missing, and installing it needs root" >&2; exit 1; }
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends patchelf >/dev/null
fi
start=$(date +%s)
rm -rf "$V"
mkdir -p "$V"/{debs,root,bin,lib,libexec,share}
private_apt "$V/apt" "deb $SUITE"
export APT_CONFIG=$V/apt/apt.conf

# The names of the packages that the packages named depend on; libraries only.
depends() {
  apt-cache depends "$@" --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances |
    sed -nE 's/^ *\|?(Pre)?Depends: ((lib|zlib)[^ <>]*)$/\2/p' | sort -u
}
# Libraries of libraries, until there are no new ones. (apt's --recurse would also follow programs.)
mapfile -t libs < <(depends "${ROOTS[@]}")
while :; do
  mapfile -t more < <({ printf '%s\n' "${libs[@]}"; depends "${libs[@]}"; } | sort -u)
  [ ${#more[@]} -gt ${#libs[@]} ] || break
  libs=("${more[@]}")
done
(cd "$V/debs" && apt-get download -qq "${ROOTS[@]}" qemu-system-data seabios ipxe-qemu "${libs[@]}")
for deb in "$V"/debs/*.deb; do
  dpkg --fsys-tarfile "$deb" | tar -x -C "$V/root" --exclude='./usr/share/doc*' --exclude='./usr/share/man*' \
    --exclude='./usr/share/locale*' --exclude='./usr/share/lintian*' --exclude='*/gconv'
done

lib=$(dirname "$(find "$V/root" -name libc.so.6)")
mapfile -t programs < <(find "$V"/root/usr/{bin,libexec} -type f \( -name "${PROGRAMS[0]}" -o -name "${PROGRAMS[1]}" -o -name "${PROGRAMS[2]}" \))
for p in "${programs[@]}"; do "$lib/ld-linux-x86-64.so.2" --library-path "$lib" --list "$p"; done |
  sed -n "/ld-linux/d; s|.* => \($lib/[^ ]*\) .*|\1|p" | sort -u | xargs cp -L -t "$V/lib" "$lib/ld-linux-x86-64.so.2"
mkdir -p "$V/share/qemu"
cp -a "$V"/root/usr/share/qemu/{pvh,kvmvapic,linuxboot_dma}.bin "$V"/root/usr/share/qemu/qboot.rom \
  "$V"/root/usr/share/seabios/bios{,-256k,-microvm}.bin "$V/share/qemu/"
find "$V/root" -name 'efi-virtio.rom' -exec cp -L {} "$V/share/qemu/" \; -quit
cp "${programs[@]}" "$V/bin/"
for p in "${PROGRAMS[@]}"; do
  # DT_RPATH, unlike DT_RUNPATH, also serves the libraries' own libraries.
  patchelf --set-interpreter "$V/lib/ld-linux-x86-64.so.2" --force-rpath --set-rpath "$V/lib" "$V/bin/$p"
done
mv "$V/bin/qemu-system-x86_64" "$V/libexec/"
printf '#!/bin/sh\nexec "%s" -L "%s" "$@"\n' "$V/libexec/qemu-system-x86_64" "$V/share/qemu" > "$V/bin/qemu-system-x86_64"
chmod 0755 "$V/bin/qemu-system-x86_64"
rm -rf "$V/root" "$V/debs" "$V/apt"
versions
touch "$stamp"
echo "vmm: made in $(($(date +%s) - start)) s, $(du -sh "$V" | cut -f1)"
