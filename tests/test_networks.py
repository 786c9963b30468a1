"""The networks, Inception's weights and the checkpoints. Random weights, no download."""
import copy
import pickle
import urllib.error
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from models import DeepLabV3Plus, Refiner, inception_features, load_inception, resize_299
from support import training
from support.cli import UserError
from support.training import (autocast, load_checkpoint, pick_device, rebuild, save_checkpoint,
                              to_float, to_uint8)


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


@pytest.mark.parametrize("layer", ["Conv2d_1a_3x3", "Conv2d_4a_3x3", "maxpool2", "Mixed_7c", "pool3"])
def test_inception_ends_at_its_layer(layer, full_file, images, outputs):
    with torch.no_grad():
        y = load_inception(full_file, layer).double()(to_float(images[:2]).double())
    torch.testing.assert_close(y, outputs[layer], rtol=1e-9, atol=1e-9)


def test_the_help_names_every_layer():
    """What is documented is what is tested: an unknown layer's error lists these."""
    with pytest.raises(UserError) as caught:
        load_inception("random", "no such layer")
    for layer in LAYERS:
        assert layer in str(caught.value)


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


@pytest.mark.parametrize("left_out", [
    (), ("fc.",), ("fc.", "AuxLogits."),
    ("num_batches_tracked",)])                       # files from before PyTorch 0.4.1 lack them
def test_inception_from_a_file(full, images, tmp_path, left_out):
    """torchvision's state dict, with or without what the features do not need: the output is
    that of torchvision's own layers, so nothing was left at its random start."""
    torch.save(without(full.state_dict(), *left_out), tmp_path / "net.pt")
    x = to_float(images[:2])
    stem = list(full.children())[:6]                                  # to Conv2d_4a_3x3
    with torch.no_grad():
        wanted = nn.Sequential(*stem)(x)
    net = load_inception(tmp_path / "net.pt", "Conv2d_4a_3x3")
    assert wanted.std() > 1e-3
    torch.testing.assert_close(net(x), wanted)
    deep = load_inception(tmp_path / "net.pt")
    assert torch.equal(deep[-3].branch1x1.conv.weight, full.Mixed_7c.branch1x1.conv.weight)


def test_inception_from_a_half_precision_file(full, images, tmp_path):
    """float16 files (half the size) give the same features up to float16's 11 bits."""
    half = {k: v.half() if v.is_floating_point() else v for k, v in full.state_dict().items()}
    torch.save(full.state_dict(), tmp_path / "single.pt")
    torch.save(half, tmp_path / "half.pt")
    x = to_float(images[:2])
    single, half = (load_inception(tmp_path / f"{n}.pt", "Mixed_5d")(x) for n in
                    ("single", "half"))
    assert half.dtype == torch.float32
    assert 0 < (half - single).norm() < 5e-3 * single.norm()


def save_list(path, full):
    torch.save([1, 2], path)


def save_garbage(path, full):
    path.write_bytes(bytes(range(256)) * 20)


def save_nothing(path, full):
    path.write_bytes(b"")


def save_text(path, full):
    path.write_text(". and then some text\n" * 5)


def save_tensor(path, full):
    torch.save(torch.zeros(3), path)


def save_other_network(path, full):
    torch.save(torchvision.models.resnet18().state_dict(), path)


def save_our_checkpoint(path, full):
    save_checkpoint(path, "pretrain", step=3, refiner=Refiner().state_dict())


def save_wrong_shape(path, full):
    torch.save({**full.state_dict(), "Mixed_5b.branch1x1.conv.weight": torch.zeros(1)}, path)


def save_part(path, full):
    torch.save(without(full.state_dict(), "Mixed_7c"), path)


@pytest.mark.parametrize("save, found", [
    (save_garbage, "damaged"), (save_nothing, "damaged"), (save_text, "damaged"),
    (save_tensor, "470 of 470"), (save_list, "470 of 470"),
    (save_other_network, "470 of 470 .*first is Conv2d_1a_3x3.conv.weight"),
    (save_our_checkpoint, "470 of 470"),
    (save_wrong_shape, "1 of 470 .*first is Mixed_5b.branch1x1.conv.weight"),
    (save_part, "45 of 470 .*first is Mixed_7c.branch1x1.conv.weight")])
def test_inception_refuses_another_file(full, tmp_path, save, found):
    """Whatever is in the file: one error that names the flag, the file and what is missing."""
    save(tmp_path / "net.pt", full)
    with pytest.raises(UserError, match=f"--inception .*net.pt.*{found}"):
        load_inception(tmp_path / "net.pt")


def test_inception_refuses_a_missing_file_and_an_unknown_layer(images, tmp_path):
    """The error names the flag; for a layer it lists what there is."""
    with pytest.raises(UserError, match="--inception .*none.pt"):
        load_inception(tmp_path / "none.pt")
    for layer in ("conv2d_4", "fc", "avgpool", "AuxLogits"):
        with pytest.raises(UserError, match=f"--layer {layer}.*Conv2d_4a_3x3"):
            load_inception("random", layer, images)


@pytest.mark.parametrize("error", [
    urllib.error.URLError("no network"), RuntimeError("invalid hash value")])
def test_failed_download_names_the_other_choices(tmp_path, monkeypatch, error):
    """Without a network the default cannot work; the message says what can."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    def fail(*_, **__):
        raise error
    monkeypatch.setattr(torchvision.models.Inception_V3_Weights, "get_state_dict", fail)
    with pytest.raises(UserError) as caught:
        load_inception("imagenet")
    for words in ("--inception imagenet", "give a file", "--inception random"):
        assert words in str(caught.value)


def test_imagenet_is_torchvisions_state_dict(monkeypatch, full):
    """"imagenet" takes what torchvision gives (here a stand-in), classifier and all."""
    monkeypatch.setattr(torchvision.models.Inception_V3_Weights, "get_state_dict",
                        lambda *_, **__: full.state_dict())
    net = load_inception("imagenet", "Conv2d_1a_3x3")
    assert torch.equal(net[0].conv.weight, full.Conv2d_1a_3x3.conv.weight)


def test_backbone_weights_from_a_file(tmp_path):
    """DeepLabV3+ takes a ResNet-50's state dict; another file is an error naming the flag."""
    backbone = torchvision.models.resnet50()
    torch.save(backbone.state_dict(), tmp_path / "resnet50.pt")
    net = DeepLabV3Plus(backbone_weights=tmp_path / "resnet50.pt")
    assert torch.equal(net.deep[2][2].conv3.weight, backbone.layer4[2].conv3.weight)
    save_our_checkpoint(tmp_path / "other.pt", None)
    with pytest.raises(UserError, match="--backbone-weights .*other.pt"):
        DeepLabV3Plus(backbone_weights=tmp_path / "other.pt")


@pytest.mark.parametrize("name", ["gpu", "cuda:x"])
def test_an_unknown_device_is_a_user_error(name):
    """`--device gpu` is a likely slip."""
    with pytest.raises(UserError, match="--device"):
        pick_device(name)


# ----------------------------------------------------------------------------- checkpoints


def test_checkpoint_round_trip(tmp_path):
    """Tensors, numbers, lists and dicts come back as they were, the stage with them."""
    path, weights = tmp_path / "a.pt", Refiner(8, 1).state_dict()
    save_checkpoint(path, "gan", step=7, settings={"lr": 1e-4, "layers": ["a", None]},
                    weights=weights)
    state = load_checkpoint(path, ["pretrain", "gan"], "")
    assert state["stage"] == "gan" and state["step"] == 7
    assert state["settings"] == {"lr": 1e-4, "layers": ["a", None]}
    assert all(torch.equal(state["weights"][k], v) for k, v in weights.items())
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_refiner_of_an_older_checkpoint_loads():
    """Its arguments name an option that is gone; one that had been used is refused."""
    net = Refiner(8, 1)
    state = {"refiner_args": {**net.args, "skip": False}, "refiner": net.state_dict()}
    x = to_float(random_images(1, 24, 48))
    assert torch.equal(rebuild(Refiner, state, "refiner", "old.pt")(x), net(x))
    state["refiner_args"]["skip"] = True
    with pytest.raises(UserError, match="old.pt.*refiner"):
        rebuild(Refiner, state, "refiner", "old.pt")


def test_checkpoint_of_another_stage(tmp_path):
    """The error names both stages and what to do."""
    save_checkpoint(tmp_path / "a.pt", "pretrain")
    with pytest.raises(UserError, match="a.pt.*gan.*pretrain.*run train_gan.py"):
        load_checkpoint(tmp_path / "a.pt", ["gan"], "run train_gan.py")
    torch.save(torch.zeros(3), tmp_path / "b.pt")
    with pytest.raises(UserError, match="b.pt.*run train_gan.py"):
        load_checkpoint(tmp_path / "b.pt", ["gan"], "run train_gan.py")


def test_missing_checkpoint(tmp_path):
    """The error names the file and what to do."""
    with pytest.raises(UserError, match="none.pt.*run train_gan.py"):
        load_checkpoint(tmp_path / "none.pt", ["gan"], "run train_gan.py")


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


class MakesAFile:
    """Unpickling it would create `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_checkpoint_cannot_run_code(tmp_path):
    """A pickle may call anything; ours are read as tensors and plain values only."""
    path, made = tmp_path / "a.pt", tmp_path / "made"
    torch.save({"stage": "gan", "x": MakesAFile(made)}, path)
    with pytest.raises(UserError, match="a.pt"):
        load_checkpoint(path, ["gan"], "")
    path.write_bytes(pickle.dumps({"stage": "gan", "x": MakesAFile(made)}, protocol=2))
    with pytest.raises(UserError, match="a.pt"):
        load_checkpoint(path, ["gan"], "")
    assert not made.exists()
    pickle.loads(path.read_bytes())["x"].close()                # it is a trap indeed
    assert made.exists()


def test_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    """A full disk in the middle of a write must not cost the run so far."""
    path = tmp_path / "a.pt"
    save_checkpoint(path, "gan", step=1)

    def half(state, target):
        Path(target).write_bytes(b"half")
        raise OSError("No space left on device")
    monkeypatch.setattr(training.torch, "save", half)
    with pytest.raises(OSError):
        save_checkpoint(path, "gan", step=2)
    assert load_checkpoint(path, ["gan"], "")["step"] == 1


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
    with autocast(torch.device("cpu"), "float32"):
        assert torch.equal(plain(x), wanted)


@pytest.mark.parametrize("seconds, asked, said", [
    (0.1, "float32", "2.00"), (0.1, "bfloat16", "2.00"), (1, "float32", ""), (1, "bfloat16", "0.20")])
def test_the_speed_of_bfloat16_is_said(seconds, asked, said, monkeypatch):
    """On a CPU, measured: where it is asked for, and where it is worth a try."""
    ticks = iter([0, 0.2] * 4 + [0, seconds] * 4)
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(ticks))
    assert training.precision_note(torch.device("cuda"), asked) == ""
    note = training.precision_note(torch.device("cpu"), asked)
    assert note == (said and f"; --precision bfloat16 is {said} times as fast here as float32")
