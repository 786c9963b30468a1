"""The networks, Inception's weights and the checkpoints. Random weights, no download."""
import copy
import hashlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import save
from torch import nn

import pretrain
import train_gan
from evaluate import weights_of
from models import (DeepLabV3Plus, Discriminator, Refiner, inception_features, load_inception,
                    resize_299)
from support import training
from support.cli import UserError
from support.training import autocast, keep_on, make_optimizer, to_float, to_uint8


# ------------------------------------------------------------------------------- Inception


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(0)
    return torch.randint(0, 256, (8, 3, 80, 160), dtype=torch.uint8)


@pytest.fixture(scope="module")
def full(images):
    """torchvision's own network with auxiliary head and classifier, as its file has them."""
    torch.manual_seed(1)
    net = torchvision.models.inception_v3(weights=None, init_weights=False, aux_logits=True,
                                          transform_input=False)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):          # a trained one is not 0 and 1
            module.momentum = None                      # the average of one pass
    with torch.no_grad():
        net.train()(resize_299(images[:4]))
    return net.eval()


def test_every_inception_layer_equals_torchvisions_with_keras_pooling(full, images, tmp_path):
    """torchvision's own forward pass, told to pool like Keras (it can be, but not by an argument);
    in float64, since 94 random layers enlarge the last digits of float32. The file lacks what the
    features do not need, and what files from before PyTorch 0.4.1 lack."""
    needless = ("fc.", "AuxLogits.", "num_batches_tracked")
    torch.save({k: v for k, v in full.state_dict().items()
                if not any(part in k for part in needless)}, tmp_path / "net.pt")
    net, theirs = load_inception(tmp_path / "net.pt").double(), copy.deepcopy(full).double()
    x, wanted, pool = to_float(images[:2]).double(), {}, F.avg_pool2d
    for name, module in theirs.named_children():
        module.register_forward_hook(lambda m, x, y, name=name: wanted.update({name: y}))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "avg_pool2d", lambda *args, **keywords: pool(
            *args, **keywords, count_include_pad=False))
        theirs(x)
    for layer, module in zip(wanted, net[:-2]):            # the last two: the average, its shape
        x = module(x)
        assert wanted[layer].std() > 1e-2
        torch.testing.assert_close(x, wanted[layer], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(net[-2:](x), wanted["avgpool"].flatten(1), rtol=1e-9, atol=1e-9)


def test_random_inception_is_frozen_and_not_flat(images):
    """Its numbers differ between images; the seed decides the weights, and the caller's random
    state stays as it was."""
    before, x = torch.get_rng_state(), to_float(images)
    pool3 = load_inception("random", images=images)
    again, other = (load_inception("random", "Conv2d_4a_3x3", images, seed) for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert (again(x) - other(x)).abs().mean() > 1e-3
    y = pool3(x)
    assert not y.requires_grad and y.isfinite().all() and y.std(0).mean() > 1e-3
    many = torch.cat([images.flip(0)] * 30 + [images])[:32]
    some = [load_inception("random", "Conv2d_1a_3x3", x)[0].bn.running_mean
            for x in (many, many[::2], many[:16])]
    assert torch.equal(some[0], some[1]) and not torch.equal(some[0], some[2])


def test_features_that_are_not_finite_are_refused(images):
    """Damaged weights must not become a score."""
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    net[2].weight.data[0, 0] = torch.inf
    with pytest.raises(UserError, match="--inception.*not finite"), torch.no_grad():
        inception_features(net, images, "cpu")


@pytest.mark.parametrize("change, found", [
    (lambda state: torch.zeros(3), "470 of 470"),
    (lambda state: {**state, "Mixed_5b.branch1x1.conv.weight": torch.zeros(1)},
     "1 of 470 .*first is Mixed_5b.branch1x1.conv.weight")])
def test_inception_refuses_another_file(full, tmp_path, change, found):
    """Whatever is in the file: one error that names the flag, the file and what is missing."""
    torch.save(change(full.state_dict()), tmp_path / "net.pt")
    with pytest.raises(UserError, match=f"--inception .*net.pt.*{found}"):
        load_inception(tmp_path / "net.pt")


def test_imagenet_is_torchvisions_or_names_the_other_choices(tmp_path, monkeypatch, full):
    """What torchvision gives (here a stand-in), classifier and all; else what can be done."""
    weights = torchvision.models.Inception_V3_Weights
    monkeypatch.setattr(weights, "get_state_dict",
                        lambda _, **said: said["check_hash"] and full.state_dict())
    net = load_inception("imagenet", "Conv2d_1a_3x3")
    assert torch.equal(net[0].conv.weight, full.Conv2d_1a_3x3.conv.weight)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(weights, "get_state_dict", None)                # without a network
    with pytest.raises(UserError, match="--inception imagenet.*give a file, or --inception random"):
        load_inception("imagenet")
    for file, load in (("inception_v3_google-0cc3c7bd.pth", load_inception), (
            "resnet50-11ad3fa6.pth", lambda: DeepLabV3Plus(backbone_weights="imagenet"))):
        save(tmp_path / "hub/checkpoints" / file, b"<html>404</html>")
        with pytest.raises(UserError, match=f"{file} is damaged; delete it"):
            load()


def test_weights_are_computed_as_their_owner_does(full, images, tmp_path):
    """pytorch-fid's file has 1008 classes, and its last block takes the maximum where it averages.
    The copy here is torchvision's block, told so."""
    torch.save({**full.state_dict(), "fc.weight": torch.zeros(1008, 2048)}, tmp_path / "net.pth")
    below, pool3 = (load_inception(tmp_path / "net.pth", layer) for layer in ("Mixed_7b", "pool3"))
    content = b"".join(w.numpy().tobytes() for w in pool3.state_dict().values())
    assert weights_of(pool3, "a/net.pth") == ("FID as pytorch-fid computes it (net.pth)",
                                              hashlib.sha256(content).hexdigest())
    pool3.is_pytorch_fid = False
    assert weights_of(pool3, "net.pth")[0] == "FID (net.pth)"
    x, block = to_float(images[:2]).double(), copy.deepcopy(full.Mixed_7c).double()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        before, found = below.double()(x), pool3.double()(x)
        patch.setattr(F, "avg_pool2d", F.max_pool2d)
        wanted = block(before).mean((2, 3))
    torch.testing.assert_close(found, wanted)


def test_backbone_weights_from_a_file(tmp_path):
    """DeepLabV3+ takes a ResNet-50's state dict; its classifier may be missing."""
    backbone = torchvision.models.resnet50()
    backbone.fc = nn.Identity()
    torch.save(backbone.state_dict(), tmp_path / "resnet50.pt")
    net = DeepLabV3Plus(backbone_weights=tmp_path / "resnet50.pt")
    assert torch.equal(net.deep[2][2].conv3.weight, backbone.layer4[2].conv3.weight)


# ----------------------------------------------------------------------------- checkpoints


def test_what_a_precision_changes():
    """tf32 is float32 on a CPU; in bfloat16 a step counts at once."""
    plain, x = Refiner(maps=8, blocks=1), torch.rand(2, 3, 24, 48) * 2 - 1
    wanted = plain(x)
    for precision in ("tf32", "float32"):                      # tf32 is a GPU's
        training.pick_device("cpu", precision)
        cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        assert cudnn.allow_tf32 == (precision == "tf32") and not cuda.allow_tf32
        with autocast(torch.device("cpu"), precision):
            assert torch.equal(plain(x), wanted)
    with autocast(torch.device("cpu"), "bfloat16"):
        before, _ = plain(x), plain.last.bias.data.add_(1)
        assert before.dtype == torch.bfloat16 and not torch.equal(plain(x), before)
    assert torch.equal(to_uint8(before), to_uint8(before.float()))        # computed in float32
    assert to_uint8(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]       # clipped, not wrapped


def test_what_fills_over_half_of_a_gpu_stays_in_main_memory(monkeypatch):
    """Both sets, 3 and 2 images of 12 bytes, and a history of 4."""
    x, y = (torch.zeros(n, 3, 2, 2, dtype=torch.uint8) for n in (3, 2))
    monkeypatch.setattr(torch.Tensor, "to", lambda _, device: f"on {device}")
    for free, found in ((216, ("on cuda", "on cuda")), (215, (x, y))):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 999))
        assert keep_on(torch.device("cuda"), x, y, 4) == found


def test_losses_stay_float32():
    """In bfloat16 too; and psi measures in float32."""
    R, D, psi, seen, graphs = Refiner(8, 1), Discriminator(), nn.Conv2d(3, 4, 3), [], []
    psi.register_forward_hook(lambda module, x, y: seen.append(y.dtype))
    R.register_forward_hook(lambda module, x, y: graphs.append(y.requires_grad))
    x, y = torch.rand(2, 2, 3, 24, 48) * 2 - 1
    of_R, of_D = (make_optimizer("sgd", net.parameters(), 1e-4) for net in (R, D))
    with autocast(torch.device("cpu"), "bfloat16"):
        rows = [pretrain.update_R(R, of_R, x, psi), pretrain.update_D(D, of_D, x, y),
                train_gan.update_R(R, D, of_R, x, 50, 4e-6, 512),
                train_gan.update_D(R, D, of_D, x, y, train_gan.History(4, None, "cpu"), 0)]
    values = [value for row in rows for value in row.values() if torch.is_tensor(value)]
    assert len(values) == 11 and {v.dtype for v in values} == {*seen} == {torch.float32}
    assert not any(v.requires_grad for v in values)            # a log keeps no graphs
    assert graphs == [True, True, False]                       # update_D only refines


@pytest.mark.parametrize("cuda, mps, wanted", [(1, 1, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_auto_is_the_fastest_device_that_is_there(cuda, mps, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "empty",
                        lambda _, device: SimpleNamespace(device=torch.device(device)))
    assert training.pick_device("auto").type == wanted


@pytest.mark.parametrize("seconds, asked, said", [
    (0.1, "float32", "2.00"), (1, "float32", ""), (1, "bfloat16", "0.20")])
def test_the_speed_of_bfloat16_is_said(seconds, asked, said, monkeypatch):
    """On a CPU, measured: where it is asked for, and where it is worth a try."""
    times = {torch.float32: [9, 0.2, 0.2, 0.2], torch.bfloat16: [9, seconds, seconds, seconds]}
    monkeypatch.setattr(training, "repeat", lambda convolve, **_: times[convolve().dtype])
    assert training.precision_note(torch.device("cuda"), asked) == ""
    note = training.precision_note(torch.device("cpu"), asked)
    assert note == (said and f"; --precision bfloat16 convolves {said} times as fast here")
