"""Refining, segmentation and the networks, held against the paper told a second time in numpy.

Nothing here is recorded from a run: every value wanted is computed from the definition, but for
two things taken from torchvision as they are, the trunk of ResNet-50 and Inception V3.
"""
import json

import numpy as np
import pytest
import torch
import torchvision
from conftest import call, call_all
from PIL import Image
from torch import nn

from models import DeepLabV3Plus, Discriminator, Refiner, UNet, inception_features, resize_299
from prepare import CLASSES, IGNORE, PALETTE, load_images, load_labels, names
from segment import confusion


def save_pair(folder, name, rgb, label):
    """One image and its label of a prepared domain: uint8 [H, W, 3] and [H, W]."""
    for kind, image in (("images", Image.fromarray(rgb)), ("labels", Image.fromarray(label))):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        if kind == "labels":
            image.putpalette(PALETTE.tobytes())
        image.save(folder / kind / f"{name}.png")


# --------------------------------------------------------------------------------- refining


def refiner_by_hand(shift):
    """A Refiner that gives tanh(shift - x) of its pixel: two maps of each colour hold what is
    above 0 and below, blocks of zeros change neither, the last layer puts them together."""
    net = Refiner(maps=6, blocks=2)
    for weights in net.parameters():
        weights.data.zero_()
    for c in range(3):
        for map_, sign in ((c, 1), (c + 3, -1)):
            net.first.weight.data[map_, c, 1, 1] = sign
            net.last.weight.data[c, map_] = -sign
    net.last.bias.data.fill_(shift)
    return net


@pytest.fixture(scope="module")
def refined(tmp_path_factory):
    """data/synthetic, each image and label with its serial number, refined four times."""
    cwd = tmp_path_factory.mktemp("refined")
    for split, serials in (("train", range(1, 13)), ("test", range(8, 15))):
        for name in serials:                   # in the order of names() 10 comes before 8 and 9
            serial = name if split == "train" else name + 5        # the names of both overlap
            rgb = np.full((12, 16, 3), 10 * serial, np.uint8)
            rgb[2:5, 3:9] = (250, 5, 120)
            label = np.full((12, 16), serial % 19, np.uint8)
            label[2:5, 3:9] = IGNORE
            save_pair(cwd / "data/synthetic" / split, name, rgb, label)
    for method, shift in (("ours", 0.25), ("simgan", -0.25)):
        (cwd / "runs" / method).mkdir(parents=True)
        for stage, other in (("average", 0), ("gan", 2), ("pretrain", -2)):
            net = refiner_by_hand(shift + other)
            torch.save({"stage": stage, "step": 3, "refiner_args": net.args,
                        "refiner": net.state_dict()}, cwd / f"runs/{method}/{stage}.pt")
    call_all(["refine.py"], ["refine.py", "--method", "simgan"],
             *[["refine.py", "--batch-size", n, "--out", f"data/{n}"] for n in (1, 3)],
             ["refine.py", "--checkpoint", "runs/simgan/gan.pt", "--out", "data/gan"], cwd=cwd)
    return cwd / "data"


@pytest.mark.parametrize("domain, shift", [("ours", 0.25), ("1", 0.25), ("3", 0.25),
                                           ("simgan", -0.25), ("gan", 1.75)])
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_image_is_refined_under_its_name_with_its_label(refined, domain, shift, split):
    """By the R of its method (the average, unless a checkpoint is given), whatever the batch."""
    before, after = refined / "synthetic" / split, refined / domain / split
    assert names(before) == names(after), "images are lost, or have other names"
    images, found = load_images(before).numpy(), load_images(after).numpy().astype(int)
    wanted = ((np.tanh(shift - (images / 127.5 - 1)) + 1) * 127.5).round()
    for i, name in enumerate(names(before)):
        assert np.abs(found[i] - wanted[i]).max() <= 1, \
            f"{domain}/{split}/{name}.png is not R of the synthetic image of that name"
        assert torch.equal(load_labels(after)[i], load_labels(before)[i]), \
            f"the label {domain}/{split}/{name}.png is not that of its synthetic image"


# ----------------------------------------------------------------------------- segmentation

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200),
           "yellow": (200, 200, 40)}
# What a colour is called. Yellow is void at first. From synthetic to real the other three go
# round in a circle, so that no matrix of confusion equals its transpose.
CALLED = {"synthetic": {"red": 0, "green": 8, "blue": 10, "yellow": IGNORE},
          "simgan": {"red": 0, "green": 10, "blue": 8, "yellow": IGNORE},
          "ours": {"red": 8, "green": 10, "blue": 0, "yellow": 13},
          "real": {"red": 8, "green": 10, "blue": 0, "yellow": 13}}
COUNTS = {"synthetic": (10, 18), "simgan": (9, 3), "ours": (10, 4), "real": (8, 5)}


def draw(random, called, left_to_right, top_to_bottom):
    """Four quarters of one colour each, of unequal size: [16, 32, 3] and its label."""
    row, column = random.integers(6, 11), random.integers(10, 23)
    rgb, label = np.zeros((16, 32, 3)), np.zeros((16, 32), np.uint8)
    for colour, place in (("red", np.s_[:row, :column]), ("green", np.s_[:row, column:]),
                          ("blue", np.s_[row:, :column]), ("yellow", np.s_[row:, column:])):
        rgb[place], label[place] = COLOURS[colour], called[colour]
    rgb = (rgb + random.normal(0, 4, rgb.shape)).astype(np.uint8)
    turn = np.s_[::top_to_bottom, ::left_to_right]
    return rgb[turn], label[turn]


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """Lopsided data: in training red is always on the left and mostly above; tests have it on
    the right and below. Only who mirrors image and label alike learns that colour decides."""
    cwd, random = tmp_path_factory.mktemp("streets"), np.random.default_rng(0)
    for domain, called in CALLED.items():
        for split, count in zip(("train", "test"), COUNTS[domain]):
            for i in range(count):
                test = split == "test"
                pair = draw(random, called, -1 if test else 1, -1 if test or i % 3 == 0 else 1)
                save_pair(cwd / "data" / domain / split, i, *pair)
    return cwd


def iou(matrix):
    """Per class; nan for a class in neither truth nor prediction. Rows are truth."""
    hit, all_ = np.diag(matrix), matrix.sum(0) + matrix.sum(1)
    return np.array([h / (a - h) if a else np.nan for h, a in zip(hit, all_)])


def cells(text, first):
    """The Markdown tables whose head begins with `first`: a list of {row: {column: cell}}."""
    tables, head = [], None
    for line in text.splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith(f"| {first}"):
            head = row
            tables.append({})
        elif not line.startswith("|"):
            head = None
        elif head and line.startswith("|---"):
            assert line == "|---" * len(head) + "|", "Markdown shows no table"
        elif head:
            tables[-1][row[0]] = dict(zip(head[1:], row[1:], strict=True))
    return tables


def check_tables(folder, out, rows, seeds):
    """What is printed, and its file, say what the confusion matrices say, cell by cell."""
    record = json.loads((folder / "segment_unet.json").read_text())
    text = (folder / "segment_unet.md").read_text()
    assert text in out, "what is printed is not what is written"
    assert record["domains"] == list(CALLED) and record["seeds"] == seeds
    assert record["test_images"] == {d: COUNTS[d][1] for d in CALLED}, "other images were tested"
    matrices = {seed: {d: {o: np.array(m) for o, m in row.items()} for d, row in table.items()}
                for seed, table in record["confusion"].items()}

    def mean(values, digits):
        spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(seeds) > 1 else ""
        return f"{np.mean(values):.{digits}f}{spread}"

    scores = {"mIoU": lambda m: np.nanmean(iou(m)),
              "accuracy": lambda m: 100 * np.trace(m) / m.sum()}
    tables = cells(text, "trained on")
    assert len(tables) == 2
    for (metric, score), table, digits in zip(scores.items(), tables, (3, 1)):
        assert list(table) == rows, f"rows of {metric} are not what was trained on"
        for row in rows:
            assert list(table[row]) == list(CALLED), "columns are not what was tested on"
            for column, cell in table[row].items():
                values = [score(matrices[str(s)][row][column]) for s in seeds]
                where = f"{metric}, trained on {row}, tested on {column}: {cell}"
                wanted = mean(values, digits)
                if column in ("synthetic", "simgan" if row == "simgan" else "ours", "real"):
                    assert cell.startswith(f"**{wanted}** ("), f"{where} is not bold {wanted}"
                else:
                    assert cell == wanted, f"{where} is not {wanted}"
                kept = [record["scores"][str(s)][row][column][metric] for s in seeds]
                np.testing.assert_allclose(kept, values, rtol=1e-6, err_msg=where)
    (table,) = cells(text, "class |")
    for row in rows:
        on_real = [matrices[str(s)][row]["real"] for s in seeds]
        for i, name in enumerate(CLASSES):
            values = [iou(m)[i] for m in on_real]
            wanted = "-" if np.isnan(values).any() else mean(values, 3)
            assert table[name][row] == wanted, f"IoU of {name}, trained on {row}"
        wanted = str(np.isfinite(iou(on_real[0])).sum())
        assert table["classes in the mean"][row] == wanted, "classes without IoU were counted"
    errors = [max(record["scores"][str(s)][row]["real"][f"{metric}_se"] for s in seeds
                  for row in rows) for metric in scores]
    assert f"to {errors[0]:.3f} (mIoU) and {errors[1]:.1f} (accuracy)" in text, "errors on real"
    assert ("± is the standard deviation over the seeds" in text) == (len(seeds) > 1)
    return matrices


def test_segmentation_learns_what_a_domain_calls_its_colours(streets):
    """Trained on a, tested on b: the pixels of a colour have b's class and are found to be a's."""
    out, _ = call("segment.py", "--network", "unet", "--epochs", 10, "--batch-size", 4, "--lr",
                  3e-3, cwd=streets)
    matrices = check_tables(streets / "results", out, list(CALLED), [0])["0"]
    for a, trained in CALLED.items():
        for b, tested in CALLED.items():
            m, truth = matrices[a][b], load_labels(streets / "data" / b / "test").numpy()
            where = f"trained on {a}, tested on {b}"
            wanted = [(truth == c).sum() for c in range(19)]
            assert m.sum(1).tolist() == wanted, f"{where}: the rows are not the truth"
            for colour in COLOURS:
                true, learnt = tested[colour], trained[colour]
                if IGNORE not in (true, learnt):
                    part = m[true, learnt] / m[true].sum()
                    assert part > 0.9, f"{where}: {colour} is {CLASSES[true]} there and must be " \
                        f"found to be {CLASSES[learnt]}, but only {part:.0%} of it is"
            if trained == tested:
                assert np.nanmean(iou(m)) > 0.9, f"{where}: mIoU {np.nanmean(iou(m)):.3f}"


def train_plainly(images, labels, seed, epochs, batch, lr):
    """U-Net's training, told again. Random numbers: the weights; then every epoch the order, and
    for each of its batches which images are mirrored. The odd rest of an epoch is left out."""
    torch.manual_seed(seed)
    net = UNet().to(memory_format=torch.channels_last)
    adam = torch.optim.Adam(net.parameters(), lr)
    steps = epochs * (len(images) // batch)
    for step in range(steps):
        if step % (len(images) // batch) == 0:
            order = torch.randperm(len(images)).tolist()
        chosen, order = order[:batch], order[batch:]
        x, y = images[chosen] / 127.5 - 1, labels[chosen].long()
        for i, mirror in enumerate(torch.rand(batch) < 0.5):
            if mirror:
                x[i], y[i] = x[i].flip(2), y[i].flip(1)
        adam.param_groups[0]["lr"] = lr * (1 + np.cos(np.pi * step / steps)) / 2
        adam.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y, ignore_index=IGNORE).backward()
        adam.step()
    return net.eval()


def test_segmentation_trainings_differ_in_data_and_seed_only(streets):
    """Two seeds, hardly trained: the weights are those of the training told again, on the same
    8 of 10 images for all seeds, and every matrix is what they give in eval mode."""
    out, _ = call("segment.py", "--network", "unet", "--epochs", 2, "--batch-size", 3, "--seeds",
                  0, 1, "--train", "synthetic", "real", "--out", "other", cwd=streets)
    matrices = check_tables(streets / "other", out, ["synthetic", "real"], [0, 1])
    for seed, table in matrices.items():
        for trained, row in table.items():
            folder = streets / "data" / trained / "train"
            images, labels = load_images(folder), load_labels(folder)
            chosen = np.random.default_rng(0).permutation(len(images))[:8]
            net = train_plainly(images[chosen], labels[chosen], int(seed), 2, 3, 1e-3)
            saved = torch.load(streets / f"other/weights/unet_{trained}_seed{seed}.pt",
                               weights_only=True)["weights"]
            for name, p in net.named_parameters():
                gap = (saved[name] - p).abs().mean()          # a wrong line moves all by about lr
                assert gap < 2e-5, f"{trained}, seed {seed}: {name} was trained otherwise: {gap}"
            net.load_state_dict(saved)
            for tested, matrix in row.items():
                folder = streets / "data" / tested / "test"
                with torch.no_grad():
                    predicted = net(load_images(folder) / 127.5 - 1).argmax(1)
                wanted = confusion(load_labels(folder), predicted).numpy()
                assert np.abs(matrix - wanted).sum() <= 0.01 * wanted.sum(), \
                    f"trained on {trained}, tested on {tested}: not what the network predicts"


# ----------------------------------------------------- a forward pass, written out in numpy


def convolve(x, weight, bias=None, stride=1, rate=1):
    """Float64 [N, C, H, W], padded before: one shifted product for each pixel of the kernel."""
    height = (x.shape[2] - rate * (weight.shape[2] - 1) - 1) // stride + 1
    width = (x.shape[3] - rate * (weight.shape[3] - 1) - 1) // stride + 1
    y = np.zeros((len(x), height, width, len(weight)))
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            seen = x[:, :, i * rate:, j * rate:][:, :, ::stride, ::stride][..., :height, :width]
            y += np.tensordot(seen, weight[:, :, i, j], (1, 1))
    y = y.transpose(0, 3, 1, 2)
    return y if bias is None else y + bias[:, None, None]


def pad(x, top, bottom, left, right, **mode):
    return np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), **mode)


def pool(x, size, how):
    """Windows of size x size, stride 2, of what is padded before."""
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (2, 3))[:, :, ::2, ::2]
    return how(windows, (4, 5))


def relu(x):
    """A ReLU that cuts nothing, or all, would not be missed: then the test is worth nothing."""
    assert (x > 0).mean() > 0.05 and (x < 0).mean() > 0.05
    return np.maximum(x, 0)


def bilinear(x, height, width):
    """align_corners=False, no antialias: pixel centres at i + 1/2, the edge repeated."""
    for axis, size in ((2, height), (3, width)):
        n = x.shape[axis]
        place = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
        low = np.floor(place).astype(int)
        part = (place - low).reshape([-1, 1] if axis == 2 else [-1])
        x = x.take(low, axis) * (1 - part) + x.take(np.minimum(low + 1, n - 1), axis) * part
    return x


def with_known_weights(net):
    """`net` in float64 and eval mode, no two of its numbers alike: a formula of their place, so
    large that every ReLU cuts. Variances stay positive."""
    for name, p in net.double().eval().state_dict().items():
        if p.is_floating_point():
            k = torch.arange(p.numel(), dtype=torch.float64) + len(name)
            value = (k * k % 6007).sin().view(p.shape)
            if p.ndim > 1:
                p.copy_(value * 2 / (p.numel() / len(p)) ** 0.5)
            else:
                p.copy_(1 + value / 2 if name.endswith("var") else value / 4)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data += 1
    return net


def known_images(n, height, width):
    """float64 [n, 3, height, width] in [-1, 1]: rough, and unlike everywhere."""
    k = torch.arange(n * 3 * height * width, dtype=torch.float64)
    return (k * k % 4001).sin().view(n, 3, height, width)


def same(net, x, wanted, what):
    with torch.no_grad():
        found = net(x).numpy()
    assert found.shape == wanted.shape, f"{what}: {found.shape} instead of {wanted.shape}"
    gap = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert gap < 1e-9, f"{what} is not the network of the paper: off by {gap:.1g} of its maximum"


def numbers(net):
    return {name: p.numpy() for name, p in net.state_dict().items()}


def batch_norm(x, p, name):
    """In eval mode: the running statistics, eps 1e-5."""
    scale, shift, mean, var = (p[f"{name}.{k}"][:, None, None] for k in (
        "weight", "bias", "running_mean", "running_var"))
    return (x - mean) / np.sqrt(var + 1e-5) * scale + shift


@pytest.mark.parametrize("args, blocks, size", [({}, 5, (7, 9)),
                                                ({"maps": 6, "blocks": 2}, 2, (12, 8))])
def test_refiner_equals_section_5_1_written_out(args, blocks, size):
    """4x4 to 64 maps, ReLU; five blocks of two 4x4 with a ReLU between, the identity added, a
    ReLU after; 1x1; tanh. All padding reflects: 1 before and 2 after, in a block 1 then 2."""
    net = with_known_weights(Refiner(**args))
    p, images = numbers(net), known_images(2, *size)
    x = pad(images.numpy(), 1, 2, 1, 2, mode="reflect")
    x = relu(convolve(x, p["first.weight"], p["first.bias"]))
    for i in range(blocks):
        y = pad(x, 1, 1, 1, 1, mode="reflect")
        y = relu(convolve(y, p[f"blocks.{i}.conv1.weight"], p[f"blocks.{i}.conv1.bias"]))
        y = pad(y, 2, 2, 2, 2, mode="reflect")
        x = relu(x + convolve(y, p[f"blocks.{i}.conv2.weight"], p[f"blocks.{i}.conv2.bias"]))
    x = convolve(x, p["last.weight"], p["last.bias"])
    assert np.abs(x).max() > 1, "without tanh it must look different"
    same(net, images, np.tanh(x), "R")
    assert args or len(p["first.weight"]) == 64, "the paper's R has 64 maps"
    assert Refiner(**net.args).args == net.args, "a checkpoint does not say which R it holds"


# The pads (top, bottom, left, right) that TensorFlow's SAME gives conv1, conv2, pool and conv3.
PADS = [(3, (80, 160), [(1, 2, 2, 2), (1, 2, 1, 1), (0, 1, 1, 1), (1, 1, 0, 1)]),   # Table 1
        (3, (40, 80), [(2, 2, 1, 2), (1, 1, 1, 2), (1, 1, 0, 1), (0, 1, 1, 1)]),
        (1, (20, 25), [(2, 2, 2, 2), (1, 1, 1, 2), (0, 1, 1, 1), (1, 1, 1, 1)])]


@pytest.mark.parametrize("final_relu", [False, True])
@pytest.mark.parametrize("stride, size, pads", PADS)
def test_discriminator_equals_table_1_written_out(stride, size, pads, final_relu):
    """5x5/3 96, 4x4/2 64, max pool 3/2, 3x3/2 32, 1x1 32, 1x1 2, a ReLU after each but the last
    unless Table 1's own is asked for; SAME padding, in which the maximum sees no zeros."""
    args = {"stride": stride, "final_relu": final_relu}
    paper = {"stride": 3, "final_relu": False}
    net = with_known_weights(Discriminator() if args == paper else Discriminator(**args))
    p, images = numbers(net), known_images(2, *size)
    x = pad(images.numpy(), *pads[0])
    x = relu(convolve(x, p["conv1.weight"], p["conv1.bias"], stride))
    x = pad(x, *pads[1])
    x = relu(convolve(x, p["conv2.weight"], p["conv2.bias"], 2))
    x = pool(pad(x, *pads[2], constant_values=-np.inf), 3, np.max)
    x = relu(convolve(pad(x, *pads[3]), p["conv3.weight"], p["conv3.bias"], 2))
    x = relu(convolve(x, p["conv4.weight"], p["conv4.bias"]))
    x = convolve(x, p["conv5.weight"], p["conv5.bias"])
    same(net, images, relu(x) if final_relu else x, "D")
    assert Discriminator(**net.args).args == net.args, "a checkpoint does not say which D"


def convolve_twice(x, p, name):
    """(3x3 without bias, padded by zeros, BatchNorm, ReLU) twice."""
    for i in (0, 3):
        x = convolve(pad(x, 1, 1, 1, 1), p[f"{name}.{i}.weight"])
        x = relu(batch_norm(x, p, f"{name}.{i + 1}"))
    return x


@pytest.mark.parametrize("args, height, width", [({"base": 4}, 17, 30), ({}, 16, 32)])
def test_unet_equals_its_drawing_written_out(args, height, width):
    """Four times down by max pooling, four times up by a 2x2 transposed convolution, each time
    joined (skip first) with the map of its size; the edge is repeated up to a multiple of 16."""
    net = with_known_weights(UNet(**args))
    p, images = numbers(net), known_images(2, height, width)
    x = pad(images.numpy(), 0, -height % 16, 0, -width % 16, mode="edge")
    skips = [convolve_twice(x, p, "down.0")]
    for i in (1, 2, 3, 4):
        skips.append(convolve_twice(pool(skips[-1], 2, np.max), p, f"down.{i}"))
    x = skips.pop()
    for i in range(4):
        weight, bias = p[f"up.{i}.weight"], p[f"up.{i}.bias"]         # [inputs, outputs, 2, 2]
        n, _, h, w = x.shape
        up = np.einsum("nchw,coij->nohiwj", x, weight).reshape(n, -1, 2 * h, 2 * w)
        up = up + bias[:, None, None]
        x = convolve_twice(np.concatenate([skips.pop(), up], 1), p, f"merge.{i}")
    x = convolve(x, p["head.weight"], p["head.bias"])[..., :height, :width]
    same(net, images, x, "U-Net")
    assert args or p["down.4.3.weight"].shape[:2] == (512, 512), "32 maps at the top, 512 below"


def test_deeplab_equals_its_papers_written_out():
    """ASPP of 1x1, 3x3 at rates 6, 12 and 18 and the mean of the image; the decoder with the
    low-level path; both times enlarged bilinearly. The map of 7 x 20 lets every rate reach it.
    The trunk is torchvision's ResNet-50 with an output stride of 16, taken as it is."""
    net = with_known_weights(DeepLabV3Plus())
    trunk = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True])
    trunk.avgpool = trunk.fc = nn.Identity()
    renamed, state = {}, net.state_dict()
    places = {"stem.0.": "conv1.", "stem.1.": "bn1.", "layer1.": "layer1.", "deep.0.": "layer2.",
              "deep.1.": "layer3.", "deep.2.": "layer4."}
    for ours, theirs in places.items():
        renamed.update({theirs + k[len(ours):]: v for k, v in state.items() if k.startswith(ours)})
    trunk.double().eval().load_state_dict(renamed)
    seen, images = {}, known_images(1, 100, 310)
    for name in ("layer1", "layer4"):
        getattr(trunk, name).register_forward_hook(
            lambda module, x, y, name=name: seen.update({name: y.numpy()}))
    with torch.no_grad():
        trunk(images)
    low, deep, p = seen["layer1"], seen["layer4"], numbers(net)
    assert deep.shape[2:] == (7, 20)

    branches = [convolve(deep, p["aspp.convs.0.0.weight"])]
    for i, rate in ((1, 6), (2, 12), (3, 18)):
        name = f"aspp.convs.{i}.0.weight"
        weight = p[name] if name in p else np.stack(
            [p[f"{name}s.{k}"] for k in range(9)], -1).reshape(256, 2048, 3, 3)
        branches.append(convolve(pad(deep, *[rate] * 4), weight, rate=rate))
    branches = [relu(batch_norm(x, p, f"aspp.convs.{i}.1")) for i, x in enumerate(branches)]
    mean = convolve(deep.mean((2, 3), keepdims=True), p["aspp.convs.4.1.weight"])
    mean = relu(batch_norm(mean, p, "aspp.convs.4.2"))
    x = np.concatenate([*branches, np.broadcast_to(mean, branches[0].shape)], 1)
    x = relu(batch_norm(convolve(x, p["aspp.project.0.weight"]), p, "aspp.project.1"))

    low = relu(batch_norm(convolve(low, p["low.0.weight"]), p, "low.1"))
    x = np.concatenate([bilinear(x, *low.shape[2:]), low], 1)
    x = convolve(convolve_twice(x, p, "decoder"), p["head.weight"], p["head.bias"])
    same(net, images, bilinear(x, 100, 310), "DeepLabV3+")


@pytest.mark.parametrize("size", [(24, 48), (80, 160), (320, 400)])
def test_inception_sees_299_pixels_in_its_range_and_order(size):
    """From the uint8 image on: 0..255 to [-1, 1], then bilinear to 299 x 299 without antialias,
    also where that shrinks; features of image i in row i, whatever the batch."""
    images = ((known_images(3, *size) + 1) * 127.5).round().to(torch.uint8)
    wanted = bilinear(images.numpy() / 127.5 - 1, 299, 299)
    found = resize_299(images).numpy()
    assert np.abs(found - wanted).max() < 1e-4, "Inception gets other pixels"
    for batch_size in (None, 1, 2):
        features = inception_features(nn.Flatten(), images, "cpu", batch_size)
        assert features.dtype == torch.float64
        assert np.abs(features.numpy() - wanted.reshape(3, -1)).max() < 1e-4, \
            "features of another image, or of other pixels"
