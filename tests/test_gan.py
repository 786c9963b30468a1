"""The adversarial training against its definition (section 3.3) and against interruptions."""
import csv
import math
import shutil
import signal
import time

import pytest
import torch
from conftest import call, start

import train_gan
from models import load_checkpoint

GAN = ["--batch-size", 4, "--sample-every", 3, "--save-every", 3]


@pytest.fixture
def fresh(project, tmp_path):
    """A copy of the prepared and pre-trained project, for a test to train in."""
    return shutil.copytree(project, tmp_path / "project")


def read_log(cwd, run="runs/ours"):
    with open(cwd / run / "log.csv") as file:
        return list(csv.DictReader(file))


def equal(a, b, but=()):
    """Whether two checkpoints (nested dicts and lists of tensors and values) are the same."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k], but) for k in a if k not in but)
    if isinstance(a, list):
        return len(a) == len(b) and all(equal(x, y, but) for x, y in zip(a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a == b or (a != a and b != b)                                  # nan equals nan


def without_clock(state):
    """A last.pt whose log lacks the images per second, the one thing that may differ."""
    column = train_gan.COLUMNS.index("images_per_s")
    state["log"] = [row[:column] + row[column + 1:] for row in state["log"]]
    return state


# ------------------------------------------------------------------------------- the history


def images(*values):
    """One 1 x 1 grey image per value."""
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)


def test_history_fills_then_replaces_at_random():
    history = train_gan.History(6, torch.Generator().manual_seed(0))
    history.add(images(1, 2, 3, 4))
    assert len(history) == 4
    history.add(images(5, 6, 7, 8))                       # two find room, two replace
    kept = set(history.images[:, 0, 0, 0].tolist())
    assert len(history) == 6 and {7, 8} <= kept
    for value in range(9, 40):
        history.add(images(value))
        assert len(history) == 6 and value in history.images[:, 0, 0, 0].tolist()
    assert len(set(history.images[:, 0, 0, 0].tolist())) == 6


def test_history_samples_everything_it_holds():
    history = train_gan.History(8, torch.Generator().manual_seed(0))
    history.add(images(*range(8)))
    drawn = {v for _ in range(30) for v in history.sample(4)[:, 0, 0, 0].tolist()}
    assert drawn == set(range(8))


def test_history_of_a_batch_larger_than_itself():
    history = train_gan.History(2, torch.Generator().manual_seed(0))
    history.add(images(1, 2, 3, 4, 5))
    assert len(history) == 2


# ------------------------------------------------------------------------ one training step


def test_R_learns_while_D_is_fixed_and_the_other_way_round(fresh):
    """A learning rate of 1e-30 stops a network's own updates; nobody else may move it."""
    before = load_checkpoint(fresh / "runs/ours/pretrain.pt", ["pretrain"], "")
    for flag, moving, fixed in (("--d-lr", "refiner", "discriminator"),
                                ("--lr", "discriminator", "refiner")):
        call("train_gan.py", "--steps", 2, *GAN, flag, 1e-30, "--overwrite", cwd=fresh)
        after = load_checkpoint(fresh / "runs/ours/last.pt", ["gan"], "")
        assert equal(before[fixed], after[fixed])
        assert not equal(before[moving], after[moving])


def test_alpha_and_beta_weigh_the_two_terms(fresh):
    """Without L_adv R stays near the identity; without L_rec it goes further away from it."""
    change = {}
    for alpha, beta in ((0, 4e-6), (50, 0)):
        call("train_gan.py", "--steps", 25, *GAN, "--alpha", alpha, "--beta", beta, "--lr",
             1e-3, "--overwrite", cwd=fresh)
        change[alpha] = float(read_log(fresh)[-1]["mean_change"])
    assert change[0] < change[50]


def test_log_history_and_rec_loss(fresh):
    call("train_gan.py", "--steps", 6, *GAN, "--history", 3, cwd=fresh)
    rows = read_log(fresh)
    assert [int(r["step"]) for r in rows] == [1, 2, 3, 4, 5, 6]
    # One batch of 4 before the start, then half a batch a step, at most 3 batches.
    assert [int(r["history"]) for r in rows] == [6, 8, 10, 12, 12, 12]
    for r in rows:
        assert float(r["loss_rec"]) == pytest.approx(
            512 * 3 * 80 * 160 * float(r["mean_change"]), rel=1e-3)
        assert (r["ssim"] != "nan") == (int(r["step"]) % 3 == 0)
    assert (fresh / "runs/ours/curves.png").is_file()
    assert (fresh / "runs/ours/samples/step_000006.png").is_file()


def test_gan_pt_is_the_step_of_the_papers_rule(fresh):
    call("train_gan.py", "--steps", 18, *GAN, "--lr", 1e-3, cwd=fresh)
    rows = read_log(fresh)
    value = {}
    for step in (12, 15, 18):                             # 3, 6, 9 lie in the first half
        window = rows[step - 3:step]
        value[step] = sum(float(r["d_loss_refined"]) - float(r["d_loss_real"])
                          - float(r["loss_adv"]) for r in window) / 3
    best = load_checkpoint(fresh / "runs/ours/gan.pt", ["best"], "")
    assert best["step"] == max(value, key=value.get)
    assert best["score"] == pytest.approx(max(value.values()), rel=1e-3)


def test_without_history(fresh):
    call("train_gan.py", "--steps", 2, *GAN, "--history", 0, cwd=fresh)
    assert [r["history"] for r in read_log(fresh)] == ["0", "0"]


# ------------------------------------------------------------------- interruptions and resume


def test_killed_runs_that_resume_equal_one_that_was_not_stopped(fresh):
    """SIGKILL, twice, then --resume: every tensor, the log and the best step are the same."""
    steps = ["--steps", 40, *GAN]
    call("train_gan.py", *steps, cwd=fresh)
    whole = load_checkpoint(fresh / "runs/ours/last.pt", ["gan"], "")
    (fresh / "runs/again").mkdir()
    shutil.copy(fresh / "runs/ours/pretrain.pt", fresh / "runs/again/pretrain.pt")
    last, killed = fresh / "runs/again/last.pt", 0
    for go_on in ([], ["--resume"]):
        process = start("train_gan.py", *steps, "--run", "runs/again", *go_on, cwd=fresh)
        seen = last.stat().st_mtime_ns if last.exists() else 0
        while process.poll() is None and (not last.exists() or last.stat().st_mtime_ns == seen):
            time.sleep(0.005)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    assert killed == 2
    call("train_gan.py", *steps, "--run", "runs/again", "--resume", cwd=fresh)
    resumed = load_checkpoint(last, ["gan"], "")
    assert equal(without_clock(whole), without_clock(resumed))
    log = [[v for k, v in r.items() if k != "images_per_s"] for r in read_log(fresh)]
    assert log == [[v for k, v in r.items() if k != "images_per_s"]
                   for r in read_log(fresh, "runs/again")]


def test_sigterm_saves_and_pretraining_resumes(fresh):
    flags = ["--method", "simgan", "--steps", 60, "--d-steps", 20, "--batch-size", 4,
             "--save-every", 1000]
    call("pretrain.py", *flags, "--run", "runs/whole", cwd=fresh)
    process = start("pretrain.py", *flags, "--run", "runs/parts", cwd=fresh)
    process.stdout.readline()                               # the first line: it has begun
    time.sleep(0.4)
    process.terminate()
    assert process.wait() == 130
    part = load_checkpoint(fresh / "runs/parts/pretrain.pt", ["pretrain"], "")
    assert part["step"] < 80 and not part["finished"]
    call("train_gan.py", "--run", "runs/parts", cwd=fresh, status=2)     # not finished
    call("pretrain.py", *flags, "--run", "runs/parts", "--resume", cwd=fresh)
    whole, parts = (load_checkpoint(fresh / f"runs/{r}/pretrain.pt", ["pretrain"], "")
                    for r in ("whole", "parts"))
    assert equal(whole, parts)


def test_a_run_is_neither_overwritten_nor_resumed_by_accident(fresh):
    call("train_gan.py", "--steps", 3, *GAN, cwd=fresh)
    _, err = call("train_gan.py", "--steps", 3, *GAN, cwd=fresh, status=2)
    assert "--resume" in err and "--overwrite" in err
    _, err = call("train_gan.py", "--steps", 3, *GAN, "--alpha", 1, "--resume", cwd=fresh,
                  status=2)
    assert "alpha" in err and "50" in err
    shutil.copy(fresh / "runs/ours/pretrain.pt", fresh / "other.pt")
    _, err = call("refine.py", "--checkpoint", "nothing.pt", cwd=fresh, status=2)
    assert "nothing.pt" in err and "Traceback" not in err


# ---------------------------------------------------------------------------- what it says


def test_watch_names_a_dead_and_a_winning_discriminator(capsys):
    said = set()
    row = dict(zip(train_gan.COLUMNS, [0.7, 1.0, 0.69, 0.69, 0.5, 0.5, 0.1, 0, 0, 0]))
    for change, word in (({"d_loss_real": math.log(2), "d_loss_refined": math.log(2)}, "dead"),
                         ({"loss_adv": 9.0}, "wins"), ({"mean_change": 1.1}, "left the image"),
                         ({}, "")):
        train_gan.watch([list({**row, **change}.values())], 1, said)
        text = capsys.readouterr().out
        assert word in text and bool(text) == bool(change)
    train_gan.watch([list({**row, "loss_adv": 9.0}.values())], 2, said)
    assert capsys.readouterr().out == ""                   # once is enough
