# The index of this project for a newcomer. Every target sets up what it needs in $(VENV).
#
#   make report    train small models, accelerate them and real ones, write report/index.html
#   make test      all tests
#   make install   .venv with lamina in it
#   make bench     the benchmark suite, and each promised ratio met or missed
#   make gpu       on a GPU: build with CUDA, test, time and tune, write gpu-report/index.html, in 8 minutes
#   make lint      ruff and clang-format
#   make sanitize  op tests on a build with address and undefined-behaviour sanitizers
#   make clean     remove what the others made
#
# Overridable: PYTHON, VENV, TORCH (a pip requirement; the default is the CPU build the project is developed on), OUT (of
# make gpu, which takes PYTHON as it is: it must have a PyTorch for CUDA, Triton, cmake, ninja, pybind11 and
# scikit-build-core, and needs no network; CUTLASS comes from LAMINA_CUTLASS_DIR or a wheel of nvidia-cutlass in .whl).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc kernels python -type f -not -path '*/__pycache__/*' -not -name '*.so')

OUT ?= gpu-report

.PHONY: install report test bench gpu lint sanitize clean

install: $(VENV)/.installed

report: $(VENV)/.onnx
	$(BIN)/lamina report --out report

# One process for each core; waiting OpenMP threads sleep, or those of one process would keep the other's from running.
test: $(VENV)/.installed
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $$(nproc) --dist worksteal

bench: $(VENV)/.openvino
	$(BIN)/lamina bench --targets benchmarks/targets.toml

gpu:
	$(PYTHON) benchmarks/gpu.py --out $(OUT)

lint: $(VENV)/.linted
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run -Werror

# The sanitized module goes to a folder of its own, which comes first on the path. --capture=sys lets its messages through.
SANITIZED := build/sanitize
sanitize: $(VENV)/.installed
	$(BIN)/pip install -q --no-deps --upgrade --target $(SANITIZED)/site . \
	  -C build-dir=$(SANITIZED)/cmake -C cmake.define.LAMINA_SANITIZE=ON -C cmake.define.LAMINA_CUDA=OFF
	PYTHONPATH=$(SANITIZED)/site ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  $(BIN)/python -m pytest tests/ops tests/test_every_isa.py -q --capture=sys -k "not compile and not export and not subprocess"

clean:
	rm -rf build report gpu-report $(VENV) .pytest_cache .ruff_cache .hypothesis .benchmarks

# torch comes first and by exact version: lamina itself asks for any torch from 2.10 on.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install "$(TORCH)"
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install ".[test]"
	touch $@

# ONNX Runtime (the extra "onnx"), which some targets compare with; without it those are not judged, and say so.
$(VENV)/.onnx: $(VENV)/.installed
	if $(BIN)/pip install -q onnxruntime onnx onnxscript; then touch $@; \
	else echo "ONNX Runtime can't be installed here: the targets against it will not be judged"; fi

# OpenVINO on the model that ONNX Runtime's tool quantized, which the targets of int8 ResNets compare with.
$(VENV)/.openvino: $(VENV)/.onnx
	if $(BIN)/pip install -q openvino; then touch $@; \
	else echo "OpenVINO can't be installed here: the targets against it will not be judged"; fi

# By exact version: a newer formatter would find fault with files that nobody touched.
$(VENV)/.linted: $(VENV)/.torch Makefile
	$(BIN)/pip install -q ruff==0.17.6 clang-format==23.1.5
	touch $@
