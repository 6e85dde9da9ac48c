#!/bin/bash
# Units and packages: systemd's own checks of the units; deb and rpm made, installed, upgraded,
# removed and purged in a root directory of their own, and upgraded under a running pod.
# packages.sh [NAME]: only the tests whose name contains NAME. Needs the programs of `make build`.
# shellcheck disable=SC2015 # `A && B || fail`: fail never returns
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

fail() { echo "  $*" >&2; exit 1; }
# A test that cannot run says why and ends with 77.
skip() { echo "skipped: $*"; exit 77; }
check() { # NAME…: functions, each in a shell of its own
  local name code
  for name; do
    case $name in *"$FILTER"*) ;; *) continue ;; esac
    # Not `|| code=$?`, in which a failed command would not end the test.
    set +e
    (set -e; "$name") > "$T/out" 2>&1
    code=$?
    set -e
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
    sed 's|^ExecStart=/usr/local/bin/[a-z]*-[a-z]*|ExecStart=/bin/true|' "$f" > "$1/$(basename "$f")"
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
    case $kind in runc | wasm) most=96 ;; *) most=91 ;; esac
    systemd-analyze security --no-pager --offline=yes --threshold=$most "$T/units/kuasar-$kind.service" > "$T/security" ||
      fail "$(tail -n 1 "$T/security")"
  done
  # This one starts nothing: it can have what the others cannot.
  systemd-analyze security --no-pager --offline=yes --threshold=25 "$T/units/kuasar-metrics.service" > "$T/security" ||
    fail "$(tail -n 1 "$T/security")"
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
  for kind in runc wasm; do
    ! grep -E '^(NoNewPrivileges|SystemCall|Restrict|Lock|MemoryDeny|CapabilityBounding)' "$TOP/packaging/systemd/kuasar-$kind.service" ||
      fail "kuasar-$kind.service: containers would inherit it"
  done
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

dashboard_and_alerts_ask_for_metrics_that_exist() { python3 "$TOP/tests/packages/monitoring_check.py" "$TOP"; }

# Those of docs/, the dashboard's among them.
pictures_are_what_their_texts_give() {
  "$TOP/docs/pictures/draw.py" --check
  # It would have said so.
  mkdir -p "$T/drawn/docs" "$T/drawn/packaging"
  cp -r "$TOP/docs/pictures" "$TOP"/docs/*.svg "$T/drawn/docs/"
  cp -r "$TOP/packaging/monitoring" "$T/drawn/packaging/"
  sed -i '0,/Requests to the Controller/s//Requests/' "$T/drawn/packaging/monitoring/grafana-dashboard.json"
  sed -i 's/"sandbox-parent"/"another name"/' "$T/drawn/docs/pictures/pod-start.txt"
  local said
  ! said=$("$T/drawn/docs/pictures/draw.py" --check 2>&1) || fail "changed texts were not noticed"
  case $said in *dashboard.svg*) ;; *) fail "$said" ;; esac
  case $said in *pod-start.svg*) ;; *) fail "$said" ;; esac
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
need_programs() { [ -x "${BIN:-$TOP/target/release}/runc-sandboxer" ] || skip "no programs: run \`make build\`"; }
# Where no guest was built, what needs one is left out.
[ -e "$TOP/target/guest/vmlinux" ] || export WITHOUT="kuasar-guest kuasar-vmm"
need_rpm() { command -v rpmbuild >/dev/null && command -v rpm >/dev/null || skip "no rpmbuild here: \`make rpm\` installs it"; }

# The formats that can be made here.
FORMATS=both
{ command -v rpmbuild && command -v rpm; } >/dev/null || FORMATS=deb

# What packages are made of is what `make deb` and `make rpm` have built before, from nothing.
make_builds_all_that_packages_need() {
  local format clone=$T/clone said package p
  git clone -q "$TOP" "$clone" 2>/dev/null || skip "no git checkout here"
  for format in deb rpm; do
    said=$(make -s -n -C "$clone" "$format")
    for package in kuasar-common kuasar-runc kuasar-vmm kuasar-gvisor kuasar-quark kuasar-wasm kuasar-ctl; do
      # shellcheck disable=SC2016 # the inner shell's
      for p in $(bash -c '. "$1" && programs "$2"' - "$TOP/packaging/packages.sh" "$package"); do
        grep -qE "/$p( |\$)" <<<"$said" || fail "make $format does not build $p of $package"
      done
    done
    for p in "kuasar-ctl man target/release/man" completions/kuasar-ctl.bash completions/_kuasar-ctl completions/kuasar-ctl.fish \
      "build.sh kernel" "build.sh image target/release/vmm-task" "packaging/build.sh $format"; do
      grep -qF "$p" <<<"$said" || fail "make $format: no $p"
    done
  done
}

the_same_programs_give_the_same_bytes() {
  need_programs
  local f
  build $FORMATS "$T/a" SOURCE_DATE_EPOCH=1700000000 -- kuasar-common
  # Another umask and directory.
  (umask 077; mkdir -p "$T/elsewhere"; TMPDIR=$T/elsewhere build $FORMATS "$T/b" SOURCE_DATE_EPOCH=1700000000 -- kuasar-common)
  for f in "$T"/a/*; do cmp "$f" "$T/b/${f##*/}"; done
}

# A root directory that looks like this host, package database included, and in which everything may
# be done: an overlay over it in a mount namespace of its own. systemctl is a fake.
new_root() {
  mkdir -p "$T/layer" "$T/root"
  mount -t tmpfs -o size=2g,mode=0755 tmpfs "$T/layer" 2>/dev/null || skip "no tmpfs can be mounted here"
  mkdir "$T/layer/upper" "$T/layer/work"
  mount -t overlay overlay -o "lowerdir=/,upperdir=$T/layer/upper,workdir=$T/layer/work" "$T/root" 2>/dev/null ||
    skip "no overlay over this host's root can be mounted here"
  mkdir -p "$T/root/run/systemd/system"
  mv "$T/root/usr/bin/systemctl" "$T/root/usr/bin/systemctl.real" 2>/dev/null || skip "no systemctl here"
  cp "$TOP/tests/packages/fake-systemctl" "$T/root/usr/bin/systemctl"
  rm -f "$T/root/usr/sbin/policy-rc.d"
  mount --bind /dev "$T/root/dev"
  mount -t proc proc "$T/root/proc"
}
in_own_mounts() { # FUNCTION ARGUMENT…: what it mounts goes with it
  [ "$(id -u)" = 0 ] || skip "installing packages into a root directory needs root"
  # shellcheck disable=SC2163 # the function that is named
  export -f "$1"
  export -f new_root fail skip units_did ctl_works ctl_left
  export T TOP FILTER KINDS WITHOUT B
  unshare --mount --propagation private bash -euc "$*"
}
units_did() { # WORDS: systemctl was asked for this since the log was last emptied
  grep -q -- "$1" "$T/root/systemctl.log" || fail "systemctl was never asked for: $1"
}

# All packages, and of three a second version.
both_versions() {
  need_programs
  [ -e "$T/1" ] || build $FORMATS "$T/1" RELEASE=1
  [ -e "$T/2" ] || build $FORMATS "$T/2" RELEASE=2 -- kuasar-common kuasar-runc kuasar-wasm
}

bills_of_materials_hold_what_is_linked() {
  both_versions
  local f
  for f in "$T"/1/*.deb; do dpkg-deb -x "$f" "$T/unpacked"; done
  python3 "$TOP/tests/packages/sbom_check.py" "$TOP" "$T"/unpacked/usr/share/doc/kuasar-*/sbom.cdx.json
  for f in "$T"/unpacked/usr/share/doc/kuasar-*; do
    [ -s "$f/THIRD-PARTY-LICENCES" ] || fail "$f: no licences"
  done
  # No program without a bill, and no word of the machine that built them.
  ! grep -l "$TOP" -r "$T/unpacked/usr/share/doc" "$T/unpacked/usr/lib" "$T/unpacked/etc" || fail "paths of this machine"
}

inside_deb() {
  new_root
  local r=$T/root log=$T/root/systemctl.log conf=$T/root/etc/kuasar/runc-sandboxer.toml
  dpkg --root="$r" --install "$T"/1/*.deb
  [ "$(dpkg-query --root="$r" -W -f '${db:Status-Status} ${Version}' kuasar-runc)" = "installed 0.1.0-1" ] || fail "not installed"
  [ -L "$r/etc/systemd/system/multi-user.target.wants/kuasar-runc.service" ] || fail "not enabled"
  [ -L "$r/etc/systemd/system/kuasar.target.wants/kuasar-runc.service" ] || fail "not in the target"
  units_did "start kuasar-runc.service"
  chroot "$r" runc-sandboxer --config /etc/kuasar/runc-sandboxer.toml --check-config
  chroot "$r" containerd-shim-kuasar-runc-v1 -v
  # Upgrade: the operator's configuration stays, nothing is stopped.
  echo 'log_level = "debug"' >> "$conf"
  : > "$log"
  dpkg --root="$r" --install "$T"/2/*.deb
  grep -qx 'log_level = "debug"' "$conf" || fail "the operator's configuration was replaced"
  units_did "try-restart kuasar-runc.service"
  units_did daemon-reload
  ! grep -E '(^| )(stop|kill|restart|disable) ' "$log" || fail "an upgrade has stopped something"
  # One that the operator has switched off stays off.
  chroot "$r" systemctl.real --root=/ --quiet disable kuasar-wasm.service
  dpkg --root="$r" --install "$T"/2/kuasar-wasm*.deb
  [ ! -L "$r/etc/systemd/system/multi-user.target.wants/kuasar-wasm.service" ] || fail "switched on again"
  # Another version of the companion than that of the daemon is refused.
  ! dpkg --root="$r" --install "$T"/1/kuasar-runc_*.deb 2>/dev/null || fail "a daemon beside another companion"
  dpkg --root="$r" --install "$T"/2/kuasar-runc_*.deb
  : > "$log"
  dpkg --root="$r" --remove kuasar-runc
  units_did "stop kuasar-runc.service"
  [ ! -e "$r/usr/bin/runc-sandboxer" ] && [ -e "$conf" ] || fail "removed: the program goes, the configuration stays"
  local all
  all=$(cd "$T/1" && for f in *.deb; do echo "${f%%_*}"; done)
  mkdir -p "$r/var/cache/kuasar-wasm/v1" "$r/run/kuasar-runc/sandboxes/pod" "$r/run/kuasar-wasm/sandboxes"
  # shellcheck disable=SC2086 # a list of names
  dpkg --root="$r" --purge $all
  [ ! -e "$r/etc/kuasar" ] && [ ! -e "$r/var/cache/kuasar-wasm" ] && [ ! -e "$r/run/kuasar-wasm" ] || fail "purged: something is left"
  [ -e "$r/run/kuasar-runc/sandboxes/pod" ] || fail "purged: the record of a running pod is gone"
  left=$(find "$T/layer/upper/usr" "$T/layer/upper/etc" "$T/layer/upper/var/lib" -name '*kuasar*' ! -type c)
  [ -z "$left" ] || fail "purged: left: $left"
}
deb_is_installed_upgraded_removed_and_purged() {
  both_versions
  in_own_mounts inside_deb
}

# The operator's tool by itself, on a host without any other package of ours.
ctl_works() { # nothing is configured and nothing runs: 5 says that something of this host is bad
  local r=$T/root code=0 page
  [ "$(chroot "$r" kuasar-ctl --version)" = "kuasar-ctl 0.1.0" ] || fail "another version"
  chroot "$r" kuasar-ctl check > "$T/check" || code=$?
  [ "$code" = 0 ] || [ "$code" = 5 ] || fail "check: exit code $code: $(cat "$T/check")"
  tail -n 1 "$T/check" | grep -qE '^[0-9]+ good, [0-9]+ absent, ' || fail "check: $(cat "$T/check")"
  for page in kuasar-ctl kuasar-ctl-check kuasar-ctl-template; do
    zcat "$r/usr/share/man/man1/$page.1.gz" | grep -q '^\.TH ' || fail "no manual page $page"
  done
  chroot "$r" bash -c '. /usr/share/bash-completion/completions/kuasar-ctl && complete -p kuasar-ctl' >/dev/null ||
    fail "bash does not complete it"
  grep -q '^#compdef kuasar-ctl' "$r/usr/share/zsh/site-functions/_kuasar-ctl" || fail "no completions for zsh"
  grep -q 'complete -c kuasar-ctl' "$r/usr/share/fish/vendor_completions.d/kuasar-ctl.fish" || fail "no completions for fish"
  # The metrics' socket waits for its operator.
  grep -q '^ExecStart=/usr/bin/kuasar-ctl metrics --listen fd://$' "$r/usr/lib/systemd/system/kuasar-metrics.service" || fail "no unit"
  [ ! -L "$r/etc/systemd/system/sockets.target.wants/kuasar-metrics.socket" ] || fail "the metrics' socket was switched on"
  chroot "$r" systemctl.real --root=/ --quiet enable kuasar-metrics.socket
  [ -L "$r/etc/systemd/system/sockets.target.wants/kuasar-metrics.socket" ] || fail "the metrics' socket cannot be switched on"
}
ctl_left() { # nothing of it is left
  local left
  left=$(find "$T/layer/upper" -path '*/proc' -prune -o -name '*kuasar*' ! -type c -print)
  [ -z "$left" ] || fail "removed: left: $left"
}
inside_ctl() { # the same as deb and, where rpm is here, as rpm
  new_root
  local r=$T/root
  dpkg --root="$r" --install "$T"/1/kuasar-ctl_*.deb
  ctl_works
  dpkg --root="$r" --remove kuasar-ctl
  [ ! -e "$r/usr/bin/kuasar-ctl" ] || fail "not removed"
  dpkg --root="$r" --purge kuasar-ctl 2>/dev/null || true
  ctl_left
  command -v rpm >/dev/null && [ -e "$(echo "$T"/1/kuasar-ctl-*.rpm)" ] || return 0
  local rpm=(rpm --root "$r" --nodeps)
  ! rpm --help | grep -q force-debian || rpm+=(--force-debian)
  "${rpm[@]}" -i "$T"/1/kuasar-ctl-*.rpm
  ctl_works
  "${rpm[@]}" -e kuasar-ctl
  ctl_left
}
ctl_is_installed_alone_works_and_is_removed() {
  both_versions
  in_own_mounts inside_ctl
}

inside_rpm() {
  new_root
  local r=$T/root log=$T/root/systemctl.log conf=$T/root/etc/kuasar/runc-sandboxer.toml
  local rpm=(rpm --root "$r" --nodeps)
  # Debian's own warns who uses it beside dpkg.
  ! rpm --help | grep -q force-debian || rpm+=(--force-debian)
  "${rpm[@]}" -i "$T"/1/*.rpm
  units_did "preset kuasar-runc.service"
  ! grep -E '(^| )start ' "$log" || fail "rpm packages are not started by themselves"
  "${rpm[@]}" -V kuasar-runc kuasar-common || fail "files are not as packaged"
  chroot "$r" runc-sandboxer --config /etc/kuasar/runc-sandboxer.toml --check-config
  echo 'log_level = "debug"' >> "$conf"
  : > "$log"
  "${rpm[@]}" -U "$T"/2/*.rpm
  grep -qx 'log_level = "debug"' "$conf" || fail "the operator's configuration was replaced"
  units_did "try-restart kuasar-runc.service"
  ! grep -E '(^| )(stop|kill|restart|disable) ' "$log" || fail "an upgrade has stopped something"
  [ "$(rpm --root "$r" -q kuasar-runc)" = kuasar-runc-0.1.0-2 ] || [ "$(rpm --root "$r" -q kuasar-runc)" = kuasar-runc-0.1.0-2.x86_64 ] || fail "not upgraded"
  : > "$log"
  # shellcheck disable=SC2046 # a list of names
  "${rpm[@]}" -e $(rpm --root "$r" -qa | grep ^kuasar)
  units_did "disable --now kuasar-runc.service"
  [ -e "$conf.rpmsave" ] && [ ! -e "$r/usr/bin/runc-sandboxer" ] || fail "erased: an edited configuration is kept as .rpmsave"
}
rpm_is_installed_upgraded_and_erased() {
  need_rpm
  both_versions
  in_own_mounts inside_rpm
}

# --- an upgrade under a running pod

crictl() { CRI_CONFIG_FILE=$B/etc/crictl.yaml "$BED_SH" run "$B/bin/crictl" "$@"; }
a_pod_outlives_the_upgrade_of_its_daemon() {
  both_versions
  [ "$(id -u)" = 0 ] || skip "pods need root"
  [ -x "$B/bin/crictl" ] || skip "no crictl in the bed"
  local package pod container parent before
  unpack() { for package in kuasar-common kuasar-runc; do dpkg-deb -x "$T/$1/${package}"_*.deb "$T/node"; done; }
  unpack 1
  export KUASAR_BIN_DIR=$T/node/usr/bin
  touch "$T/bed"
  "$BED_SH" up
  cat > "$T/pod.json" <<EOF
{ "metadata": { "name": "upgrade", "namespace": "packages", "uid": "u", "attempt": 1 }, "hostname": "upgrade",
  "log_directory": "$T/logs", "linux": { "security_context": { "namespace_options": { "pid": 1 } } } }
EOF
  cat > "$T/container.json" <<EOF
{ "metadata": { "name": "c" }, "image": { "image": "localhost/busybox:latest" }, "log_path": "c.log", "linux": {},
  "command": ["sh", "-c", "trap 'echo bye; exit 7' TERM; echo begun; while :; do sleep 0.1; done"] }
EOF
  pod=$(crictl runp --runtime kuasar-runc "$T/pod.json")
  container=$(crictl create "$pod" "$T/container.json" "$T/pod.json")
  crictl start "$container" >/dev/null
  before=$(crictl inspect -o go-template --template '{{.info.pid}}' "$container")
  parent=$(pgrep -f "^\[sandbox-parent" | while read -r p; do [ "$(readlink "/proc/$p/exe")" != "$KUASAR_BIN_DIR/sandbox-parent" ] || echo "$p"; done)
  # What dpkg does: the files are replaced under the daemon; then the unit's try-restart.
  unpack 2
  KIND=runc "$BED_SH" daemon stop
  KIND=runc "$BED_SH" daemon start
  [ "$(readlink "/proc/$(cat "$B/run/daemon.pid")/exe")" = "$KUASAR_BIN_DIR/runc-sandboxer" ] || fail "not the new program"
  [ -e "/proc/$parent" ] || fail "sandbox-parent was replaced"
  [ "$(crictl inspect -o go-template --template '{{.status.state}} {{.info.pid}}' "$container")" = "CONTAINER_RUNNING $before" ] ||
    fail "the container did not live on"
  [ "$(crictl exec "$container" hostname)" = upgrade ] || fail "no exec after the upgrade"
  crictl stop --timeout 10 "$container" >/dev/null
  [ "$(crictl inspect -o go-template --template '{{.status.exitCode}}' "$container")" = 7 ] || fail "the exit code is lost"
  grep -q begun "$T/logs/c.log" && grep -q bye "$T/logs/c.log" || fail "output is lost"
  crictl rmp -f "$pod" >/dev/null
}

check systemd_accepts_every_unit no_unit_is_more_exposed_than_it_was pods_outlive_what_a_unit_does \
  tmpfiles_make_private_directories dashboard_and_alerts_ask_for_metrics_that_exist make_builds_all_that_packages_need the_same_programs_give_the_same_bytes bills_of_materials_hold_what_is_linked \
  pictures_are_what_their_texts_give ctl_is_installed_alone_works_and_is_removed \
  deb_is_installed_upgraded_removed_and_purged rpm_is_installed_upgraded_and_erased a_pod_outlives_the_upgrade_of_its_daemon
[ "$failed" = 0 ] && word=ok || word=FAILED
echo "test result: $word. $passed passed; $failed failed; $skipped ignored; packages"
[ "$failed" = 0 ]
