# Everything is installed into .venv and .tools here; see scripts/bootstrap.py. `make help` lists the targets.
.DEFAULT_GOAL := help
.PHONY: help install demo test check fmt bench bench-proxy bench-hostile bench-routing bench-shard fuzz lock clean soak

# The first python3 that runs: a shim of pyenv's may be on PATH and fail.
PYTHON3 = $(shell for p in $$(which -a python3) /usr/bin/python3; do "$$p" -c '' 2>/dev/null && echo "$$p" && break; done)
BIN := .venv/bin
INSTALLED := .venv/.installed
BENCH_INSTALLED := .venv/.bench
PEERS_INSTALLED := .venv/.bench-proxy
FUZZ_INSTALLED := .venv/.fuzz
ARGS ?=

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

install: $(INSTALLED) ## make .venv with SOLLOL, its demo and what its tests need

$(INSTALLED): pyproject.toml requirements.lock scripts/bootstrap.py scripts/uv.lock.txt
	@test -n "$(PYTHON3)" || { echo "sollol: no python3 that runs is on PATH; install one (on Debian: apt-get install python3)."; exit 1; }
	@$(PYTHON3) scripts/bootstrap.py
	@touch $@

demo: install ## three nodes and the proxy on this machine, with a real model
	@$(BIN)/sollol demo $(ARGS)

test: install ## all tests; ARGS='-k name' for some
	@scripts/test_deps.sh
	@$(BIN)/pytest -n 2 --dist loadfile $(ARGS)

soak: install ## shake a fleet of real processes; ARGS='--minutes 30 --clients 200 --seed 1'
	@$(BIN)/python -m tests.soak $(ARGS)

check: install ## lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/mypy scripts

fmt: install ## format, and mend what lint can mend
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: install ## measure what the agent, decisions and the proxy's watch cost
	@$(BIN)/python scripts/bench.py $(ARGS)

bench-proxy: $(PEERS_INSTALLED) ## compare what proxies cost; renews docs/performance.md; ARGS=--quick for three minutes
	@scripts/test_deps.sh bench
	@$(BIN)/python scripts/bench_proxy.py $(ARGS)

$(PEERS_INSTALLED): $(INSTALLED) scripts/bench.lock.txt scripts/bench_litellm.lock.txt scripts/bench_herd.lock.txt
	@$(PYTHON3) scripts/bootstrap.py bench-proxy
	@touch $@

bench-routing: $(BENCH_INSTALLED) ## compare routing with other balancers on a simulated fleet; renews docs/routing.md
	@scripts/test_deps.sh bench
	@$(BIN)/python scripts/bench_routing.py $(ARGS)

$(BENCH_INSTALLED): $(INSTALLED) scripts/bench.lock.txt
	@$(PYTHON3) scripts/bootstrap.py bench
	@touch $@

fuzz: $(FUZZ_INSTALLED) ## search inputs that break the parsers; ARGS='--seconds 60 --target chunks'
	@$(BIN)/python scripts/fuzz.py $(ARGS)

$(FUZZ_INSTALLED): $(INSTALLED) scripts/fuzz.lock.txt
	@$(PYTHON3) scripts/bootstrap.py fuzz
	@touch $@

bench-hostile: install ## measure what hostile clients cost the others
	@$(BIN)/python scripts/bench_hostile.py $(ARGS)

bench-shard: install ## measure models over several hosts: cost, gain over llama.cpp's split, recovery (as root)
	@scripts/test_deps.sh
	@$(BIN)/python scripts/bench_shard.py $(ARGS)

lock: ## remake requirements.lock after a change to pyproject.toml; ARGS=--upgrade for newer versions
	@$(PYTHON3) scripts/bootstrap.py lock $(ARGS)

clean: ## remove what these targets made
	rm -rf .venv .tools .mypy_cache .pytest_cache .ruff_cache .hypothesis tests/e2e/js/node_modules
