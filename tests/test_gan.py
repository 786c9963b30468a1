"""The adversarial training against its definition (section 3.3)."""
import csv
import math
import shutil
import sys

import pytest
import torch
from conftest import call

import train_gan
from models import Discriminator, Refiner, load_checkpoint, patch_loss, to_float, to_uint8

GAN = ["--batch-size", 4, "--sample-every", 3, "--save-every", 3]


def read_log(cwd, run="runs/ours"):
    with open(cwd / run / "log.csv") as file:
        return list(csv.DictReader(file))


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


@pytest.fixture
def players():
    """R, D and two batches of 24 x 48 noise, a bright and a dark one."""
    torch.manual_seed(0)
    x, y = torch.rand(4, 3, 24, 48), torch.rand(4, 3, 24, 48) - 1
    return Refiner(maps=8, blocks=1), Discriminator(), x, y


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_D_is_fixed_while_R_learns(players):
    R, D, x, _ = players
    before_R, before_D = weights(R), weights(D)
    train_gan.update_R(R, D, torch.optim.SGD(R.parameters(), 0.1), x, 50, 4e-6, 512)
    assert not torch.equal(weights(R), before_R) and torch.equal(weights(D), before_D)
    assert all(p.grad is None and p.requires_grad for p in D.parameters())


def test_R_is_fixed_while_D_learns(players):
    R, D, x, y = players
    before_R, before_D = weights(R), weights(D)
    history = train_gan.History(8, torch.Generator())
    train_gan.update_D(R, D, torch.optim.SGD(D.parameters(), 0.1), x, y, history, 0)
    assert torch.equal(weights(R), before_R) and not torch.equal(weights(D), before_D)
    assert all(p.grad is None for p in R.parameters())


def test_D_sees_the_history_and_the_history_takes_the_new_images(players):
    """With a history of real images D cannot tell apart, its loss on "refined" is another one."""
    R, D, x, y = players
    frozen = torch.optim.SGD(D.parameters(), 0.0)
    history = train_gan.History(4, torch.Generator().manual_seed(0))
    history.add(to_uint8(y))
    new, old = D(to_float(to_uint8(R(x[:2])))), D(to_float(history.images[:1]))
    _, loss, _, _ = train_gan.update_D(R, D, frozen, x[:2], y, history, 0)
    assert loss.item() == pytest.approx(patch_loss(new, 1).item(), rel=1e-4)
    history = train_gan.History(4, torch.Generator().manual_seed(0))
    history.add(to_uint8(y[:1]))
    _, loss, _, _ = train_gan.update_D(R, D, frozen, x[:2], y, history, 2)
    assert loss.item() == pytest.approx(
        (patch_loss(new, 1) + patch_loss(old, 1)).item() / 2, rel=1e-4)
    assert len(history) == 3


def test_losses_of_R_are_the_papers(players):
    R, D, x, _ = players
    refined = R(x)
    wanted_adv = patch_loss(D(refined), 0).item()
    wanted_rec = 512 / 4 * (refined - x).abs().sum().item() * (80 * 160) / (24 * 48)
    adv, rec, change = train_gan.update_R(R, D, torch.optim.SGD(R.parameters(), 0.0), x, 50,
                                          4e-6, 512, "l1")
    assert adv.item() == pytest.approx(wanted_adv, rel=1e-5)
    assert rec.item() == pytest.approx(wanted_rec, rel=1e-5)
    assert change.item() == pytest.approx((refined - x).abs().mean().item(), rel=1e-5)


def test_squares_in_place_of_L1(players):
    """The default: the sum of squares, in the units of L1; L_adv and the mean change are the
    same."""
    R, D, x, _ = players
    wanted = 512 / 4 * (R(x) - x).square().sum().item() * (80 * 160) / (24 * 48)
    frozen = torch.optim.SGD(R.parameters(), 0.0)
    l1, l2 = (train_gan.update_R(R, D, frozen, x, 50, 4e-6, 512, *rec) for rec in (["l1"], []))
    assert l2[1].item() == pytest.approx(wanted, rel=1e-5)
    assert l1[0] == l2[0] and l1[2] == l2[2]


@pytest.mark.parametrize("alpha, beta", [(50, 0), (0, 4e-6)])
def test_alpha_and_beta_weigh_their_own_term(players, alpha, beta):
    """With the other term at weight 0, a few steps make this one smaller."""
    R, D, x, _ = players
    optimizer = torch.optim.Adam(R.parameters(), 1e-3)
    values = [train_gan.update_R(R, D, optimizer, x, alpha, beta, 512) for _ in range(20)]
    assert values[-1][0 if alpha else 1] < values[0][0 if alpha else 1]


def test_the_average_of_R(players):
    """n = 1, 2, 3: the mean of what was seen; n = N from then on: exponential weights."""
    R, average = players[0], {name: torch.zeros_like(w) for name, w in
                              players[0].state_dict().items()}
    for n, value in ((1, 3.0), (2, 5.0), (3, 10.0)):
        for weight in R.parameters():
            torch.nn.init.constant_(weight, value)
        train_gan.take_average(average, R, n)
    assert all(torch.allclose(w, torch.tensor(6.0)) for w in average.values())
    for _ in range(2):                                     # 6 -> 10 with weight 1/4, twice
        train_gan.take_average(average, R, 4)
    assert all(torch.allclose(w, torch.tensor(10 - 4 * 0.75 ** 2)) for w in average.values())
    assert all((w == 10).all() for w in R.parameters())


# ----------------------------------------------------------------- a run by the command line


@pytest.fixture(scope="module")
def trained(project, tmp_path_factory):
    """A project in which 18 steps of train_gan.py have run, with a history of 3 batches."""
    cwd = shutil.copytree(project, tmp_path_factory.mktemp("trained") / "project")
    call("train_gan.py", "--steps", 18, *GAN, "--history", 3, "--lr", 1e-3, "--rec", "l1", cwd=cwd)
    return cwd


def test_log_and_pictures(trained):
    rows = read_log(trained)
    assert [int(r["step"]) for r in rows] == list(range(1, 19))
    # One batch of 4 before the start, then half a batch a step, at most 3 batches.
    assert [int(r["history"]) for r in rows][:5] == [6, 8, 10, 12, 12]
    for r in rows:
        assert float(r["loss_rec"]) == pytest.approx(
            512 * 3 * 80 * 160 * float(r["mean_change"]), rel=1e-3)
        assert (r["ssim"] != "nan") == (int(r["step"]) % 3 == 0)
    assert (trained / "runs/ours/curves.png").is_file()
    assert (trained / "runs/ours/samples/step_000018.png").is_file()


def test_gan_pt_is_the_step_of_the_papers_rule(trained):
    rows, value = read_log(trained), {}
    for step in (12, 15, 18):                             # 3, 6, 9 lie in the first half
        window = rows[step - 3:step]
        value[step] = sum(float(r["d_loss_refined"]) - float(r["d_loss_real"])
                          - float(r["loss_adv"]) for r in window) / 3
    best = load_checkpoint(trained / "runs/ours/gan.pt", ["best"], "")
    assert best["step"] == max(value, key=value.get)
    assert best["score"] == pytest.approx(max(value.values()), rel=1e-3)


def test_average_pt_changes_nothing_and_is_one_that_refine_takes(trained, fresh):
    """Over one step it is R itself; over more it is not, while R and the log are the same."""
    call("train_gan.py", "--steps", 18, *GAN, "--history", 3, "--lr", 1e-3, "--rec", "l1",
         "--average", 1, cwd=fresh)
    runs = [cwd / "runs/ours" for cwd in (trained, fresh)]
    of_3, of_1 = (load_checkpoint(run / "average.pt", ["average"], "")["refiner"] for run in runs)
    last, again = (load_checkpoint(run / "last.pt", ["gan"], "")["refiner"] for run in runs)
    assert all(torch.equal(last[name], again[name]) for name in last)
    assert all(torch.equal(of_1[name], last[name]) for name in last)
    assert not any(torch.equal(of_3[name], last[name]) for name in last)
    out, _ = call("refine.py", "--out", "data/averaged", cwd=trained)
    assert "average.pt (step 18)" in out
    assert len(list((trained / "data/averaged/test/images").iterdir()))


@pytest.mark.parametrize("steps, average", [(1, 1), (120, 24), (1000, 200), (5000, 200)])
def test_a_short_run_is_averaged_over_less(steps, average, monkeypatch):
    """Not over its first steps, in which R leaps."""
    monkeypatch.setattr(sys, "argv", ["train_gan.py", "--steps", str(steps)])
    assert train_gan.arguments().average == average
    monkeypatch.setattr(sys, "argv", ["train_gan.py", "--steps", str(steps), "--average", "7"])
    assert train_gan.arguments().average == 7


def test_a_run_is_neither_overwritten_nor_resumed_by_accident(trained):
    before = (trained / "runs/ours/last.pt").read_bytes()
    _, err = call("train_gan.py", "--steps", 18, *GAN, cwd=trained, status=2)
    assert "--resume" in err and "--overwrite" in err
    _, err = call("train_gan.py", "--steps", 18, *GAN, "--alpha", 1, "--resume", cwd=trained,
                  status=2)
    assert "alpha" in err and "50" in err
    assert (trained / "runs/ours/last.pt").read_bytes() == before


def test_without_history(fresh):
    call("train_gan.py", "--steps", 2, *GAN, "--history", 0, cwd=fresh)
    assert [r["history"] for r in read_log(fresh)] == ["0", "0"]


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
