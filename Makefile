# Two commands: `make demo` runs it, `make test` tests it.

CARGO ?= cargo
WALCAST := $(shell $(CARGO) metadata --format-version 1 --no-deps 2>/dev/null | sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')/debug/walcast

.PHONY: help demo build page test test-rust test-clients lint needs bench

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' Makefile | expand -t 22

demo: page build ## a PostgreSQL of its own, the clinic, live: walcast dev
	@$(WALCAST) dev $(ARGS)

build:
	@echo "Building walcast; the first build takes about five minutes on two cores."
	$(CARGO) build -p walcast-server

page: demo/page/vendor/supabase.js

demo/page/vendor/supabase.js: demo/package-lock.json
	cd demo && npm ci --no-audit --no-fund
	@touch $@

test: needs page test-rust test-clients ## every test: Rust, stock clients, browser

# RUST_BACKTRACE off: a failed assertion says enough, and hundreds of frames hide it.
test-rust:
	RUST_BACKTRACE=0 $(CARGO) test --workspace

test-clients: build
	$(MAKE) -C tests all

lint: ## format, clippy, docs: warnings are errors
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --document-private-items

# What the tests need beside Rust, make and npm; said all at once, with the command that brings it.
needs:
	@missing=""; \
	[ -n "$$WALCAST_PG_BIN" ] || command -v pg_config >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || missing="$$missing postgresql"; \
	command -v psql >/dev/null || missing="$$missing postgresql-client"; \
	[ -x "$${CHROMIUM:-/usr/bin/chromium}" ] || missing="$$missing chromium fonts-dejavu-core"; \
	[ -n "$$WALCAST_TEST_PGBOUNCER" ] || PATH="$$PATH:/usr/sbin" command -v pgbouncer >/dev/null || missing="$$missing pgbouncer"; \
	python3 -c 'import venv, ensurepip' 2>/dev/null || missing="$$missing python3-venv"; \
	if [ -n "$$missing" ]; then echo "The tests need:$$missing"; echo "  apt-get install -y --no-install-recommends$$missing"; exit 1; fi

bench: ## figures and ratios, in release: draining, commit to client, memory
	$(CARGO) build --release -p walcast-server -p walcast-bench
	@$(dir $(WALCAST))../release/walcast-bench $(ARGS)
