"""Table 2: its errors and differences. Its numbers: test_algorithm.py; the metrics:
test_metrics.py."""
import pytest
import torch

from evaluate import difference, measure, plus_minus, with_error
from models import jackknife_error, kid, leave_out, ssim


def test_a_score_has_its_error_and_its_interval():
    """SSIM: the mean over pairs and its s / sqrt(N), at both ranges. In float64: beside a flat
    image L = 1 leaves float32 nothing but its rounding, of either sign."""
    images, real = (100 + 40 * torch.randn(2, 70, 3, 16, 24)).clamp(0, 255).to(torch.uint8)
    features, real_features = torch.randn(2, 70, 5).double()
    found = measure(images, features, real, real_features)
    row = {m: with_error(*s) for m, s in found.items()}
    for name, max_val in (("ssim", 255), ("ssim_range1", 1)):
        values = ssim(images.double(), real.double(), max_val)
        assert row[name]["value"] == pytest.approx(values.mean().item(), rel=1e-9)
        assert found[name][1][3] == pytest.approx(values[torch.arange(70) != 3].mean().item())
        assert row[name]["se"] == pytest.approx(values.std().item() / 70 ** 0.5, rel=1e-6)
    s = row["kid"]                             # of 20 replicates: t with 19 degrees of freedom
    assert s["se"] == pytest.approx(jackknife_error(leave_out(kid, features, real_features)))
    assert (s["high"] - s["value"]) / s["se"] == pytest.approx(2.093024, rel=1e-6)
    assert s["value"] - s["low"] == pytest.approx(s["high"] - s["value"])


def test_a_difference_is_paired_and_marked_inside_its_error():
    a, b = torch.randn(2, 20, generator=torch.Generator().manual_seed(0)).double()
    for one, other, sure in (((90.0, a), (0.0, b), True), ((0.0, a), (90.0, b), True),
                             ((1.0, a), (0.0, b), False), ((5.0, a), (5.0, a), False)):
        found = difference({"fid": one}, {"fid": other})["fid"]
        assert found == {**with_error(one[0] - other[0], one[1] - other[1]), "sure": sure}
        assert plus_minus(found, sign="+").startswith("(") != sure
