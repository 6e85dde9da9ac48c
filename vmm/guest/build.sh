#!/bin/bash
# Builds what a microVM guest is made of into target/guest, from distribution packages alone:
#
#   build.sh kernel             vmlinux, with its configuration
#   build.sh image INIT         initramfs.cpio and guest.erofs, holding the static program INIT as /init
#   build.sh distribution INIT  vmlinux-distribution, Debian's own "cloud" kernel with PCI, and
#                               initramfs-distribution.cpio with INIT and the modules that it needs
#
# Reproducible: the same source package, compiler and files of this directory give the same bytes, in
# whatever directory. What is there already, made from the same things, is not made again. Root is
# needed for installing packages that are missing, and for the device node in the disk image.
# FLAVOURS="pci microvm" also builds vmlinux-pci, for machines with PCI and ACPI (q35), which takes minutes more.
# The distribution's is for these machines too, takes no compiler, and is larger and slower to boot.
set -euo pipefail
export LC_ALL=C TZ=UTC DEBIAN_FRONTEND=noninteractive
SRC=$(cd "$(dirname "$0")" && pwd)
TOP=$(cd "$SRC/../.." && pwd)
G=${GUEST:-$TOP/target/guest}
SERIES=6.12                     # long-term; in Debian 13, and in Debian 12's security or backports suite
PACKAGE=linux-source-$SERIES
FLAVOURS=${FLAVOURS:-microvm}
JOBS=${JOBS:-$(nproc)}
ARCH=$(uname -m)
# any fixed moment, user and host: they are printed by the kernel and are part of its bytes
export KBUILD_BUILD_TIMESTAMP='Thu Jan  1 00:00:00 UTC 2026' KBUILD_BUILD_USER=kuasar KBUILD_BUILD_HOST=kuasar KBUILD_BUILD_VERSION=1
UUID=4b756173-6172-4775-8573-74526f6f7400
# shellcheck source=tests/bed/apt.sh
. "$TOP/tests/bed/apt.sh"

die() { echo "guest: $*" >&2; exit 1; }

# packages PROGRAM:PACKAGE...: installs the packages whose program (or file) is not there
packages() {
  local pair missing=()
  for pair; do
    case $pair in
      /*) [ -e "${pair%%:*}" ] || missing+=("${pair##*:}") ;;
      *) command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}") ;;
    esac
  done
  [ ${#missing[@]} = 0 ] && return 0
  [ "$(id -u)" = 0 ] || die "these packages are missing, and installing them needs root: ${missing[*]}"
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# The version of the source package that apt would give; nothing when it knows none.
candidate() { apt-cache policy "$PACKAGE" 2>/dev/null | awk '$1 == "Candidate:" && $2 != "(none)" { print $2 }'; }

# Says which version is to be had, having told apt (APT_CONFIG) where from: this host's own suites
# when they have it, else a private configuration with the suite that does.
find_source() {
  local suite
  VERSION=$(candidate)
  [ -z "$VERSION" ] || return 0
  # lists that are there are good enough: whoever wants a newer kernel runs apt-get update
  [ ! -e "$G/apt/apt.conf" ] || { export APT_CONFIG=$G/apt/apt.conf; VERSION=$(candidate); }
  [ -z "$VERSION" ] || return 0
  unset APT_CONFIG
  [ "$(id -u)" != 0 ] || apt-get update -qq
  VERSION=$(candidate)
  [ -z "$VERSION" ] || return 0
  case $(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release) in
    bookworm) suite=bookworm-backports ;;
    *) suite=trixie ;;
  esac
  private_apt "$G/apt" "deb $suite"
  export APT_CONFIG=$G/apt/apt.conf
  VERSION=$(candidate)
  [ -n "$VERSION" ] || die "no package $PACKAGE in $suite"
}

# the configuration of a flavour, as far as it is ours
fragment() {
  case $1 in
    microvm) cat "$SRC"/kernel/{common,"$ARCH"}.config ;;
    pci) cat "$SRC"/kernel/{common,"$ARCH","$ARCH-pci"}.config ;;
    *) die "no flavour $1 of the kernel" ;;
  esac
}

product() { case $1 in microvm) echo vmlinux ;; *) echo "vmlinux-$1" ;; esac; }

# what a kernel is made from, as one line
inputs() {
  echo "$VERSION $({ fragment "$1"; declare -f kernel; } | sha256sum | cut -c1-16) $(gcc -dumpfullversion) $(ld --version | head -n 1)"
}

made() { [ -s "$G/$(product "$1")" ] && [ "$(cat "$G/$(product "$1").stamp" 2>/dev/null)" = "$(inputs "$1")" ]; }

unpack_source() {
  TREE=$G/src/$PACKAGE-$VERSION
  [ ! -e "$TREE/.complete" ] || return 0
  rm -rf "$G/src"
  mkdir -p "$G/src" "$TREE"
  (cd "$G/src" && apt-get download -qq -o APT::Sandbox::User=root "$PACKAGE=$VERSION")
  dpkg --fsys-tarfile "$G"/src/*.deb | tar -xO --wildcards './usr/src/*.tar.xz' | tar -xJ -C "$TREE" --strip-components=1
  rm -f "$G"/src/*.deb
  touch "$TREE/.complete"
}

# Every line of the fragments must hold: the kernel's own tools drop silently what cannot be.
check_config() {
  local line wrong=0
  # the last word on an option counts
  while read -r line; do
    case $line in
      '#'*) ! grep -q "^${line:2:-11}=" "$2" || { echo "guest: is set, and must not be: ${line:2:-11}" >&2; wrong=1; } ;;
      *) grep -qxF "$line" "$2" || { echo "guest: does not hold: $line" >&2; wrong=1; } ;;
    esac
  done < <(grep -hE '^(CONFIG_|# CONFIG_[A-Z0-9_]+ is not set$)' "$1" |
    awk '{ k = $0; sub(/^# /, "", k); sub(/[ =].*/, "", k); v[k] = $0 } END { for (k in v) print v[k] }')
  [ $wrong = 0 ] || die "the configuration asks for what this kernel cannot be"
}

build_kernel() {
  local flavour=$1 build=$G/build out image=vmlinux start
  start=$(date +%s)
  out=$G/$(product "$flavour")
  mkdir -p "$build"
  fragment "$flavour" > "$build/fragment.new"
  # All flavours are built in one place, one after the other: what the difference between their
  # configurations does not touch is compiled once.
  if ! cmp -s "$build/fragment.new" "$build/fragment" || [ ! -e "$build/.config" ]; then
    rm -f "$build/fragment"
    make -s -C "$TREE" O="$build" KCONFIG_ALLCONFIG="$build/fragment.new" allnoconfig >"$build/config.log" 2>&1 ||
      { tail -n 20 "$build/config.log" >&2; die "the configuration of $flavour is not one"; }
    check_config "$build/fragment.new" "$build/.config"
    mv "$build/fragment.new" "$build/fragment"
  fi
  [ "$ARCH" = x86_64 ] || image=Image
  echo "guest: building $(basename "$out") from $PACKAGE $VERSION ($build/build.log)"
  nice -n 5 make -C "$TREE" O="$build" -j"$JOBS" "$image" >"$build/build.log" 2>&1 ||
    { tail -n 20 "$build/build.log" >&2; die "the kernel does not build"; }
  case $image in
    vmlinux) objcopy --strip-all --remove-section=.comment "$build/vmlinux" "$out.part" ;;
    *) cp "$build/arch/arm64/boot/Image" "$out.part" ;;
  esac
  cp "$build/.config" "$out.config"
  mv "$out.part" "$out"
  inputs "$flavour" > "$out.stamp"
  echo "guest: $(basename "$out") took $(($(date +%s) - start)) s"
}

kernel() {
  local flavour all=1
  case $ARCH in x86_64 | aarch64) ;; *) die "no kernel configuration for $ARCH" ;; esac
  packages gcc:gcc make:make
  find_source
  for flavour in $FLAVOURS; do made "$flavour" || all=0; done
  if [ $all = 0 ]; then
    packages flex:flex bison:bison bc:bc perl:perl xz:xz-utils /usr/include/libelf.h:libelf-dev /usr/include/stdio.h:libc6-dev
    unpack_source
    for flavour in $FLAVOURS; do made "$flavour" || build_kernel "$flavour"; done
    # A tree with its objects is 2 GB: kept only for whoever works on the configuration.
    [ -n "${KEEP:-}" ] || rm -rf "$G/src" "$G/build"
  fi
  for flavour in $FLAVOURS; do
    echo "guest: $G/$(product "$flavour"): $(stat -c %s "$G/$(product "$flavour")") bytes, $PACKAGE $VERSION"
  done
}

# The program that packs a guest, for this host. Flags that the static programs are built with
# (RUSTFLAGS with crt-static) are not for its build scripts and macros.
builder() {
  (cd "$TOP" && env -u RUSTFLAGS -u CARGO_ENCODED_RUSTFLAGS -u CARGO_BUILD_TARGET -u CARGO_TARGET_DIR \
    cargo build --quiet -p guest-image)
  BUILDER=$TOP/target/debug/guest-image
}

image() {
  local init=$1 tree
  [ -f "$init" ] || die "$init is not there"
  packages mkfs.erofs:erofs-utils objcopy:binutils
  mkdir -p "$G"
  builder
  tree=$(mktemp -d "$G/tree.XXXXXX")
  # shellcheck disable=SC2064 # this directory
  trap "rm -rf '$tree' '$tree.init'" EXIT
  chmod 0755 "$tree"
  # Names of functions are a quarter of the program, and an initramfs is memory in each pod.
  objcopy --strip-all "$init" "$tree.init"
  "$BUILDER" --init "$tree.init" --initramfs "$G/initramfs.cpio" --tree "$tree"
  # Not compressed: pages of the program are read as they are needed.
  mkfs.erofs --quiet -T 0 -U "$UUID" --all-root "$G/guest.erofs.part" "$tree" >/dev/null
  mv "$G/guest.erofs.part" "$G/guest.erofs"
  echo "guest: $G/guest.erofs: $(stat -c %s "$G/guest.erofs") bytes"
}

# What vmm-task needs of a kernel and distributions have as modules, or built in.
# Tests want others, which MODULES names.
WANTED=(virtio_pci virtio_console virtio_net virtio_blk virtio_balloon vmw_vsock_virtio_transport virtiofs erofs ext4 overlay)
[ -z "${MODULES:-}" ] || read -ra WANTED <<< "$MODULES"

# The kernel inside of a bzImage (Documentation/arch/x86/boot.rst: setup_sects, payload_offset,
# payload_length). VMMs load it without a firmware's help, and nothing is unpacked at each boot.
payload() { # IMAGE
  local setup offset length part=$1.payload
  number() { od -An -t "u$3" -j "$2" -N "$3" --endian=little "$1" | tr -d ' '; }
  setup=$(number "$1" $((0x1f1)) 1)
  offset=$(number "$1" $((0x248)) 4)
  length=$(number "$1" $((0x24c)) 4)
  tail -c "+$(((setup + 1) * 512 + offset + 1))" "$1" | head -c "$length" > "$part" || true
  # behind the compressed bytes are four with the length, which makes unpackers grumble
  case $(od -An -t x1 -N 4 "$part" | tr -d ' ') in
    fd377a58) xz -dc --single-stream "$part" ;;
    1f8b*) gzip -dc "$part" 2>/dev/null || true ;;
    28b52ffd) packages zstd:zstd; zstd -dcq "$part" 2>/dev/null || true ;;
    7f454c46) cat "$part" ;;
    *) die "a kernel that is compressed in an unknown way" ;;
  esac
  rm -f "$part"
}

distribution() {
  local init=$1 package made tree modules release name start list=() args=()
  start=$(date +%s)
  [ "$ARCH" = x86_64 ] || die "only for x86_64"
  [ -f "$init" ] || die "$init is not there"
  packages modinfo:kmod xz:xz-utils objcopy:binutils
  mkdir -p "$G"
  find_source
  package=$(apt-cache pkgnames "linux-image-$SERIES" | grep -E -- '-cloud-amd64$' | sort -V | tail -n 1)
  [ -n "$package" ] || die "no cloud kernel $SERIES where $PACKAGE is"
  made=$package-$VERSION-$({ cat "$init"; declare -f distribution payload; echo "${WANTED[@]}"; } | sha256sum | cut -c1-16)
  [ "$(cat "$G/vmlinux-distribution.stamp" 2>/dev/null)" != "$made" ] || return 0
  tree=$(mktemp -d "$G/distribution.XXXXXX")
  # shellcheck disable=SC2064 # this directory
  trap "rm -rf '$tree'" EXIT
  (cd "$tree" && apt-get download -qq -o APT::Sandbox::User=root "$package")
  dpkg --fsys-tarfile "$tree"/*.deb | tar -x -C "$tree" ./boot ./lib/modules
  release=$(basename "$tree"/lib/modules/*)
  modules=$tree/lib/modules/$release
  payload "$tree/boot/vmlinuz-$release" > "$tree/vmlinux"
  [ "$(head -c 4 "$tree/vmlinux" | tail -c 3)" = ELF ] || die "no kernel in vmlinuz-$release"
  # module NAME: what it depends on, then itself, each once
  module() {
    local file other name=${1//-/_}
    case " ${list[*]} " in *" $name "*) return 0 ;; esac
    ! sed 's|.*/||; s/\.ko$//; s/-/_/g' "$modules/modules.builtin" | grep -qx "$name" || return 0
    file=$(find "$modules/kernel" -name "$name.ko*" -o -name "${name//_/-}.ko*" | head -n 1)
    [ -n "$file" ] || die "$package has no $name"
    for other in $(modinfo -F depends "$file" | tr ',' ' '); do module "$other"; done
    list+=("$name")
    case $file in
      *.xz) xz -dc "$file" ;;
      *.zst) packages zstd:zstd; zstd -dcq "$file" ;;
      *) cat "$file" ;;
    esac > "$tree/$name.ko"
    # What a debugger wants of it is the most of it.
    objcopy --strip-debug "$tree/$name.ko"
    args+=(--module "$tree/$name.ko")
  }
  for name in "${WANTED[@]}"; do module "$name"; done
  objcopy --strip-all "$init" "$tree/init"
  builder
  "$BUILDER" --init "$tree/init" "${args[@]}" --initramfs "$G/initramfs-distribution.cpio"
  mv "$tree/vmlinux" "$G/vmlinux-distribution"
  echo "$made" > "$G/vmlinux-distribution.stamp"
  echo "guest: $G/vmlinux-distribution: $(stat -c %s "$G/vmlinux-distribution") bytes, $package; modules: ${list[*]}"
  echo "guest: took $(($(date +%s) - start)) s"
}

case ${1:-} in
  kernel) kernel ;;
  image) image "${2:?the program that becomes /init}" ;;
  distribution) distribution "${2:?the program that becomes /init}" ;;
  *) sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2 ;;
esac
