"""Kills at random moments, Ctrl-C, changed inputs: what resumes equals what never stopped."""
import io
import json
import os
import random
import re
import shutil
import signal
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import Command, call, content, noise, run_here

import prepare
import refine
import train_gan
from support import training
from support.cli import UserError
from support.training import load_checkpoint

# A save after every step, so that a random moment often lies in one.
GAN = ["--steps", 10, "--batch-size", 2, "--sample-every", 2, "--save-every", 1, "--history", 2]
PRETRAIN = ["--method", "simgan", "--steps", 10, "--d-steps", 6, "--batch-size", 2,
            "--save-every", 1, "--inception", "random"]


def fingerprint(file):
    """Of what a checkpoint holds, in whatever order its file has it."""
    state = torch.load(file, weights_only=True)
    return hash(json.dumps(state, sort_keys=True, default=lambda x: x.numpy().tobytes().hex()))


def same_runs(one, other):
    """Whether two run folders hold the same checkpoints, logs and pictures."""
    a, b = content(one), content(other)
    assert a.keys() == b.keys()
    for name in a:
        if name.endswith(".pt"):
            assert fingerprint(one / name) == fingerprint(other / name), name
        else:
            assert a[name] == b[name], name
    return True


@pytest.mark.parametrize("script, flags, name", [("train_gan.py", GAN, "last.pt"),
                                                 ("pretrain.py", PRETRAIN, "pretrain.pt")])
def test_a_training_killed_five_times_equals_one_that_was_not(fresh, script, flags, name):
    """SIGKILL, five times, twice of them while a checkpoint is half-written: weights, optimisers,
    history, random state, log, samples and the best step are the same."""
    whole, parts = fresh / "runs/whole", fresh / "runs/parts"
    if script == "train_gan.py":
        for run in (whole, parts):
            run.mkdir()
            shutil.copy(fresh / "runs/ours/pretrain.pt", run)
    undisturbed = Command(script, *flags, "--run", whole, cwd=fresh)     # at the same time
    command, last = [script, *flags, "--run", parts], parts / name
    half, met, halves = last.with_name(last.name + ".tmp"), 0, 0
    for moment in (None, 0.05, 0.24, 0.13, None):              # seconds after its first line
        process = Command(*command, *["--resume"] * last.exists(), cwd=fresh)
        process.wait_for(lambda: process.read("stderr"))
        process.wait_for(half.exists) if moment is None else time.sleep(moment)
        process.kill()
        met += process.wait() == -signal.SIGKILL
        halves += half.exists()
    if script == "pretrain.py":                                # and while D learns
        process = Command(*command, "--resume", cwd=fresh)
        process.wait_for(lambda: (parts / "pretrain.csv").read_text().count(",D,") > 2)
        process.kill(), process.wait()
    call(*command, *["--resume"] * last.exists(), cwd=fresh)
    assert met >= 3 and halves >= 1
    assert undisturbed.wait() == 0 and same_runs(whole, parts)


@pytest.mark.parametrize("command, out", [
    (["prepare.py", "--demo", "--limit", 16, "--test", 4, "--size", 24, 48, "--workers", 2,
      "--out"], "toy"),
    (["refine.py", "--checkpoint", "runs/ours/pretrain.pt", "--batch-size", 1, "--out"],
     "new")])
def test_data_stages_killed_and_run_again(fresh, command, out):
    """No command but the same one again: the same bytes, and nothing half-made in between is
    taken for a data set."""
    call(*command, "whole", cwd=fresh)
    chance, met = random.Random(5), 0
    for longest in (0, 0.1, 0.3):
        process = Command(*command, out, cwd=fresh)
        process.wait_for((fresh / out).exists)
        time.sleep(chance.uniform(0, longest))
        process.kill()
        killed = process.wait() == -signal.SIGKILL
        if killed and content(fresh / out) != content(fresh / "whole"):   # not after its last byte
            met += 1
            for split in (fresh / out).glob("**/t[er]*"):              # train and test
                with pytest.raises(UserError, match="not finished|no .*png there"):
                    prepare.names(split)
    assert met
    call(*command, out, cwd=fresh)
    assert same_runs(fresh / "whole", fresh / out) and len(content(fresh / "whole")) > 20


def test_half_a_domain_is_not_taken_for_none(fresh):
    """Stopped in train/; evaluate.py looks for test/."""
    process = Command("refine.py", "--checkpoint", "runs/ours/pretrain.pt", "--batch-size", 1,
                      "--out", "data/half", cwd=fresh)
    process.wait_for(lambda: any((fresh / "data/half/train/images").glob("*.png")))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    _, err = call("evaluate.py", "--inception", "random", cwd=fresh, status=2)
    assert "data/half" in err and "not finished" in err


def test_a_full_disk_is_one_line_with_the_file(tmp_path):
    _, err = call("prepare.py", "--demo", "--size", 24, 48, "--limit", 2, "--test", 1, cwd=tmp_path,
                  status=2, megabytes=0.001)
    assert re.search(r"File too large: 'data/\w+/\w+/\w+/\w+.png'$", err.strip())


@pytest.mark.parametrize("module, step, flags", [
    (prepare, "make_domain", ["--demo", "--size", 24, 48, "--limit", 2, "--test", 1]),
    (refine, "refine_split", ["--checkpoint", "runs/ours/pretrain.pt"])])
def test_what_is_made_anew_is_unfinished_until_then(fresh, monkeypatch, module, step, flags):
    flags, made = [*flags, "--out", "anew"], fresh / f"anew/{module.__name__}.json"
    call(f"{module.__name__}.py", *flags, cwd=fresh)
    assert json.loads(made.read_text())["finished"]

    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(module, step, stop)
    with pytest.raises(KeyboardInterrupt):
        run_here(monkeypatch, fresh, module.__name__, flags)
    assert not json.loads(made.read_text())["finished"]


def test_ctrl_c_in_prepare_is_one_line(tmp_path):
    """While its threads draw."""
    process = Command("prepare.py", "--demo", "--size", 400, 800, "--test", 5, "--limit", 1,
                      "--workers", 3, cwd=tmp_path)
    process.wait_for(lambda: len([*tmp_path.glob("data/synthetic/test/images/*.png")]) >= 4)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    said = process.read("stderr")
    assert "Traceback" not in said and said.endswith("prepare.py: stopped; run it again\n")


def test_a_second_signal_stops_at_once(fresh):
    process = Command("pretrain.py", "--method", "simgan", "--batch-size", 128, "--run",
                      "runs/twice", cwd=fresh)                 # a step of some seconds
    process.wait_for(lambda: process.read("stderr"))
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        process.wait_for(lambda: "a second Ctrl-C" in process.read("stderr"))
    assert process.wait(1) == -signal.SIGINT
    assert process.read("stdout").startswith("pretrain.py: cpu (1 threads), torch ")     # at once
    assert not (fresh / "runs/twice/pretrain.pt").exists()


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGTERM])
def test_a_training_that_is_asked_to_stop_saves(fresh, signum):
    """By a closed terminal or a batch system: to the group, and by a parent."""
    process = Command("train_gan.py", "--batch-size", 2, "--save-every", 2, cwd=fresh)  # 5000 steps
    last = fresh / "runs/ours/last.pt"
    process.wait_for(last.exists)
    for _ in range(5):
        os.kill(process.pid, signum)
        time.sleep(0.002)
    assert process.wait() == 130
    err = process.read("stderr")
    assert err.count("a second Ctrl-C stops without saving") == 1 and "; --resume goes on" in err
    assert not torch.load(last, weights_only=True)["finished"]


def test_a_stop_that_nobody_reads_of_is_one(tmp_path, monkeypatch):
    """The terminal was closed, or the Ctrl-C has ended `| tee log` as well: it saves."""
    taken, silenced = {}, []

    def fail(*_):
        raise BrokenPipeError
    bar = SimpleNamespace(update=fail, set_postfix=lambda *_, **__: None)
    monkeypatch.setattr(training, "progress", lambda **_: bar)
    monkeypatch.setattr(signal, "signal", taken.setdefault)
    monkeypatch.setattr(os, "write", fail)
    monkeypatch.setattr(os, "dup2", lambda _, stream: silenced.append(stream))
    run = training.Training(tmp_path / "last.pt", "gan", tmp_path / "log.csv", {}, ["loss"], None)
    with pytest.raises(KeyboardInterrupt, match="at step 1 of 9, saved in "):
        for _ in run.steps(9, 9):
            taken[signal.SIGTERM](signal.SIGTERM, None)
            run.log({"loss": 1.0})
    assert silenced == [1, 2] and (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("at", range(8))
def test_a_stop_between_any_two_lines_saves_every_row(tmp_path, monkeypatch, at):
    class Requests(list):                                      # a signal before the next look
        looks = 0

        def __len__(self):
            self.looks += 1
            return self.looks > at
    monkeypatch.setattr(training, "stop_requests", Requests)
    run = training.Training(tmp_path / "last.pt", "gan", tmp_path / "log.csv", {}, ["loss"], None)
    with pytest.raises(KeyboardInterrupt):
        for _ in run.steps(99, 99):
            run.log({"loss": 1.0})
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert len(state["log"]) == state["step"]


def test_nohup_is_obeyed(monkeypatch):
    """A signal that was ignored when the training began stays ignored."""
    taken, ignored = [], {signal.SIGHUP: signal.SIG_IGN}
    monkeypatch.setattr(signal, "getsignal", ignored.get)
    monkeypatch.setattr(signal, "signal", lambda signum, _: taken.append(signum))
    training.stop_requests()
    assert taken == [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


def test_a_trained_network_is_not_trained_again_but_a_changed_one_is(fresh):
    """At other settings, of other images, or of an older U-Net."""
    def run(*flags):
        out, _ = call("segment.py", "--network", "unet", "--epochs", 1, "--batch-size", 4, *flags,
                      cwd=fresh)
        assert "missing: data/ours/" in out and "missing: data/real/" not in out
        record = json.loads((fresh / "results/segment_unet.json").read_text())
        return out.count("trained before, not again"), record

    def weights_of(row):
        path = fresh / f"results/weights/unet_{row}_seed0.pt"
        return path, torch.load(path, weights_only=True)

    first = run()[1]["scores"]
    older, state = weights_of("synthetic")
    again, record = run()
    assert again == 2 and str(record["scores"]) == str(first)           # nan equals nan as text
    weights_of("real")[0].unlink()
    state["settings"]["start"] = "?"                               # it began with other weights
    torch.save(state, older)
    again, record = run()
    assert again == 0 and str(record["scores"]) == str(first)           # the same seed and network
    whole = weights_of("real")[1]
    assert {**whole["settings"], "start": 0, "data": 0} == {
        "start": 0, "data": 0, "epochs": 1, "batch_size": 4, "lr": 1e-3, "precision": "float32",
        "random_crops": False}
    run("--epochs", 2, "--batch-size", 3, "--lr", 0.01, "--precision", "bfloat16")
    found = weights_of("real")[1]["settings"]
    assert [found[key] for key in ("epochs", "batch_size", "lr", "precision")] == [
        2, 3, 0.01, "bfloat16"]
    assert run("--random-crops")[0] == 0
    crops = weights_of("real")[1]["weights"]
    assert not torch.equal(crops["head.bias"], whole["weights"]["head.bias"])
    text = (fresh / "results/segment_unet.md").read_text()
    assert ", random crops, seeds 0\n" in text and "\nOne seed: nothing here says" in text
    noise(0, (24, 48)).save(next((fresh / "data/real/train/images").iterdir()))
    assert run("--random-crops")[0] == 1
    one, two, *_ = (fresh / "data/synthetic/train/labels").iterdir()
    shutil.copy(one, two)
    assert run("--random-crops")[0] == 1                       # each time only what has changed


def test_resume_refuses_another_pre_training_and_other_images(fresh):
    """It would go on, but with a run that no single command can repeat. Data may be moved."""
    call("train_gan.py", *GAN, cwd=fresh)
    before = fingerprint(fresh / "runs/ours/last.pt")
    pretrained = fresh / "runs/ours/pretrain.pt"
    kept = pretrained.read_bytes()
    other = torch.load(fresh / "runs/simgan/pretrain.pt", weights_only=True)
    other["settings"]["method"] = "ours"
    torch.save(other, pretrained)
    _, err = call("train_gan.py", *GAN, "--resume", cwd=fresh, status=2)
    assert "last.pt: was run with pretrain = " in err
    other = torch.load(io.BytesIO(kept), weights_only=True)
    next(iter(other["discriminator"].values())).mul_(2)         # of other --d-steps, R is the same
    torch.save(other, pretrained)
    _, err = call("train_gan.py", *GAN, "--resume", cwd=fresh, status=2)
    assert "last.pt: was run with discriminator = " in err
    pretrained.write_bytes(kept)
    (fresh / "data").rename(fresh / "my data")
    moved = ["train_gan.py", *GAN, "--resume", "--data", "my data/"]
    call(*moved, cwd=fresh)
    pretrain = ["pretrain.py", "--steps", 4, "--d-steps", 4, "--batch-size", 4, "--inception",
                "random", "--resume", "--data", "my data"]
    for domain in ("synthetic", "real"):
        image = next((fresh / "my data" / domain / "train/images").iterdir())
        kept = image.read_bytes()
        noise(0, (24, 48)).save(image)
        for command in (moved, pretrain):
            assert ".pt: was run with images = " in call(*command, cwd=fresh, status=2)[1]
        image.write_bytes(kept)
    assert fingerprint(fresh / "runs/ours/last.pt") == before


def test_a_finished_run_goes_further_as_if_it_had_been_asked_for(fresh, monkeypatch, capsys):
    """Where the best step is looked for from the same step on: checkpoints, log and Figure 1
    are those of the longer run. It does not go back."""
    monkeypatch.setattr(train_gan, "WARM_UP", 2)
    shutil.copytree(fresh / "runs/ours", fresh / "runs/parts")

    def train(steps, *flags):
        run_here(monkeypatch, fresh, "train_gan", ["--batch-size", 2, "--sample-every", 2,
                                                   "--average", 3, "--steps", steps, *flags])
    train(10)
    parts = "--run", "runs/parts"
    train(4, *parts)
    capsys.readouterr()
    train(10, *parts, "--resume", "--save-every", 3)
    bar = capsys.readouterr().err                     # in a log: what it begins and ends with
    assert re.findall(r"(\d+)/10 \[", bar) == ["4", "10"] and ", loss_adv=0." in bar
    assert same_runs(fresh / "runs/ours", fresh / "runs/parts")
    train(5, *parts, "--overwrite")
    with pytest.raises(UserError, match="was run with steps = 5, not 10"):     # 10 looks not at 5
        train(10, *parts, "--resume")
    state = load_checkpoint(fresh / "runs/ours/last.pt", ["gan"], "")
    # Back; not as far yet; nobody looked at 7; WARM_UP is 5 of 10 steps, so it looked at the sixth.
    for step, steps, warm_up in ((10, 9, 2), (2, 3, 2), (7, 7, 2), (7, 20, 6)):
        torch.save({**state, "step": step}, fresh / "runs/ours/last.pt")
        monkeypatch.setattr(train_gan, "WARM_UP", warm_up)
        with pytest.raises(UserError, match=f"was run with steps = 10, not {steps}"):
            train(steps, "--resume")


# ------------------------------------------------------------------- losses that are no numbers


@pytest.mark.parametrize("seconds", [2, 0.01])
@pytest.mark.parametrize("script, term", [("train_gan", "loss_adv"), ("pretrain", "loss")])
def test_a_loss_that_is_no_number_keeps_the_last_good_state(fresh, script, term, seconds,
                                                            monkeypatch):
    """Step 5 gives nan: the line says which step and term; the state of step 4 is kept."""
    module, calls = __import__(script), []

    def update(honest, *args):
        calls.append(torch.is_autocast_enabled("cpu"))
        values = honest(*args)
        if len(calls) == (14 if script == "train_gan" else 5):   # 3 updates a step, the last of D
            values[term].mul_(torch.nan)
        return values
    for name in ("update_R", "update_D"):
        monkeypatch.setattr(module, name, partial(update, getattr(module, name)))
    flags = GAN if script == "train_gan" else [*PRETRAIN, "--run", "runs/nan", "--steps", 3]
    flags = [*flags, "--save-every", 4, "--precision", "bfloat16"]
    old = fresh / ("runs/ours/curves.png" if script == "train_gan" else "runs/nan/pretrain.png")
    old.parent.mkdir(exist_ok=True)
    old.touch()                                                  # of a run to --overwrite
    with pytest.raises(UserError, match=f"step 5: .*{term}.* nan.*(last|pretrain).pt"):
        run_here(monkeypatch, fresh, script, flags, seconds)
    path = fresh / ("runs/ours/last.pt" if script == "train_gan" else "runs/nan/pretrain.pt")
    assert load_checkpoint(path, ["gan", "pretrain"], "")["step"] == 4
    assert all(calls) and not old.exists()
    assert seconds < 1 or len(calls) == (15 if script == "train_gan" else 5)    # it stops at once


def test_losses_that_are_read_late_are_the_same(fresh, monkeypatch):
    """Once a second, as to read waits for a GPU; no row of the log may differ."""
    read, after = training.Training.read, []
    monkeypatch.setattr(training.Training, "read", lambda self: (
        steps.append(len(self.unread)), read(self)))
    flags = ["--steps", 10, "--batch-size", 2, "--sample-every", 10, "--overwrite"]
    for seconds, wanted in ((2, [1] * 10), (0.4, [3, 3, 3, 1]), (0.01, [10])):
        steps = []
        run_here(monkeypatch, fresh, "train_gan", flags, seconds)
        assert [n for n in steps if n] == wanted
        after.append(fingerprint(fresh / "runs/ours/last.pt"))
    assert after[0] == after[1] == after[2]


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    """The last finite loss can have an infinite gradient: its update ruins the weights, and only
    the next step's loss would tell."""
    path = tmp_path / "last.pt"
    training.save_checkpoint(path, "gan", refiner={"w": torch.ones(2)})
    before = path.read_bytes()
    for key in ("refiner", "discriminator", "weights"):
        with pytest.raises(UserError, match=f"last.pt: not written, the {key}"):
            training.save_checkpoint(path, "gan", **{key: {"w": torch.tensor([1, torch.inf])}})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["last.pt"]
