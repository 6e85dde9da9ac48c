#!/bin/bash
# Makes the test bed below target/bed: containerd, CNI plugins, runc and criu from a newer Debian, unpacked
# and not installed; a static busybox; images made offline; crictl and critest where Go is there.
# As root, on Debian 12 or 13. Nothing outside the checkout is touched but packages that it needs
# being installed. Each part has a stamp named for what it is made from: a second run finds
# everything made and ends at once, and a change remakes one part alone.
set -euo pipefail
SRC=$(cd "$(dirname "$0")" && pwd)
TOP=$(cd "$SRC/../.." && pwd)
B=${BED:-$TOP/target/bed}
CRITOOLS=${CRITOOLS:-v1.37.0}
export DEBIAN_FRONTEND=noninteractive
# shellcheck source=tests/bed/apt.sh
. "$SRC/apt.sh"

# The text of the functions named, and of the files they read, as one number.
sum() { { declare -f "$@"; cat "$SRC"/src/*.c "$SRC"/mkimages.py; echo "$B $CRITOOLS"; } | sha256sum | cut -c1-12; }
made() { [ -e "$B/stamp/$1-$(sum "part_$1")" ]; }
make_part() {
  made "$1" && return 0
  local t; t=$(date +%s)
  "part_$1"
  rm -f "$B/stamp/$1"-*
  touch "$B/stamp/$1-$(sum "part_$1")"
  echo "bed: $1 made in $(($(date +%s) - t)) s"
}

part_packages() {
  local want=(runc nftables iproute2 util-linux bsdutils e2fsprogs procps patchelf gcc libc6-dev make bzip2 dpkg-dev python3) missing=() p
  for p in "${want[@]}"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing+=("$p")
  done
  [ ${#missing[@]} = 0 ] && return 0
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# Packages of other releases, through a private apt configuration.
part_lists() { private_apt "$B/apt" 'deb forky' 'deb trixie' 'deb bookworm-backports' 'deb-src bookworm'; }

part_engines() {
  local lib d
  (
    cd "$B/debs"
    export APT_CONFIG=$B/apt/apt.conf
    apt-get download -qq containerd/forky containernetworking-plugins/forky runc/forky libc6/forky libseccomp2/forky
    # forky's crun refuses a cgroup v1 hierarchy, bookworm's the spec version of containerd 2
    mkdir -p crun && cd crun
    apt-get download -qq {crun,libyajl2,libsystemd0,libcap2,libgcrypt20,libgpg-error0,liblz4-1,liblzma5,libzstd1}/trixie
  )
  for d in "$B"/debs/{containerd,containernetworking}*.deb; do dpkg -x "$d" "$B/root"; done
  # its runc wants a newer glibc: it gets that loader and those libraries beside it
  for d in "$B"/debs/{libc6,libseccomp2,runc}_*.deb; do dpkg -x "$d" "$B/rt"; done
  lib=$B/rt/usr/lib/$(gcc -dumpmachine)
  cp "$B/rt/usr/sbin/runc" "$B/bin/runc13"
  patchelf --set-interpreter "$(echo "$lib"/ld-linux*.so.*)" --set-rpath "$lib" "$B/bin/runc13"
  for d in "$B"/debs/crun/*.deb; do dpkg -x "$d" "$B/crun"; done
  cp "$B/crun/usr/bin/crun" "$B/bin/crun"
  # DT_RPATH, unlike DT_RUNPATH, also serves the libraries' own libraries
  patchelf --set-interpreter "$(echo "$lib"/ld-linux*.so.*)" --force-rpath \
    --set-rpath "$B/crun/usr/lib/$(gcc -dumpmachine):$lib" "$B/bin/crun"
  "$B/bin/crun" --version >/dev/null || { echo "bed: crun does not run here: left out"; rm -f "$B/bin/crun"; }
  "$B/bin/runc13" --version >/dev/null
}

# bookworm's criu does not know newer kernels. Like crun it gets forky's loader and libraries; not by
# LD_LIBRARY_PATH, which the tar that criu runs would see as well.
part_criu() {
  local lib d
  mkdir -p "$B/debs/criu"
  (
    cd "$B/debs/criu"
    APT_CONFIG=$B/apt/apt.conf apt-get download -qq {criu,libbsd0,libc6,libcap2,libffi8,libgmp10,libgnutls30t64,libhogweed6t64,libidn2-0,libjansson4,libmd0,libmnl0,libnet9,libnettle8t64,libnftables1,libnftnl11,libnl-3-200,libp11-kit0,libprotobuf-c1,libtasn1-6,libunistring5,libuuid1,libxtables12}/forky
  )
  for d in "$B"/debs/criu/*.deb; do dpkg -x "$d" "$B/criu"; done
  lib=$B/criu/usr/lib/$(gcc -dumpmachine)
  cp "$B/criu/usr/sbin/criu" "$B/bin/criu"
  patchelf --set-interpreter "$(echo "$lib"/ld-linux*.so.*)" --force-rpath --set-rpath "$lib" "$B/bin/criu"
  "$B/bin/criu" check >/dev/null 2>&1 || { echo "bed: criu does not run here: left out"; rm -f "$B/bin/criu"; }
}

# Debian's busybox-static lacks pgrep and ipcs, and its shell runs applets without exec.
part_busybox() {
  (cd "$B/src" && APT_CONFIG=$B/apt/apt.conf apt-get source -qq --only-source --download-only busybox)
  (
    cd "$B/src"
    rm -rf busybox-*/
    tar xf busybox_*.orig.tar.bz2
    cd busybox-*/
    make defconfig
    sed -i 's/# CONFIG_STATIC is not set/CONFIG_STATIC=y/; s/CONFIG_TC=y/# CONFIG_TC is not set/' .config
    make -j"$(nproc)" busybox
    cp busybox ../busybox
    cd ..
    rm -rf busybox-*/
  ) >"$B/busybox.log" 2>&1
}

part_images() {
  local p
  for p in pause web nnp; do gcc -static -Os -s -o "$B/src/$p" "$SRC/src/$p.c"; done
  python3 "$SRC/mkimages.py" "$B/src/busybox" "$B/src/pause" "$B/src/web" "$B/src/nnp" "$B/images" >/dev/null
}

part_critools() {
  command -v go >/dev/null || { echo "bed: no go here: crictl and critest left out"; return 0; }
  (
    GOBIN=$B/bin CGO_ENABLED=0 go install -trimpath -ldflags '-s -w' "sigs.k8s.io/cri-tools/cmd/crictl@$CRITOOLS"
    mkdir -p "$B/src/critest"
    cd "$B/src/critest"
    [ -f go.mod ] || go mod init critest-build
    go get -t "sigs.k8s.io/cri-tools/cmd/critest@$CRITOOLS"
    CGO_ENABLED=0 go test -c -trimpath -ldflags '-s -w' -o "$B/bin/critest" sigs.k8s.io/cri-tools/cmd/critest
  ) >"$B/go.log" 2>&1
}

# gVisor: a static program. Of bookworm-backports: the same release in forky is built with a Go that
# has moved what it reads of goroutines, and its sentry panics as soon as a task waits for another.
part_runsc() {
  rm -rf "$B/runsc" "$B"/debs/runsc_*
  (cd "$B/debs" && APT_CONFIG=$B/apt/apt.conf apt-get download -qq runsc/bookworm-backports && dpkg -x runsc_*.deb "$B/runsc")
  ln -sf "$B/runsc/usr/bin/runsc" "$B/bin/runsc"
  "$B/bin/runsc" --version >/dev/null || { echo "bed: runsc does not run here: left out"; rm -f "$B/bin/runsc"; }
}

# WasmEdge's library with what it needs: of forky, like the glibc that it wants.
part_wasmedge() {
  local d lib
  mkdir -p "$B/debs/wasmedge"
  (
    cd "$B/debs/wasmedge"
    rm -f ./*.deb
    APT_CONFIG=$B/apt/apt.conf apt-get download -qq {libwasmedge0,wasmedge,libllvm21,libfmt11,libspdlog1.15,libstdc++6,libgcc-s1,libzstd1,zlib1g,libedit2,libffi8,libtinfo6,libxml2-16,libz3-4,libbsd0,libmd0}/forky
  )
  rm -rf "$B/wasmedge"
  for d in "$B"/debs/wasmedge/*.deb; do dpkg -x "$d" "$B/wasmedge"; done
  rm -rf "$B/wasmedge/usr/share" "$B/debs/wasmedge"
  # It has a path of its own, which would count in place of the program's.
  patchelf --remove-rpath "$B/wasmedge/usr/lib/$(gcc -dumpmachine)"/libLLVM.so.*
  # All in one place: the loader drops further ones for libraries of libraries.
  lib=$B/rt/usr/lib/$(gcc -dumpmachine)
  ln -sf "$lib"/*.so.* "$B/wasmedge/usr/lib/$(gcc -dumpmachine)/"
  # The compiler of shared objects, for images that bring their own code.
  cp "$B/wasmedge/usr/bin/wasmedge" "$B/bin/wasmedge"
  patchelf --set-interpreter "$(echo "$lib"/ld-linux*.so.*)" --force-rpath \
    --set-rpath "$B/wasmedge/usr/lib/$(gcc -dumpmachine)" "$B/bin/wasmedge"
  "$B/bin/wasmedge" --version >/dev/null || { echo "bed: WasmEdge does not run here: left out"; rm -rf "$B/wasmedge" "$B/bin/wasmedge"; }
}

# ONNX Runtime's library with what it needs, where wasm-worker-nn was built: like WasmEdge's.
part_onnx() {
  local d lib
  mkdir -p "$B/debs/onnx"
  (
    cd "$B/debs/onnx"
    rm -f ./*.deb
    APT_CONFIG=$B/apt/apt.conf apt-get download -qq {libonnxruntime1.23,libonnx1l,libcpuinfo0,libabsl20260526,libprotobuf32t64,libprotobuf-lite32t64,libpthreadpool0,libre2-11,libstdc++6,libgcc-s1,libxnnpack0.20241108,zlib1g}/forky
  )
  rm -rf "$B/onnx"
  for d in "$B"/debs/onnx/*.deb; do dpkg -x "$d" "$B/onnx"; done
  rm -rf "$B/onnx/usr/share" "$B/debs/onnx"
  lib=$B/rt/usr/lib/$(gcc -dumpmachine)
  ln -sf "$lib"/*.so.* "$B/onnx/usr/lib/$(gcc -dumpmachine)/"
}

part_config() {
  local r="plugins.'io.containerd.cri.v1.runtime'" name type sandboxer io
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
[$r]
  restrict_oom_score_adj = true
  [$r.cni]
    bin_dirs = ['$B/root/usr/lib/cni']
    conf_dir = '$B/cni/net.d'
  [$r.containerd]
    default_runtime_name = 'runc'
    [$r.containerd.runtimes.runc]
      runtime_type = 'io.containerd.runc.v2'
      [$r.containerd.runtimes.runc.options]
        BinaryName = '$B/bin/runc13'
EOF
    # A snapshotter whose snapshots are ext4 images.
    if truncate -s 32M "$B/scratch.ext4" && mkfs.ext4 -q -F -m 0 -O ^has_journal "$B/scratch.ext4"; then
      cat <<EOF
[plugins.'io.containerd.snapshotter.v1.blockfile']
  scratch_file = '$B/scratch.ext4'
  fs_type = 'ext4'
  recreate_scratch = true
[$r.containerd.runtimes.kuasar-vmm-block]
  runtime_type = 'io.containerd.kuasar-vmm.v1'
  sandboxer = 'kuasar-vmm'
  snapshotter = 'blockfile'
EOF
    fi
    cat <<EOF
[plugins.'io.containerd.nri.v1.nri']
  socket_path = '$B/run/nri.sock'
  plugin_path = '$B/nri/plugins'
  plugin_config_path = '$B/nri/conf.d'
[proxy_plugins.kuasar-runc]
  type = 'sandbox'
  address = '$B/run/kuasar-runc.sock'
[proxy_plugins.kuasar-vmm]
  type = 'sandbox'
  address = '$B/run/kuasar-vmm.sock'
[proxy_plugins.kuasar-gvisor]
  type = 'sandbox'
  address = '$B/run/kuasar-gvisor.sock'
[proxy_plugins.kuasar-wasm]
  type = 'sandbox'
  address = '$B/run/kuasar-wasm.sock'
[proxy_plugins.kuasar-quark]
  type = 'sandbox'
  address = '$B/run/kuasar-quark.sock'
EOF
    while read -r name type sandboxer io; do
      cat <<EOF
[$r.containerd.runtimes.$name]
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
kuasar-vmm io.containerd.kuasar-vmm.v1 kuasar-vmm fifo
kuasar-vmm-streaming io.containerd.kuasar-vmm.v1 kuasar-vmm streaming
kuasar-gvisor io.containerd.kuasar-gvisor.v1 kuasar-gvisor fifo
kuasar-gvisor-streaming io.containerd.kuasar-gvisor.v1 kuasar-gvisor streaming
kuasar-wasm io.containerd.kuasar-wasm.v1 kuasar-wasm fifo
kuasar-wasm-streaming io.containerd.kuasar-wasm.v1 kuasar-wasm streaming
kuasar-wasmedge io.containerd.kuasar-wasmedge.v1 kuasar-wasm fifo
kuasar-wasm-v2 io.containerd.runc.v2 kuasar-wasm fifo
kuasar-quark io.containerd.kuasar-quark.v1 kuasar-quark fifo
kuasar-quark-streaming io.containerd.kuasar-quark.v1 kuasar-quark streaming
EOF
    # containerd asks this runc what it can do, and offers user namespaces to pods accordingly
    for name in kuasar-runc-v2 kuasar-wasm-v2; do
      cat <<EOF
  [$r.containerd.runtimes.$name.options]
    BinaryName = '$B/bin/runc13'
EOF
    done
  } > "$B/etc/config.toml"
  cat > "$B/etc/kuasar-runc.toml" <<EOF
events_address = "$B/run/containerd.sock.ttrpc"
metrics_listen = "$B/run/kuasar-runc-metrics.sock"
allowed_annotations = ["io.kuasar.runc.engine"]
[timeouts]
unstarted = "6s"
[engines.runc]
path = "$B/bin/runc13"
[engines.crun]
path = "$B/bin/crun"
EOF
  # TCG: nothing is assumed of the machine's KVM.
  cat > "$B/etc/kuasar-vmm.toml" <<EOF
events_address = "$B/run/containerd.sock.ttrpc"
metrics_listen = "$B/run/kuasar-vmm-metrics.sock"
allowed_annotations = ["io.kuasar.vmm"]
[qemu]
path = "$B/vmm/libexec/qemu-system-x86_64"
accel = "tcg"
data_dirs = ["$B/vmm/share/qemu"]
[jail]
libraries = ["$B/vmm", "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
[helpers]
virtiofsd = "$B/vmm/bin/virtiofsd"
vsock = "$B/vmm/bin/vhost-device-vsock"
EOF
  cat > "$B/etc/kuasar-gvisor.toml" <<EOF
events_address = "$B/run/containerd.sock.ttrpc"
metrics_listen = "$B/run/kuasar-gvisor-metrics.sock"
allowed_annotations = ["io.kuasar.gvisor.platform", "io.kuasar.gvisor.network", "io.kuasar.gvisor.overlay2", "io.kuasar.gvisor.file-access", "io.kuasar.gvisor.file-access-mounts", "io.kuasar.gvisor.host-uds", "io.kuasar.gvisor.host-fifo", "io.kuasar.gvisor.net-raw", "io.kuasar.gvisor.oci-seccomp", "io.kuasar.gvisor.strace", "io.kuasar.gvisor.restore"]
[timeouts]
unstarted = "6s"
[runsc]
path = "$B/bin/runsc"
EOF
  cat > "$B/etc/kuasar-wasm.toml" <<EOF
events_address = "$B/run/containerd.sock.ttrpc"
containerd.address = "$B/run/containerd.sock"
metrics_listen = "$B/run/kuasar-wasm-metrics.sock"
allowed_annotations = ["io.kuasar.wasm.http-port", "io.kuasar.wasm.engine", "io.kuasar.wasm.fuel", "io.kuasar.wasm.time-budget"]
max_threads = 16
[runtimes]
"io.containerd.kuasar-wasmedge.v1" = "wasmedge"
[userns_engine]
path = "$B/bin/runc13"
[wasmedge]
worker = "$B/bin/wasm-worker-wasmedge"
library = "libwasmedge.so.0"
image_code = true
[wasi_nn]
worker = "$B/bin/wasm-worker-nn"
library = "libonnxruntime.so.1.23"
[timeouts]
unstarted = "6s"
[cache]
dir = "$B/run/wasm-cache"
[compiler]
timeout = "20s"
EOF
  # A fake, which needs no KVM.
  cat > "$B/etc/kuasar-quark.toml" <<EOF
events_address = "$B/run/containerd.sock.ttrpc"
metrics_listen = "$B/run/kuasar-quark-metrics.sock"
[timeouts]
unstarted = "6s"
[quark]
path = "fake-quark"
kvm = "/dev/null"
EOF
  # Tests change them: bed.sh begins with these.
  rm -rf "$B/etc/made" && mkdir "$B/etc/made" && cp "$B"/etc/kuasar-*.toml "$B/etc/made/"
}

# A bed that was copied from another checkout has the paths of that one in its files, links and
# programs. They become this one's; what only a running bed has is left behind.
take_over() { # FORMER
  local was=$1 p f lib
  echo "bed: $B is a copy of $was: its paths are written anew"
  command -v patchelf >/dev/null || part_packages
  for p in $PARTS onnx; do
    f=$B/stamp/$p-$(B=$was sum "part_$p")
    [ ! -e "$f" ] || mv "$f" "$B/stamp/$p-$(sum "part_$p")"
  done
  rm -rf "${B:?}"/{run,var}
  mkdir -p "$B/run"
  find "$B" -path "$B/node" -prune -o -lname "$was/*" -print | while read -r f; do
    ln -sfn "$B/$(readlink "$f" | sed "s|^$was/||")" "$f"
  done
  for f in "$B"/bin/* "$B"/vmm/{bin,libexec}/*; do
    if [ ! -f "$f" ] || [ -L "$f" ]; then continue; fi
    lib=$(patchelf --print-interpreter "$f" 2>/dev/null) || continue
    case $lib in
      "$was"/*)
        patchelf --set-interpreter "$B/${lib#"$was"/}" --force-rpath \
          --set-rpath "$(patchelf --print-rpath "$f" | sed "s|$was/|$B/|g")" "$f" ;;
    esac
  done
  # The file that names the bed's place is the last: a take-over that was cut off is done once more.
  grep -rIlF "$was/" "$B" --exclude-dir=node --exclude=crictl.yaml | xargs -r sed -i "s|$was/|$B/|g"
  sed -i "s|$was/|$B/|g" "$B/etc/crictl.yaml"
}

PARTS="packages lists engines criu busybox images critools runsc wasmedge config"
[ ! -x "$TOP/target/release/wasm-worker-nn" ] || PARTS="$PARTS onnx"
former=$(sed -n 's|^runtime-endpoint: unix://\(.*\)/run/containerd.sock$|\1|p' "$B/etc/crictl.yaml" 2>/dev/null || true)
[ -z "$former" ] || [ "$former" = "$B" ] || take_over "$former"
all=1
for p in $PARTS; do made "$p" || all=0; done
[ "$all" = 1 ] && exit 0
[ "$(id -u)" = 0 ] || { echo "the test bed needs root: namespaces, mounts, cgroups" >&2; exit 1; }
mkdir -p "$B"/{bin,etc,run,src,stamp,debs,root,rt,cni/net.d,certs/_default,images}
trap '[ $? = 0 ] || tail -n 8 "$B"/*.log >&2' EXIT
# Go wants none of Debian's packages: it downloads and compiles while they are fetched.
make_part critools & go=$!
make_part packages
make_part lists
{ make_part engines; make_part criu; } & engines=$!
make_part busybox
make_part images
make_part runsc
wait "$engines"
make_part wasmedge
case $PARTS in *onnx*) make_part onnx ;; esac
make_part config
wait "$go"
