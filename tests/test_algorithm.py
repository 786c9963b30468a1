"""What the scripts compute is what the paper says: held against plain.py, number by number, and
against networks that are written out.

Nothing is recorded from a run: every value wanted is computed from its definition, but for two
things taken from torchvision as they are, the trunk of ResNet-50 and Inception V3.
"""
import csv
import inspect
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import Command, call, parsed, save_pair
from PIL import Image
from torch import nn
from torchvision.models.segmentation.deeplabv3 import ASPP

import plain
import segment
from evaluate import CONTROL, FLOOR
from models import (DeepLabV3Plus, Discriminator, Refiner, UNet, fid, inception_features,
                    kid, load_inception, ssim)
from prepare import CLASSES, IGNORE, PALETTE, TABLE, load_images, load_labels, names
from support.figures import save_curves, save_grid


@pytest.fixture(scope="module")
def cwd(tmp_path_factory):
    """Prepared images and labels of noise, 24 x 48, none like another; each domain has its
    brightness, real one training image more and 17 to test on; four classes, a tenth void, or, of
    every fourth image, five and none."""
    cwd, random = tmp_path_factory.mktemp("algorithm"), np.random.default_rng(0)
    for k, domain in enumerate(["synthetic", "pretrained", "simgan", "ours", "real"]):
        real = domain == "real"
        for split, count in (("train", 10 + real), ("test", 7 + 10 * real)):
            for i in range(count):
                image = random.integers(0, 120, (24, 48, 3), np.uint8) + np.uint8(130 - 30 * k)
                label = np.uint8([0, 3, 8, 10, 13])[random.integers(0, 19, (24, 48), np.uint8) % 5]
                label[random.random(label.shape) < 0.1] = IGNORE
                label[label == (IGNORE if i % 4 == 3 else 13)] = 8     # the most classes, no void
                save_pair(cwd / "data" / domain / split, f"{i:02d}", image, label)
    return cwd


# ------------------------------------------------------------------------------ 1. training

PRETRAIN = ["loss", "mean_change", "accuracy"]
GAN = ["loss_adv", "loss_rec", "d_loss_real", "d_loss_refined", "d_acc_real", "d_acc_refined",
       "mean_change", "history"]
# Settings of both scripts, of pretrain.py, of train_gan.py; what is not there is the default. In
# "simgan" and "finer D" the best step would be another by one row instead of the mean since the
# last look, by the mean of all rows, or with the last step of the warm-up.
RUNS = {
    "ours": (dict(batch_size=2), dict(steps=3, d_steps=3), dict(steps=6, sample_every=2)),
    "simgan": (
        dict(batch_size=2),
        dict(steps=3, d_steps=3, lr=.01, d_lr=1e-4),
        dict(steps=8, lr=1e-3, d_lr=1e-4, d_optimizer="adam", history=0, average=3,
             sample_every=2)),
    "finer D": (
        dict(batch_size=3, seed=5),          # where the last ReLU cuts some patches
        dict(steps=3, d_steps=3, d_lr=.01, layer="Conv2d_2b_3x3", final_relu=True, d_stride=1),
        dict(steps=7, d_optimizer="sgd", history=2, rec="l2", rec_batch=64, alpha=3, beta=1e-3,
             average=4, sample_every=6))}


def begin(script, where, settings, cwd):
    """Start a script with these flags."""
    args = [script, "--device", "cpu", *where]
    for name, value in settings.items():
        args += ["--" + name.replace("_", "-")] + ([] if value is True else [value])
    return Command(*args, cwd=cwd)


def compare(log, columns, wanted, weights):
    """A log is its `wanted` rows; weights {what: (found, wanted)}. Returns the log's rows."""
    rows = list(csv.DictReader(log.open()))
    for step, (row, values) in enumerate(zip(rows, wanted, strict=True), 1):
        right = {"step": str(step)}
        right |= {column: f"{value:.6g}" for column, value in zip(columns, values, strict=True)}
        assert {column: row[column] for column in right} == right, log
    for what, (found, right) in weights.items():
        assert not [k for k in right if not torch.equal(found[k], right[k])], what
    return rows


def drawn(file, rows):
    """Whether a picture is this grid, captions included; what a grid looks like: section 6."""
    save_grid(file.with_suffix(".wanted"), rows)
    return file.read_bytes() == file.with_suffix(".wanted").read_bytes()


@pytest.mark.parametrize("name", RUNS)
def test_training_is_the_papers(name, cwd):
    """Bit for bit: both logs, R, D, the averaged R, the best step and its R."""
    both, pretrain, gan = RUNS[name]
    where = {"ours": [], "simgan": ["--method", "simgan"]}.get(name, ["--run", f"runs/{name}"])
    run = cwd / "runs" / name
    x, y, x_test, y_test = (load_images(cwd / "data" / d / split) for split in ("train", "test")
                            for d in ("synthetic", "real"))
    y_test = y_test[:7]                                     # as many as of x_test

    process = begin("pretrain.py", [*where, "--inception", "random"], {**both, **pretrain}, cwd)
    R, D, log = plain.pretrain(x, y, method="simgan" if name == "simgan" else "ours",
                               **both, **pretrain)
    assert process.wait() == 0, process.read("stderr")
    file = torch.load(run / "pretrain.pt", weights_only=True)
    rows = compare(run / "pretrain.csv", PRETRAIN, log, {
        "R after pre-training": (file["refiner"], R.state_dict()),
        "D after pre-training": (file["discriminator"], D.state_dict())})
    assert [row["network"] for row in rows] == ["R"] * 3 + ["D"] * 3
    (_, change, _), (loss, _, right) = np.mean(log[:3], 0), np.mean(log[3:], 0)
    for said in (f"= {change:.3f} with", f"D: loss {loss:.3f}", f"accuracy {right:.2f}"):
        assert said in process.read("stdout")
    refined = R(plain.as_input(x[:6]))
    change = (refined - plain.as_input(x[:6])).abs() - 1
    assert drawn(run / "pretrain.png", {
        "synthetic": x[:6], "R(synthetic)": plain.as_images(refined),
        "|difference|": plain.as_images(change)})

    process = begin("train_gan.py", where, {**both, **gan}, cwd)
    average = max(1, gan["steps"] // 5)                          # where it is not given
    log, average, step, best = plain.train(R, D, x, y, **{"average": average, **both, **gan})
    assert process.wait() == 0, process.read("stderr")
    last, averaged, chosen = (torch.load(run / f"{stem}.pt", weights_only=True)
                              for stem in ("last", "average", "gan"))
    rows = compare(run / "log.csv", GAN, log, {
        "R": (last["refiner"], R.state_dict()), "D": (last["discriminator"], D.state_dict()),
        "R averaged": (averaged["refiner"], average),
        f"R at the best step by the paper's rule, {step}, which gan.pt says is {chosen['step']}":
            (chosen["refiner"], best)})
    assert (last["step"], averaged["step"], chosen["step"]) == (len(log), len(log), step)
    save_curves(run / "wanted.png", last["log"], gan["sample_every"], step)
    assert (run / "curves.png").read_bytes() == (run / "wanted.png").read_bytes()
    for step, row in enumerate(rows, 1):
        looks = step % gan["sample_every"] == 0 or step == len(rows)
        assert (row["ssim"] != "nan") == looks, f"step {step}"
    refined = plain.as_images(R(plain.as_input(x_test)))
    change = (refined.int() - x_test.int()).abs().byte()
    assert float(rows[-1]["ssim"]) == pytest.approx(ssim(refined, y_test).mean().item(), rel=1e-5)
    R.load_state_dict(average)
    averaged = plain.as_images(R(plain.as_input(x_test)))
    assert drawn(run / f"samples/step_{len(log):06d}.png", {
        "synthetic": x_test[:6], "refined": refined[:6], "averaged R": averaged[:6],
        "real": y_test[:6], "|difference|": change[:6]})


# ------------------------------------------------------------------------------ 2. refining


@pytest.fixture(scope="module")
def refined(cwd, tmp_path_factory):
    """data/synthetic, refined several times."""
    source, cwd = cwd / "data/synthetic", tmp_path_factory.mktemp("refined")
    for folder in ("data", "other"):
        shutil.copytree(source, cwd / folder / "synthetic")
    torch.manual_seed(0)
    for method in ("ours", "simgan"):
        (cwd / "runs" / method).mkdir(parents=True)
        for stage in ("average", "gan", "pretrain"):
            net = Refiner(maps=6, blocks=2)
            for weights in net.parameters():
                weights.data *= 3                      # or it hardly depends on the image
            torch.save({"stage": stage, "step": 3, "refiner_args": net.args,
                        "refiner": net.state_dict()}, cwd / f"runs/{method}/{stage}.pt")
    call("refine.py", "--checkpoint", "runs/simgan/gan.pt", "--out", "data/ours", cwd=cwd)
    (cwd / "data/ours/train/images/of an older run.png").touch()
    out, _ = call("refine.py", "--batch-size", 2, cwd=cwd)     # data/ours is made anew
    for flags in (["--method", "simgan"], ["--data", "other/synthetic"],
                  ["--checkpoint", "runs/simgan/gan.pt", "--out", "data/gan"]):
        call("refine.py", *flags, cwd=cwd)
    assert "average.pt (step 3)" in out and "done: 17 refined images" in out
    made = json.loads((cwd / "data/gan/refine.json").read_text())
    assert (made["checkpoint"], made["step"]) == ("runs/simgan/gan.pt", 3)
    return cwd / "data"


@pytest.mark.parametrize("domain, checkpoint", [
    ("ours", "ours/average"), ("../other/ours", "ours/average"), ("simgan", "simgan/average"),
    ("gan", "simgan/gan")])
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_image_is_refined_under_its_name_with_its_label(refined, domain, checkpoint, split):
    """By the R of its method (the average, unless a checkpoint is given)."""
    before, after = refined / "synthetic" / split, refined / domain / split
    assert names(before) == names(after), "images are lost, or have other names"
    state = torch.load(refined.parent / f"runs/{checkpoint}.pt", weights_only=True)
    R = Refiner(**state["refiner_args"])
    R.load_state_dict(state["refiner"])
    wanted = plain.as_images(R(plain.as_input(load_images(before)))).int()
    found = load_images(after).int()
    assert (found - wanted).abs().max() <= 1, "not R of the synthetic image of that name"
    assert torch.equal(load_labels(after), load_labels(before)), "not the label of its image"


# -------------------------------------------------------------------------- 3. segmentation

ROWS, COLUMNS = ["simgan", "real"], ["synthetic", "simgan", "ours", "real"]


def test_segmentation_trainings_differ_in_data_and_seed_only(cwd):
    """Bit for bit: two seeds, hardly trained, on the same 10 of 11 images for all seeds; and every
    matrix of confusion, and Table 7 (of seed 0), is what the network gives in eval mode."""
    def coloured(labels):
        return torch.from_numpy(PALETTE[labels.numpy()]).permute(0, 3, 1, 2)
    real = cwd / "data/real/test"
    seen, truth = load_images(real)[3:12:4], load_labels(real)[3:12:4]    # with most classes
    table7 = {"real test image": seen, "ground truth": coloured(truth)}
    for split in ("train", "test"):
        (cwd / "data/.hidden" / split).mkdir(parents=True)     # no domain, here and in Table 2
    out, _ = call("segment.py", "--network", "unet", "--epochs", 2, "--batch-size", 4, "--seeds",
                  0, 1, "--seed", 3, "--train", *ROWS, cwd=cwd)
    record = json.loads((cwd / "results/segment_unet.json").read_text())
    text = (cwd / "results/segment_unet.md").read_text()
    assert text in out, "what is printed is not what is written"
    assert text.startswith("### U-Net: 10 training images, 2 epochs")
    assert record["domains"] == COLUMNS and record["seeds"] == [0, 1]
    assert record["images"] == 10 and record["epochs"] == 2 and "torch" in record["versions"]
    assert "10 training images of every domain" in out
    assert record["test_images"] == {"synthetic": 7, "simgan": 7, "ours": 7, "real": 17}
    found = {seed: {row: {column: segment.scores(torch.tensor(matrix))
                          for column, matrix in of_row.items()} for row, of_row in of_seed.items()}
             for seed, of_seed in record["confusion"].items()}
    assert record["scores"] == json.loads(json.dumps(found), parse_constant=lambda _: None)
    for metric, paper in segment.PAPER["unet"].items():
        assert segment.matrix_table(metric, paper, found, ROWS, COLUMNS) in text
    assert "\n| bicycle | - | - |\n" in text and "\n± is the standard deviation over" in text
    assert segment.class_table(found, ROWS, TABLE) in text
    for seed, table in record["confusion"].items():
        for trained, row in table.items():
            folder = cwd / "data" / trained / "train"
            x, y = load_images(folder), load_labels(folder)
            chosen = np.random.default_rng(3).permutation(len(x))[:10]
            net = plain.train_unet(x[chosen], y[chosen], seed=int(seed), epochs=2, batch_size=4)
            file = torch.load(cwd / f"results/weights/unet_{trained}_seed{seed}.pt",
                              weights_only=True)["weights"]
            wrong = [k for k, w in net.state_dict().items() if not torch.equal(w, file[k])]
            assert not wrong, (trained, seed)
            for tested, matrix in row.items():
                folder = cwd / "data" / tested / "test"
                predicted = net(plain.as_input(load_images(folder))).argmax(1)
                assert matrix == segment.confusion(load_labels(folder), predicted).tolist()
            if seed == "0":
                with torch.no_grad():
                    predicted = net(plain.as_input(seen)).argmax(1)
                table7 |= {f"{trained}: a training image": x[chosen][:3],
                           f"{trained}: U-Net": coloured(predicted)}
    assert drawn(cwd / "results/table7.png", table7), "Table 7 shows something else"


# ------------------------------------------------------------------------------- 4. Table 2


@pytest.fixture(scope="module")
def table2(cwd):
    """What evaluate.py prints, table2.json and table2.md, of three images of seven, or of 17."""
    out, _ = call("evaluate.py", "--inception", "random", "--n", 3, "--pair-seed", 1, "--seed", 2,
                  "--device", "cpu", cwd=cwd)
    return (out, json.loads((cwd / "results/table2.json").read_text()),
            (cwd / "results/table2.md").read_text(encoding="utf-8"))


def test_table2_is_the_papers(cwd, table2):
    """Every row by the formulas from the images of its row and the same real partners."""
    _, found, _ = table2
    *domains, real, other = (load_images(cwd / "data" / folder) for folder in (
        "synthetic/test", "pretrained/test", "simgan/test", "ours/test", "real/test", "real/train"))
    random = np.random.default_rng(1)                     # partners, then other reals, then scenes
    real, other = real[random.permutation(17)[:3]], other[random.permutation(11)[:3]]
    scenes = random.permutation(7)[:3]
    inception = load_inception("random", "pool3", torch.cat([*[d[scenes] for d in domains], other]),
                               seed=2)

    def features(x):
        return inception(F.interpolate(plain.as_input(x), (299, 299), mode="bilinear")).double()
    of_real, values = features(real), {}
    rows = dict(zip(TABLE2, (d[scenes] for d in domains)))
    for name, x in {**rows, "real, other frames (the floor)": other}.items():
        of_x = features(x)
        values[name] = {"fid": fid(of_x, of_real),
                        "ssim": ssim(x, real).mean().item(), "kid": kid(of_x, of_real),
                        "ssim_range1": ssim(x, real, 1).mean().item()}
        for metric, value in values[name].items():
            assert found["rows"][name]["scores"][metric]["value"] == pytest.approx(
                value, rel=1e-5), f"Table 2: {metric} of {name} and the real images"
    for metric, cell in found["differences"]["ours - synthetic"].items():
        assert cell["value"] == pytest.approx(values["ours"][metric] - values["synthetic"][metric],
                                              rel=1e-3), f"ours less synthetic: {metric}"
    flat = real.double().mean((0, 2, 3)).round()[:, None, None].expand(real.shape)
    assert found["rows"][CONTROL]["scores"]["ssim"]["value"] == pytest.approx(
        ssim(flat, real.double()).mean().item(), rel=1e-4)


def test_table2_says_everything(table2):
    """Each number in its column, with its error, beside the paper's; paired differences; N and the
    warning; how it came about: weights by hash, resize, data, command, versions."""
    out, found, text = table2
    assert text in out and "N = 3 images" in text and "warning: N = 3 is small for FID" in out
    assert text.startswith("| images vs real | random features, not an FID | KID x 1000 | SSIM (L "
                           "= 255) | SSIM (L = 1) | paper FID | paper SSIM |\n")
    rows, papers = {**found["rows"], **found["differences"]}, {**TABLE2, FLOOR: "- | -",
                                                               CONTROL: "- | -"}
    assert list(found["rows"]) == list(papers)
    assert list(found["differences"]) == [f"{row} - synthetic" for row in list(papers)[1:]] + [
        "ours - simgan"]
    lines = [line.strip("| ") for line in text.splitlines() if " ± " in line and line[0] == "|"]
    for line, (name, row) in zip(lines, rows.items(), strict=True):
        scores, cells, sign = row.get("scores", row), [], "" if name in papers else "+"
        for metric, scale, digits in (("fid", 1, 2), ("kid", 1000, 2), ("ssim", 1, 4),
                                      ("ssim_range1", 1, 4)):
            s = scores.get(metric)
            cells.append(f"{scale * s['value']:{sign}.{digits}f} ± {scale * s['se']:.{digits}f}"
                         if s else "-")
        found_name, *found_cells = line.split(" | ")
        assert found_name == name and " | ".join(found_cells[4:]) == papers.get(name, ""), line
        assert [cell.strip("()") for cell in found_cells[:4]] == cells, line    # (not sure)
    assert found["command"].startswith("evaluate.py --inception random --n 3")
    assert found["settings"]["data"] == "data" and found["settings"]["inception"] == "random"
    assert "bilinear" in found["resize"] and len(found["weights_sha256"]) == 64
    assert found["versions"]["torch"] == torch.__version__ and found["device"].startswith("cpu")


# ----------------------------------------------- 5. the networks, written out layer by layer


def convolve(x, p, name, maps, size, bias=True, **how):
    """The layer `name` of the numbers p, which must have so many maps of size x size."""
    weight = p[f"{name}.weight"]
    assert weight.shape == (maps, x.shape[1], size, size), f"{name} has weights {weight.shape}"
    assert (f"{name}.bias" in p) == bias, f"{name}: a bias too many or missing"
    return F.conv2d(x, weight, p.get(f"{name}.bias"), **how)


def relu(x):
    """A ReLU that cuts nothing, or all, would not be missed: then the test is worth nothing."""
    assert 0.05 < (x > 0).double().mean() < 0.95
    return F.relu(x)


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


def same(net, x, wanted):
    with torch.no_grad():
        found = net(x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9 * wanted.abs().max().item())


def batch_norm(x, p, name):
    """In eval mode: the running statistics, eps 1e-5."""
    return F.batch_norm(x, *(p[f"{name}.{k}"] for k in (
        "running_mean", "running_var", "weight", "bias")))


@pytest.mark.parametrize("args, maps, blocks, size", [
    ({}, 64, 5, (7, 9)), ({"maps": 6, "blocks": 2}, 6, 2, (12, 8))])
def test_refiner_equals_section_5_1_written_out(args, maps, blocks, size):
    """4x4 to 64 maps, ReLU; five blocks of two 4x4 with a ReLU between, the identity added, a
    ReLU after; 1x1; tanh. All padding reflects: 1 before and 2 after, in a block 1 then 2."""
    net, images = with_known_weights(Refiner(**args)), known_images(2, *size)
    p = net.state_dict()
    x = relu(convolve(F.pad(images, (1, 2, 1, 2), mode="reflect"), p, "first", maps, 4))
    for i in range(blocks):
        y = F.pad(x, (1, 1, 1, 1), mode="reflect")
        y = relu(convolve(y, p, f"blocks.{i}.conv1", maps, 4))
        y = F.pad(y, (2, 2, 2, 2), mode="reflect")
        x = relu(x + convolve(y, p, f"blocks.{i}.conv2", maps, 4))
    x = convolve(x, p, "last", 3, 1)
    assert x.abs().max() > 1, "without tanh it must look different"
    same(net, images, x.tanh())


@pytest.mark.parametrize("args, size, pads", [
    ({}, (80, 160), [(2, 2, 1, 2), (1, 1, 1, 2), (1, 1, 0, 1), (0, 1, 1, 1)]),      # Table 1
    ({"final_relu": True}, (40, 80), [(1, 2, 2, 2), (1, 2, 1, 1), (0, 1, 1, 1), (1, 1, 0, 1)]),
    ({"stride": 1}, (20, 25), [(2, 2, 2, 2), (1, 2, 1, 1), (1, 1, 0, 1), (1, 1, 1, 1)])])
def test_discriminator_equals_table_1_written_out(args, size, pads):
    """5x5/3 96, 4x4/2 64, max pool 3/2, 3x3/2 32, 1x1 32, 1x1 2, a ReLU after each but the last
    unless Table 1's own is asked for; SAME padding, in which the maximum sees no zeros: pads
    (left, right, top, bottom) are TensorFlow's of conv1, conv2, pool and conv3."""
    net, images = with_known_weights(Discriminator(**args)), known_images(2, *size)
    p = net.state_dict()
    x = relu(convolve(F.pad(images, pads[0]), p, "conv1", 96, 5, stride=args.get("stride", 3)))
    x = relu(convolve(F.pad(x, pads[1]), p, "conv2", 64, 4, stride=2))
    x = F.max_pool2d(F.pad(x, pads[2], value=-torch.inf), 3, 2)
    x = relu(convolve(F.pad(x, pads[3]), p, "conv3", 32, 3, stride=2))
    x = convolve(relu(convolve(x, p, "conv4", 32, 1)), p, "conv5", 2, 1)
    same(net, images, relu(x) if "final_relu" in args else x)


def convolve_twice(x, p, name, maps):
    """(3x3 without bias, padded by zeros, BatchNorm, ReLU) twice."""
    for i in (0, 3):
        x = convolve(x, p, f"{name}.{i}", maps, 3, bias=False, padding=1)
        x = relu(batch_norm(x, p, f"{name}.{i + 1}"))
    return x


@pytest.mark.parametrize("height, width", [(17, 30), (16, 32)])
def test_unet_equals_its_drawing_written_out(height, width):
    """Four times down by max pooling, four times up by a 2x2 transposed convolution, each time
    joined (skip first) with the map of its size; the edge is repeated up to a multiple of 16."""
    net, images = with_known_weights(UNet()), known_images(2, height, width)
    p, skips = net.state_dict(), []
    x = F.pad(images, (0, -width % 16, 0, -height % 16), mode="replicate")
    x = convolve_twice(x, p, "down1", 32)
    for name, maps in (("down2", 64), ("down3", 128), ("down4", 256), ("bottom", 512)):
        skips.append(x)
        x = convolve_twice(F.max_pool2d(x, 2), p, name, maps)
    for i, maps in ((4, 256), (3, 128), (2, 64), (1, 32)):
        assert p[f"up{i}.weight"].shape == (2 * maps, maps, 2, 2)     # [inputs, outputs, 2, 2]
        x = F.conv_transpose2d(x, p[f"up{i}.weight"], p[f"up{i}.bias"], stride=2)
        x = convolve_twice(torch.cat([skips.pop(), x], 1), p, f"merge{i}", maps)
    same(net, images, convolve(x, p, "head", len(CLASSES), 1)[..., :height, :width])


def test_deeplab_equals_its_papers_written_out():
    """The decoder with the low-level path; both times enlarged bilinearly. Before it torchvision's
    ResNet-50 with an output stride of 16 and its ASPP with rates of 6, 12 and 18, which the map of
    7 x 20 lets reach it."""
    net, images = with_known_weights(DeepLabV3Plus()), known_images(1, 100, 310)
    p, trunk = net.state_dict(), torchvision.models.resnet50(
        replace_stride_with_dilation=[False, False, True])
    trunk = nn.Sequential(*list(trunk.children())[:8]).double().eval()     # without its classifier
    trunk.load_state_dict(dict(zip(trunk.state_dict(), p.values())))       # which come first
    with torch.no_grad():
        low = trunk[:5](images)                                            # of layer1
        deep = trunk[5:](low)
    assert deep.shape[2:] == (7, 20)

    aspp = ASPP(2048, [6, 12, 18]).double().eval()
    aspp.load_state_dict({name[5:]: w for name, w in p.items() if name.startswith("aspp.")})
    with torch.no_grad():
        x = aspp(deep)

    low = relu(batch_norm(convolve(low, p, "low.0", 48, 1, bias=False), p, "low.1"))
    x = torch.cat([F.interpolate(x, low.shape[2:], mode="bilinear"), low], 1)
    x = convolve(convolve_twice(x, p, "decoder", 256), p, "head", len(CLASSES), 1)
    same(net, images, F.interpolate(x, (100, 310), mode="bilinear"))


def test_inception_sees_299_pixels_in_its_range_and_order():
    """From the uint8 image on: 0..255 to [-1, 1], then bilinear to 299 x 299 without antialias,
    where that shrinks; float64 features of image i in row i, over two batches (of 8 and 1)."""
    images = ((known_images(9, 320, 400) + 1) * 127.5).round().to(torch.uint8)
    wanted = F.interpolate(images.double() / 127.5 - 1, (299, 299), mode="bilinear")
    features = inception_features(nn.Flatten(), images, "cpu")
    torch.testing.assert_close(features, wanted.flatten(1), rtol=0, atol=1e-4)


# ---------------------------------------------------------------------- 6. the paper's values

TABLE2 = {"synthetic": "60.82 | 0.0023", "pretrained": "56.89 | 0.0025", "simgan": "57.04 | 0.0025",
          "ours": "55.71 | 0.0026"}


@pytest.mark.parametrize("script, same, papers", [
    ("prepare", lambda size=[80, 160]: 0, "size crop test"),
    ("pretrain", plain.pretrain, "steps d-steps lr d-lr d-stride"),
    ("train_gan", plain.train, "alpha beta steps lr d-lr rec"),
    ("refine", lambda batch_size=16: 0, ""), ("evaluate", lambda inception="imagenet": 0, ""),
    ("segment", plain.train_unet, "")])
def test_the_papers_values_are_the_defaults(script, same, papers, cwd, monkeypatch):
    """Those of plain.py; --help shows every default, and marks the paper's."""
    text = call(f"{script}.py", "--help", cwd=cwd)[0]
    assert f"\n    python {script}.py" in text and "(default: None)" not in text
    text, args = " ".join(text.split()), vars(parsed(monkeypatch, script, []))
    assert "(default: " in text and " --seed SEED " in text
    for name, parameter in inspect.signature(same).parameters.items():
        assert parameter.default in (parameter.empty, args.get(name)), name
    for flag in papers.split():
        block = text.rsplit(f" --{flag} ", 1)[1].split(" --")[0]
        assert "(paper)" in block and "(default: " in block, block


@pytest.mark.parametrize("width, scale", [(48, 3), (170, 1)])
def test_a_grid_shows_images_behind_captions(tmp_path, width, scale):
    """Small ones enlarged."""
    x = torch.randint(0, 256, (2, 3, 16, width), dtype=torch.uint8)
    save_grid(tmp_path / "a.png", {"wide": x, "again": x.flip(0)})
    picture, left = np.array(Image.open(tmp_path / "a.png")), 12 + 7 * len("again")
    assert picture.shape == (2 * (16 * scale + 4), left + 2 * (width * scale + 4), 3)
    for i, row in enumerate((x, x.flip(0))):
        line = picture[i * (16 * scale + 4):][:16 * scale + 4]
        assert line[:, :left].min() < 100, "no caption"
        for j, image in enumerate(row):
            large = image.permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1)
            place = line[2:-2, left + j * (width * scale + 4):][:, :width * scale]
            assert np.array_equal(place, large)
