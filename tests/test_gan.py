"""What train_gan.py leaves behind, refuses and says; what it computes: test_algorithm.py."""
from functools import partial
from math import nan
from types import SimpleNamespace

import pytest
import torch
from conftest import call, fill, parsed, run_here

import pretrain
import train_gan
from models import Refiner
from support.cli import UserError
from support.figures import Figure, draw_curves

GAN = ["--batch-size", 4, "--sample-every", 3, "--save-every", 3]


@pytest.mark.parametrize("synthetic, real, pairs", [(70, 70, 64), (3, 2, 2), (2, 3, 2)])
def test_the_fixed_pairs_are_as_many_as_the_smaller_test_set(tmp_path, synthetic, real, pairs):
    """And 64 at most."""
    for domain, count in (("synthetic", synthetic), ("real", real)):
        fill(tmp_path / domain / "train/images", 1), fill(tmp_path / domain / "test/images", count)
    _, _, (x, y) = train_gan.load_data(tmp_path)
    assert len(x) == len(y) == pairs


def test_there_is_no_gan_pt_without_a_best_step(tmp_path):
    """And what another run has left goes, or refine.py would take it."""
    (tmp_path / "gan.pt").touch()
    R, best = Refiner(8, 1), train_gan.BestStep()
    train_gan.save_refiners(R, R, best, SimpleNamespace(settings={}, step=1), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["average.pt"]
    for step in (5, 6):                                        # of two equal ones the first
        best.look(R, step, [{"d_loss_refined": 1, "d_loss_real": 2, "loss_adv": 3}])
    assert best.step == 5


def test_pretraining_says_what_its_last_50_steps_were(tmp_path, capsys):
    rows = [*[{"mean_change": 9}] * 4, *[{"mean_change": 0.25}] * 50,
            *[{"loss": 9, "accuracy": 9}] * 4, *[{"loss": 1, "accuracy": 0.5}] * 50]
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    pretrain.summarise(tmp_path / "x.png", Refiner(maps=2), images, rows, SimpleNamespace(steps=54))
    out = capsys.readouterr().out
    assert "= 0.250 " in out and "loss 1.000 " in out and "accuracy 0.50\n" in out


def test_a_run_is_neither_overwritten_nor_resumed_by_accident(fresh, monkeypatch):
    run = partial(call, "train_gan.py", "--steps", 3, *GAN, cwd=fresh)

    def refused(*flags, **how):
        return run(*flags, status=2, **how)[1]
    out, _ = run()
    assert "best step by the paper's rule: 3 of 3" in out
    before = {p: p.read_bytes() for p in fresh.glob("runs/ours/*.pt*")}
    assert "--resume goes on with that run, --overwrite starts" in refused()
    assert "was run with alpha = 50.0, not 1.0" in refused("--alpha", 1, "--resume")
    for name in ("average.pt", "log.csv"):                      # made again by the next line
        (fresh / "runs/ours" / name).unlink()
    run("--alpha", 50, "--resume", "--overwrite", "--device", "cpu")    # --resume comes first
    after = {p: p.read_bytes() for p in fresh.glob("runs/ours/*.pt*")}
    assert len(after) == 4 and {p.name for p in after if after[p] != before[p]} <= {"last.pt"}
    assert (fresh / "runs/ours/log.csv").exists()
    run("--resume")
    assert "was run with steps = 3, not 4" in refused("--steps", 4, "--resume")     # too short
    err = refused("--overwrite", megabytes=0.5)
    assert "average.pt: cannot be written, is the disk full?" in err
    assert {p: p.read_bytes() for p in fresh.glob("runs/ours/*.pt*")} == after
    state = torch.load(fresh / "runs/ours/last.pt", weights_only=True)
    first = state["log"][0]["loss_adv"]
    assert {*state["settings"]} == {*vars(parsed(monkeypatch, "train_gan", []))} - {
        "data", "run", "device", "resume", "overwrite", "save_every"} | {
        "images", "pretrain", "discriminator"}
    del state["settings"]["rec"]                                # of an older version
    torch.save(state, fresh / "runs/ours/last.pt")
    assert "last.pt: was run with rec = None, not l1" in refused("--resume")
    torch.save({**state, "log": [[1.0] * 9]}, fresh / "runs/ours/last.pt")
    assert "last.pt: was saved by an older version" in refused("--resume")
    out, _ = run("--steps", 1, "--overwrite", "--precision", "bfloat16")
    assert "writes runs/ours/; --precision bfloat16 convolves " in out
    assert torch.load(fresh / "runs/ours/last.pt", weights_only=True)["log"][0]["loss_adv"] != first
    assert [p.name for p in (fresh / "runs/ours/samples").iterdir()] == ["step_000001.png"]
    assert "other images" not in out
    images = sorted((fresh / "data/real/train/images").iterdir())
    images[1].write_bytes(images[0].read_bytes())
    out, _ = run("--steps", 1, "--overwrite")
    assert "pretrain.pt has learned from other images than these" in out
    # A short run is averaged over a fifth, not over its first steps, in which R leaps.
    assert parsed(monkeypatch, "train_gan", ["--steps", "120"]).average == 24
    assert train_gan.WARM_UP == 1000


@pytest.mark.parametrize("module, flags, path", [
    (pretrain, ["--method", "simgan", "--run", "runs/new"], "runs/new/pretrain.pt"),
    (train_gan, GAN, "runs/ours/last.pt")])
def test_a_run_that_ends_while_another_one_loads_is_not_lost(fresh, monkeypatch, module, flags,
                                                             path):
    def wait_for_it(folder):
        folder.mkdir(exist_ok=True)
        (fresh / path).touch()
    monkeypatch.setattr(module, "lock", wait_for_it)
    with pytest.raises(UserError, match=f"{path} exists: --resume goes on"):
        run_here(monkeypatch, fresh, module.__name__, flags)


def test_figure_1_shows_the_log():
    """SSIM where there is one; D's losses and their mean over two steps; the chosen step, 3."""
    rows = [{"ssim": s, "d_loss_real": y, "d_loss_refined": x} for s, y, x in (
        (nan, 1, 8), (0.5, 2, 6), (nan, 3, 4), (0.7, 6, 2))]
    axes = Figure().subplots(1, 3)
    draw_curves(axes, rows, 2, 3)
    for axis, title, wanted in zip(axes, ("SSIM", "D loss, real", "D loss, refined"), (
            [{2: 0.5, 4: 0.7}], [{1: 1, 2: 2, 3: 3, 4: 6}, {2: 1.5, 3: 2.5, 4: 4.5}],
            [{1: 8, 2: 6, 3: 4, 4: 2}, {2: 7, 3: 5, 4: 3}])):
        *curves, line = [dict(line.get_xydata()) for line in axis.lines]
        assert curves == wanted and list(line) == [3] and axis.get_title().startswith(title)
