# make demo                                  toy town, all six stages, both methods; no network
# make test                                  the tests
# make bench                                 how fast it is here: results/bench.{md,json}
# make paper GTA5=~/gtav CITYSCAPES=~/cs     the paper, all stages, both methods and networks
# make study GTA5=... CITYSCAPES=...         does it work? three seeds and the ablations
# make clean-demo                            remove demo/
# make stages BASE=... PREPARE=... ...       the chain with settings of your own
#
# Every target first makes .venv and installs requirements.txt into it. A stage leaves a stamp
# in $(BASE)runs/stamps when it is finished; it runs again only when a stage before it has.

PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test bench study paper stages clean-demo
.DELETE_ON_ERROR:

test: .venv/installed
	$(PY) -m pytest -q tests

bench: .venv/installed
	$(PY) bench.py --json results/bench.json

# ---------------------------------------------------------------------------- settings

demo: .venv/installed
	$(MAKE) --no-print-directory stages BASE=demo/ INCEPTION=random \
	  PREPARE="--demo --limit 300 --test 100 --size 32 64" \
	  PRETRAIN="--steps 100 --lr 3e-4 --batch-size 8 --layer Conv2d_2b_3x3" \
	  GAN="--steps 120 --lr 2e-4 --batch-size 8 --sample-every 20 --save-every 40 \
	    --d-optimizer adam --d-lr 1e-4" \
	  SEGMENT="--network unet --epochs 8"
	@cat demo/results/table2.md demo/results/segment_unet.md
	@echo "Pictures: demo/runs/ours/samples/ (synthetic, refined, real)," \
	  "demo/runs/ours/curves.png (Figure 1), demo/results/table7.png"

paper: .venv/installed
	@test -n "$(GTA5)" -a -n "$(CITYSCAPES)" || { \
	  echo "usage: make paper GTA5=DIR CITYSCAPES=DIR [INCEPTION=imagenet|FILE]"; exit 2; }
	$(MAKE) --no-print-directory stages BASE= \
	  PREPARE="--gta5 $(GTA5) --cityscapes $(CITYSCAPES)" SEGMENT="--network both"

STUDY_PY = $(PY) study.py --gta5 $(GTA5) --cityscapes $(CITYSCAPES) --inception $(INCEPTION) \
  $(STUDY)
# The seeds, and on each of them the finer D with and without perceptual pre-training.
MAIN := seed0 seed1 seed2 d-fine d-fine-seed1 d-fine-seed2 \
  d-fine-simgan d-fine-simgan-seed1 d-fine-simgan-seed2

study: .venv/installed            # both networks; U-Net for the ablations; both for twice as long
	@test -n "$(GTA5)" -a -n "$(CITYSCAPES)" || { \
	  echo "usage: make study GTA5=DIR CITYSCAPES=DIR [INCEPTION=imagenet|FILE] [STUDY=FLAGS]"; \
	  exit 2; }
	$(STUDY_PY) --network both --only $(MAIN)
	$(STUDY_PY)
	$(STUDY_PY) --images study --network both --epochs 60 30 --base study60 \
	  --out results/study60 --only $(MAIN)
	$(PY) report.py
	$(PY) report.py --out results/study60 --before results/study

clean-demo:
	rm -rf demo

# ------------------------------------------------------------------ the chain of the stages

INCEPTION ?= imagenet
REFINE ?= colour pretrained ours simgan
STEP ?= average
R_FLAGS ?=
DATA := $(BASE)data
RUNS := $(BASE)runs
STAMPS := $(RUNS)/stamps
# A stopped training goes on if it is newer than what it started from; else it starts anew.
go-on = $$(test $(1) -nt $(2) && echo --resume || echo --overwrite)

stages: $(STAMPS)/evaluate $(STAMPS)/segment

$(STAMPS)/prepare: | .venv/installed
	$(PY) prepare.py --out $(DATA) $(PREPARE)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/pretrain-%: $(STAMPS)/prepare
	$(PY) pretrain.py --method $* --data $(DATA) --run $(RUNS)/$* --inception $(INCEPTION) \
	  $(PRETRAIN) $(call go-on,$(RUNS)/$*/pretrain.pt,$(STAMPS)/prepare)
	@touch $@

$(STAMPS)/gan-%: $(STAMPS)/pretrain-%
	$(PY) train_gan.py --method $* --data $(DATA) --run $(RUNS)/$* \
	  $(GAN) $(call go-on,$(RUNS)/$*/last.pt,$(STAMPS)/pretrain-$*)
	@touch $@

$(STAMPS)/refine-%: $(STAMPS)/gan-%
	$(PY) refine.py --checkpoint $(RUNS)/$*/$(STEP).pt --data $(DATA)/synthetic --out $(DATA)/$* \
	  $(R_FLAGS)
	@touch $@

$(STAMPS)/refine-pretrained: $(STAMPS)/pretrain-ours
	$(PY) refine.py --checkpoint $(RUNS)/ours/pretrain.pt --data $(DATA)/synthetic \
	  --out $(DATA)/pretrained
	@touch $@

$(STAMPS)/refine-colour: $(STAMPS)/prepare
	$(PY) refine.py --method colour --data $(DATA)/synthetic --out $(DATA)/colour
	@touch $@

REFINED := $(addprefix $(STAMPS)/refine-,$(REFINE))

$(STAMPS)/evaluate: $(REFINED)
	$(PY) evaluate.py --data $(DATA) --out $(BASE)results --inception $(INCEPTION)
	@touch $@

$(STAMPS)/segment: $(REFINED)
	$(PY) segment.py --data $(DATA) --out $(BASE)results $(SEGMENT)
	@touch $@

.SECONDARY:

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --disable-pip-version-check -q -r requirements.txt
	@touch $@
