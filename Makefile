# make help lists the targets. Each of them installs first, where that is needed.
VENV ?= .venv
# The interpreter that makes the environment; found by scripts/find_python.sh where it is not given.
PYTHON ?=
PY = $(VENV)/bin/python
STAMP = $(VENV)/.megatron_dms_installed
# A second transformers, which comes before the environment's on the path, and the tests that run with both: those of
# exported models and of the baselines beside them. The test of lm-evaluation-harness runs with the first only, because
# the pinned datasets need a huggingface_hub that the second transformers refuses.
TRANSFORMERS_4 = build/transformers-4
TRANSFORMERS_4_PINS = tests/transformers-4.txt
TRANSFORMERS_4_TESTS = tests/unit/hf \
	tests/unit/inference/test_baselines.py tests/unit/inference/test_baselines_kvpress.py \
	tests/unit/evaluation/test_generation_cost.py tests/unit/test_docs.py::test_the_inference_page_runs \
	tests/e2e/test_inference_tools.py::test_pipeline_and_streaming \
	tests/unit/conversion/test_dms_formats.py::test_an_export_in_both_config_formats_runs

.DEFAULT_GOAL := help
# Processes that share the tests; each file's tests stay in one of them.
WORKERS ?= 2
PYTEST = "$(PY)" -m pytest -q -n $(WORKERS) --dist loadfile

.PHONY: help install test test-fast test-unit test-ranks test-transformers-4 demo site lint format clean

help:
	@echo "make install  make the environment in $(VENV)/ (elsewhere: VENV=DIR) from constraints.txt; about 5 GB"
	@echo "make test     everything: lint, test-unit, test-ranks and test-transformers-4 (WORKERS=2 processes)"
	@echo "make test-fast             what to run while working: test-unit without the tests marked slow, which start"
	@echo "                           processes, compile kernels, run benchmarks or evaluate whole models"
	@echo "make test-unit             tests/unit"
	@echo "make test-ranks            every other test: several ranks, the demo, a GPU where there is one"
	@echo "make test-transformers-4   the tests of exported models on transformers 4.57; puts 130 MB into build/"
	@echo "make demo     retrofit the tiny reasoner on four CPU ranks and compare; results in out/demo/"
	@echo "make lint     ruff check, ruff format --check and mypy"
	@echo "make site     the documentation as a site in build/site/, warnings are errors"
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
	"$(PY)" -m pip install -c constraints.txt -e ".[dev,docs,eval]"; \
	touch "$@"

test: lint
	$(MAKE) test-unit
	$(MAKE) test-ranks
	$(MAKE) test-transformers-4

test-fast: install
	$(PYTEST) -m "not slow" tests/unit

test-unit: install
	$(PYTEST) --durations=20 tests/unit

test-ranks: install
	$(PYTEST) --durations=15 --ignore=tests/unit tests

test-transformers-4: install $(TRANSFORMERS_4)/.installed
	PYTHONPATH="$(CURDIR)/$(TRANSFORMERS_4)" TRANSFORMERS_PINS=$(TRANSFORMERS_4_PINS) \
		$(PYTEST) --durations=5 $(TRANSFORMERS_4_TESTS)

$(TRANSFORMERS_4)/.installed: $(TRANSFORMERS_4_PINS) | install
	rm -rf "$(@D)"
	"$(PY)" -m pip install --no-deps --target "$(@D)" -r $(TRANSFORMERS_4_PINS)
	touch "$@"

lint: install
	"$(PY)" -m ruff check .
	"$(PY)" -m ruff format --check .
	"$(PY)" -m mypy

format: install
	"$(PY)" -m ruff check --fix .
	"$(PY)" -m ruff format .

site: install
	NO_MKDOCS_2_WARNING=1 "$(PY)" scripts/site.py

demo: install
	$(VENV)/bin/python examples/tiny_reasoner/demo.py --out out/demo

clean:
	rm -rf out build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -not -path '*/.venv/*' -prune -exec rm -rf {} +
