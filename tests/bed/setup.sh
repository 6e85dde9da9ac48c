#!/bin/bash
# Makes the test bed below target/bed: containerd, CNI plugins and runc from a newer Debian, unpacked
# and not installed; a static busybox; images made offline; crictl and critest where Go is there.
# As root, on Debian 12 or 13. Nothing outside the checkout is touched but packages that it needs
# being installed. A second run finds everything made and ends at once.
set -euo pipefail
SRC=$(cd "$(dirname "$0")" && pwd)
TOP=$(cd "$SRC/../.." && pwd)
B=${BED:-$TOP/target/bed}
CRITOOLS=${CRITOOLS:-v1.37.0}
STAMP="$B/stamp-$(cat "$SRC"/*.sh "$SRC"/*.py "$SRC"/src/*.c | sha256sum | cut -c1-16)"
[ -e "$STAMP" ] && exit 0
mkdir -p "$B"/{bin,etc,run,src,debs,root,rt,apt/lists/partial,cni/net.d,certs/_default,images}
t0=$(date +%s)
say() { echo "[$(($(date +%s) - t0)) s] $*"; }

say "packages of this release: runc, crun, nftables, build tools"
apt-get update -qq
apt-get install -y -qq --no-install-recommends runc nftables iproute2 util-linux patchelf gcc libc6-dev \
  make bzip2 xz-utils dpkg-dev python3 >/dev/null

say "containerd, CNI plugins and runc of a newer release (private apt configuration)"
cat > "$B/apt/apt.conf" <<EOF
Dir::State::Lists "$B/apt/lists";
Dir::Cache "$B/apt";
Dir::Etc::SourceList "$B/apt/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::Check-Valid-Until "false";
EOF
# the mirror that this host already uses
M=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep debian | grep -v security | head -1)
K='[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]'
printf 'deb %s %s forky main\ndeb-src %s %s bookworm main\n' "$K" "$M" "$K" "$M" > "$B/apt/sources.list"
(
  export APT_CONFIG=$B/apt/apt.conf
  apt-get update -qq
  cd "$B/debs"
  apt-get download -qq containerd containernetworking-plugins runc libc6 libseccomp2
  apt-get source -qq --only-source --download-only busybox
)
(cd "$B/debs" && { apt-get download -qq crun libyajl2 libsystemd0 libcap2 >/dev/null 2>&1 || true; })
for d in "$B"/debs/{containerd,containernetworking}*.deb; do dpkg -x "$d" "$B/root"; done
# its runc wants a newer glibc: it gets that loader and those libraries beside it
for d in "$B"/debs/{libc6,libseccomp2,runc}_*.deb; do dpkg -x "$d" "$B/rt"; done
LIB=$B/rt/usr/lib/$(gcc -dumpmachine)
cp "$B/rt/usr/sbin/runc" "$B/bin/runc13"
patchelf --set-interpreter "$LIB/ld-linux-x86-64.so.2" --set-rpath "$LIB" "$B/bin/runc13"
for d in "$B"/debs/{crun,libyajl2}_*.deb; do [ -e "$d" ] && dpkg -x "$d" "$B/crun"; done
if [ -x "$B/crun/usr/bin/crun" ]; then
  cp "$B/crun/usr/bin/crun" "$B/bin/crun"
  patchelf --set-rpath "$B/crun/usr/lib/$(gcc -dumpmachine)" "$B/bin/crun"
fi

say "crictl, critest $CRITOOLS (Go modules), beside the images"
if command -v go >/dev/null; then
  (
    GOBIN=$B/bin CGO_ENABLED=0 go install -trimpath -ldflags '-s -w' "sigs.k8s.io/cri-tools/cmd/crictl@$CRITOOLS"
    mkdir -p "$B/src/critest" && cd "$B/src/critest"
    [ -f go.mod ] || go mod init critest-build
    go get -t "sigs.k8s.io/cri-tools/cmd/critest@$CRITOOLS"
    CGO_ENABLED=0 go test -c -trimpath -ldflags '-s -w' -o "$B/bin/critest" sigs.k8s.io/cri-tools/cmd/critest
  ) >"$B/go.log" 2>&1 &
  GO=$!
fi
for p in pause web nnp; do gcc -static -Os -s -o "$B/src/$p" "$SRC/src/$p.c"; done
# Debian's busybox-static lacks pgrep and ipcs and its shell runs applets without exec
if [ ! -x "$B/src/busybox" ]; then
  (
    cd "$B/src" && tar xf "$B"/debs/busybox_*.orig.tar.bz2 && cd busybox-*/ && make defconfig
    sed -i 's/# CONFIG_STATIC is not set/CONFIG_STATIC=y/; s/CONFIG_TC=y/# CONFIG_TC is not set/' .config
    make -j2 busybox && cp busybox ../busybox
  ) >"$B/busybox.log" 2>&1
fi
python3 "$SRC/mkimages.py" "$B/src/busybox" "$B/src/pause" "$B/src/web" "$B/src/nnp" "$B/images"
if [ -n "${GO:-}" ]; then wait "$GO" || { tail -5 "$B/go.log"; exit 1; }; fi

say "configuration"
echo 'server = "http://127.0.0.1:5055"' > "$B/certs/_default/hosts.toml"
cat > "$B/cni/net.d/10-bed.conflist" <<EOF
{ "cniVersion": "1.0.0", "name": "bed",
  "plugins": [
    { "type": "bridge", "bridge": "cni-bed0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
      "ipam": { "type": "host-local", "dataDir": "$B/run/cni-ipam", "ranges": [[{ "subnet": "10.88.77.0/24" }]], "routes": [{ "dst": "0.0.0.0/0" }] } },
    { "type": "portmap", "backend": "nftables", "capabilities": { "portMappings": true } }
  ] }
EOF
printf 'runtime-endpoint: unix://%s/run/containerd.sock\nimage-endpoint: unix://%s/run/containerd.sock\ntimeout: 30\n' "$B" "$B" > "$B/etc/crictl.yaml"
R="plugins.'io.containerd.cri.v1.runtime'"
{
  cat <<EOF
version = 3
root = '$B/var'
state = '$B/run/containerd'
[grpc]
  address = '$B/run/containerd.sock'
[plugins.'io.containerd.cri.v1.images']
  snapshotter = 'overlayfs'
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = 'registry.k8s.io/pause:3.10'
  [plugins.'io.containerd.cri.v1.images'.registry]
    config_path = '$B/certs'
[$R]
  restrict_oom_score_adj = true
  [$R.cni]
    bin_dirs = ['$B/root/usr/lib/cni']
    conf_dir = '$B/cni/net.d'
  [$R.containerd]
    default_runtime_name = 'runc'
    [$R.containerd.runtimes.runc]
      runtime_type = 'io.containerd.runc.v2'
      [$R.containerd.runtimes.runc.options]
        BinaryName = '$B/bin/runc13'
[plugins.'io.containerd.nri.v1.nri']
  socket_path = '$B/run/nri.sock'
  plugin_path = '$B/nri/plugins'
  plugin_config_path = '$B/nri/conf.d'
[proxy_plugins.kuasar-runc]
  type = 'sandbox'
  address = '$B/run/kuasar-runc.sock'
EOF
  # NAME, runtime_type, sandboxer, io_type
  while read -r name type sandboxer io; do
    cat <<EOF
[$R.containerd.runtimes.$name]
  runtime_type = '$type'
  sandboxer = '$sandboxer'
  io_type = '$io'
  pod_annotations = ['io.kuasar.*']
EOF
  done <<EOF
kuasar-runc io.containerd.kuasar-runc.v1 kuasar-runc fifo
kuasar-runc-streaming io.containerd.kuasar-runc.v1 kuasar-runc streaming
kuasar-runc-v2 io.containerd.runc.v2 kuasar-runc fifo
kuasar-runc-shim io.containerd.kuasar-runc.v1 shim fifo
EOF
} > "$B/etc/config.toml"
cat > "$B/etc/kuasar-runc.toml" <<EOF
events_address = "$B/run/containerd.sock.ttrpc"
allowed_annotations = ["io.kuasar.runc.engine"]
[engines.runc]
path = "$B/bin/runc13"
[engines.crun]
path = "$B/bin/crun"
EOF
touch "$STAMP"
say "the bed is made"
