# make demo   sets up .venv, trains SOUP on the countdown example, says where the results are
# make test   sets up .venv, runs every check and test
# make help   lists the rest

PYTHON ?= python3.11
VENV ?= .venv
TORCH := $(shell grep '^torch==' requirements-cpu.txt)
UV := uv==0.13.9
AUDIT := pip-audit==2.10.1
PIP_AUDIT = $(VENV)/audit/bin/pip-audit --strict --disable-pip --no-deps --requirement
LOCKS := requirements-cpu.txt requirements-dev.txt
# Test files that run at a time. A file of real runs takes 7 GB of memory: JOBS=1 on a small machine.
JOBS ?= 2
BIN := $(VENV)/bin
# Torch's threads of two test processes on two cores wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUN := $(BIN)/python -m verl.trainer.main_ppo hardware=cpu example=countdown

.PHONY: help install demo demo-grpo compare test check audit unit real real-all real-model nightly gpu-check docs clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

install: $(VENV)/.installed ## the environment in .venv (about 4 GB)

$(VENV)/.installed: $(LOCKS) setup.py
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, or give PYTHON=/path/to/python3.11."; exit 1; }
	@$(PYTHON) -I verl_ext/cpu/machine.py $(VENV)
	@echo "Setting up $(VENV): torch, vLLM, verl and what they need, 4 GB. Takes 3 to 5 minutes, of which pip is silent for the last one or two."
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot make a virtual environment: install its venv module (python3.11-venv)."; exit 1; }
	@# Where pip's own sources lack the CPU build of torch: uv knows where PyTorch keeps it.
	$(PIP) install --no-deps "$(TORCH)" || { $(PIP) install $(UV) && \
		$(BIN)/uv pip install --python $(BIN)/python --no-deps --torch-backend cpu "$(TORCH)"; }
	$(PIP) install --no-deps $(LOCKS:%=-r %)
	$(PIP) install --no-deps -e .
	@touch $@

demo: install ## SOUP on the countdown example, on this machine's CPU
	$(RUN) algorithm=soup $(ARGS)

demo-grpo: install ## the twin: GRPO, with every other setting equal
	$(RUN) algorithm=grpo $(ARGS)

compare: install ## GRPO against SOUP in the lab: 9 runs, about eight minutes on two cores
	$(BIN)/soup-verl compare examples/countdown/studies/first.yaml --jobs 2

test: check ## every check and test (about 22 minutes on two cores)
	$(PYTEST) -m "not real_more and not real_model"

check: install ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# In an environment of its own. Strict: what could not be looked up is no clean bill. A local version, as torch's for
# CPUs, is looked up by its public one. First an old release whose weakness is known: where that is not found, nothing
# else would be, and pip-audit itself only says that a package was not found.
audit: install ## known weaknesses of the pinned packages; asks on the net, so CI leaves it out
	@$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip --disable-pip-version-check install --quiet $(AUDIT)
	@sed 's/+.*//' $(LOCKS) > $(VENV)/audit/pins.txt
	@echo 'requests==2.19.0' > $(VENV)/audit/known.txt
	@$(PIP_AUDIT) $(VENV)/audit/known.txt 2>&1 | grep -Eq 'PYSEC-|GHSA-|CVE-' || \
		{ echo "The service that pip-audit asks for known weaknesses cannot be reached from here, so nothing was looked up."; exit 1; }
	$(PIP_AUDIT) $(VENV)/audit/pins.txt

unit: install ## tests without Ray (about ten minutes)
	$(PYTEST) -m "not real_run and not real_more and not real_model"

real: install ## tests that run the real path: main_ppo, Ray, FSDP2, vLLM (about twelve minutes)
	$(PYTEST) -m "real_run and not real_more"

real-all: install ## the same and further runs, which CI leaves out
	$(PYTEST) -m "real_run or real_more"

real-model: install ## a real language model, SmolLM2, in every tool: ten minutes or so on two cores
	test -e runs/smollm2/model/model.safetensors || $(BIN)/python -m examples.smollm2.build_model
	test -e runs/smollm2/data/train.parquet || $(BIN)/python -m examples.smollm2.build_data
	$(BIN)/python -m pytest -m real_model -s

nightly: install ## 10,000 configs, each of which starts or is refused in a sentence (CI draws 200)
	$(BIN)/python -m pytest --hypothesis-profile=nightly -p no:warnings tests/recipe/soup/checks/test_config_space.py

gpu-check: install ## every command for GPUs, taken as far as a machine without one can (about two minutes)
	$(BIN)/python -m pytest -v -p no:warnings tests/examples/test_gpu_commands.py

docs: install ## these documents as a site, in site/
	$(BIN)/python -m mkdocs build --strict

clean: ## the environment and everything that runs wrote here
	rm -rf $(VENV) runs outputs checkpoints tensorboard_log site
