# What people and CI run. `make demo` and `make test` need nothing but Rust and gcc.

# Seeds a scenario for `make sim`.
SEEDS ?= 20000

# Times that `make chaos` runs each of its scenarios, and a part of the names of those that it runs (empty: all).
TRIALS ?= 10
FAULT ?=

# The longest blob that `make bench` measures with.
BYTES ?= 100MB

# The codec of updates that `make codecs` runs (empty: all), seeds of which it takes the mean, and the directory of MNIST's
# files for a CNN (empty: the digits only).
CODEC ?=
CODEC_SEEDS ?= 5
MNIST ?=

# How `make demo` is built. CI takes dev, which the tests have built already.
PROFILE ?= release

# How the source is formatted: wide lines, since names are words.
STYLE := --config max_width=120,use_small_heuristics=Max

.PHONY: demo test format fmt lint docs sim chaos bench codecs clean

demo: ## Train on this machine: a broker and five peers, until the target is reached
	cargo run --profile $(PROFILE) --quiet -- run --config configs/quickstart.toml

test: format lint docs ## Everything that must hold before a change lands
	cargo test --quiet

format:
	cargo fmt -- --check $(STYLE)

fmt: ## Format the source
	cargo fmt -- $(STYLE)

lint:
	cargo clippy --quiet --all-targets -- -D warnings

docs:
	RUSTDOCFLAGS="-D warnings" cargo doc --quiet --no-deps

sim: ## The protocol under faults, by many more seeds
	SEEDS=$(SEEDS) cargo test --release --test simulation

chaos: ## Real processes killed, frozen and cut off, many times; prints a table of how long recovery takes
	TRIALS=$(TRIALS) FAULT="$(FAULT)" cargo test --release --test chaos -- \
		--ignored --nocapture --exact every_scenario_holds_for_many_seeds

bench: ## The kernels, then transfers and rounds: how fast this machine is
	cargo bench --quiet --bench kernels
	for of in "--receivers 1" "--receivers 4" "--receivers 16" "--senders 4" "--senders 16"; do \
		cargo run --release --quiet -- bench transfer --quiet --bytes $(BYTES) $$of && echo || exit 1; \
	done
	for bytes in 1MB 10MB $(BYTES); do \
		cargo run --release --quiet -- bench round --quiet --bytes $$bytes && echo || exit 1; \
	done

codecs: ## What each codec costs in real runs: bytes, accuracy, seconds
	CODEC="$(CODEC)" SEEDS=$(CODEC_SEEDS) MNIST="$(MNIST)" cargo test --release --test codecs -- --ignored --nocapture

clean:
	cargo clean
