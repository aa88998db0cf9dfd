PYTHON ?= python3
COMPOSE ?= docker compose
TORCH_INDEX ?=
TORCH_BUILD ?=
PYTEST_ARGS ?=
BENCH ?=
SEEDS ?= 1
TEXT ?=
# many tests wait for processes; files stay whole, for what their tests share
TWO = -n 2 --dist loadfile

export PYTHON TORCH_INDEX TORCH_BUILD

.PHONY: help setup demo up test test-slow test-docker bench lint format

help:
	@echo "make demo         train a small GPT on this machine, end to end"
	@echo "make up           start the local stack in the foreground"
	@echo "make test         the quick tests     make test-slow     the long ones"
	@echo "make lint         ruff and mypy       make format        let ruff rewrite"
	@echo "make test-docker  build the containers and run the demo through them"
	@echo "make bench        how fast this machine trains, beside others (BENCH=--full TEXT=file SEEDS=5)"
	@echo "make setup        only install, into .venv"

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt setup.sh
	@./setup.sh
	@touch $@

demo: setup
	@.venv/bin/trainmaster demo

up: setup
	@.venv/bin/trainmaster up

test: setup
	.venv/bin/python -m pytest -m "not slow" $(TWO) $(PYTEST_ARGS)

# what is broken on purpose is timed, so it gets the machine for itself
test-slow: setup
	.venv/bin/python -m pytest -m slow --ignore tests/chaos $(TWO) $(PYTEST_ARGS)
	.venv/bin/python -m pytest -m slow tests/chaos $(PYTEST_ARGS)

# transformers is here anyway; litgpt's requirements contradict ours, so it comes without them and beside .venv
.peers/litgpt: benchmarks/peers.txt | setup
	.venv/bin/python -m pip install -qq --no-deps --upgrade --target .peers -r benchmarks/peers.txt
	@touch $@

bench: .peers/litgpt
	-.venv/bin/python benchmarks/throughput.py $(BENCH)
	-.venv/bin/python benchmarks/time_to_loss.py --seeds $(SEEDS) $(if $(TEXT),--text $(TEXT))
	-.venv/bin/python benchmarks/service_overhead.py --pairs 2 --steps 40

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: setup
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

test-docker: setup
	COMPOSE="$(COMPOSE)" docker/test
