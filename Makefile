# make demo   build the emoji model's bundle and draw with it
# make test   everything that CI checks
# make bench  measure LatentRT and other runtimes, and write the README's table (an hour or two, 30 GB of disk)
PYTHON ?= python3
comma := ,
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt
# TensorRT-RTX builds plans without a GPU; on other systems than this one the tests of it are skipped.
TEST_EXTRAS ?= dev$(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),$(comma)tensorrt-rtx)
PROMPTS ?= "a red apple" "smiling face with sunglasses" "tropical fish" "hot beverage" "rocket" "red heart" "sunflower" "penguin"

DAY := $(shell date -u +%Y-%m-%d)
BENCHED := latentrt-onnxruntime-fp32 latentrt-onnxruntime-int8 latentrt-openvino-fp32 latentrt-openvino-bf16 latentrt-openvino-int8 peers

.PHONY: demo test bench bench-emoji bench-sd15 lint layers types docs pytest clean

demo: $(VENV)/export.stamp
	$(BIN)/latentrt build-engine examples/emoji --output build/emoji --guidance 4
	$(BIN)/python examples/emoji/demo.py build/emoji --output build/emoji-demo.png $(PROMPTS)

test: lint layers types docs pytest

bench: bench-emoji bench-sd15
	$(BIN)/python -m latentrt.benchmarks.report.readme

# The emoji model as it is used.
bench-emoji: $(VENV)/dev.stamp
	$(BIN)/latentrt bench build/bench/emoji --source examples/emoji --build --contenders $(BENCHED) --width 64 --height 64 --steps 20 \
		--guidance 4 --rounds 10 --warm-up 3 --output build/bench/emoji-report
	cp build/bench/emoji-report/report.json benchmarks/results/$(DAY)-bench-emoji.json

# A model of Stable Diffusion 1.5's size with random weights: a few steps, the rest extrapolated.
bench-sd15: $(VENV)/dev.stamp
	test -d build/bench/sd15-checkpoint || $(BIN)/python -m latentrt.benchmarks.checkpoints.write build/bench/sd15-checkpoint
	# Calibrated on small pictures: at 512x512 that takes 19 GB and most of an hour.
	$(BIN)/latentrt build-engine build/bench/sd15-checkpoint --output build/bench/sd15 --engine onnxruntime --precision int8 \
		--width 256 --height 256 --calibration-steps 2 --accept-quality
	$(BIN)/latentrt bench build/bench/sd15 --source build/bench/sd15-checkpoint --build --contenders $(BENCHED) --width 512 --height 512 --steps 2 \
		--guidance 7.5 --rounds 2 --extrapolate 20 --output build/bench/sd15-report
	cp build/bench/sd15-report/report.json benchmarks/results/$(DAY)-bench-sd15.json

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

layers: $(VENV)/dev.stamp
	$(BIN)/lint-imports --no-cache

# mypy cannot follow the mapping of folders to packages, but it follows links: in build/types the layers stand under their names.
LAYERS := engines runtime exporter benchmarks
types: $(VENV)/dev.stamp
	rm -rf build/types && mkdir -p build/types/latentrt
	for layer in $(LAYERS); do ln -s "$(CURDIR)/$$layer" build/types/latentrt/; done
	cd build/types && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml $(LAYERS:%=-p latentrt.%)

# The manual, as a site that needs no network: build/site/index.html.
docs: $(VENV)/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

pytest: $(VENV)/dev.stamp
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/export.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing LatentRT with its exporter into $(VENV) (PyTorch for the CPU; a few minutes at the first time)"
	$(PIP) --editable ".[export]"
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing LatentRT with all that its tests need into $(VENV) (a few minutes at the first time)"
	$(PIP) --editable ".[$(TEST_EXTRAS)]"
	@# Alone: the stubs ask for TensorRT itself, which comes from NVIDIA's own index.
	$(PIP) --no-deps tensorrt-stubs
	@touch $@ $(VENV)/export.stamp

clean:
	rm -rf build $(VENV)
