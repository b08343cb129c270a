# Everything is set up by itself: a fresh machine needs Python >= 3.10 and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow lint types clean

demo: $(STAMP)  ## race K-FAC against SGD and AdamW; the report is report/index.html
	$(BIN)/kfac-bench run digits-autoencoder --trials 6 --seconds 4 --budget 230 --out report --overwrite

test: $(STAMP)  ## the test suite without what is marked slow or gpu
	$(BIN)/pytest -n 2 --dist loadgroup

test-slow: $(STAMP)
	$(BIN)/pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy -p kfac_triton

clean:
	rm -rf build dist report *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[test,bench]'
	touch $@
