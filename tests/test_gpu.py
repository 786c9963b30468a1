"""What only a GPU does: the same numbers as a CPU, no waiting inside a step, any device resumes.

Skipped where there is no CUDA device. Tolerances: float32 sums are in another order there (1e-4 of
the largest value); TF32 is off.
"""
import copy
import shutil

import pytest
import torch
from conftest import Command, call

import refine
import train_gan
from models import (DeepLabV3Plus, Discriminator, Refiner, UNet, fid, inception_features,
                    load_inception)
from pretrain import update_D as pretrain_D
from pretrain import update_R as pretrain_R
from support.training import (Batches, autocast, keep_on, make_optimizer, pick_device, place,
                              to_float)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", "cuda"]


def images(n, height=80, width=160, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=random)


def close(found, wanted, tolerance=1e-4):
    found, wanted = found.float().cpu(), wanted.float()
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def networks(device):
    """R and D of one seed, on a device."""
    torch.manual_seed(0)
    nets = [Refiner(), Discriminator()]
    return [place(net, pick_device(device)) for net in nets]


def learner(device, precision="float32"):
    """One step of both scripts, from the batches to the average, as a function that returns its
    values; and the weights that it changes, but Adam's, which turns a last digit into a whole
    step. D learns so fast that a step shows; in the second it has momentum, and a full history."""
    device, (R, D), (P, Q) = pick_device(device), networks(device), networks(device)
    adam, of_Q, sgd, of_D = (make_optimizer(name, net.parameters(), lr) for name, net, lr in (
        ("adam", P, 1e-4), ("momentum", Q, 0.1), ("sgd", R, 1e-4), ("momentum", D, 0.1)))
    psi = place(load_inception("random", "Conv2d_4a_3x3", images(4)), device)
    batches, average = Batches(0, device), copy.deepcopy(R)
    x, y = keep_on(device, images(6), images(6, seed=1))
    history = train_gan.History(5, batches.random, device)
    history.add(train_gan.refine(R, batches.draw(x, 4)))

    def step():
        with autocast(device, precision):
            rows = [pretrain_R(P, adam, batches.draw(x, 4), psi),
                    pretrain_D(Q, of_Q, batches.draw(x, 4), batches.draw(y, 4)),
                    train_gan.update_R(R, D, sgd, batches.draw(x, 4), 50, 4e-6, 512),
                    train_gan.update_D(R, D, of_D, batches.draw(x, 2), batches.draw(y, 4),
                                       history, 2)]
        train_gan.update_average(average, R, 3)
        return [value for row in rows for value in row.values() if torch.is_tensor(value)]
    return step, [weight for net in (Q, R, D, average) for weight in net.parameters()]


def test_a_step_is_a_cpus():
    found = []
    for device in DEVICES:
        step, weights = learner(device)
        step()
        found.append([*step(), *weights])
    for wanted, value in zip(*found, strict=True):
        close(value, wanted, 1e-3)


def test_refined_pictures_are_a_cpus():
    R, _ = networks("cpu")
    picture = images(1, 100, 120)[0].permute(1, 2, 0).numpy()
    wanted = refine.refine_tiles(R, picture, "cpu").astype(int)
    found = refine.refine_tiles(copy.deepcopy(R).cuda(), picture, "cuda")
    assert abs(found - wanted).max() <= 1


def test_features_and_fid_are_a_cpus():
    net, a, b = load_inception("random", images=images(16)), images(12), images(12, seed=1)
    found = {}
    for device in map(pick_device, DEVICES):                  # TF32 is off
        features = [inception_features(net, x, device) for x in (a, b)]
        found[device.type] = [*features, torch.tensor(fid(*features))]
    for value, wanted in zip(found["cuda"], found["cpu"]):
        close(value, wanted, 1e-2)                            # 94 layers enlarge a last digit


@pytest.mark.parametrize("Network", [UNet, DeepLabV3Plus])
def test_segmentation_is_a_cpus(Network):
    net, x = Network().eval(), to_float(images(2))
    with torch.no_grad():
        wanted = net(x)
        close(place(net, pick_device("auto"))(x.cuda()), wanted, 1e-3)


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_every_precision_trains_and_saves_the_same_keys(fresh, precision):
    flags = ["--precision", precision]
    call("train_gan.py", "--steps", 4, "--batch-size", 2, "--sample-every", 2, "--device", "cuda",
         *flags, cwd=fresh)                                   # what is not finite is not saved
    found, wanted = (torch.load(fresh / f"runs/ours/{name}.pt", weights_only=True)
                     for name in ("last", "pretrain"))
    for part, kind in (("refiner",) * 2, ("average", "refiner"), ("discriminator",) * 2):
        assert found[part].keys() == wanted[kind].keys()
    call("segment.py", "--network", "unet", "--epochs", 1, "--batch-size", 4, "--device", "cuda",
         "--train", "real", *flags, cwd=fresh)


def test_the_other_stages_run_on_it(fresh):
    on_it = ["--device", "cuda"]
    call("pretrain.py", "--steps", 2, "--d-steps", 2, "--batch-size", 2, "--inception", "random",
         "--overwrite", *on_it, cwd=fresh)
    call("refine.py", "--checkpoint", "runs/ours/pretrain.pt", "--out", "data/ours", *on_it,
         cwd=fresh)
    call("evaluate.py", "--inception", "random", "--n", 3, *on_it, cwd=fresh)


@pytest.mark.parametrize("first, then", [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_stopped_on_one_device_resumes_on_the_other(fresh, first, then):
    gan = ["train_gan.py", "--steps", 60, "--batch-size", 2, "--save-every", 2, "--sample-every",
           60]
    shutil.copytree(fresh / "runs/ours", fresh / "runs/whole")
    call(*gan, "--device", "cpu", "--run", "runs/whole", cwd=fresh)
    last = fresh / "runs/ours/last.pt"
    process = Command(*gan, "--device", first, cwd=fresh)
    process.wait_for(last.exists)
    process.terminate()
    assert process.wait() == 130
    call(*gan, "--device", then, "--resume", cwd=fresh)
    found, wanted = (torch.load(fresh / f"runs/{run}/last.pt", weights_only=True)
                     for run in ("ours", "whole"))
    assert found["step"] == 60
    for part in ("refiner", "discriminator", "average"):
        for name, weight in wanted[part].items():
            close(found[part][name], weight, 1e-2)


def test_images_that_do_not_fit_stay_in_main_memory(monkeypatch, capsys):
    device = torch.device("cuda")
    assert all(x.is_cuda for x in keep_on(device, images(2), images(2)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 1000))
    kept = keep_on(device, images(2), images(2))
    assert not any(x.is_cuda for x in kept) and "stay in main memory" in capsys.readouterr().out
    batches, (R, D) = Batches(0, device), networks("cuda")
    x, y = batches.draw(kept[0], 2), batches.draw(kept[1], 4)
    assert x.is_cuda
    history = train_gan.History(4, batches.random, kept[0].device)        # lies where they do
    history.add(train_gan.refine(R, x))
    train_gan.update_D(R, D, make_optimizer("sgd", D.parameters(), 1e-4), x, y, history, 2)
    assert not history.images.is_cuda


def test_a_step_does_not_wait_for_the_gpu():
    """The log reads the losses once a second."""
    step, _ = learner("cuda", "bfloat16")
    step()                                                    # what is made once is made
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
