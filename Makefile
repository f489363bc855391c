# What people and CI run. `make demo` and `make test` need nothing but Rust and gcc.

# Seeds a scenario for `make sim`.
SEEDS ?= 20000

# Times that `make chaos` runs each of its scenarios, and a part of the names of those that it runs (empty: all).
TRIALS ?= 10
FAULT ?=

# How the source is formatted: wide lines, since names are words.
STYLE := --config max_width=120,use_small_heuristics=Max

.PHONY: demo test format fmt lint docs sim chaos clean

demo: ## Train on this machine: a broker and five peers, until the target is reached
	cargo run --release --quiet -- run --config configs/quickstart.toml

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

clean:
	cargo clean
