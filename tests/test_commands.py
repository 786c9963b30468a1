"""What users type: every command of the README parses, every mistake gets its one line."""
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentParser

import numpy as np
import pytest
import torch
from conftest import ROOT, fill, noise, parsed, save, save_pair

from models import Refiner
from support.cli import path_of, start

SCRIPTS = ["prepare", "pretrain", "train_gan", "refine", "evaluate", "segment"]


def commands_in(path):
    """Every line of the form `python SCRIPT.py ...` or `make ...` in a text file, joined over
    trailing backslashes; comments after two spaces are cut off."""
    text = re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))
    found = re.findall(
        r"^(?:    |\$ )?((?:python (?:[a-z_]+\.py|-m study\.[a-z]+)|make [a-z]+).*)$", text, re.M)
    return [re.split(r"\s{3,}|\s+#", line)[0].strip() for line in found]


READMES = [ROOT / "README.md", ROOT / "study/README.md"]
README_COMMANDS = [command for file in READMES for command in commands_in(file)]


def headings(file):
    """The anchors that GitHub makes of the headings of a file."""
    found = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_the_readmes_links_lead_somewhere(readme):
    text = readme.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]*)(?:#([^):]+))?\)", text)
    assert len(links) >= 8
    for link, anchor in links:
        file = readme.parent / link if link else readme
        assert file.exists() and (not anchor or anchor in headings(file)), (link, anchor)


@pytest.mark.parametrize("command", sorted({
    c for file in READMES + [ROOT / f"{s}.py" for s in SCRIPTS] for c in commands_in(file)
    if c.startswith("python")}))
def test_documented_command_parses(command, monkeypatch):
    """README and docstrings: the script's own parser takes the command as it is printed."""
    _, script, *argv = shlex.split(command)
    if script == "-m":
        script, *argv = argv
    found = parsed(monkeypatch, script.removesuffix(".py"), argv)
    assert "~" not in str(vars(found))                       # nor in --out=~/x


@pytest.mark.parametrize("command", sorted({
    "make study GTA5='/my gta' CITYSCAPES=/cs", *[c for c in README_COMMANDS if c[:4] == "make"]}))
def test_documented_make_target_does_what_the_scripts_take(command, monkeypatch):
    done = subprocess.run(["make", "-n", *shlex.split(command)[1:]], cwd=ROOT,
                          capture_output=True, text=True, env={**os.environ, "MAKEFLAGS": ""})
    assert done.returncode == 0, done.stderr
    assert "--overwrite" not in done.stdout, "a run may be somebody's own"
    for line in re.sub(r"\\\n\s*", " ", done.stdout).splitlines():
        if " -m study." in line and "study.demo" not in line:        # has no flags
            _, _, module, *argv = shlex.split(line)
            args = vars(parsed(monkeypatch, module, argv))
            for script, flags in (("prepare", "prepare"), ("pretrain", "pretrain"),
                                  ("train_gan", "gan")):
                found = parsed(monkeypatch, script, args.get(flags, ["--seed", "0"]))
                if script == "prepare" and "study" in command and flags in args:
                    assert str(found.gta5) == "/my gta" and str(found.cityscapes) == "/cs"


BOTH = "prepare.py --synthetic ok --real ok --crop none --size 24 48 --test 2"
# script and arguments -> words of the last line on stderr.
MISTAKES = [
    ("prepare.py --demo --size 24 4097 --limit 1 --test 1", "--size 4096"),
    ("prepare.py --synthetic ok --real empty --test 1", "empty: no images"),
    ("prepare.py --synthetic ok empty --real ok", "none has its label; ok/00.png: no"),
    ("prepare.py --synthetic ok ok ok --real ok", "--synthetic IMAGES [LABELS]"),
    ("prepare.py --synthetic same --real ok", "same/00_leftImg8bit.png same/00.png become rename"),
    ("prepare.py --synthetic mixed --real ok --test 1", "mixed/00_gtFine_color.png: label"),
    ("prepare.py --synthetic good/real/train --real ok", "labels/0.png label images; give"),
    ("prepare.py --gta5 ok --real ok --out ok/x", "--out ok/x lies in ok"),
    ("prepare.py --cityscapes cs --synthetic ok --out cs/x", "--out cs/x lies in cs"),
    ("prepare.py --synthetic ok --real empty --out ok/x", "--out ok/x lies in ok"),
    (f"{BOTH} --test 4", "--test 4 frames"),
    (f"{BOTH} --size 10 48", "--size 24 x"),
    *[(f"{BOTH} --crop {crop}", "--crop four numbers")
      for crop in ("1 2 3", "1 1 0 9", "0 0 -5 10")],
    (f"{BOTH} --classes no.txt --label-ids trainIds", "--classes goes with"),
    ("prepare.py", "nothing synthetic domain: --gta5 --demo"),
    *[(f"prepare.py --demo {flags}", "--demo draws") for flags in (
        "--real ok", "--gta5 ok", "--cityscapes ok", "--crop 0 0 5 5", "--synthetic ok",
        "--label-ids trainIds")],
    *[(f"prepare.py {flags} --classes no.txt", "--classes goes with")
      for flags in ("--demo", "--gta5 ok --real ok", "--cityscapes ok --synthetic ok")],
    ("prepare.py --synthetic ok --real ok ok ok", "--synthetic and --real want"),
    ("prepare.py --gta5 ok --synthetic ok --real ok", "--gta5 --synthetic, source"),
    ("prepare.py --cityscapes ok --real ok --synthetic ok", "--cityscapes --real: source"),
    ("prepare.py --synthetic single/real/train/images --real ok", "two frames at least"),
    ("train_gan.py", "runs/ours/pretrain.pt pretrain.py"),
    ("train_gan.py --run stopped", "stopped/pretrain.pt: step 1; pretrain.py --resume"),
    ("train_gan.py --run trained --method simgan", "trained/pretrain.pt: --method ours, simgan"),
    ("train_gan.py --resume", "last.pt --resume"),
    *[(f"{script} --data {data}", f"{data}/real/{split}: {data}/synthetic/train 24 48 32 64")
      for script in ("train_gan.py --run trained", "pretrain.py", "segment.py")
      for data, split in (("floor", "train"), ("tested", "test"))],
    ("refine.py", "runs/ours/average.pt train_gan.py"),
    ("refine.py --checkpoint broken.pt", "--checkpoint --out"),
    ("refine.py --checkpoint broken.pt --out new", "broken.pt: damaged"),
    ("refine.py --checkpoint evil.pt --out new", "evil.pt"),
    ("refine.py --checkpoint tensor.pt --out new", "tensor.pt train_gan.py"),
    ("evaluate.py", "data prepare.py"),
    ("segment.py", "data real prepare.py"),
    ("segment.py --batch-size 1", "--batch-size two"),
    ("train_gan.py --batch-size 1", "--batch-size 1: --history 0"),
    ("train_gan.py --seed 9223372036854775808", "--seed 2**63"),
    ("pretrain.py --device cuda:99", "--device cuda:99:"),
    ("pretrain.py --device meta", "--device meta: (no network runs"),
    ("refine.py --checkpoint old.pt --data good/real --out new", "old.pt refiner train"),
    ("refine.py --checkpoint pretrain.pt --data empty --out empty", "--out empty lies in --data"),
    ("refine.py --images ok", "--images --out"),
    ("refine.py --checkpoint pretrain.pt --images none --out x", "none: no picture there"),
    ("refine.py --checkpoint pretrain.pt --images ok --out ok/x", "ok/x lies in --images"),
    ("refine.py --checkpoint pretrain.pt --images twice --out x", "would both become"),
    ("refine.py --checkpoint pretrain.pt --images cs --out x", "cs/gtFine/ulm/00.png: a label map"),
    ("refine.py --checkpoint pretrain.pt --images photos --out x", "photos/depth/00.png: a label"),
    ("refine.py --checkpoint pretrain.pt --images ok --out x --size 3 9", "--size 4 x 4"),
    ("refine.py --checkpoint pretrain.pt --images ok --out x --size 9 4097", "--size 4096"),
    ("refine.py --checkpoint pretrain.pt --size 9 9 --out x", "--size goes with --images"),
    ("refine.py --checkpoint pretrain.pt --data lone/real --out x", "real/test/images prepare.py"),
    ("refine.py --checkpoint segment.pt --out new", "segment.pt: average, segment; train_gan.py"),
    ("pretrain.py --data good --inception nowhere.pt", "--inception nowhere.pt"),
    ("pretrain.py --data good --inception random --layer fc",
     "--layer fc: Conv2d_1a_3x3, Mixed_7c, pool3"),
    ("pretrain.py --layer pool3", "--layer pool3: Mixed_7c"),
    ("pretrain.py --data good --inception random --layer Mixed_6a", "--layer Mixed_6a: too small"),
    ("evaluate.py --data good --n 2 --inception random", "--n 2 least"),
    ("evaluate.py --data shapes --n 9 --inception random", "--n 9 has 4"),
    *[(f"evaluate.py --data {data} --n 4 --inception random", "--n 4 has 3")
      for data in ("bare", "values")],
    ("evaluate.py --data single --inception random", "single/ours: file names"),
    ("evaluate.py --data good --inception random --out /proc", "/proc"),
    ("evaluate.py --data sizes --inception random", "sizes 24 48 32 64"),
    ("evaluate.py --data floor --inception random", "floor/real/train: 24 48 32 64"),
    ("segment.py --data good --out broken.pt --network unet", "broken.pt"),
    ("segment.py --data good --train nowhere", "--train nowhere: real, synthetic"),
    ("segment.py --data single", "single: only 1"),
    ("segment.py --data bare", "bare/real/test: has no labels;"),
    ("segment.py --data values", "values/real/test/labels: values 18 255"),
    ("segment.py --data shapes", "shapes/real/test/labels: images' size"),
    ("segment.py --epoch 3", "unrecognized --epoch"),
    ("segment.py --data lone", "lone: needs real/"),
    ("segment.py --data good --backbone-weights none.pt", "--backbone-weights none.pt"),
    ("study.run tiny", "--prepare"),
    ("study.run tiny --prepare \"--gta5 john's\"", "--prepare: john's"),
    ("study.run tiny --prepare=--classes=a.txt", "--prepare: leave out --classes"),
    ("study.bench --batch-size 1", "--batch-size 2"),
    ("study.bench --size 8 24", "--size 24 x"),
    ("study.report no --results .", "no.json"),
    ("study.colour --data no", "no/synthetic"),
]


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("empty")
    (cwd / "evil.pt").write_bytes(b"cos\nsystem\n(S'touch was_run'\ntR.")      # a pickle
    torch.save(torch.zeros(3), cwd / "tensor.pt")
    refiner = Refiner()
    old_args = {**refiner.args, "skip": False}                # of R in older checkpoints
    states = {"pretrain": dict(refiner_args=old_args, refiner=refiner.state_dict(), step=1),
              "stopped/pretrain": dict(stage="pretrain", finished=False, step=1),
              "trained/pretrain": dict(stage="pretrain", finished=True, step=1,
                                       settings={"method": "ours"}),
              "segment": {}, "old": dict(stage="best", refiner_args={}, refiner={}, step=1)}
    for run in ("stopped", "trained"):
        (cwd / run).mkdir()
    for name, state in states.items():
        torch.save({"stage": name, **state}, cwd / f"{name}.pt")
    (cwd / "broken.pt").write_bytes((cwd / "pretrain.pt").read_bytes()[:-99])
    for folder, size, count in (("good/real", (24, 48), 5), ("sizes/real", (24, 48), 5),
                                ("sizes/synthetic", (32, 64), 5), ("single/real", (24, 48), 1)):
        for i in range(count):
            for split in ("train", "test"):
                save_pair(cwd / folder / split, i, np.zeros((*size, 3), np.uint8),
                          np.zeros(size, np.uint8))
    for source, target in (("good/real", "good/synthetic"), ("good/real", "single/synthetic"),
                           ("single/real", "single/ours"),
                           *[("good", c) for c in ("bare", "floor", "tested", "values", "shapes")],
                           ("good/real/train", "lone/real/train"),
                           ("sizes/synthetic/train", "floor/real/train"),
                           ("sizes/synthetic/test", "tested/real/test")):
        shutil.copytree(cwd / source, cwd / target, dirs_exist_ok=True)
    shutil.rmtree(cwd / "bare/real/test/labels")
    for folder, size, value in (("values", (24, 48), 19), ("shapes", (12, 48), 0)):
        for i in range(5):
            save_pair(cwd / folder / "real/test", i, np.zeros((24, 48, 3), np.uint8),
                      np.full(size, value, np.uint8))
    for file in (*cwd.glob("bare/real/test/images/[34].png"),
                 *cwd.glob("values/real/train/*/[34].png"),
                 *cwd.glob("shapes/synthetic/test/*/4.png")):
        file.unlink()
    for folder in ("ok", "twice", "mixed", "cs/leftImg8bit/ulm", "cs/gtFine/ulm"):
        fill(cwd / folder, 4)
    for file in ("same/00.png", "same/00_leftImg8bit.png", "twice/00.jpg", "photos/depth/00.png",
                 "mixed/00_gtFine_color.png"):
        save(cwd / file, noise(0))
    (cwd / "empty").mkdir()
    return cwd


@pytest.mark.parametrize("command, words", MISTAKES)
def test_a_mistake_gets_one_line_and_status_2(command, words, empty, monkeypatch, capsys):
    """As its script runs a command, but in this process."""
    script, *argv = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [script, *argv])
    monkeypatch.chdir(empty)
    before = sorted(empty.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        start(importlib.import_module(script.removesuffix(".py")).main)
    err = capsys.readouterr().err
    last = err.strip().splitlines()[-1]
    assert stop.value.code == 2 and ": error: " in last
    for word in words.split():
        assert word in last, last
    assert "%|" not in err                           # before any work: no progress bar
    assert err.startswith("usage: ") or err.count("\n") == 1
    assert sorted(empty.rglob("*")) == before        # nothing made, nothing removed, none run


# Flags that take any text; what is done with it is among the mistakes.
FREE = ["name", "--crop", "--layer", "--device", "--train", "--prepare", "--pretrain", "--gan"]


@pytest.mark.parametrize("script", [*SCRIPTS, *(
    f"study.{module}" for module in ("run", "report", "bench", "colour"))])
def test_every_flag_refuses_what_is_no_choice_or_number(script, monkeypatch, capsys):
    def stop(self):
        raise StopIteration(self)
    with monkeypatch.context() as patch, pytest.raises(StopIteration) as stopped:
        patch.setattr(ArgumentParser, "parse_args", stop)
        parsed(patch, script, [])
    parser = stopped.value.value
    for action in parser._actions:
        flag, kind = max(action.option_strings, default="name"), action.type
        if action.nargs == 0 or kind in (path_of, os.path.expanduser) or flag in FREE:
            continue
        assert action.choices or kind, flag
        zero = getattr(kind, "__name__", "").startswith("positive")     # of which there is none
        for value in ["x", "-1", "inf", "0"][:4 if zero else 3]:
            with pytest.raises(SystemExit) as error:
                parser.parse_args([flag, *[value] * (action.nargs if action.nargs == 2 else 1)])
            assert error.value.code == 2 and f"argument {flag}: " in capsys.readouterr().err


@pytest.mark.parametrize("script", ["pretrain", "train_gan", "segment"])
def test_a_training_prepares_its_device_for_its_precision(script, monkeypatch):
    def stop(*asked):
        raise StopIteration(asked)
    monkeypatch.setattr(importlib.import_module(script), "pick_device", stop)
    monkeypatch.setattr(sys, "argv", [script, "--precision", "tf32"])
    with pytest.raises(StopIteration) as stopped:
        importlib.import_module(script).main()
    assert stopped.value.value == ("auto", "tf32")


def test_the_readmes_result_is_the_studys():
    """mIoU and accuracy of every row stand so in the tables that study.report made."""
    scores = {}
    for study in ("game", "control"):
        record = (ROOT / f"study/results/{study}-80x160.md").read_text(encoding="utf-8")
        table = re.search(r"\| trained on \| seeds .*?\n\n", record, re.S)[0]     # U-Net's
        for line in table.strip().splitlines()[2:]:
            row, _, miou, _, _, accuracy, *_ = line.strip("| ").split(" | ")
            scores[study, row] = [miou, accuracy]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.search(r"\| trained on \| game: .*?\n\n", readme, re.S)[0]
    lines = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[2:]]
    assert [line[0] for line in lines] == ["synthetic", "colour", "simgan", "ours", "real"]
    for row, miou, accuracy, look, _ in lines:                        # the last is the paper's
        assert scores["game", row] == [miou, accuracy], row
        assert " / ".join(scores.get(("control", row), "-")) == look, row
