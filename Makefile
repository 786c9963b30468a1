# make demo                                  toy town, all six stages, both methods; no data needed
# make test                                  the tests
# make bench                                 how fast it is here: results/bench.md
# make study GTA5=~/gtav CITYSCAPES=~/cs     all stages, rows and networks, for three seeds
#
# Every target first makes .venv and installs requirements.txt into it.

PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test bench study

test: .venv/installed                     # in two halves, side by side
	@log=$$(mktemp); $(PY) -m pytest -q tests/test_[k-z]*.py > $$log 2>&1 & other=$$!; \
	trap "kill $$other" INT TERM HUP; \
	$(PY) -m pytest -q tests/test_[a-j]*.py; status=$$?; \
	wait $$other || status=1; cat $$log; rm $$log; exit $$status

bench: .venv/installed
	$(PY) -m study.bench --out results/bench.md

demo: .venv/installed
	$(PY) -m study.run demo --base demo --results demo --seeds 0 --inception random \
	  --rows synthetic real simgan ours pretrained --epochs 8 --deeplab --random-crops \
	  --prepare "--demo --limit 200 --test 60 --size 32 64" \
	  --pretrain "--steps 80 --d-steps 200 --lr 3e-4 --batch-size 8 --layer Conv2d_2b_3x3" \
	  --gan "--steps 100 --lr 2e-4 --batch-size 6 --sample-every 20 --save-every 50 \
	    --d-optimizer adam --d-lr 1e-4"
	@$(PY) -m study.demo

NAME ?= paper-size
study: .venv/installed
	@test -n "$(GTA5)" -a -n "$(CITYSCAPES)" || { \
	  echo "usage: make study GTA5=DIR CITYSCAPES=DIR [NAME=paper-size] [PREPARE=FLAGS]" \
	    "[STUDY=FLAGS]"; exit 2; }
	$(PY) -m study.run $(NAME) $(STUDY) \
	  --prepare "--gta5 '$(GTA5)' --cityscapes '$(CITYSCAPES)' $(PREPARE)"
	$(PY) -m study.report $(NAME)

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --disable-pip-version-check -q -r requirements.txt
	@touch $@
