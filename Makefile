# Kuasar. `make help` lists the targets.
SHELL := /bin/bash
HANDLER ?= kuasar-runc
PREFIX ?= /usr/local
DESTDIR ?=
HOST := $(shell rustc -vV | sed -n 's/^host: //p')
BIN := target/release
# Kinds of sandboxers: each has a daemon, a shim name, a unit and a configuration.
KINDS := runc vmm gvisor quark wasm

.PHONY: help build deps fakes wasi-nn guest guest-distribution demo test test-programs unit check conformance bench install deb rpm packages node compat clean bed bed-and-kernel test-worker
help:
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

# python3 makes the packages' bills of materials.
DEBS := libseccomp-dev pkg-config protobuf-compiler gcc libc6-dev python3
deps: ## installs the Debian packages that building needs (root); elsewhere says what is missing
	@if command -v apt-get >/dev/null; then \
	  dpkg -s $(DEBS) >/dev/null 2>&1 || \
	    { apt-get update -qq && apt-get install -y -qq --no-install-recommends $(DEBS) >/dev/null; }; \
	else for p in pkg-config protoc gcc python3; do \
	  command -v $$p >/dev/null || { echo "deps: no $$p: install it, and static libraries of libc and libseccomp" >&2; exit 1; }; \
	done; fi

# Static and never relocated: a program that is run for every container is to touch as little
# memory and to be loaded as fast as can be.
STATIC = RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static" LIBSECCOMP_LINK_TYPE=static \
  LIBSECCOMP_LIB_PATH="$$(dirname "$$(gcc -print-file-name=libseccomp.a)")"
BUILT := target/static/$(HOST)

# The workers have a compiler in them: optimised for speed, and not as a whole, which would take minutes.
WORKER_OPT_LEVEL ?= 2
WORKER = CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
  CARGO_PROFILE_RELEASE_OPT_LEVEL=$(WORKER_OPT_LEVEL)

# The profile that vmm-task is built with. Its own takes minutes, since all that it uses is compiled once more;
# with `release` it is larger, and shares that with the daemons.
AGENT_PROFILE ?= agent

# The profile of wasm-worker-wasmedge, which no other program shares what it uses with: with `dev` the tests do.
WASMEDGE_PROFILE ?= release
ifeq ($(WASMEDGE_PROFILE),dev)
WASMEDGE = cargo build --workspace --exclude wasm-worker --features kuasar-tests/e2e --bin wasm-worker-wasmedge
WASMEDGE_BIN = target/debug/wasm-worker-wasmedge
else
WASMEDGE = $(WORKER) cargo build --release --target $(HOST) -p wasm-worker-wasmedge --target-dir target/static
WASMEDGE_BIN = $(BUILT)/release/wasm-worker-wasmedge
endif

# FAKES: what stands for engines that nobody packages; for tests, never installed. Named together with
# the programs, so that cargo compiles what they share once.
FAKES ?=

build: deps ## all programs, optimised, into target/release
	$(STATIC) cargo build --release --target $(HOST) -p runc-sandboxer -p gvisor-sandboxer \
	  -p quark-sandboxer -p wasm-sandboxer -p vmm-sandboxer -p containerd-shim-kuasar -p kuasar-ctl \
	  $(addprefix -p ,$(FAKES)) $(if $(filter release,$(AGENT_PROFILE)),-p vmm-task) --target-dir target/static
	$(STATIC) cargo build --profile parent --target $(HOST) -p sandbox-parent --no-default-features \
	  --bin sandbox-parent --target-dir target/static
	$(if $(filter release,$(AGENT_PROFILE)),,$(STATIC) cargo build --profile $(AGENT_PROFILE) --target $(HOST) \
	  -p vmm-task --target-dir target/static)
	$(STATIC) $(WORKER) cargo build --release --target $(HOST) -p wasm-worker --target-dir target/static
	@# It loads libwasmedge, which a static program cannot.
	$(WASMEDGE)
	@install -d $(BIN)
	cp --remove-destination $(BUILT)/release/runc-sandboxer $(BUILT)/release/gvisor-sandboxer \
	  $(BUILT)/release/quark-sandboxer $(BUILT)/release/vmm-sandboxer \
	  $(BUILT)/release/wasm-sandboxer $(BUILT)/release/wasm-worker $(WASMEDGE_BIN) \
	  $(BUILT)/release/containerd-shim-kuasar $(BUILT)/$(AGENT_PROFILE)/vmm-task \
	  $(BUILT)/release/kuasar-ctl $(BUILT)/parent/sandbox-parent $(BIN)/
	@set -e; for fake in $(FAKES); do cp --remove-destination $(BUILT)/release/$$fake $(BIN)/; done
	for kind in $(KINDS) wasmedge; do ln -sf containerd-shim-kuasar $(BIN)/containerd-shim-kuasar-$$kind-v1; done
	@# The program writes its own pages and completions.
	@rm -rf $(BIN)/man $(BIN)/completions && install -d $(BIN)/man $(BIN)/completions
	@$(BIN)/kuasar-ctl man $(BIN)/man
	@$(BIN)/kuasar-ctl completions bash > $(BIN)/completions/kuasar-ctl.bash
	@$(BIN)/kuasar-ctl completions zsh > $(BIN)/completions/_kuasar-ctl
	@$(BIN)/kuasar-ctl completions fish > $(BIN)/completions/kuasar-ctl.fish

# What microVM pods boot. The program in the image is GUEST_INIT.
GUEST_INIT ?= $(BIN)/vmm-task
guest: build ## kernel and image of microVM guests, into target/guest (root; the kernel takes minutes, once)
	vmm/guest/build.sh kernel
	vmm/guest/build.sh image $(GUEST_INIT)

# Debian's own kernel with its modules, in place of ours: for machines with PCI.
guest-distribution: build ## the distribution's kernel and an image with its modules, into target/guest (seconds)
	vmm/guest/build.sh distribution $(GUEST_INIT)

fakes:
	$(MAKE) build FAKES=fake-quark

# Wasmtime once more, and linked dynamically: it takes minutes, and is for those who want it. In a directory
# of its own, since its program has the other one's name there.
wasi-nn: deps ## wasm-worker-nn, which is Wasmtime with WASI-NN by ONNX Runtime, into target/release (minutes)
	$(WORKER) cargo build --release --target $(HOST) -p wasm-worker --features wasi-nn --target-dir target/wasi-nn
	@install -d $(BIN)
	cp --remove-destination target/wasi-nn/$(HOST)/release/wasm-worker $(BIN)/wasm-worker-nn

bed: deps
	tests/bed/setup.sh
	@if [ "$$(uname -m)" = x86_64 ]; then tests/bed/vmm.sh; fi

compat: build bed ## every version of containerd that we work with, for real; builds them with Go, once
	tests/compat.sh

packages: build guest ## units, and deb and rpm packages: made, installed, upgraded under a pod, removed
	tests/run.sh packages

unit: deps ## unit and component tests; need neither root nor containerd
	cargo test --workspace

# With the Wasmtime that `build` compiles: a second one, for tests alone, takes minutes.
test-worker: deps
	$(STATIC) $(WORKER) cargo test --release --target $(HOST) -p wasm-worker --target-dir target/static

test: deps ## everything: unit tests, end-to-end suites on real containerd, critest
	@# Beside each other: the bed waits for the network, and a linker or the last crate of many keeps one
	@# processor at a time.
	$(MAKE) -j3 fakes test-programs bed-and-kernel
	vmm/guest/build.sh image $(GUEST_INIT)
	@if [ "$$(uname -m)" = x86_64 ]; then vmm/guest/build.sh distribution $(GUEST_INIT); fi
	tests/run.sh all

test-programs: deps
	cargo test --workspace --exclude wasm-worker --features kuasar-tests/e2e --no-run

bed-and-kernel: bed
	@# Made again, and told, where they are needed.
	-tests/node.sh make
	vmm/guest/build.sh kernel
	-tests/interfaces.sh make

node: build bed guest ## a machine with systemd and cgroup v2: the packages installed, pods, restarts, removal
	tests/run.sh node

demo: build bed guest ## a pod on stock runc and on each sandboxer, with timings; cleans up
	tests/demo.sh

conformance: build bed guest ## critest on stock runc and HANDLER, and what differs
	tests/run.sh conformance $(HANDLER)

bench: build bed ## figures beside stock runc, under target/bench/
	tests/run.sh bench

check: deps ## format, lints, licences, documentation, shell scripts
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --features kuasar-tests/e2e -- -D warnings
	@# What a workspace's build hides, since features add up there.
	cargo check -q -p kuasar-oci --no-default-features
	cargo check -q -p sandbox-parent --no-default-features
	cargo check -q -p vmm-sandboxer
	RUSTDOCFLAGS=-Dwarnings cargo doc --workspace --no-deps --document-private-items
	@command -v shellcheck >/dev/null || apt-get install -y -qq --no-install-recommends shellcheck >/dev/null
	shellcheck -x tests/*.sh tests/bed/*.sh tests/node/*.sh vmm/guest/build.sh packaging/*.sh .ci/run
	shellcheck -s sh packaging/deb/*.in tests/packages/fake-systemctl
	docs/pictures/draw.py --check
	@if [ ! -x target/tools/bin/cargo-deny ]; then cargo install -q cargo-deny --locked --root target/tools; fi
	target/tools/bin/cargo-deny check

install: build ## programs, manual pages, completions, units and (unless there is one) configuration
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/lib/systemd/system $(DESTDIR)/etc/kuasar
	install -m 0755 $(BIN)/sandbox-parent $(BIN)/wasm-worker $(BIN)/wasm-worker-wasmedge $(BIN)/kuasar-ctl \
	  $(DESTDIR)$(PREFIX)/bin/
	install -d $(DESTDIR)$(PREFIX)/share/man/man1 $(DESTDIR)$(PREFIX)/share/bash-completion/completions \
	  $(DESTDIR)$(PREFIX)/share/zsh/site-functions $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	install -m 0644 $(BIN)/man/*.1 $(DESTDIR)$(PREFIX)/share/man/man1/
	install -m 0644 $(BIN)/completions/kuasar-ctl.bash $(DESTDIR)$(PREFIX)/share/bash-completion/completions/kuasar-ctl
	install -m 0644 $(BIN)/completions/_kuasar-ctl $(DESTDIR)$(PREFIX)/share/zsh/site-functions/
	install -m 0644 $(BIN)/completions/kuasar-ctl.fish $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/
	@# An operator's configuration is never replaced.
	set -e; for kind in $(KINDS); do \
	  install -m 0755 $(BIN)/$$kind-sandboxer $(DESTDIR)$(PREFIX)/bin/; \
	  install -m 0755 $(BIN)/containerd-shim-kuasar $(DESTDIR)$(PREFIX)/bin/containerd-shim-kuasar-$$kind-v1; \
	  sed 's|/usr/local/bin/|$(PREFIX)/bin/|' packaging/systemd/kuasar-$$kind.service \
	    > $(DESTDIR)$(PREFIX)/lib/systemd/system/kuasar-$$kind.service; \
	  chmod 0644 $(DESTDIR)$(PREFIX)/lib/systemd/system/kuasar-$$kind.service; \
	  install -D -m 0644 packaging/tmpfiles.d/kuasar-$$kind.conf $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/kuasar-$$kind.conf; \
	  [ -e $(DESTDIR)/etc/kuasar/$$kind-sandboxer.toml ] || \
	    install -m 0644 packaging/$$kind-sandboxer.toml $(DESTDIR)/etc/kuasar/$$kind-sandboxer.toml; \
	done
	install -m 0644 packaging/systemd/kuasar.target packaging/systemd/kuasar-metrics.socket \
	  $(DESTDIR)$(PREFIX)/lib/systemd/system/
	sed 's|/usr/local/bin/|$(PREFIX)/bin/|' packaging/systemd/kuasar-metrics.service \
	  > $(DESTDIR)$(PREFIX)/lib/systemd/system/kuasar-metrics.service
	chmod 0644 $(DESTDIR)$(PREFIX)/lib/systemd/system/kuasar-metrics.service
	@# Where `make wasi-nn` has made it.
	@[ ! -e $(BIN)/wasm-worker-nn ] || install -m 0755 $(BIN)/wasm-worker-nn $(DESTDIR)$(PREFIX)/bin/
	@# A runtime type of its own for pods that run on WasmEdge.
	install -m 0755 $(BIN)/containerd-shim-kuasar $(DESTDIR)$(PREFIX)/bin/containerd-shim-kuasar-wasmedge-v1
	@# What microVMs boot, where `make guest` has made it.
	@if [ -e target/guest/vmlinux ] && [ -e target/guest/initramfs.cpio ]; then \
	  install -d $(DESTDIR)$(PREFIX)/share/kuasar; \
	  install -m 0644 target/guest/vmlinux target/guest/initramfs.cpio $(DESTDIR)$(PREFIX)/share/kuasar/; \
	  for f in vmlinux-pci vmlinux-distribution initramfs-distribution.cpio; do \
	    [ ! -e target/guest/$$f ] || install -m 0644 target/guest/$$f $(DESTDIR)$(PREFIX)/share/kuasar/; \
	  done; \
	else echo "install: no guest for microVM pods: run \`make guest\` first"; fi

deb: build guest ## Debian packages, into target/packages
	packaging/build.sh deb

rpm: build guest ## RPM packages, into target/packages (needs rpmbuild, which it installs on Debian)
	@command -v rpmbuild >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends rpm >/dev/null; }
	packaging/build.sh rpm

clean: ## removes target/
	cargo clean
