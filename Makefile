# `make demo` and `make test` work on a machine that has nothing but Python 3.11 or newer.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := demo_output
# The version that the tests were run with; `make TORCH=torch ...` takes the newest, `make TORCH= ...` that of the system,
# such as Debian's python3-torch. Where the version changes, VENV should name another folder.
TORCH ?= torch==2.13.0

# Of the demo's model; `make demo RECIPE=recipes/demo_wav2vec2.json` takes an encoder of the raw waveform
RECIPE ?= recipes/demo.json

# Processes that share the tests
JOBS ?= 2

# What `make test-oldest` runs: the files that reach into other packages, in a few minutes
OLDEST_TESTS ?= tests/test_configuration.py tests/test_modeling.py tests/test_processing.py tests/test_trainer.py \
	tests/test_train_hf.py tests/test_predict.py tests/test_prediction_parts.py tests/test_loading.py \
	tests/test_serving.py tests/test_lora.py tests/test_search.py tests/test_export.py tests/test_openmax.py

# `$(call environment,FOLDER)`: with pip and torch, whose version no later package may change
define environment
	$(PYTHON) -m venv $(if $(TORCH),,--system-site-packages) $(1)
	$(1)/bin/python -m pip install --quiet --upgrade pip
	$(1)/bin/python $(if $(TORCH),-m pip install --quiet "$(TORCH)",-c "import torch")
	$(1)/bin/python -m pip list --format freeze | grep '^torch==' > $(1)/constraints.txt
endef
# Else what the system has beside torch would count as the newest
NEWEST := $(if $(TORCH),,--upgrade --upgrade-strategy eager)

.PHONY: demo app test test-oldest test-newest format lint docs docs-check clean

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

# The oldest versions that setup.cfg allows, in an environment of their own
test-oldest: $(VENV)-oldest/installed
	$(VENV)-oldest/bin/python -m pytest -n $(JOBS) $(OLDEST_TESTS)

$(VENV)-oldest/installed: setup.cfg tests/oldest_versions.py
	$(call environment,$(VENV)-oldest)
	$(VENV)-oldest/bin/python tests/oldest_versions.py >> $(VENV)-oldest/constraints.txt
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint $(VENV)-oldest/constraints.txt \
		--editable ".[av,onnx,report,app,live,lora,search,serve,dev]"
	touch $@

# The newest ones that there are, today
test-newest:
	rm -rf $(VENV)-newest
	$(MAKE) test VENV=$(VENV)-newest

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
	$(call environment,$(VENV))
	$(BIN)/python -m pip install --quiet $(NEWEST) --constraint $(VENV)/constraints.txt --editable ".[demo,report,dev]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest $(DEMO)
