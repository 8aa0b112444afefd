# Two commands for users: `make demo` and `make test`. Each makes .venv if missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A bare `kernels` package belongs to Hugging Face: keep this folder off sys.path.
export PYTHONSAFEPATH := 1

.PHONY: demo explain docs test test-full test-core aot soak bench bench-quick check format clean

$(VENV)/demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[all]"
	touch $@

$(VENV)/dev: $(VENV)/demo
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

$(VENV)/docs: $(VENV)/demo
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

demo: $(VENV)/demo
	$(BIN)/python examples/demo.py

explain: $(VENV)/demo  # what the demo's adapter changed: out/explain/report.html
	$(BIN)/python examples/explain.py

# The pages as a site in build/site, each link checked.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/docs
	$(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

# Two processes of one thread: most tests are too small for two threads. Threads that wait by
# spinning starve each other as soon as a second process runs.
WORKERS ?= 2
test test-full: export OMP_WAIT_POLICY := PASSIVE
test test-full: export OMP_NUM_THREADS := 1
test: $(VENV)/dev
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# The suite, and thousands of damaged files and odd arguments.
test-full: $(VENV)/dev
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --wide $(ARGS)

# What another version of torch is tried with, in an environment of its own: docs/install.md.
#   make test-core PYTEST=/path/to/bin/pytest
PYTEST ?= $(BIN)/pytest
CORE := $(foreach name,kernels_* quantization* lora_layer lora_injection lora_merging \
	peft_save_load models_* loading_folder loading_gguf loading_quantized running_compiling \
	running_evaluation running_generation train_step training training_resume, \
	$(wildcard tests/test_$(name).py))
test-core: export OMP_WAIT_POLICY := PASSIVE
test-core: export OMP_NUM_THREADS := 1
test-core:
	$(PYTEST) -p no:cacheprovider $(CORE) $(ARGS)

# Every Triton kernel × tile × dtype for sm_80 and sm_90, without a GPU: benchmarks/results/aot.csv.
aot: $(VENV)/dev
	$(BIN)/python benchmarks/aot.py $(ARGS)

# Training killed KILLS times at random, inside saves too, and held against an unbroken run; then
# the peak memory of quantizing a checkpoint of over 1 GB while reading it.
KILLS ?= 200
soak: export OMP_WAIT_POLICY := PASSIVE
soak: $(VENV)/dev
	KILLS=$(KILLS) $(BIN)/pytest -s tests/test_kill.py $(ARGS)
	BIG=1 $(BIN)/pytest tests/test_loading_quantized.py -k peak_memory

# A training step beside its peers: every provider (an hour and more), or the main ones (minutes).
bench bench-quick: export PYTHONPATH := benchmarks
bench: $(VENV)/dev
	$(BIN)/python benchmarks/train_step.py $(ARGS)
	$(BIN)/python benchmarks/train_chart.py

bench-quick: $(VENV)/dev
	$(BIN)/python benchmarks/train_step.py --quick $(ARGS)

check: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python tests/check_layers.py
	$(BIN)/python tests/check_limits.py

format: $(VENV)/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info
