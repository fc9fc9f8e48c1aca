# facebench. `make help` lists the targets.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test test-slow lint format bench docs weights lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-10s %s\n", $$1, $$2}'

setup: $(STAMP)  ## the environment, from the lock file, into .venv

$(STAMP): requirements.lock pyproject.toml
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: setup  ## build the demo corpus, train and score four systems, write the report
	$(BIN)/facebench data demo --out data/demo
	$(BIN)/facebench bench configs/suites/demo.yaml --out runs/demo
	$(BIN)/facebench report runs/demo

test: setup  ## run the tests
	$(BIN)/python -m pytest

test-slow: setup  ## run the slow tests too
	$(BIN)/python -m pytest -m "slow or not slow"

lint: setup  ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .

format: setup  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: setup  ## resolve the dependencies anew into requirements.lock
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --upgrade pyproject.toml --extra corpus --extra dev --generate-hashes \
	  --python-version 3.11 --no-annotate --custom-compile-command "make lock" -o requirements.lock

bench: setup  ## run every benchmark and print its table
	for name in decoding metrics streaming speech; do $(BIN)/python -m benchmarks.$$name || exit 1; done

docs: setup  ## make the README's pictures anew, from the last demo (needs chromium)
	$(BIN)/python -m docs.pictures

weights: setup  ## train the demo weights anew (hours); see docs/weights.md
	$(BIN)/facebench data demo --out data/demo
	for name in attributes_guide attributes_judge perceptual identity_guide identity_judge speech_encoder clip text_encoder emotion_judge stylegan2 inverter; do \
	  $(BIN)/facebench fit --config configs/demo/$$name.yaml --run runs/weights/$$name || exit 1; done

clean:  ## delete what was built: environment, data, runs
	rm -rf $(VENV) data runs
