# make help lists the targets. Each of them installs first, where that is needed.
VENV ?= .venv
# The interpreter that makes the environment; found by scripts/find_python.sh where it is not given.
PYTHON ?=
PY = $(VENV)/bin/python
STAMP = $(VENV)/.megatron_dms_installed

.DEFAULT_GOAL := help
.PHONY: help install test demo lint format clean

help:
	@echo "make install  make the environment in $(VENV)/ (elsewhere: VENV=DIR) from constraints.txt; about 5 GB"
	@echo "make test     ruff, then the whole test suite"
	@echo "make demo     retrofit the tiny reasoner on four CPU ranks and compare; results in out/demo/"
	@echo "make lint     ruff check and ruff format --check"
	@echo "make format   let ruff mend and format the source"
	@echo "make clean    remove caches and out/; $(VENV)/ stays"

install: $(STAMP)

# The stamp is touched last, so an installation that broke off is done again.
$(STAMP): setup.py constraints.txt
	@set -e; \
	python="$(PYTHON)"; \
	if [ -z "$$python" ]; then python=$$(sh scripts/find_python.sh); fi; \
	echo "installing into $(VENV)/ with $$python (about 5 GB, a few minutes) ..."; \
	"$$python" -m venv "$(VENV)"; \
	"$(PY)" -m pip install -c constraints.txt -e ".[dev,eval]"; \
	touch "$@"

test: lint
	"$(PY)" -m pytest -q --durations=15

lint: install
	"$(PY)" -m ruff check .
	"$(PY)" -m ruff format --check .

format: install
	"$(PY)" -m ruff check --fix .
	"$(PY)" -m ruff format .

demo: install
	$(VENV)/bin/python examples/tiny_reasoner/demo.py --out out/demo

clean:
	rm -rf out build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -not -path '*/.venv/*' -prune -exec rm -rf {} +
