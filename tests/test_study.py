"""study.py: its commands are ones the stages take; report.py: its tables against closed forms."""
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, call

import study.run as study
from study import report
from prepare import UserError


NAN, METHODS = float("nan"), ("ours", "simgan")


def keep(folder, scores, network="unet", fid=None, epochs=30):
    """A kept run in which a network trained on each domain has these (mIoU, accuracy) on real."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {d: {"real": {"mIoU": m, "accuracy": a, "IoU": [m] + [NAN] * 18, "classes": 1}}
            for d, (m, a) in scores.items()}
    (folder / f"segment_{network}.json").write_text(json.dumps(
        {"epochs": epochs, "scores": {"0": rows}}))
    if fid:
        rows = {m: {"scores": {"fid": {"value": fid}, "kid": {"value": 0.02}}} for m in METHODS}
        (folder / "table2.json").write_text(json.dumps({"label": "FID", "n": 6, "rows": rows}))
        for method in METHODS:                     # 30 steps, of which the last 25 count
            lines = ["mean_change,d_acc_real,d_acc_refined"] + ["9,9,9"] * 5 + [
                "0.3,0.75,0.5", "0.5,0.75,0.5"] * 12 + ["0.4,0.75,0.5"]
            (folder / f"{method}_log.csv").write_text("\n".join(lines))


@pytest.fixture
def kept(tmp_path):
    """Two seeds: ours closes 50 and 70 % of the gap in mIoU, 25 and 25 % in accuracy."""
    for name, ours, fid in (("seed0", (0.15, 65.0), 10.0), ("seed1", (0.17, 65.0), 14.0)):
        keep(tmp_path / name, {"synthetic": (0.10, 60.0), "simgan": (0.10, 60.0), "ours": ours,
                               "real": (0.20, 80.0)}, fid=fid)
    keep(tmp_path / "no-history", {"ours": (0.11, 61.0)}, fid=11.0)
    return tmp_path


def test_gap_closed_and_its_interval(kept):
    out, _ = call("study/report.py", "--out", ".", cwd=kept)
    record = json.loads((kept / "study.json").read_text())
    on_real = record["unet"]["on_real"]
    gap = on_real["ours"]["gap_mIoU"]
    assert gap["mean"] == pytest.approx(60) and gap["n"] == 2
    # Student's t of one degree of freedom: 12.706; sd 14.14, so +- 127.06
    assert gap["low"] == pytest.approx(60 - 127.06, abs=0.01)
    assert on_real["ours"]["gap_accuracy"]["sd"] == pytest.approx(0, abs=1e-9)
    assert on_real["real"]["gap_mIoU"]["mean"] == pytest.approx(100)
    assert "| ours | 0.160 ± 0.014 | 65.0 ± 0.0 | 60 [-67, 187] | 25 [25, 25] |" in out
    # 0.05 and 0.07 more than synthetic: 0.06 +- 12.706 x 0.0141 / sqrt(2)
    assert "| ours - synthetic | +0.060 [-0.067, 0.187] | +5.0 [5.0, 5.0] |" in out
    assert ("| D sees no history | 0 | - | 0.400 | 0.75, 0.50 | 11.0 | 20.0 | 0.110 (-0.040) | "
            "61.0 (-4.0) |") in out
    assert "beta 0" not in out
    assert "| ours | 12.0 ± 2.8 | 20.0 ± 0.0 | - | - |" in out              # Table 2
    assert "| ours | **0.160 ± 0.014** (0.14) |" in out and "| road | 0.100 ± 0.000 |" in out
    assert record["deeplabv3plus"] is None
    for file in ("study.md", "ablations.md"):
        assert (kept / file).read_text().strip() in out


def test_networks_are_reported_apart(kept):
    """DeepLabV3+ where a seed has it, with no spread where it is one seed."""
    keep(kept / "seed0", {"synthetic": (0.1, 50.0), "simgan": (0.1, 50.0), "ours": (0.2, 51.0),
                          "real": (0.3, 52.0)}, network="deeplabv3plus")
    out, _ = call("study/report.py", "--out", ".", cwd=kept)
    assert "### U-Net, 30 epochs, seed 0, 1\n" in out
    assert "### DeepLabV3+, 30 epochs, seed 0\n" in out


def test_what_blurred_test_images_change(kept):
    """Seed by seed: ours gains 0.03 and 0.01, so 0.02 +- 12.706 x 0.01414 / sqrt(2)."""
    for name, ours in (("seed0", (0.18, 66.0)), ("seed1", (0.18, 66.0))):
        keep(kept / name, {"synthetic": (0.08, 60.0), "simgan": (0.10, 60.0), "ours": ours,
                           "real": (0.19, 80.0)}, network="unet_blur0.6")
    out, _ = call("study/report.py", "--out", ".", cwd=kept)
    assert "| trained on; real blurred by 0.6 pixels - sharp | mIoU |" in out
    assert "| ours | +0.020 [-0.107, 0.147] | +1.0 [1.0, 1.0] |" in out
    record = json.loads((kept / "study.json").read_text())["unet"]["blurred"]["unet_blur0.6"]
    assert record["synthetic"]["mIoU"]["mean"] == pytest.approx(-0.02)


def test_what_longer_training_changed(kept):
    """Only segmentation was run again: no Table 2, no ablations; ours gains 0.03 and 0.01, so
    0.02 +- 12.706 x 0.01414 / sqrt(2). A domain that one seed lacks is left out."""
    longer = kept / "longer"
    for seed, ours in ((0, (0.18, 66.0)), (1, (0.18, 66.0))):
        scores = {"synthetic": (0.09, 60.0), "ours": ours, "real": (0.25, 80.0)}
        keep(longer / f"seed{seed}", scores | ({"colour": (0.1, 60.0)} if seed else {}), epochs=60)
        for folder, score in ((kept, 0.15), (longer, 0.20)):
            keep(folder / study.join("d-fine", seed), {"ours": (score, 70.0)})
    out, _ = call("study/report.py", "--out", "longer", "--before", ".", cwd=kept)
    assert "### U-Net, 60 epochs, seed 0, 1\n" in out and "colour" not in out
    assert "| trained on; after 60 epochs - after 30 | mIoU |" in out
    assert "| ours | +0.020 [-0.107, 0.147] | +1.0 [1.0, 1.0] |" in out
    assert "| ours, d-fine | +0.050 [0.050, 0.050] | +0.0 [0.0, 0.0] |" in out
    assert "simgan" not in out and "images vs real" not in out
    assert "No ablation has been run" in (longer / "ablations.md").read_text()
    record = json.loads((longer / "study.json").read_text())
    assert record["quality"] is None
    assert record["unet"]["since_before"]["real"]["mIoU"]["mean"] == pytest.approx(0.05)


def test_a_part_of_a_study_has_the_tables_that_it_can_have(kept):
    """Only real (no gap), no ours (no difference to it), another study with fewer seeds."""
    part = kept / "part"
    keep(part / "seed0", {"real": (0.25, 81.0)}, epochs=60)
    out, _ = call("study/report.py", "--out", "part", cwd=kept)
    assert "| real | 0.250 | 81.0 | - | - |" in out
    keep(part / "seed0", {"synthetic": (0.10, 60.0), "real": (0.25, 81.0)}, epochs=60)
    call("study/report.py", "--out", "part", cwd=kept)
    out, _ = call("study/report.py", "--out", ".", "--before", "part", cwd=kept)
    assert "| trained on; after 30 epochs - after 60 |" in out and "| real | -0.050 | -1.0 |" in out
    keep(part / "seed7", {"real": (0.25, 81.0)})
    (part / "seed0/segment_unet.json").unlink()
    out, _ = call("study/report.py", "--out", ".", "--before", "part", cwd=kept)
    assert "trained on; after" not in out


def test_an_ablation_beside_ours_of_the_same_seeds(kept):
    """Seeds side by side, the step that was used, and the mean difference to ours."""
    keep(kept / "skip", {"ours": (0.18, 70.0)}, fid=8.0)
    keep(kept / "skip-seed1", {"ours": (0.18, 70.0)}, fid=9.0)
    (kept / "skip-seed1/ours_refine.json").write_text('{"step": 125}')
    out, _ = call("study/report.py", "--out", ".", cwd=kept)
    assert (f"| {study.ABLATIONS['skip']['says']} | 0, 1 | - / 125 | 0.400 / 0.400 | "
            "0.75, 0.50 / 0.75, 0.50 | 8.0 / 9.0 | 20.0 / 20.0 | 0.180 / 0.180 (+0.020) |") in out
    assert "ours, as in the study | 0, 1 | - / - |" in out
    # simgan - ours: mIoU -0.05, -0.07; skip - ours: 0.03, 0.01. Pooled over 2 degrees of freedom
    # sd = 0.01414, so with t = 4.3027 and n = 2 the margin is 0.0430
    record = json.loads((kept / "study.json").read_text())["unet"]["ablations"]["against_ours"]
    assert record["mIoU"]["skip"]["mean"] == pytest.approx(0.02)
    gap = json.loads((kept / "study.json").read_text())["unet"]["ablations"]["gap_closed"]
    assert gap["skip"]["mIoU"]["mean"] == pytest.approx(80)       # 0.18 between 0.10 and 0.20
    assert gap["skip"]["accuracy"]["mean"] == pytest.approx(50)   # 70 between 60 and 80
    assert record["mIoU"]["skip"]["margin"] == pytest.approx(0.0430, abs=1e-4)
    assert record["mIoU"]["no-history"]["margin"] == pytest.approx(0.0430 * 2 ** 0.5, abs=1e-4)
    assert "0.100 / 0.100 (**-0.060**)" in out and record["accuracy"]["skip"]["margin"] is None
    keep(kept / "no-history-seed1", {"ours": (0.13, 62.0)}, fid=11.0)
    out, _ = call("study/report.py", "--out", ".", cwd=kept)
    assert "chance explains (95 %; with most seeds 0.026 mIoU and 0.9 % accuracy)" in out


def test_what_was_changed_on_every_seed_stands_beside_ours(kept):
    """As a row of the gap and in the differences, also to the same change of SimGAN's."""
    for name, scores in (("d-fine", (0.19, 75.0)), ("d-fine-seed1", (0.21, 75.0))):
        keep(kept / name, {"ours": scores}, fid=8.0)
    out, _ = call("study/report.py", "--out", ".", cwd=kept)
    assert "| ours, d-fine | 0.200 ± 0.014 | 75.0 ± 0.0 | 100 [-27, 227] | 75 [75, 75] |" in out
    assert "| ours, d-fine - ours | +0.040 [0.040, 0.040] | +10.0 [10.0, 10.0] |" in out
    assert "no-history -" not in out and "- simgan, d-fine" not in out     # one seed; none
    for name in ("d-fine-simgan", "d-fine-simgan-seed1"):
        keep(kept / name, {"simgan": (0.18, 74.0)}, fid=9.0)
    out, _ = call("study/report.py", "--out", ".", cwd=kept)
    assert "| ours, d-fine - simgan, d-fine | +0.020 [-0.107, 0.147] | +1.0 [1.0, 1.0] |" in out
    assert (f"| {study.ABLATIONS['d-fine-simgan']['says']} | 0, 1 | - / - | 0.400 / 0.400 |"
            in out)
    assert "| simgan, d-fine - " not in out and "| ours - ours" not in out


@pytest.mark.parametrize("name, parts", [("seed12", ("", 12)), ("l1", ("l1", 0)),
                                         ("no-history-seed2", ("no-history", 2))])
def test_the_name_of_a_run(name, parts):
    assert study.split(name) == parts and study.join(*parts) == name


def test_what_is_run_if_nothing_is_said(monkeypatch):
    """Every seed, and the ablations of two of them; --only names others."""
    folders = "--gta5 g --cityscapes c"
    names = parsed(monkeypatch, "study.run", f"{folders} --seeds 0 3 4").only
    assert names[:3] == ["seed0", "seed3", "seed4"] and names[3:5] == ["l1", "l1-seed3"]
    assert len(names) == len(set(names)) == 3 + 2 * len(study.ABLATIONS)
    assert parsed(monkeypatch, "study.run", f"{folders} --only l1-seed4").only == ["l1-seed4"]


@pytest.mark.parametrize("name", ["seed", "l2", "l1-seed", "l1-seed0", "seedl1", "x-seed1"])
def test_what_is_no_name_of_a_run(name):
    with pytest.raises(ValueError):
        study.split(name)


def test_seeds_are_found_by_name(tmp_path):
    """Any number of digits; other folders beside them are not seeds."""
    for name in ("seed0", "seed123", "seeds", "long", "l1", "l1-seed2", "l1-seed10", "skip-seed1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").touch()
    assert report.seeds_with(tmp_path, "f") == [0, 123]
    assert report.seeds_with(tmp_path, "f", "l1") == [0, 2, 10]
    assert report.seeds_with(tmp_path, "f", "skip") == [1]


def test_one_seed_has_no_interval():
    assert report.mean_and_interval([3.0]) == {"mean": 3.0, "sd": None, "low": None, "high": None,
                                              "n": 1}


def test_mistakes(tmp_path):
    folders = ["--gta5", "no", "--cityscapes", "no"]
    for script, flags, words in (("study/report.py", ["--out", "."], "no finished seed"),
                                 ("study/run.py", [], "--gta5"),
                                 ("study/run.py", folders, "no such folder"),
                                 ("study/run.py", ["--images", "no"], "of its own"),
                                 ("study/run.py", ["--images", "no", "--out", "o", "--base", "no"],
                                  "of its own"),
                                 ("study/run.py", ["--images", "no", "--out", "o"], "no such folder"),
                                 ("study/run.py", [*folders, "--only", "beta1"], "--only beta1")):
        _, err = call(script, *flags, cwd=tmp_path, status=2)
        assert words in err and "Traceback" not in err


def parsed(monkeypatch, stage, flags):
    """What the stage's own parser makes of the flags."""
    monkeypatch.setattr(sys, "argv", [f"{stage}.py", *shlex.split(flags)])
    return importlib.import_module(stage).arguments()


def test_make_study_asks_for_what_its_scripts_take(monkeypatch):
    """The chain for every seed and ablation, then segmentation again for twice as long on the
    images of runs that the first commands finish, and both reports."""
    done = subprocess.run(["make", "-n", "study", "GTA5=g", "CITYSCAPES=c"], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "MAKEFLAGS": ""}, check=True)
    found = re.findall(r"python (study|report)\.py(.*)", done.stdout.replace("\\\n", ""))
    asked = [parsed(monkeypatch, stage, flags) for stage, flags in found]
    assert [stage for stage, _ in found] == ["study"] * 3 + ["report"] * 2
    main, every, longer, tables, compared = asked
    assert longer.images == main.base and set(longer.only) == set(main.only) > set(every.only[:3])
    assert [2 * n for n in main.epochs] == longer.epochs and longer.network == "both"
    assert (tables.out, tables.before) == (main.out, None) and longer.base != main.base
    assert (compared.out, compared.before) == (longer.out, main.out)


@pytest.mark.parametrize("name", ["seed1", "skip-seed1", "l1-seed1", *study.ABLATIONS])
def test_every_run_is_one_that_the_stages_take(name, tmp_path, monkeypatch):
    """make is asked once, with flags that parse; an ablation differs from its seed in one thing."""
    asked = []
    monkeypatch.setattr(study.subprocess, "run",
                        lambda command: asked.append(command) or SimpleNamespace(returncode=0))
    args = SimpleNamespace(base=tmp_path / "study", out=tmp_path / "out", gta5="g", cityscapes="c",
                           inception="random", network="unet", precision="bfloat16",
                           epochs=[12, 7], train=study.DOMAINS)
    ablation, seed = study.split(name)
    if ablation:
        source = "d-fine" if name in ("d-fine-detail", "d-fine-beta") else f"seed{seed}"
        with pytest.raises(UserError, match=f"{source}.*not finished"):
            study.run(name, args)
        runs = tmp_path / f"study/{source}/runs"
        for file in ("stamps/evaluate", "ours/pretrain.pt", "ours/last.pt", "ours/gan.pt",
                     "ours/average.pt", "ours/log.csv", "../data/synthetic/x", "../data/real/x",
                     "../data/colour/x"):
            (runs / file).parent.mkdir(parents=True, exist_ok=True)
            (runs / file).write_text(file)
    study.run(name, args)
    variables = dict(word.split("=", 1) for word in asked[0] if "=" in word)
    gan = parsed(monkeypatch, "train_gan", variables["GAN"])
    pretrain = parsed(monkeypatch, "pretrain", variables["PRETRAIN"])
    segment = parsed(monkeypatch, "segment", variables["SEGMENT"])
    parsed(monkeypatch, "prepare", variables["PREPARE"] + " --out data")
    assert gan.seed == pretrain.seed == segment.seeds[0] == (1 if "seed1" in name else 0)
    assert gan.precision == pretrain.precision == segment.precision == "bfloat16"
    plain = parsed(monkeypatch, "train_gan", f"--seed {seed} --precision bfloat16 {study.GAN}")
    pretrained_anew = ("", "skip", "colour-first", "colour-skip", "relu", "layer", "d-fine",
                       "d-fine-simgan", "d-adam")
    other_step = ("rule", "last-step", "detail", "d-fine-detail", "colour-detail")   # not trained
    assert (vars(gan) == vars(plain)) == (ablation in (*pretrained_anew[:-1], *other_step))
    step = variables["STEP"]
    assert step == {"rule": "gan", "last-step": "last"}.get(ablation, "average")
    refined = parsed(monkeypatch, "refine", variables["R_FLAGS"])
    assert refined.match_detail == ("detail" in ablation)
    assert refined.method == ("colour" if ablation == "colour-detail" else "ours")
    assert gan.d_optimizer == pretrain.d_optimizer and gan.d_lr == pretrain.d_lr
    assert pretrain.skip == ("skip" in ablation)
    base = tmp_path / "study" / name
    assert (base / "runs/ours/last.pt").exists() == (name in other_step)
    assert (base / "runs/ours/pretrain.pt").exists() == (ablation not in pretrained_anew)
    if ablation:
        origin = "colour" if ablation in ("colour-first", "colour-skip") else "synthetic"
        assert (base / "data/synthetic/x").read_text().endswith(f"{origin}/x")
    method = "simgan" if ablation == "d-fine-simgan" else "ours"
    assert segment.train == ([method] if ablation else
                             ["synthetic", "colour", "simgan", "ours", "real"])
    assert variables["REFINE"] == (method if ablation else "colour pretrained ours simgan")
    assert pretrain.d_stride == (1 if ablation in ("d-fine", "d-fine-simgan") else 3)
    assert segment.network == "unet" and segment.epochs == [12, 7]


@pytest.mark.parametrize("name, domains", [("seed1", ["synthetic", "real"]),
                                           ("d-fine-simgan", ["simgan"])])
def test_only_segmentation_is_run_again(name, domains, tmp_path, monkeypatch):
    """On the images of the finished run, with results in a folder of its own."""
    asked, before = [], tmp_path / "study" / name
    monkeypatch.setattr(study.subprocess, "run",
                        lambda command: asked.append(command) or SimpleNamespace(returncode=0))
    args = parsed(monkeypatch, "study.run", f"--images {tmp_path}/study --base {tmp_path}/longer --out "
                  f"{tmp_path}/out --epochs 60 --only {name} --train synthetic real")
    with pytest.raises(UserError, match=f"{name}.*not finished"):
        study.segment_again(name, args)
    (before / "runs/stamps").mkdir(parents=True)
    (before / "runs/stamps/evaluate").touch()
    results = tmp_path / "longer" / name / "results"
    results.mkdir(parents=True)
    (results / "segment_unet.json").write_text("{}")
    study.segment_again(name, args)
    (command,) = asked
    flags = parsed(monkeypatch, "segment", shlex.join(command[2:]))
    assert flags.data == before / "data" and flags.out == results and flags.train == domains
    assert flags.epochs == [60] and flags.seeds == [study.split(name)[1]]
    assert [f.name for f in (tmp_path / "out" / name).iterdir()] == ["segment_unet.json"]
    monkeypatch.setattr(study.subprocess, "run", lambda command: SimpleNamespace(returncode=2))
    with pytest.raises(UserError, match="stopped"):
        study.segment_again(name, args)


def test_a_further_network_is_shown_beside_the_first(tmp_path):
    """U-Net finished, DeepLabV3+ asked for: both, so that Table 7 does not lose U-Net's column.
    But not if U-Net's epochs were others: it would be trained again."""
    assert study.with_finished("deeplabv3plus", tmp_path, [30]) == "deeplabv3plus"
    (tmp_path / "results").mkdir()
    (tmp_path / "results/segment_unet.json").write_text('{"epochs": 30}')
    for epochs in ([30], [30, 15]):
        assert study.with_finished("deeplabv3plus", tmp_path, epochs) == "both"
        assert study.with_finished("unet", tmp_path, epochs) == "unet"
    assert study.with_finished("deeplabv3plus", tmp_path, [15, 30]) == "deeplabv3plus"
