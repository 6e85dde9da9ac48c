#!/bin/bash
# Makes packages of programs that are built already:
#
#   build.sh deb|rpm|both [PACKAGE…]     into target/packages/; all packages unless some are named
#
# From the environment:
#   ARCH               machine that the programs are for (default: this one): x86_64, aarch64
#   BIN, GUEST, OUT    programs (target/release), guest (target/guest), result (target/packages)
#   VERSION, RELEASE   default: the workspace's version, 1
#   COMPRESSION        xz (default), gzip or none
#   SOURCE_DATE_EPOCH  time of everything in the packages; default: that of the last commit
#   WITHOUT            packages to leave out, such as kuasar-guest
# The same programs, version and SOURCE_DATE_EPOCH give the same bytes.
set -euo pipefail
export LC_ALL=C TZ=UTC
umask 022
TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ARCH=${ARCH:-$(uname -m)}
TARGET=$ARCH-unknown-linux-gnu
BIN=${BIN:-$TOP/target/release}
GUEST=${GUEST:-$TOP/target/guest}
OUT=${OUT:-$TOP/target/packages}
RELEASE=${RELEASE:-1}
COMPRESSION=${COMPRESSION:-xz}
VERSION=${VERSION:-$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' "$TOP/Cargo.toml")}
if [ -z "${SOURCE_DATE_EPOCH:-}" ]; then
  SOURCE_DATE_EPOCH=$(git -C "$TOP" log -1 --format=%ct 2>/dev/null) || SOURCE_DATE_EPOCH=$(stat -c %Y "$TOP/CHANGELOG.md")
fi
export SOURCE_DATE_EPOCH BIN GUEST TOP VERSION TARGET
MAINTAINER="The Kuasar authors <kuasar@localhost>"
# shellcheck source=packaging/packages.sh
. "$TOP/packaging/packages.sh"

die() { echo "packages: $*" >&2; exit 1; }

# there PACKAGE: whether its files are there; says what is to be done when not
there() {
  local p
  for p in $(programs "$1"); do
    [ -x "$BIN/$p" ] && continue
    # The operator's tool is a package that others do not need.
    [ "$1" = kuasar-ctl ] && { echo "packages: no $BIN/$p: kuasar-ctl left out"; return 1; }
    die "no $BIN/$p: run \`make build\` first, or leave $1 out with WITHOUT=$1"
  done
  if [ "$1" = kuasar-ctl ]; then
    for p in man/kuasar-ctl.1 completions/kuasar-ctl.bash completions/_kuasar-ctl completions/kuasar-ctl.fish; do
      [ -s "$BIN/$p" ] || die "no $BIN/$p: run \`make build\` first, or leave $1 out with WITHOUT=$1"
    done
  fi
  if [ "$1" = kuasar-guest ]; then
    for p in vmlinux initramfs.cpio guest.erofs; do
      [ -e "$GUEST/$p" ] || die "no $GUEST/$p: run \`make guest\` first, or leave $1 out with WITHOUT=$1"
    done
  fi
}

# right_machine PACKAGE: a package for one machine with programs of another would install, and not run
right_machine() {
  local p want
  case $ARCH in x86_64) want='3e00' ;; aarch64) want='b700' ;; *) die "ARCH=$ARCH: x86_64 or aarch64" ;; esac
  for p in $(programs "$1"); do
    [ "$(od -An -tx1 -j18 -N2 "$BIN/$p" | tr -d ' ')" = $want ] || die "$BIN/$p is not for $ARCH"
  done
}

indented() { description "$1" | sed 's/^/ /'; }

# fill TEMPLATE KIND FILE: a maintainer script
fill() { sed "s/@KIND@/$2/g" "$1" > "$3"; chmod 0755 "$3"; }

deb() {
  local package=$1 root=$2 arch kind needs='' d list
  case $ARCH in x86_64) arch=amd64 ;; aarch64) arch=arm64 ;; esac
  kind=$(kind "$package")
  for d in $(depends "$package"); do needs="$needs, $d (= $VERSION-$RELEASE)"; done
  install -d "$root/DEBIAN"
  list=$(recommends deb "$package")
  {
    echo "Package: $package"
    echo "Version: $VERSION-$RELEASE"
    echo "Architecture: $arch"
    echo "Maintainer: $MAINTAINER"
    echo "Section: admin"
    echo "Priority: optional"
    echo "Installed-Size: $(du -sk --apparent-size "$root" | cut -f1)"
    [ -z "$needs" ] || echo "Depends: ${needs#, }"
    [ -z "$list" ] || echo "Recommends: $list"
    echo "Description: $(summary "$package")"
    indented "$package"
  } > "$root/DEBIAN/control"
  if [ -n "$kind" ]; then
    echo "/etc/kuasar/$kind-sandboxer.toml" > "$root/DEBIAN/conffiles"
    for d in postinst prerm postrm; do fill "$TOP/packaging/deb/sandboxer.$d.in" "$kind" "$root/DEBIAN/$d"; done
  elif [ "$package" = kuasar-common ]; then
    for d in postinst postrm; do fill "$TOP/packaging/deb/common.$d.in" "" "$root/DEBIAN/$d"; done
  elif [ "$package" = kuasar-ctl ]; then
    for d in postinst prerm postrm; do fill "$TOP/packaging/deb/ctl.$d.in" "" "$root/DEBIAN/$d"; done
  fi
  cat > "$root/usr/share/doc/$package/copyright" <<EOF
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: kuasar
Comment: What is linked into the programs, or is in the package beside them, has licences of its own
 ($(cat "$root/usr/share/doc/$package/licence")). Their texts are in THIRD-PARTY-LICENCES, the list
 with versions is in sbom.cdx.json.

Files: *
Copyright: The Kuasar authors
License: Apache-2.0
 On Debian systems the text is in /usr/share/common-licenses/Apache-2.0.
EOF
  chmod 0644 "$root/usr/share/doc/$package/copyright"
  rm "$root/usr/share/doc/$package/licence" "$root/usr/share/doc/$package/LICENSE"
  (cd "$root" && find . -type f ! -path './DEBIAN/*' -printf '%P\0' | sort -z | xargs -0r md5sum > DEBIAN/md5sums)
  find "$root" -exec touch -hd "@$SOURCE_DATE_EPOCH" {} +
  dpkg-deb --root-owner-group -Z"$COMPRESSION" --build "$root" "$OUT/${package}_$VERSION-${RELEASE}_$arch.deb" >/dev/null
}

# The scriptlets of a sandboxer, as systemd's own macros would expand, but that nothing is restarted
# before all files are new.
rpm_scriptlets() {
  local package=$1 kind=$2
  cat <<EOF
%post -n $package
if [ \$1 -eq 1 ] && [ -x /usr/bin/systemctl ]; then
  systemctl --no-reload preset kuasar-$kind.service >/dev/null 2>&1 || :
fi
if [ -d /run/systemd/system ]; then systemd-tmpfiles --create kuasar-$kind.conf >/dev/null 2>&1 || :; fi

%preun -n $package
if [ \$1 -eq 0 ]; then
  # The daemon ends; pods do not, and its companion only when it keeps none.
  if [ -d /run/systemd/system ]; then
    systemctl --no-reload disable --now kuasar-$kind.service >/dev/null 2>&1 || :
  elif [ -x /usr/bin/systemctl ]; then
    systemctl --no-reload disable kuasar-$kind.service >/dev/null 2>&1 || :
  fi
  case \$($kind-sandboxer --config /etc/kuasar/$kind-sandboxer.toml shutdown-parent 2>&1) in
    *"keeps pods"*)
      echo "$package: pods of this node go on without a daemon: install the package again to manage them" >&2 ;;
  esac
fi
:

%postun -n $package
if [ -d /run/systemd/system ]; then systemctl daemon-reload >/dev/null 2>&1 || :; fi

%posttrans -n $package
# Upgraded: the daemon is replaced; sandbox-parent and the pods go on.
if [ -d /run/systemd/system ]; then
  systemctl daemon-reload >/dev/null 2>&1 || :
  systemctl try-restart kuasar-$kind.service >/dev/null 2>&1 || :
fi

EOF
}

rpm_files() { # PACKAGE ROOT: its %files, directories that are ours among them
  local package=$1 root=$2
  echo "%files -n $package"
  (cd "$root" && find . \( -type f -o -type l \) -printf '/%P\n') | LC_ALL=C sort | while read -r f; do
    case $f in
      /etc/*.toml) echo "%config(noreplace) \"$f\"" ;;
      /usr/share/doc/*/LICENSE | /usr/share/doc/*/THIRD-PARTY-LICENCES) echo "%license \"$f\"" ;;
      /usr/share/doc/* | /usr/share/man/*) echo "%doc \"$f\"" ;;
      *) echo "\"$f\"" ;;
    esac
  done
  (cd "$root" && find . -type d \( -path './etc/kuasar*' -o -path './usr/share/kuasar' -o -path "./usr/share/doc/$package" \) -printf '/%P\n') |
    LC_ALL=C sort | sed 's/.*/%dir "&"/'
  echo
}

rpm_spec() { # STAGE PACKAGE…: the spec on standard output
  local stage=$1 package kind d list zip
  shift
  case $COMPRESSION in xz) zip=w6.xzdio ;; gzip) zip=w6.gzdio ;; *) zip=w0.gzdio ;; esac
  cat <<EOF
# Written by packaging/build.sh.
%global debug_package %{nil}
%global __os_install_post %{nil}
%global __brp_mangle_shebangs %{nil}
%global _build_id_links none
%global _binary_payload $zip
%global _buildhost localhost
%global use_source_date_epoch_as_buildtime 1
%global clamp_mtime_to_source_date_epoch 1
AutoReqProv: no
Name: kuasar
Version: $VERSION
Release: $RELEASE
Summary: Container runtime with several kinds of sandbox
License: Apache-2.0
Vendor: The Kuasar authors

%description
Container runtime with several kinds of sandbox.

EOF
  for package; do
    kind=$(kind "$package")
    echo "%package -n $package"
    echo "Summary: $(summary "$package")"
    echo "License: $(cat "$stage/$package/usr/share/doc/$package/licence")"
    for d in $(depends "$package"); do echo "Requires: $d = $VERSION-$RELEASE"; done
    list=$(recommends rpm "$package")
    [ -z "$list" ] || echo "Recommends: $list"
    [ -z "$kind" ] || printf 'Requires(post): /bin/sh\nRequires(preun): /bin/sh\n'
    printf '\n%%description -n %s\n' "$package"
    description "$package"
    echo
    [ -z "$kind" ] || rpm_scriptlets "$package" "$kind"
    if [ "$package" = kuasar-common ]; then
      cat <<'EOF'
%post -n kuasar-common
if [ $1 -eq 1 ] && [ -x /usr/bin/systemctl ]; then
  systemctl --no-reload preset kuasar.target >/dev/null 2>&1 || :
fi

%preun -n kuasar-common
if [ $1 -eq 0 ] && [ -x /usr/bin/systemctl ]; then
  systemctl --no-reload disable kuasar.target >/dev/null 2>&1 || :
fi

EOF
    fi
    if [ "$package" = kuasar-ctl ]; then
      cat <<'EOF'
%preun -n kuasar-ctl
if [ $1 -eq 0 ] && [ -d /run/systemd/system ]; then
  systemctl --no-reload disable --now kuasar-metrics.service kuasar-metrics.socket >/dev/null 2>&1 || :
elif [ $1 -eq 0 ] && [ -x /usr/bin/systemctl ]; then
  systemctl --no-reload disable kuasar-metrics.socket >/dev/null 2>&1 || :
fi

%postun -n kuasar-ctl
if [ -d /run/systemd/system ]; then systemctl daemon-reload >/dev/null 2>&1 || :; fi

%posttrans -n kuasar-ctl
if [ -d /run/systemd/system ]; then
  systemctl daemon-reload >/dev/null 2>&1 || :
  systemctl try-restart kuasar-metrics.service >/dev/null 2>&1 || :
fi

EOF
    fi
  done
  # shellcheck disable=SC2016 # rpm's own variable
  echo '%install'
  echo 'rm -rf %{buildroot}; mkdir -p %{buildroot}'
  for package; do
    echo "cp -a $stage/$package/. %{buildroot}/"
    rm "$stage/$package/usr/share/doc/$package/licence"
  done
  echo
  for package; do rpm_files "$package" "$stage/$package"; done
}

format=${1:-}
case $format in deb | rpm | both) ;; *) echo "usage: build.sh deb|rpm|both [PACKAGE…]" >&2; exit 2 ;; esac
[ "$format" = rpm ] || command -v dpkg-deb >/dev/null ||
  die "dpkg-deb is not here: deb packages are made on Debian or Ubuntu"
[ "$format" = deb ] || command -v rpmbuild >/dev/null ||
  die "rpmbuild is not here: install the package rpm (Debian) or rpm-build"
shift
wanted=("$@")
# shellcheck disable=SC2206 # a list of words
[ ${#wanted[@]} != 0 ] || wanted=($PACKAGES)
made=()
STAGE=$(mktemp -d "${TMPDIR:-/tmp}/kuasar-packages.XXXXXX")
trap 'rm -rf "$STAGE"' EXIT
mkdir -p "$OUT"
METADATA=$STAGE/metadata.json
export METADATA
(cd "$TOP" && cargo metadata --locked --format-version 1 --filter-platform "$TARGET") > "$METADATA" ||
  die "cargo metadata failed: the list of parts is made from it"
for package in "${wanted[@]}"; do
  case " ${WITHOUT:-} " in *" $package "*) continue ;; esac
  [ -n "$(summary "$package")" ] || die "there is no package $package: $PACKAGES"
  there "$package" || continue
  right_machine "$package"
  stage "$package" "$STAGE/$package"
  if [ "$format" != rpm ]; then
    mkdir -p "$STAGE/deb"
    cp -al "$STAGE/$package" "$STAGE/deb/$package"
    deb "$package" "$STAGE/deb/$package"
    rm -rf "$STAGE/deb"
  fi
  made+=("$package")
done
if [ "$format" != deb ]; then
  rpm_spec "$STAGE" "${made[@]}" > "$STAGE/kuasar.spec"
  rpmbuild -bb --quiet --target "$ARCH" --define "_topdir $STAGE/rpmbuild" --define "_rpmdir $OUT" \
    --define '_build_name_fmt %%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm' "$STAGE/kuasar.spec"
fi
ls -1 "$OUT"/*-"$VERSION-$RELEASE".*.rpm "$OUT"/*_"$VERSION-${RELEASE}"_*.deb 2>/dev/null || true
