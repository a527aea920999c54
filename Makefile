# `make demo` and `make test` work on a machine that has nothing but Python 3.11 or newer.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := demo_output
# The version that the tests were run with; `make TORCH=torch ...` takes the newest.
TORCH ?= torch==2.13.0

# Of the demo's model; `make demo RECIPE=recipes/demo_wav2vec2.json` takes an encoder of the raw waveform
RECIPE ?= recipes/demo.json

# Processes that share the tests
JOBS ?= 2

.PHONY: demo app test format lint docs docs-check clean

# One thread computes (the tensors are small) while the data are decoded on the other cores
demo: $(VENV)/installed $(DEMO)/corpus $(DEMO)/tokenizer $(DEMO)/non_speech
	OMP_NUM_THREADS=1 $(BIN)/python train_hf.py $(RECIPE)
	OMP_NUM_THREADS=1 $(BIN)/python eval_hf.py --checkpoint $(DEMO)/model --data_dir $(DEMO)/corpus \
		--ood_dir $(DEMO)/corpus/ood $(DEMO)/non_speech --log_mel_probe --output_dir $(DEMO)/report
	$(BIN)/python demo/classify.py $(DEMO)/model $(DEMO)/corpus --report $(DEMO)/report/report.json

$(DEMO)/corpus: | $(VENV)/installed
	$(BIN)/python demo/synthesize_corpus.py $@

$(DEMO)/non_speech: | $(VENV)/installed
	$(BIN)/python demo/synthesize_non_speech.py $@

$(DEMO)/tokenizer: | $(VENV)/installed $(DEMO)/corpus
	$(BIN)/python demo/train_tokenizer.py $(DEMO)/corpus $@

# The page in a browser, with the small model: Ctrl-C ends it
app: $(VENV)/installed
	$(BIN)/python app.py --open_browser

test: $(VENV)/installed
	$(BIN)/python -m pytest -n $(JOBS)

# The reference of all public names and commands, as pages for a browser
docs: $(VENV)/installed
	$(BIN)/python docs/build_reference.py build/reference

# The code in README.md and docs/ runs, and their links lead somewhere
docs-check: $(VENV)/installed
	$(BIN)/python -m pytest tests/test_docs.py

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[demo,report,dev]"
	touch $@

clean:
	rm -rf $(VENV) $(DEMO)
