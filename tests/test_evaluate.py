"""Table 2: its errors, its differences, what its files say. The metrics: test_metrics.py."""
import hashlib
import json

import numpy as np
import pytest
import torch
from conftest import call, save_pair

import evaluate
from evaluate import difference, measure, plus_minus, weights_of, with_error
from models import jackknife_error, kid, leave_out, ssim
from prepare import load_images

CPU = torch.device("cpu")


def scenes(n=70, noise=0.0, seed=0):
    """uint8 images [n, 3, 16, 24] of equal scenes for equal seeds, and their features [n, 5]."""
    g = torch.Generator().manual_seed(seed)
    images = 100 + 40 * torch.randn(n, 3, 16, 24, generator=g)
    features = torch.randn(n, 5, generator=g).double()
    g.manual_seed(seed + 1000)
    images = images + noise * torch.randn(images.shape, generator=g)
    features = features + 0.02 * noise * torch.randn(n, 5, generator=g).double()
    return images.clamp(0, 255).to(torch.uint8), features


REAL, REAL_FEATURES = scenes(seed=9)


def scored(noise=0.0, seed=0):
    return measure(*scenes(noise=noise, seed=seed), REAL, REAL_FEATURES, CPU)


def test_ssim_has_the_classical_error():
    """The mean over pairs and its s / sqrt(N), at both ranges."""
    images, features = scenes()
    row = {m: with_error(*s) for m, s in measure(images, features, REAL, REAL_FEATURES,
                                               CPU).items()}
    for name, max_val in (("ssim", 255), ("ssim_range1", 1)):
        values = ssim(images.float(), REAL.float(), max_val).double()
        assert row[name]["value"] == pytest.approx(values.mean().item(), rel=1e-9)
        assert row[name]["se"] == pytest.approx(values.std().item() / 70 ** 0.5, rel=1e-6)
    assert row["kid"]["se"] == pytest.approx(jackknife_error(leave_out(kid, features,
                                                                       REAL_FEATURES)))


def test_the_interval_is_students():
    """20 replicates: 2.093 standard errors on both sides (t with 19 degrees of freedom)."""
    s = with_error(5.0, torch.randn(20, generator=torch.Generator().manual_seed(0)).double())
    assert (s["high"] - s["value"]) / s["se"] == pytest.approx(2.093024, rel=1e-6)
    assert s["value"] - s["low"] == pytest.approx(s["high"] - s["value"])


def test_differences_are_paired():
    """Two versions of the same scenes share their noise, so that the error of the difference is
    far below that of either; two sets of other scenes do not."""
    base, refined, others = scored(), scored(noise=3), scored(seed=1)
    for metric in ("fid", "kid", "ssim"):
        single = with_error(*base[metric])["se"]
        assert difference(refined, base)[metric]["se"] < 0.5 * single
        assert difference(others, base)[metric]["se"] > 0.5 * single


def test_a_difference_inside_its_error_is_marked():
    """Of equal distributions (other scenes): not sure. Of far ones: sure. And so in the cell."""
    images, features = scenes()
    far = difference(measure(images, features + 2, REAL, REAL_FEATURES, CPU), scored())
    near = difference(scored(seed=1), scored(seed=2))
    assert far["fid"]["sure"] and far["kid"]["sure"] and far["fid"]["value"] > 0
    assert not near["fid"]["sure"] and not near["kid"]["sure"]
    assert plus_minus(near["fid"], sign="+").startswith("(")
    assert not plus_minus(far["fid"], sign="+").startswith("(")
    same = difference(scored(), scored())["fid"]
    assert same["value"] == 0 and not same["sure"]


# ------------------------------------------------------------------ the command and its files


def test_table2_says_everything(tmp_path):
    """N, intervals, floor, control, paired differences, marks, the warning; weights and images by
    hash, resize, pairing, data, command, versions. 5 images a domain, 4 real ones, no labels."""
    g = np.random.default_rng(0)
    for domain, count in (("synthetic", 5), ("simgan", 5), ("ours", 5), ("real", 4)):
        for split in ("train", "test"):
            for i in range(count):
                save_pair(tmp_path / "data" / domain / split, i,
                          g.integers(0, 200, (11, 20, 3), np.uint8))
    out, _ = call("evaluate.py", "--inception", "random", cwd=tmp_path)
    record = json.loads((tmp_path / "results/table2.json").read_text())
    rows = ["synthetic", "simgan", "ours", evaluate.FLOOR, evaluate.CONTROL]
    assert list(record["rows"]) == rows
    for name in rows[:4]:
        assert list(record["rows"][name]["scores"]) == ["fid", "kid", "ssim", "ssim_range1"]
    assert list(record["rows"][evaluate.CONTROL]["scores"]) == ["ssim", "ssim_range1"]
    assert list(record["differences"]) == [f"{r} - synthetic" for r in rows[1:]] + [
        "ours - simgan"]
    text = (tmp_path / "results/table2.md").read_text()
    assert text in out
    assert "warning: N = 4 is small for FID" in out
    for words in ("| images vs real | random features, not an FID | KID x 1000 | SSIM (L = 255) | "
                  "SSIM (L = 1) |", "60.82", "± ", "N = 4",
                  f"| {evaluate.CONTROL} | - | - |"):
        assert words in text
    assert "missing: data/pretrained/" in out and "missing: data/ours/" not in out
    real = load_images(tmp_path / "data/real/test")
    flat = real.double().mean((0, 2, 3)).round()[:, None, None].expand(real.shape)
    assert record["rows"][evaluate.CONTROL]["scores"]["ssim"]["value"] == pytest.approx(
        ssim(flat, real.double()).mean().item(), rel=1e-4)
    for name in ("ours", "ours - simgan"):                     # each number in its column
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
        scores = record["rows"][name]["scores"] if name == "ours" else record["differences"][name]
        sign = "" if name == "ours" else "+"
        wanted = [f"{scale * scores[metric]['value']:{sign}.{digits}f} ± "
                  f"{scale * scores[metric]['se']:.{digits}f}" for metric, scale, digits in (
                      ("fid", 1, 2), ("kid", 1000, 2), ("ssim", 1, 4), ("ssim_range1", 1, 4))]
        found = [cell.strip("() ") for cell in line.strip("| ").split(" | ")]
        assert found[-6:-2] == wanted or found[-4:] == wanted, line
    assert record["command"] == "evaluate.py --inception random"
    assert record["settings"]["data"] == "data" and record["settings"]["inception"] == "random"
    assert record["settings"]["pair_seed"] == 0 and record["n"] == 4
    assert "bilinear" in record["resize"]
    assert record["versions"]["torch"] == torch.__version__ and record["device"].startswith("cpu")
    hashes = [r["images_sha256"] for r in record["rows"].values()] + [
        record["real_sha256"], record["weights_sha256"]]
    assert len(set(hashes)) == 7 and {len(h) for h in hashes} == {64}


def test_the_weights_name_and_hash():
    """The hash is that of the weights in memory, the label the name of their file."""
    net = torch.nn.Linear(2, 1)
    content = net.weight.detach().numpy().tobytes() + net.bias.detach().numpy().tobytes()
    net.is_pytorch_fid = False
    assert weights_of(net, "some/file.pt") == ("FID (file.pt)",
                                               hashlib.sha256(content).hexdigest())
    net.is_pytorch_fid = True
    assert weights_of(net, "a.pth")[0] == "FID as pytorch-fid computes it (a.pth)"
