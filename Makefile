# hotcell: everything a newcomer or CI needs. `make demo` and `make test` work on a fresh machine with a
# Rust toolchain; each target installs what it lacks, or says what to install.

CARGO  ?= cargo
HOST   := $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p')
INIT   := target/init/$(HOST)/init/hotcell-init
PREFIX ?= /usr/local
# The engine's address, once `make engine` has found or started one.
ENGINE  = $(shell .ci/engine address 2>/dev/null)

.PHONY: help tools engine gvisor engine-stop image images build init demo sources packages test test-full soak lint bench bench-tools install clean

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

tools: ## Install the build's own needs (a C compiler, git, mmdebstrap, e2fsprogs, promtool) where missing.
	@.ci/tools

engine: ## Find a container engine, or install and start one; the last line is its address.
	@.ci/engine start

gvisor: engine ## Add gVisor to that engine (Debian's package runsc): the runtime of the policy `untrusted`.
	@.ci/engine gvisor

engine-stop: ## Stop the engine that `make engine` started.
	@.ci/engine stop

init: ## Build hotcell-init, the static PID 1 of a cell.
	RUSTFLAGS="-C target-feature=+crt-static" $(CARGO) build --quiet --profile init --no-default-features --features init \
	  --bin hotcell-init --target $(HOST) --target-dir target/init
	@mkdir -p target/release target/debug
	@install -m 755 $(INIT) target/release/hotcell-init
	@install -m 755 $(INIT) target/debug/hotcell-init

build: tools init ## Build hotcell and hotcell-init into target/release.
	@[ -x target/release/hotcell ] || echo "hotcell: building for the first time; on two cores this takes some five minutes" >&2
	$(CARGO) build --release --locked --bin hotcell

image: build engine ## Build the cell image (Node, the Claude Code CLI, git, ripgrep, common tools).
	HOTCELL_ENGINE=$(ENGINE) target/release/hotcell image build

images: build engine ## Build the cell image and those of all toolchains (Rust, Go, Java, Python, Node, C and C++).
	HOTCELL_ENGINE=$(ENGINE) target/release/hotcell image build --all

demo: image ## Run one real job from start to clean-up and show everything that happens.
	@HOTCELL_ENGINE=$(ENGINE) tests/demo

sources: tools ## Fetch the Debian source packages that the tests change, into target/debian-sources, once.
	@.ci/sources git mercurial perl >/dev/null

packages: tools ## Fetch what the tests serve as package registries, into target/packages, once.
	@.ci/packages >/dev/null

test: tools init engine sources packages ## Run all tests, those with the real engine and the real CLI too.
	$(CARGO) build --locked --bin hotcell
	HOTCELL_ENGINE=$(ENGINE) target/debug/hotcell image build --all
	@.ci/engine gvisor || echo "hotcell: the tests go on without gVisor: they look at how it is refused" >&2
	@dir=$$(mktemp -d /var/tmp/h.XXXXXX) && chmod 755 $$dir && export HOTCELL_ENGINE=$(ENGINE) && status=0 && \
	  { HOTCELL_TEST_DIR=$$dir $(CARGO) test --locked --no-fail-fast || status=$$?; } && \
	  { .ci/leaks $$dir || status=1; } && exit $$status

test-full: test ## The tests, a repository of 80,000 files, builds of all toolchains under gVisor, 200 seeds of kills, and the property tests and fuzz targets with many more cases.
	@.ci/sources linux >/dev/null
	HOTCELL_ENGINE=$(ENGINE) HOTCELL_TEST_PACKAGES=linux $(CARGO) test --locked --test it changes::real::
	HOTCELL_ENGINE=$(ENGINE) HOTCELL_TEST_GVISOR="python rust go java cc" $(CARGO) test --locked --test it packages::projects::projects_build_and_test_under_gvisor
	HOTCELL_ENGINE=$(ENGINE) HOTCELL_CRASH_SEEDS=200 $(CARGO) test --locked --test it crash_points::
	PROPTEST_CASES=5000 $(CARGO) test --locked --lib
	HOTCELL_FUZZ_SCALE=20 $(CARGO) test --locked --test fuzz

soak: tools init engine ## Random kills of everything beside real jobs, for HOTCELL_SOAK_S seconds (600): what was survived, and what is left.
	$(CARGO) build --locked --bin hotcell
	HOTCELL_ENGINE=$(ENGINE) target/debug/hotcell image build
	HOTCELL_SOAK_S=$${HOTCELL_SOAK_S:-600} HOTCELL_ENGINE=$(ENGINE) $(CARGO) test --locked --test it soak:: -- --nocapture

lint: tools ## Format, clippy, docs, shell scripts: no warning is let through.
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --no-deps --lib --locked --quiet
	bash -n .ci/engine && bash -n .ci/tools && bash -n .ci/run && bash -n .ci/sources && bash -n .ci/apt && bash -n .ci/packages && bash -n .ci/leaks && bash -n tests/demo

# Made anew when the list of versions changes; half made, it is not taken for whole.
BENCH_TOOLS = target/bench-tools
$(BENCH_TOOLS)/peers.txt: tests/bench/peers.txt
	rm -rf $(BENCH_TOOLS)
	python3 -m venv $(BENCH_TOOLS)
	$(BENCH_TOOLS)/bin/pip install --quiet --disable-pip-version-check -r $<
	cp $< $@

# What the queue is measured against.
BENCH_PUEUE = target/bench-pueue
$(BENCH_PUEUE)/bin/pueued:
	$(CARGO) install --quiet --locked --root $(BENCH_PUEUE) pueue@4.0.4

bench-tools: ## Install what hotcell is measured against: nginx, and mitmproxy, LiteLLM and pueue below target/.
	@.ci/tools bench
	@$(MAKE) --no-print-directory $(BENCH_TOOLS)/peers.txt $(BENCH_PUEUE)/bin/pueued

bench: images bench-tools packages ## Measure side by side, print ratios, write target/bench.json.
	HOTCELL_ENGINE=$(ENGINE) $(CARGO) bench --bench side_by_side

install: build ## Install both binaries below PREFIX (default /usr/local).
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 755 target/release/hotcell target/release/hotcell-init $(DESTDIR)$(PREFIX)/bin/

clean: ## Remove what was built. Engine, images and state stay.
	$(CARGO) clean
