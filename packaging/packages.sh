# shellcheck shell=bash
# Sourced by build.sh: what each package is, and what is in it, the same for deb and rpm.
# Files are taken from BIN (programs), GUEST (kernel and image) and the checkout (TOP); METADATA is what
# `cargo metadata` says.

# The packages in the order in which they are made.
# shellcheck disable=SC2034 # of who sources this
PACKAGES="kuasar-common kuasar-guest kuasar-runc kuasar-vmm kuasar-gvisor kuasar-quark kuasar-wasm kuasar-ctl"
KINDS="runc vmm gvisor quark wasm"

# kind PACKAGE: the kind of sandboxer in it; nothing for the others
kind() { case " $KINDS " in *" ${1#kuasar-} "*) echo "${1#kuasar-}" ;; esac; }

summary() {
  case $1 in
    kuasar-common) echo "Container runtime with several kinds of sandbox: shared files" ;;
    kuasar-guest) echo "Kernel and image that Kuasar's microVMs boot" ;;
    kuasar-runc) echo "Kuasar sandboxer for pods in Linux namespaces" ;;
    kuasar-vmm) echo "Kuasar sandboxer for pods in microVMs" ;;
    kuasar-gvisor) echo "Kuasar sandboxer for pods on gVisor" ;;
    kuasar-quark) echo "Kuasar sandboxer for pods on Quark" ;;
    kuasar-wasm) echo "Kuasar sandboxer for WebAssembly pods" ;;
    kuasar-ctl) echo "Operator's tool for the Kuasar container runtime" ;;
  esac
}

description() {
  case $1 in
    kuasar-common)
      echo "sandbox-parent, which keeps what must outlive a daemon, and the shim program that"
      echo "containerd looks up; kuasar.target; documentation." ;;
    kuasar-guest)
      echo "A Linux kernel and an initramfs with vmm-task, the guest's agent, for kuasar-vmm." ;;
    kuasar-ctl)
      echo "Checks a host, shows and stops pods, runs commands in them, reads logs and metrics, and"
      echo "serves the metrics of all sandboxers of a node to Prometheus." ;;
    *)
      echo "One resident daemon serves containerd's Sandbox API and Task API for all pods of this"
      echo "kind on a node: no shim and no pause process runs per pod. Upgrading or removing the"
      echo "package never stops a pod." ;;
  esac
}

# depends PACKAGE: packages of ours that it cannot do without, always of the same version
depends() {
  case $1 in
    kuasar-common | kuasar-guest | kuasar-ctl) ;;
    kuasar-vmm) echo kuasar-common kuasar-guest ;;
    *) echo kuasar-common ;;
  esac
}

# recommends deb|rpm PACKAGE: what else it is of little use without
recommends() {
  case $1-$2 in
    deb-kuasar-common) echo "containerd (>= 2.1) | isulad" ;;
    deb-kuasar-runc) echo "runc | crun" ;;
    deb-kuasar-vmm) echo "qemu-system-x86 | qemu-system-arm, virtiofsd" ;;
    deb-kuasar-gvisor) echo "runsc" ;;
    rpm-kuasar-runc) echo "(runc or crun)" ;;
    rpm-kuasar-vmm) echo "(qemu-kvm or qemu), virtiofsd" ;;
    *) ;;
  esac
}

# crates PACKAGE: the crates whose programs are in it, with their cargo features, for its list of parts
crates() {
  case $1 in
    kuasar-common) echo "sandbox-parent:no-default-features containerd-shim-kuasar" ;;
    kuasar-guest) echo vmm-task ;;
    kuasar-wasm) echo "wasm-sandboxer wasm-worker wasm-worker-wasmedge" ;;
    kuasar-ctl) echo kuasar-ctl ;;
    *) echo "${1#kuasar-}-sandboxer" ;;
  esac
}

# programs PACKAGE: files of BIN that it needs
programs() {
  case $1 in
    kuasar-common) echo "sandbox-parent containerd-shim-kuasar" ;;
    kuasar-guest) ;;
    kuasar-wasm) echo "wasm-sandboxer wasm-worker wasm-worker-wasmedge" ;;
    kuasar-ctl) echo kuasar-ctl ;;
    *) echo "${1#kuasar-}-sandboxer" ;;
  esac
}

# stage PACKAGE ROOT: lays its files below ROOT
stage() {
  local package=$1 root=$2 kind p page doc=$2/usr/share/doc/$1
  kind=$(kind "$package")
  install -d "$root/usr/bin" "$doc"
  for p in $(programs "$package"); do install -m 0755 "$BIN/$p" "$root/usr/bin/$p"; done
  case $package in
    kuasar-common)
      install -d "$root/usr/lib/systemd/system" "$root/etc/kuasar"
      install -m 0644 "$TOP/packaging/systemd/kuasar.target" "$root/usr/lib/systemd/system/"
      install -m 0644 "$TOP/README.md" "$TOP/CHANGELOG.md" "$TOP"/packaging/monitoring/* "$doc/"
      # A sandboxer's own page is in its own package.
      for page in "$TOP"/docs/*.md; do
        p=$(basename "$page" .md)
        [ -n "$(kind "kuasar-$p")" ] || install -m 0644 "$page" "$doc/"
      done
      install -m 0644 "$TOP"/docs/*.svg "$doc/" ;;
    kuasar-guest)
      install -d "$root/usr/share/kuasar"
      for p in vmlinux initramfs.cpio guest.erofs; do install -m 0644 "$GUEST/$p" "$root/usr/share/kuasar/$p"; done
      # Where it was built, too (FLAVOURS): the one for machines with PCI.
      if [ -e "$GUEST/vmlinux-pci" ]; then
        install -m 0644 "$GUEST/vmlinux-pci" "$root/usr/share/kuasar/"
        install -m 0644 "$GUEST/vmlinux-pci.config" "$doc/kernel-pci.config"
      fi
      # What the kernel's licence asks for: which source, and how it was configured.
      install -m 0644 "$GUEST/vmlinux.config" "$doc/kernel.config"
      install -m 0644 "$GUEST/vmlinux.stamp" "$doc/kernel.source"
      install -m 0644 "$TOP/docs/vmm-guest.md" "$doc/" ;;
    kuasar-ctl)
      install -d "$root/usr/share/man/man1" "$root/usr/lib/systemd/system"
      sed 's|/usr/local/bin/|/usr/bin/|' "$TOP/packaging/systemd/kuasar-metrics.service" \
        > "$root/usr/lib/systemd/system/kuasar-metrics.service"
      install -m 0644 "$TOP/packaging/systemd/kuasar-metrics.socket" "$root/usr/lib/systemd/system/"
      for p in "$BIN"/man/*.1; do gzip -9nc "$p" > "$root/usr/share/man/man1/$(basename "$p").gz"; done
      completion() { install -Dm 0644 "$1" "$root/usr/share/$2"; }
      completion "$BIN/completions/kuasar-ctl.bash" bash-completion/completions/kuasar-ctl
      completion "$BIN/completions/_kuasar-ctl" zsh/site-functions/_kuasar-ctl
      completion "$BIN/completions/kuasar-ctl.fish" fish/vendor_completions.d/kuasar-ctl.fish ;;
    *)
      install -d "$root/usr/lib/systemd/system" "$root/usr/lib/tmpfiles.d" "$root/etc/kuasar/$kind-sandboxer.toml.d"
      ln -s containerd-shim-kuasar "$root/usr/bin/containerd-shim-kuasar-$kind-v1"
      # A runtime type of its own for pods that run on WasmEdge.
      [ "$kind" != wasm ] || ln -s containerd-shim-kuasar "$root/usr/bin/containerd-shim-kuasar-wasmedge-v1"
      sed 's|/usr/local/bin/|/usr/bin/|' "$TOP/packaging/systemd/kuasar-$kind.service" \
        > "$root/usr/lib/systemd/system/kuasar-$kind.service"
      install -m 0644 "$TOP/packaging/tmpfiles.d/kuasar-$kind.conf" "$root/usr/lib/tmpfiles.d/"
      sed 's|/usr/local/bin/|/usr/bin/|' "$TOP/packaging/$kind-sandboxer.toml" > "$root/etc/kuasar/$kind-sandboxer.toml"
      sed "s/@KIND@/$kind/g" "$TOP/packaging/containerd.toml.in" > "$doc/containerd.toml"
      sed "s/@KIND@/$kind/g" "$TOP/packaging/runtimeclass.yaml.in" > "$doc/runtimeclass.yaml"
      for page in "$TOP/docs/$kind.md" "$TOP/docs/$kind"-drivers.md; do
        [ ! -e "$page" ] || install -m 0644 "$page" "$doc/"
      done ;;
  esac
  install -m 0644 "$TOP/LICENSE" "$doc/LICENSE"
  # shellcheck disable=SC2046 # a list of words
  python3 "$TOP/packaging/sbom.py" --package "$package" --version "$VERSION" --target "$TARGET" \
    --epoch "$SOURCE_DATE_EPOCH" --out "$doc" --metadata "$METADATA" $([ "$package" != kuasar-guest ] || echo "--kernel $GUEST/vmlinux.stamp") \
    $(crates "$package")
  # Directories and files are nobody's but root's to write, whatever the builder's umask is.
  find "$root" -type d -exec chmod 0755 {} +
  find "$root" -type f ! -perm /111 -exec chmod 0644 {} +
  rmdir "$root/usr/bin" 2>/dev/null || true
}
