"""The networks, Inception's weights and the checkpoints. Random weights, no download."""
import copy
import urllib.error

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import pretrain
import train_gan
from models import (DeepLabV3Plus, Discriminator, Refiner, inception_features, load_inception,
                    resize_299)
from support import training
from support.cli import UserError
from support.training import (autocast, load_checkpoint, make_optimizer, rebuild, to_float,
                              to_uint8)


def random_images(n, height=80, width=160, seed=0):
    """uint8 [n, 3, height, width]."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, height, width), generator=g, dtype=torch.uint8)


@pytest.fixture(autouse=True)
def same_weights_every_time():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------- networks


def test_to_float_and_to_uint8_are_inverse():
    """All 256 values, 0 and 255 at the ends of [-1, 1]; out of range is clipped, not wrapped."""
    values = torch.arange(256, dtype=torch.uint8)
    x = to_float(values)
    assert x[0] == -1 and x[-1] == 1
    assert torch.equal(to_uint8(x), values)
    assert torch.equal(to_uint8(x + 0.3 / 127.5), values)                 # rounded, not cut
    assert to_uint8(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]
    assert torch.equal(to_uint8(x.bfloat16()), to_uint8(x.bfloat16().float()))


# ------------------------------------------------------------------------------- Inception


@pytest.fixture(scope="module")
def images():
    return random_images(8)


@pytest.fixture(scope="module")
def pool3(images):
    """The random Inception up to the 2048 numbers of FID."""
    return load_inception("random", images=images)


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


@pytest.fixture(scope="module")
def full_file(full, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "net.pt"
    torch.save(full.state_dict(), path)
    return path


def without(state, *parts):
    return {k: v for k, v in state.items() if not any(part in k for part in parts)}


LAYERS = {"Conv2d_1a_3x3": (32, 39, 79), "Conv2d_2a_3x3": (32, 37, 77),
          "Conv2d_2b_3x3": (64, 37, 77), "maxpool1": (64, 18, 38),
          "Conv2d_3b_1x1": (80, 18, 38), "Conv2d_4a_3x3": (192, 16, 36),
          "maxpool2": (192, 7, 17), "Mixed_5b": (256, 7, 17), "Mixed_5c": (288, 7, 17),
          "Mixed_5d": (288, 7, 17), "Mixed_6a": (768, 3, 8), "Mixed_6b": (768, 3, 8),
          "Mixed_6c": (768, 3, 8), "Mixed_6d": (768, 3, 8), "Mixed_6e": (768, 3, 8),
          "Mixed_7a": (1280, 1, 3), "Mixed_7b": (2048, 1, 3), "Mixed_7c": (2048, 1, 3),
          "pool3": (2048,)}                                   # Keras' shapes at 80 x 160


@pytest.fixture(scope="module")
def outputs(full, images):
    """What torchvision's own forward pass gives at every layer, with Keras' pooling (which
    torchvision can be told, but not by an argument)."""
    seen, net = {}, copy.deepcopy(full).double()
    for name, module in net.named_children():
        module.register_forward_hook(lambda m, x, y, name=name: seen.update({name: y}))
    pool = F.avg_pool2d
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "avg_pool2d", lambda *args, **keywords: pool(
            *args, **keywords, count_include_pad=False))
        net(to_float(images[:2]).double())
    return {**seen, "pool3": seen["avgpool"].flatten(1)}


def test_every_inception_layer_equals_torchvisions_with_keras_pooling(full_file, images, outputs):
    """Shapes of Keras' InceptionV3 and values of torchvision's forward(), from the file; in
    float64, since 94 random layers enlarge the last digits of float32."""
    y, net = to_float(images[:2]).double(), load_inception(full_file).double()
    for layer, module in zip(outputs, net):                # the last two are the average and its
        y = module(y)                                      # shape
        if layer in LAYERS:
            assert y.shape == (2, *LAYERS[layer]) and y.min() >= 0 and outputs[layer].std() > 1e-2
            torch.testing.assert_close(y, outputs[layer], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(net[-1](y), outputs["pool3"], rtol=1e-9, atol=1e-9)


def test_an_unknown_layer_is_refused_and_every_other_named():
    with pytest.raises(UserError, match=f"--layer fc: .* has {', '.join(LAYERS)}$"):
        load_inception("random", "fc")


def test_inception_pool3_is_frozen_and_not_flat(pool3, images):
    """2048 numbers per image, which differ between images although the weights are random."""
    y = pool3(to_float(images))
    assert y.shape == (8, 2048) and not y.requires_grad and not pool3.training
    assert y.isfinite().all() and y.std(0).mean() > 1e-3


def test_features_that_are_not_finite_are_refused(images):
    """Damaged weights must not become a score."""
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    net[2].weight.data[0, 0] = torch.inf
    with pytest.raises(UserError, match="--inception.*not finite"), torch.no_grad():
        inception_features(net, images, "cpu")


def test_random_inception_is_reproducible(images, pool3):
    """The seed decides the weights, and the caller's random state stays as it was."""
    before = torch.get_rng_state()
    again, other = (load_inception("random", "Conv2d_4a_3x3", images, seed) for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    x = to_float(images[:2])
    for key, value in pool3[:len(again)].state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value)
    assert (again(x) - other(x)).abs().mean() > 1e-3


@pytest.mark.parametrize("left_out, half", [
    (("fc.", "AuxLogits."), False),
    (("num_batches_tracked",), False),               # files from before PyTorch 0.4.1 lack them
    ((), True)])                                     # float16, half the size: 11 bits
def test_inception_from_a_file(full, images, tmp_path, left_out, half):
    """torchvision's state dict, with or without what the features do not need: the output is
    that of torchvision's own layers, so nothing was left at its random start."""
    state = without(full.state_dict(), *left_out)
    if half:
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    torch.save(state, tmp_path / "net.pt")
    x = to_float(images[:2])
    stem = list(full.children())[:6]                                  # to Conv2d_4a_3x3
    with torch.no_grad():
        wanted = nn.Sequential(*stem)(x)
    found = load_inception(tmp_path / "net.pt", "Conv2d_4a_3x3")(x)
    assert wanted.std() > 1e-3 and found.dtype == torch.float32
    assert (found - wanted).norm() < (5e-3 if half else 1e-6) * wanted.norm()


@pytest.mark.parametrize("change, found", [
    (lambda state: bytes(range(256)) * 20, "damaged"),
    (lambda state: torch.zeros(3), "470 of 470"),
    (lambda state: {**state, "Mixed_5b.branch1x1.conv.weight": torch.zeros(1)},
     "1 of 470 .*first is Mixed_5b.branch1x1.conv.weight")])
def test_inception_refuses_another_file(full, tmp_path, change, found):
    """Whatever is in the file: one error that names the flag, the file and what is missing."""
    content, file = change(full.state_dict()), tmp_path / "net.pt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(UserError, match=f"--inception .*net.pt.*{found}"):
        load_inception(file)


def test_failed_download_names_the_other_choices(tmp_path, monkeypatch):
    """Without a network the default cannot work; the message says what can."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    def fail(*_, **__):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(torchvision.models.Inception_V3_Weights, "get_state_dict", fail)
    with pytest.raises(UserError) as caught:
        load_inception("imagenet")
    for words in ("--inception imagenet", "give a file", "--inception random"):
        assert words in str(caught.value)


def test_imagenet_is_torchvisions_state_dict(monkeypatch, full):
    """"imagenet" takes what torchvision gives (here a stand-in), classifier and all."""
    monkeypatch.setattr(torchvision.models.Inception_V3_Weights, "get_state_dict",
                        lambda _, **said: said["check_hash"] and full.state_dict())
    net = load_inception("imagenet", "Conv2d_1a_3x3")
    assert torch.equal(net[0].conv.weight, full.Conv2d_1a_3x3.conv.weight)


def test_backbone_weights_from_a_file(tmp_path):
    """DeepLabV3+ takes a ResNet-50's state dict."""
    backbone = torchvision.models.resnet50()
    torch.save(backbone.state_dict(), tmp_path / "resnet50.pt")
    net = DeepLabV3Plus(backbone_weights=tmp_path / "resnet50.pt")
    assert torch.equal(net.deep[2][2].conv3.weight, backbone.layer4[2].conv3.weight)


# ----------------------------------------------------------------------------- checkpoints


def test_a_refiner_of_an_older_checkpoint_loads():
    """Its arguments name an option that is gone; one that had been used is refused."""
    net = Refiner(8, 1)
    state = {"refiner_args": {**net.args, "skip": False}, "refiner": net.state_dict()}
    x = to_float(random_images(1, 24, 48))
    assert torch.equal(rebuild(Refiner, state, "refiner", "old.pt")(x), net(x))
    state["refiner_args"]["skip"] = True
    with pytest.raises(UserError, match="old.pt.*refiner"):
        rebuild(Refiner, state, "refiner", "old.pt")


@pytest.mark.parametrize("name", training.OPTIMIZERS)
@pytest.mark.parametrize("saved, here", [("channels_last", "contiguous_format"),
                                         ("contiguous_format", "channels_last")])
def test_an_optimizer_goes_on_in_another_memory_order(name, saved, here):
    """And with the kernel of this device, whichever has saved it: the next steps are the same."""
    torch.manual_seed(0)
    start, gradients = nn.Conv2d(3, 5, 4), torch.randn(3, 5, 3, 4, 4)
    nets, optimizers = [], []
    for layout in (saved, here):
        nets.append(copy.deepcopy(start).to(memory_format=getattr(torch, layout)))
        optimizers.append(training.make_optimizer(name, nets[-1].parameters(), 0.1))
    for i, gradient in enumerate(gradients):
        for net, optimizer in zip(nets, optimizers):
            net.weight.grad = torch.empty_like(net.weight).copy_(gradient)
            net.bias.grad = gradient.sum((1, 2, 3))
            if i or optimizer is optimizers[0]:                # the second begins after a step
                optimizer.step()
        if i == 0:
            nets[1].load_state_dict(nets[0].state_dict())
            state = copy.deepcopy(optimizers[0].state_dict())
            state["param_groups"][0]["fused"] = True           # as a GPU saves it
            training.load_optimizer(optimizers[1], state)
    torch.testing.assert_close(*[net.weight for net in nets])
    for optimizer in optimizers:
        assert optimizer.param_groups[0]["fused"] == optimizer.defaults["fused"]


@pytest.mark.parametrize("zip_format", [True, False])
def test_truncated_checkpoint(tmp_path, zip_format):
    """A file cut off anywhere, in PyTorch's present format or the old one: one error."""
    path = tmp_path / "a.pt"
    torch.save({"stage": "gan", "weights": torch.arange(100.0)}, path,
               _use_new_zipfile_serialization=zip_format)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 40, 29):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="a.pt"):
            load_checkpoint(path, ["gan"], "")


def test_bfloat16_changes_the_arithmetic_not_the_interface():
    """autocast: close to the float32 network, which is what it is outside; the keys stay."""
    torch.manual_seed(0)
    plain = Refiner(maps=8, blocks=1)
    x = torch.rand(2, 3, 24, 48) * 2 - 1
    wanted, keys = plain(x), list(plain.state_dict())
    with autocast(torch.device("cpu"), "bfloat16"):
        got = plain(x)
    assert got.dtype == torch.bfloat16 and list(plain.state_dict()) == keys
    assert not torch.equal(got, wanted) and (got - wanted).abs().max() < 0.02
    for precision in ("tf32", "float32"):                      # tf32 is a GPU's
        training.pick_device("cpu", precision)
        cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        assert cuda.allow_tf32 == cudnn.allow_tf32 == (precision == "tf32")
        with autocast(torch.device("cpu"), precision):
            assert torch.equal(plain(x), wanted)
    with autocast(torch.device("cpu"), "bfloat16"):            # a step inside it counts at once
        plain(x), plain.last.bias.data.add_(1)
        assert not torch.equal(plain(x), got)


def test_losses_stay_float32():
    """In bfloat16 too; and psi measures in float32."""
    R, D, psi, seen = Refiner(8, 1), Discriminator(), nn.Conv2d(3, 4, 3), []
    psi.register_forward_hook(lambda module, x, y: seen.append(y.dtype))
    x, y = torch.rand(2, 2, 3, 24, 48) * 2 - 1
    of_R, of_D = (make_optimizer("sgd", net.parameters(), 1e-4) for net in (R, D))
    with autocast(torch.device("cpu"), "bfloat16"):
        rows = [pretrain.update_R(R, of_R, x, psi), pretrain.update_D(D, of_D, x, y),
                train_gan.update_R(R, D, of_R, x, 50, 4e-6, 512),
                train_gan.update_D(R, D, of_D, x, y, train_gan.History(4, None, "cpu"), 0)]
    values = [value for row in rows for value in row.values() if torch.is_tensor(value)]
    assert len(values) == 11 and {v.dtype for v in values} == {*seen} == {torch.float32}


@pytest.mark.parametrize("seconds, asked, said", [
    (0.1, "float32", "2.00"), (0.1, "bfloat16", "2.00"), (1, "float32", ""),
    (1, "bfloat16", "0.20")])
def test_the_speed_of_bfloat16_is_said(seconds, asked, said, monkeypatch):
    """On a CPU, measured: where it is asked for, and where it is worth a try."""
    times = iter([[9, 0.2, 0.2, 0.2], [9, seconds, seconds, seconds]])     # the first warms up
    monkeypatch.setattr(training, "repeat", lambda *_, **__: next(times))
    assert training.precision_note(torch.device("cuda"), asked) == ""
    note = training.precision_note(torch.device("cpu"), asked)
    assert note == (said and f"; --precision bfloat16 is {said} times as fast here as float32")
