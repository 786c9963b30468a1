# make demo                                  toy town, all six stages, both methods; no network
# make test                                  the tests
# make bench                                 how fast it is here: results/bench.md
# make paper GTA5=~/gtav CITYSCAPES=~/cs     the paper, all stages, both methods and networks
# make study GTA5=... CITYSCAPES=...         does it work? every row of it, three seeds
# make stages BASE=... PREPARE=... ...       the chain with settings of your own
#
# Every target first makes .venv and installs requirements.txt into it. A stage leaves a stamp
# in $(BASE)runs/stamps when it is finished; it runs again only when a stage before it has.

PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test bench study paper stages

test: .venv/installed                     # in two halves, side by side
	@log=$$(mktemp); $(PY) -m pytest -q tests/test_[k-z]*.py > $$log 2>&1 & other=$$!; \
	$(PY) -m pytest -q tests/test_[a-j]*.py; status=$$?; \
	wait $$other || status=1; cat $$log; rm $$log; exit $$status

bench: .venv/installed
	$(PY) -m study.bench --out results/bench.md

# ---------------------------------------------------------------------------- settings

demo: .venv/installed
	$(MAKE) --no-print-directory stages BASE=demo/ INCEPTION=random \
	  PREPARE="--demo --limit 200 --test 60 --size 32 64" \
	  PRETRAIN="--steps 80 --d-steps 200 --lr 3e-4 --batch-size 8 --layer Conv2d_2b_3x3" \
	  GAN="--steps 100 --lr 2e-4 --batch-size 6 --sample-every 20 --save-every 50 \
	    --d-optimizer adam --d-lr 1e-4" \
	  SEGMENT="--network unet --epochs 8"
	@$(PY) -m study.demo --base demo

paper: .venv/installed
	@test -n "$(GTA5)" -a -n "$(CITYSCAPES)" || { \
	  echo "usage: make paper GTA5=DIR CITYSCAPES=DIR [INCEPTION=imagenet|FILE]"; exit 2; }
	$(MAKE) --no-print-directory stages BASE= \
	  PREPARE="--gta5 '$(GTA5)' --cityscapes '$(CITYSCAPES)' $(PREPARE)"

study: .venv/installed
	@test -n "$(GTA5)" -a -n "$(CITYSCAPES)" || { \
	  echo "usage: make study GTA5=DIR CITYSCAPES=DIR [NAME=paper-size] [STUDY=FLAGS]"; exit 2; }
	$(PY) -m study.run $(NAME) $(STUDY) \
	  --prepare "--gta5 '$(GTA5)' --cityscapes '$(CITYSCAPES)' $(PREPARE)"
	$(PY) -m study.report $(NAME)

# ------------------------------------------------------------------ the chain of the stages

NAME ?= paper-size
INCEPTION ?= imagenet
DATA := $(BASE)data
RUNS := $(BASE)runs
STAMPS := $(RUNS)/stamps
go-on = $$(test -e $(1) && echo --resume)       # never --overwrite: it may be somebody's own

stages: $(STAMPS)/evaluate $(STAMPS)/segment

$(STAMPS)/prepare: | .venv/installed
	$(PY) prepare.py --out $(DATA) $(PREPARE)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/pretrain-%: $(STAMPS)/prepare
	$(PY) pretrain.py --method $* --data $(DATA) --run $(RUNS)/$* --inception '$(INCEPTION)' \
	  $(PRETRAIN) $(call go-on,$(RUNS)/$*/pretrain.pt)
	@touch $@

$(STAMPS)/gan-%: $(STAMPS)/pretrain-%
	$(PY) train_gan.py --method $* --data $(DATA) --run $(RUNS)/$* \
	  $(GAN) $(call go-on,$(RUNS)/$*/last.pt)
	@touch $@

$(STAMPS)/refine-%: $(STAMPS)/gan-%
	$(PY) refine.py --checkpoint $(RUNS)/$*/average.pt --data $(DATA)/synthetic --out $(DATA)/$*
	@touch $@

$(STAMPS)/refine-pretrained: $(STAMPS)/pretrain-ours
	$(PY) refine.py --checkpoint $(RUNS)/ours/pretrain.pt --data $(DATA)/synthetic \
	  --out $(DATA)/pretrained
	@touch $@

REFINED := $(STAMPS)/refine-pretrained $(STAMPS)/refine-ours $(STAMPS)/refine-simgan

$(STAMPS)/evaluate: $(REFINED)
	$(PY) evaluate.py --data $(DATA) --out $(BASE)results --inception '$(INCEPTION)'
	@touch $@

$(STAMPS)/segment: $(REFINED)
	$(PY) segment.py --data $(DATA) --out $(BASE)results $(SEGMENT)
	@touch $@

.SECONDARY:

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --disable-pip-version-check -q -r requirements.txt
	@touch $@
