# `make help` lists the targets. Each one does the set-up that it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN_ID := $(or $(RUN_ID),$(shell date +%Y%m%d-%H%M%S))
PROCESSES ?= 2
# Of `make pretrain`: rows and experts over all processes.
CP ?= $(PROCESSES)
EP ?= $(PROCESSES)
# Test files run side by side, one more than two cores: many wait for processes that they start.
TEST_WORKERS ?= 3
# Of benchmarks/train_step.py; on a GPU: make bench BENCH=model=text01_1b
BENCH ?= model=text01_tiny dtype=float32 micro_batch_tokens=2048 document_tokens=512 steps=20
DATA := data_cache/stdlib
QUESTIONS := data_cache/retrieval
VL := data_cache/vl
# Pictures with captions, and conversations, of `make vl-data`; of everything else a fourth.
VL_RECORDS ?= 8000
STAMP := $(VENV)/.fulmen-setup

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= true
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup data questions pretrain pretrain-stages vl-data pretrain-vl test test-gpu test-mesh test-stages test-slurm test-chaos test-fast check bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## virtual environment with pinned packages, and fulmen installed in place

$(STAMP): setup.py constraints.txt
	@echo "== setting up $(VENV) with $$($(PYTHON) --version) (a minute or two)"
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or 3.12 is needed: make PYTHON=python3.11 ...") if sys.version_info[:2] not in [(3, 11), (3, 12)] else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
	@echo "== $(VENV) is ready"

data: $(DATA)/manifest.json  ## tokenise the standard library's sources, the text that every machine has

$(DATA)/manifest.json: | $(STAMP)
	@echo "== preparing $(DATA) from the Python standard library's sources"
	@$(BIN)/python launch/prepare_data.py output=$(DATA) tokenizer=train vocab_size=4096 \
		validation_fraction=0.05 input="[$$($(BIN)/python launch/stdlib_sources.py)]"

questions: $(QUESTIONS)/manifest.json  ## long documents with questions, from the same text

$(QUESTIONS)/manifest.json: | $(STAMP) $(DATA)/manifest.json
	@echo "== making $(QUESTIONS)"
	@rm -rf $(QUESTIONS)_text
	@$(BIN)/python launch/make_retrieval.py output=$(QUESTIONS)_text tokenizer=$(DATA) tokens=300_000 \
		lengths='[[128,511,0.3],[512,2047,0.3],[2048,4096,0.4]]'
	@$(BIN)/python launch/prepare_data.py input=$(QUESTIONS)_text output=$(QUESTIONS) tokenizer=$(DATA) \
		validation_fraction=0.05

pretrain: $(STAMP) data  ## train a small Text-01 on real text, then let it write a few lines
	@echo "== training runs/text01_tiny/$(RUN_ID) with $(PROCESSES) processes (about five minutes)"
	@$(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES) launch/pretrain.py \
		recipe=text01_tiny run_id=$(RUN_ID) parallel.cp=$(CP) parallel.ep=$(EP) $(ARGS)
	@$(BIN)/python launch/generate.py run=runs/text01_tiny/$(RUN_ID)
	@echo "== done: open runs/text01_tiny/$(RUN_ID)/report.html"

pretrain-stages: $(STAMP) data questions  ## the stages of the 1M-token recipe, at lengths of 256 to 2048
	@echo "== training runs/text01_tiny_1m/$(RUN_ID) with 2 processes (some minutes)"
	@$(BIN)/torchrun --standalone --nproc-per-node 2 launch/pretrain.py \
		recipe=text01_tiny_1m run_id=$(RUN_ID) $(ARGS)
	@echo "== done: open runs/text01_tiny_1m/$(RUN_ID)/report.html"

# Pages of a typewriter, and the tiles that they are cut into: each letter is a patch.
PAGE := width=[48,48] height=[48,48] cell=12
TILES := tile_size=48 patch_size=12 max_tiles_per_side=3 max_tiles=6
MAKE_IMAGES := $(BIN)/python launch/make_images.py $(PAGE)
PREPARE_VL := $(BIN)/python launch/prepare_images.py $(TILES) validation_fraction=0
FEWER = $(shell expr $(VL_RECORDS) / 4)
SAME := tokenizer=$(VL)/conversations

vl-data: $(VL)/labelled/manifest.json  ## numbers and words as pictures: captions, conversations, pairs

$(VL)/labelled/manifest.json: | $(STAMP)
	@echo "== making $(VL) (a minute)"
	@rm -rf $(VL)
	@$(MAKE_IMAGES) output=$(VL)/made captions=$(VL_RECORDS) \
		conversations=$(VL_RECORDS) texts=$(FEWER) pairs=$(FEWER)
	@$(MAKE_IMAGES) output=$(VL)/later captions=0 conversations=$(FEWER) pairs=0 seed=1
	@$(MAKE_IMAGES) output=$(VL)/numbers captions=0 conversations=0 pairs=0 held_out=0 labelled=400 \
		kinds=[digits] letters=[2,2] seed=2
	@$(PREPARE_VL) input=$(VL)/made/conversations output=$(VL)/conversations vocab_size=312 \
		'held_out=$(VL)/made/conversations/held_out*'
	@$(PREPARE_VL) input=$(VL)/made/conversations output=$(VL)/aligned $(SAME) resolution=fixed \
		'held_out=$(VL)/made/conversations/held_out*'
	@$(PREPARE_VL) input=$(VL)/made/captions output=$(VL)/captions $(SAME) resolution=fixed \
		'held_out=$(VL)/made/captions/held_out*'
	@$(PREPARE_VL) input=$(VL)/made/texts output=$(VL)/texts $(SAME) 'held_out=$(VL)/made/texts/held_out*'
	@$(PREPARE_VL) input=$(VL)/made/pairs output=$(VL)/pairs $(SAME) 'held_out=$(VL)/made/pairs/held_out*'
	@$(PREPARE_VL) input=$(VL)/later/conversations output=$(VL)/experience $(SAME) \
		'held_out=$(VL)/later/conversations/held_out*'
	@$(PREPARE_VL) input=$(VL)/numbers/labelled output=$(VL)/labelled $(SAME) resolution=fixed \
		validation_fraction=1

pretrain-vl: $(STAMP) vl-data  ## a small VL-01 that learns to read: its tower, then all stages
	@echo "== training runs/vl01_vit_tiny/$(RUN_ID), then runs/vl01_tiny/$(RUN_ID) (some minutes)"
	@$(BIN)/torchrun --standalone --nproc-per-node 2 launch/pretrain.py recipe=vl01_vit_tiny run_id=$(RUN_ID)
	@$(BIN)/torchrun --standalone --nproc-per-node 2 launch/pretrain.py recipe=vl01_tiny run_id=$(RUN_ID) \
		checkpoint.tower=runs/vl01_vit_tiny/$(RUN_ID)/checkpoints/latest $(ARGS)
	@$(BIN)/python launch/evaluate.py run=runs/vl01_tiny/$(RUN_ID) tasks=[reading] 'sources=[conversations]'
	@echo "== done: open runs/vl01_tiny/$(RUN_ID)/report.html"

test: $(STAMP)  ## every test
	@echo "== running the tests"
	@$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

test-gpu: $(STAMP)  ## the tests that need a GPU, on a machine that has one
	@FULMEN_TEST_GPU=1 $(BIN)/python -m pytest -m gpu

test-mesh: $(STAMP)  ## the whole grid of meshes against one process (many minutes)
	@$(BIN)/python -m pytest -m mesh

test-stages: $(STAMP) data questions  ## stages of text01_tiny_1m and vl01_tiny, killed in each and moved (minutes)
	@$(BIN)/python -m pytest -m stages

test-slurm: $(STAMP)  ## jobs on a SLURM of four nodes, which it installs and brings up (minutes)
	@$(BIN)/python -m pytest -m slurm -rs tests/slurm

test-chaos: $(STAMP)  ## one run under twenty random kills, stalls and full disks (minutes; some need root)
	@$(BIN)/python -m pytest -m chaos -rs -s tests/chaos

test-fast: $(STAMP)  ## the tier for each save
	@$(BIN)/python -m pytest -m fast

check: $(STAMP) .types/fulmen  ## lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@cd .types && ../$(BIN)/mypy --config-file ../pyproject.toml -p fulmen

# The rooms lie at the top level; a tree of links shows them to mypy under their import name.
.types/fulmen: setup.py
	@mkdir -p $@
	@for room in launch recipes trainer parallel models data kernels; do ln -sfn ../../$$room $@/$$room; done
	@touch $@

bench: $(STAMP)  ## the figures of docs/performance.md that this machine can give
	@$(BIN)/python benchmarks/data.py
	@$(BIN)/python benchmarks/train_step.py $(BENCH)
	@$(BIN)/python benchmarks/kernels.py

clean:  ## remove what make built; runs and other data stay
	@rm -rf $(VENV) .types .mypy_cache .ruff_cache build *.egg-info $(DATA)
