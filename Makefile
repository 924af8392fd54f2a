# Every target is a thin call of the `nfm` command, in an environment that `make` builds once in .venv. What the tests and
# the linters need besides is added to it by the first target that needs it. (`make bench` builds an environment of its
# own, .venv-bench, with the peers that it measures.)
#
#   CONFIG=configs/fashion.toml   the run's config (default: configs/glyphs.toml, letters that it draws)
#   ARGS="--set pairs.draws=8"    more arguments for nfm
#   PYTHON=/path/to/python        use this environment as it is instead of making one
#   TORCH="torch==2.13.0"         the torch requirement, for instance a CUDA build
#   PIP_ARGS="..."                arguments for pip, for instance the index of that torch build
#   JOBS=0                        run the tests in one process; default: on two
#   MINUTES=10                    how long `make fuzz` goes on
#   AT_ONCE=1                     how many students `make report` trains at a time; default: 2 of the default config, else 1
#   TIMES=20                      how often `make test-busy` runs its tests
#   ENDPOINT=http://HOST:PORT     the S3 server of `make test-s3`

CONFIG ?= configs/glyphs.toml
ARGS ?=
TORCH ?= torch==2.13.0
PIP_ARGS ?=
JOBS ?= 2
MINUTES ?= 10
TIMES ?= 20
AT_ONCE ?= $(if $(filter configs/glyphs.toml,$(CONFIG)),2,1)
VENV := .venv
PEERS := .venv-bench

ifdef PYTHON
PY := $(PYTHON)
ENV :=
DEV :=
DOCS :=
PEERS_PY := $(PYTHON)
PEERS_ENV :=
else
PY := $(VENV)/bin/python
ENV := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs
PEERS_PY := $(PEERS)/bin/python
PEERS_ENV := $(PEERS)/.installed
endif
NFM := $(PY) -m nfm.pipeline.cli
INSTALL = $(PY) -m pip install --quiet --disable-pip-version-check --no-compile $(PIP_ARGS) -c $(VENV)/constraints.txt
# What pip does at the end of an installation, on all cores in place of one: it took a minute and a half of three.
COMPILE = @$(PY) -m compileall -qq -j 0 -x '/tests/' $(VENV)/lib || true  # some packages ship files of other Pythons

.DEFAULT_GOAL := help
.PHONY: help env data teacher pairs student report audit status test test-all test-busy test-faults test-slurm test-s3 test-gs test-az bench gpu kills fuzz lint format docs clean-env

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  settings: CONFIG=$(CONFIG)  ARGS  PYTHON  TORCH=$(TORCH)  PIP_ARGS"

env: $(DEV)  ## make the environment in .venv, development tools included

$(VENV)/.installed: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	echo '$(TORCH)' >> $(VENV)/constraints.txt
	$(INSTALL) '$(TORCH)' -e '.[all]'
	$(COMPILE)
	touch $@

$(VENV)/.installed-dev: $(ENV)
	$(INSTALL) '$(TORCH)' -e '.[all,dev]'
	$(COMPILE)
	touch $@

data: $(ENV)  ## ingest the images
	$(NFM) run data -c $(CONFIG) $(ARGS)

teacher: $(ENV)  ## train the teacher
	$(NFM) run teacher -c $(CONFIG) $(ARGS)

pairs: $(ENV)  ## data, teacher and the pair store
	$(NFM) run pairs -c $(CONFIG) $(ARGS)

student: $(ENV)  ## train a student on the pairs
	$(NFM) run student -c $(CONFIG) $(ARGS)

report: $(ENV)  ## students, evaluation and one HTML page
	$(NFM) run report -c $(CONFIG) --at-once $(AT_ONCE) $(ARGS)

audit: $(ENV)  ## prove that everything is what its manifest says
	$(NFM) audit -c $(CONFIG) $(ARGS)

status: $(ENV)  ## a line a stage
	$(NFM) status -c $(CONFIG) $(ARGS)

test: $(DEV)  ## run the tests
	$(PY) -m pytest -n $(JOBS) $(ARGS)

test-all: $(DEV)  ## the same with the long ones, and what has a size at its full size
	NFM_FULL=1 $(PY) -m pytest -n $(JOBS) -m 'not faults and not slurm' $(ARGS)

test-faults: $(DEV)  ## kill, lose and fill everything, for 20 minutes
	NFM_FULL=1 $(PY) -m pytest -m 'faults or not faults' tests/faults tests/clusters/ray tests/clusters/apart $(ARGS)

test-busy: $(DEV)  ## the tests that start processes, TIMES times on a busy machine
	$(PY) tests/repository/busy.py --times $(TIMES) --jobs $(JOBS) $(ARGS)

test-slurm: $(DEV)  ## run arrays on a real Slurm of one node (needs root, slurm-wlm and munge)
	$(PY) -m pytest -m slurm -rs tests/clusters/slurm $(ARGS)

test-s3: $(DEV)  ## the tests of buckets against another S3 server: ENDPOINT=http://HOST:PORT
	NFM_TEST_S3=$(ENDPOINT) $(PY) -m pytest -n $(JOBS) tests/pipeline/artifacts tests/e2e/bucket $(ARGS)

IN_BUCKETS := tests/pipeline/artifacts tests/storage/files/copies tests/storage/stores/test_s3.py tests/e2e/bucket

test-gs: $(DEV)  ## the tests of buckets against fake-gcs-server
	NFM_TEST_CLOUD=gs $(PY) -m pytest -n $(JOBS) $(IN_BUCKETS) $(ARGS)

test-az: $(DEV)  ## the tests of buckets against Azurite (npm install azurite)
	NFM_TEST_CLOUD=az $(PY) -m pytest -n $(JOBS) $(IN_BUCKETS) $(ARGS)

bench: $(PEERS_ENV)  ## measure the reader beside its peers and a plain copy
	$(PEERS_PY) -m benchmarks.store $(ARGS)

# The peers pin older numpy and fsspec than we are tested with, so they have an environment of their own.
$(PEERS)/.installed: pyproject.toml
	python3 -m venv $(PEERS)
	$(PEERS_PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) '$(TORCH)' -e '.[train,zarr,report,fast,bench]'
	touch $@

# By the links, so that PYTHON may be one with torch, numpy, scipy, safetensors and click alone.
gpu: $(ENV) .types/nfm  ## what a GPU gives: tests, rates, a teacher and its students, in pieces of at most 9 minutes
	PYTHONPATH=.types:. $(PY) -m benchmarks.accelerator $(ARGS)

kills: $(ENV)  ## kill a reader 100 times and compare the sequence
	$(PY) -m benchmarks.kill_reader $(ARGS)

fuzz: $(DEV)  ## feed broken files to the store's readers for MINUTES
	$(PY) -m tests.storage.fuzz.run --minutes $(MINUTES) $(ARGS)

lint: $(DEV) .types/nfm  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy -p nfm

format: $(DEV)  ## format the code
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

# Links that show type checkers and editors the four folders as the package they are installed as.
.types/nfm:
	mkdir -p $@
	for folder in pipeline stages storage trainers; do ln -sfn ../../$$folder $@/$$folder; done

# Not --quiet: it hides the warnings that --strict counts.
docs: $(DOCS) .types/nfm  ## build the site of README and docs in build/site; a broken link fails
	$(PY) -m mkdocs build --strict

$(VENV)/.installed-docs: $(ENV)
	$(INSTALL) '$(TORCH)' -e '.[all,docs]'
	touch $@

clean-env:  ## remove the environments and the site
	rm -rf $(VENV) $(PEERS) .types build/site
