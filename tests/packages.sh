#!/bin/bash
# Units and packages: systemd's own checks of the units; deb and rpm made, installed, upgraded,
# removed and purged in a root directory of their own, and upgraded under a running pod.
# packages.sh [NAME]: only the tests whose name contains NAME. Needs the programs of `make build`.
set -euo pipefail
TOP=$(cd "$(dirname "$0")/.." && pwd)
B=${BED:-$TOP/target/bed}
BED_SH=$TOP/tests/bed/bed.sh
export LC_ALL=C DEBIAN_FRONTEND=noninteractive
FILTER=${1:-}
T=$(mktemp -d "${TMPDIR:-/tmp}/kuasar-packages-test.XXXXXX")
passed=0 failed=0 skipped=0
finish() {
  [ ! -e "$T/bed" ] || KUASAR_BIN_DIR=$T/node/usr/bin "$BED_SH" down >/dev/null 2>&1 || true
  rm -rf --one-file-system "$T"
}
trap finish EXIT

fail() { echo "  $*" >&2; return 1; }
# A test that cannot run says why and ends with 77.
skip() { echo "skipped: $*"; exit 77; }
check() { # NAME…: functions, each in a shell of its own
  local name code
  for name; do
    case $name in *"$FILTER"*) ;; *) continue ;; esac
    code=0
    (set -e; "$name") > "$T/out" 2>&1 || code=$?
    case $code in
      0) passed=$((passed + 1)); echo "test packages::$name ... ok" ;;
      77) skipped=$((skipped + 1)); echo "test packages::$name ... $(grep ^skipped: "$T/out" | tail -n 1)" ;;
      *) failed=$((failed + 1)); echo "test packages::$name ... FAILED"; tail -n 30 "$T/out" ;;
    esac
  done
}

KINDS="runc vmm gvisor quark wasm"

# --- units

# units DIR: the units as they are installed, but with a program that is there
units() {
  local f
  mkdir -p "$1"
  for f in "$TOP"/packaging/systemd/*; do
    sed 's|^ExecStart=/usr/local/bin/[a-z]*-sandboxer|ExecStart=/bin/true|' "$f" > "$1/$(basename "$f")"
  done
}
verify() { SYSTEMD_UNIT_PATH=$1: systemd-analyze verify --man=no "$1"/kuasar*; }

systemd_accepts_every_unit() {
  command -v systemd-analyze >/dev/null || skip "no systemd-analyze here"
  local said
  units "$T/units"
  said=$(verify "$T/units" 2>&1)
  [ -z "$said" ] || fail "$said"
  # It would have said so.
  units "$T/bad"
  sed -i 's/^KillMode=.*/KillMod=process/' "$T/bad/kuasar-runc.service"
  said=$(verify "$T/bad" 2>&1) || true
  case $said in *KillMod*) ;; *) fail "a misspelt directive was not noticed: $said" ;; esac
}

# The figures that the units have. They are high because containers inherit what confines the
# daemon: docs/operations.md. A unit must not become worse.
no_unit_is_more_exposed_than_it_was() {
  command -v systemd-analyze >/dev/null || skip "no systemd-analyze here"
  local kind most
  units "$T/units"
  for kind in $KINDS; do
    case $kind in runc) most=96 ;; *) most=91 ;; esac
    systemd-analyze security --no-pager --offline=yes --threshold=$most "$T/units/kuasar-$kind.service" > "$T/security" ||
      fail "$(tail -n 1 "$T/security")"
  done
}

pods_outlive_what_a_unit_does() {
  local f kind
  for kind in $KINDS; do
    f=$TOP/packaging/systemd/kuasar-$kind.service
    for line in Type=notify KillMode=process Delegate=yes Restart=always WatchdogSec=30s RuntimeDirectoryPreserve=yes \
      OOMPolicy=continue StartLimitIntervalSec=0 PartOf=kuasar.target; do
      grep -qx "$line" "$f" || fail "$f: no $line"
    done
    grep -q '^Before=.*containerd.service' "$f" || fail "$f: not before containerd"
    # A mount namespace of the daemon's own hides its mounts from the engine.
    ! grep -E '^(Protect|Private|ReadOnly|ReadWrite|Inaccessible|Bind|TemporaryFileSystem|RootDir|RootImage)' "$f" ||
      fail "$f: the daemon would have a mount namespace of its own"
  done
  ! grep -E '^(NoNewPrivileges|SystemCall|Restrict|Lock|MemoryDeny|CapabilityBounding)' "$TOP/packaging/systemd/kuasar-runc.service" ||
    fail "kuasar-runc.service: containers would inherit it"
}

tmpfiles_make_private_directories() {
  command -v systemd-tmpfiles >/dev/null || skip "no systemd-tmpfiles here"
  local kind
  mkdir -p "$T/tmp/etc" "$T/tmp/usr/lib/tmpfiles.d"
  cp "$TOP"/packaging/tmpfiles.d/* "$T/tmp/usr/lib/tmpfiles.d/"
  echo 'root:x:0:0::/:/bin/sh' > "$T/tmp/etc/passwd"
  echo 'root:x:0:' > "$T/tmp/etc/group"
  systemd-tmpfiles --root="$T/tmp" --create
  for kind in $KINDS; do
    [ "$(stat -c %a "$T/tmp/run/kuasar-$kind")" = 700 ] || fail "/run/kuasar-$kind: not private"
  done
}

# --- packages

# Not compressed: that is most of the time, and not what is tried here.
build() { # FORMAT OUT [VARIABLE=VALUE…] [-- PACKAGE…]
  local format=$1 out=$2; shift 2
  local set=()
  while [ $# != 0 ] && [ "$1" != -- ]; do set+=("$1"); shift; done
  [ $# = 0 ] || shift
  env COMPRESSION=none OUT="$out" "${set[@]}" "$TOP/packaging/build.sh" "$format" "$@" >/dev/null
}
need_programs() { [ -x "$TOP/target/release/runc-sandboxer" ] || skip "no programs: run \`make build\`"; }
without() { [ -e "$TOP/target/guest/vmlinux" ] || echo WITHOUT="kuasar-guest kuasar-vmm"; }
need_rpm() { command -v rpmbuild >/dev/null && command -v rpm >/dev/null || skip "no rpmbuild here: \`make rpm\` installs it"; }

packages_are_made() {
  need_programs
  # shellcheck disable=SC2046 # one word or none
  build deb "$T/v1" $(without | tr ' ' '\a')
}

the_same_programs_give_the_same_bytes() {
  need_programs
  local format
  for format in deb rpm; do
    [ $format = deb ] || need_rpm
    build $format "$T/a" SOURCE_DATE_EPOCH=1700000000 -- kuasar-common
    # Another time, umask and directory.
    (umask 077; TMPDIR=$T/elsewhere; mkdir -p "$TMPDIR"; export TMPDIR; build $format "$T/b" SOURCE_DATE_EPOCH=1700000000 -- kuasar-common)
    cmp "$T"/a/*."$format" "$T"/b/*."$format"
  done
}
