"""Table 2: its errors, its differences, what its files say. The metrics: test_metrics.py."""
import json

import numpy as np
import pytest
import torch
from conftest import call, save_pair

import evaluate
from evaluate import difference, measure, plus_minus, with_error
from models import jackknife_error, kid, leave_out, ssim
from prepare import load_images


def test_ssim_has_the_classical_error():
    """The mean over pairs and its s / sqrt(N), at both ranges. In float64: beside a flat image
    L = 1 leaves float32 nothing but its rounding, of either sign."""
    images, real = (100 + 40 * torch.randn(2, 70, 3, 16, 24)).clamp(0, 255).to(torch.uint8)
    features, real_features = torch.randn(2, 70, 5).double()
    row = {m: with_error(*s) for m, s in measure(images, features, real, real_features).items()}
    for name, max_val in (("ssim", 255), ("ssim_range1", 1)):
        values = ssim(images.double(), real.double(), max_val)
        assert row[name]["value"] == pytest.approx(values.mean().item(), rel=1e-9)
        assert row[name]["se"] == pytest.approx(values.std().item() / 70 ** 0.5, rel=1e-6)
    assert row["kid"]["se"] == pytest.approx(jackknife_error(leave_out(kid, features,
                                                                       real_features)))


def test_the_interval_is_students():
    """20 replicates: 2.093 standard errors on both sides (t with 19 degrees of freedom)."""
    s = with_error(5.0, torch.randn(20, generator=torch.Generator().manual_seed(0)).double())
    assert (s["high"] - s["value"]) / s["se"] == pytest.approx(2.093024, rel=1e-6)
    assert s["value"] - s["low"] == pytest.approx(s["high"] - s["value"])


def test_a_difference_is_paired_and_marked_inside_its_error():
    a, b = torch.randn(2, 20, generator=torch.Generator().manual_seed(0)).double()
    for one, other, sure in (((90.0, a), (0.0, b), True), ((0.0, a), (90.0, b), True),
                             ((1.0, a), (0.0, b), False), ((5.0, a), (5.0, a), False)):
        found = difference({"fid": one}, {"fid": other})["fid"]
        assert found == {**with_error(one[0] - other[0], one[1] - other[1]), "sure": sure}
        assert plus_minus(found, sign="+").startswith("(") != sure


# ------------------------------------------------------------------ the command and its files


def test_table2_says_everything(tmp_path):
    """N, intervals, floor, control, paired differences, marks, the warning; the weights by hash,
    resize, pairing, data, command, versions. 5 images a domain, 4 real ones, no labels."""
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
        assert found[1:5] == wanted, line
    assert record["command"] == "evaluate.py --inception random"
    assert record["settings"]["data"] == "data" and record["settings"]["inception"] == "random"
    assert "bilinear" in record["resize"]
    assert record["versions"]["torch"] == torch.__version__ and record["device"].startswith("cpu")
    assert len(record["weights_sha256"]) == 64
