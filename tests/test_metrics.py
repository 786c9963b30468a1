"""The metrics against golden values, closed forms and direct sums; Table 2's errors."""
import argparse

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evaluate import difference, measure, plus_minus, with_error
from models import fid, jackknife_error, kid, leave_out, ssim
from segment import confusion, predict, random_crops, scores, train
from study.bench import direct_ssim, sqrtm_fid
from support.cli import UserError

# ------------------------------------------------------------------------------------- SSIM


def test_ssim_equals_tensorflow():
    """tf.image.ssim(uint8, max_val=255) of TensorFlow 2.21; to the last digit: the test below."""
    y, x, c = np.mgrid[:80, :160, :3]
    ramps = 3 * y + x + 40 * c, 2 * y + 2 * x + 25 * c
    a, b = (torch.from_numpy((image % 256).astype(np.uint8)).permute(2, 0, 1)[None]
            for image in ramps)
    assert ssim(a, b).item() == pytest.approx(0.638190, abs=1e-5)


@pytest.mark.parametrize("shape", [(11, 11), (11, 40), (12, 11), (37, 23), (24, 48)])
def test_ssim_equals_the_definition_window_by_window(shape):
    """Wang et al. 2004, Eq 13, at any size: one 11 x 11 Gaussian window at a time. [N, 3, H, W]
    twice -> [N]: no pair sees another. With L = 1 it is the same of [0, 1]."""
    x, y = torch.rand(2, 2, 3, *shape, generator=torch.Generator().manual_seed(0)).double() * 255
    y = 0.7 * x + 0.3 * y
    t = torch.arange(-5, 6).double()
    w = torch.exp(-(t[:, None] ** 2 + t[None] ** 2) / (2 * 1.5 ** 2))
    values = []

    def mean(maps):
        return (w * maps).sum((2, 3), keepdim=True) / w.sum()
    for i in range(shape[0] - 10):
        for j in range(shape[1] - 10):
            a, b = x[..., i:i + 11, j:j + 11], y[..., i:i + 11, j:j + 11]
            ma, mb = mean(a), mean(b)
            va, vb, cov = mean((a - ma) ** 2), mean((b - mb) ** 2), mean((a - ma) * (b - mb))
            values.append((2 * ma * mb + 2.55 ** 2) * (2 * cov + 7.65 ** 2)
                          / ((ma ** 2 + mb ** 2 + 2.55 ** 2) * (va + vb + 7.65 ** 2)))
    wanted = torch.stack(values).mean((0, 2, 3, 4))
    for found in (ssim(x, y), ssim(x / 255, y / 255, 1)):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    torch.testing.assert_close(direct_ssim(x.float(), y.float()), wanted.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 10, 40), (1, 3, 40, 10), (2, 3, 40, 40)])
def test_ssim_refuses_what_it_cannot_compare(shape):
    """No 11 x 11 window lies inside, or the shapes differ (and must not broadcast)."""
    with pytest.raises(ValueError):
        ssim(torch.zeros(shape), torch.zeros(1, *shape[1:]))


# -------------------------------------------------------------------------------------- FID


def random_features(n, d, seed):
    """Correlated features with a mean."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g).double()
    return torch.randn(n, d, generator=g).double() @ mix + torch.randn(d, generator=g).double()


@pytest.mark.parametrize("n1, n2", [(40, 40), (40, 71), (4, 60)])
def test_fid_equals_the_formula_with_sqrtm(n1, n2):
    """|m1-m2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)), S with N - 1, as every FID package has it; where S1
    and S2 are singular, too."""
    a, b = random_features(n1, 6, 0), random_features(n2, 6, 1)
    wanted = sqrtm_fid(a, b)
    assert fid(a, b) == pytest.approx(wanted, rel=1e-8)
    q = torch.linalg.qr(random_features(54, 6, 2)).Q.T         # the same, turned into 54 dimensions
    assert fid(a @ q, b @ q) == pytest.approx(wanted, rel=1e-4)
    for same in (a, a @ q):                                    # of itself: 0, never below
        assert 0 <= fid(same, same) < 1e-6 and 0 <= fid(same, same.flip(0)) < 1e-6


@pytest.mark.parametrize("metric", [fid, kid])
def test_fid_and_kid_compute_in_float64(metric):
    """float32 features far from 0, as pool3's are: nothing may be lost in rounding."""
    a, b = ((random_features(n, 4, n) + 1000).float() for n in (50, 60))
    assert metric(a, b) == pytest.approx(metric(a.double(), b.double()), rel=1e-9)


# -------------------------------------------------------------------------------------- KID


def test_kid_equals_the_direct_sum():
    """Binkowski et al. 2018, unbiased MMD^2, k = (x.y/d + 1)^3: no i = j within a set."""
    a, b = random_features(5, 3, 0), random_features(7, 3, 1)

    def k(x, y):
        return (sum(x * y) / 3 + 1) ** 3

    within_a = sum(k(a[i], a[j]) for i in range(5) for j in range(5) if i != j) / (5 * 4)
    within_b = sum(k(b[i], b[j]) for i in range(7) for j in range(7) if i != j) / (7 * 6)
    between = sum(k(x, y) for x in a for y in b) / (5 * 7)
    wanted = (within_a + within_b - 2 * between).item()
    assert kid(a, b) == pytest.approx(wanted, rel=1e-10)


# -------------------------------------------------------------------------------- jackknife


def test_leave_out_leaves_out_one_group_of_every_set():
    """Element k is in group k mod 20, in both sets; 20 groups, or as many as there are elements,
    and every time as many are left."""
    a = torch.arange(40.0)
    seen = leave_out(lambda x, y: (x.sum() + y.sum()).item(), a, 10 * a)
    assert seen.tolist() == pytest.approx([8580 - 11 * (2 * i + 20) for i in range(20)])
    for n, left in ((50, 48), (39, 38), (60, 57), (3, 2)):
        assert leave_out(len, torch.zeros(n)).tolist() == [left] * min(20, n)


def test_the_error_of_a_mean_is_s_over_the_root_of_n():
    """Over many samples, whether the groups hold all or not."""
    torch.manual_seed(0)
    for n, close in ((59, 0.03), (39, 0.03), (24, 0.03), (60, 0.03), (11, 1e-9)):
        samples = torch.randn(1500, n).double()
        found = [jackknife_error(leave_out(lambda x: x.mean().item(), x)) ** 2 for x in samples]
        assert np.mean(found) == pytest.approx(samples.var(1).mean().item() / n, rel=close)


# ----------------------------------------------------- Table 2: its errors, its differences


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
        assert plus_minus(found, 1, 2, "+").startswith("(") != sure


# -------------------------------------------------------- mIoU, pixel accuracy; what void does


def test_the_scores_of_seven_pixels():
    """Truth in rows; a void pixel (255) is no error, whatever was predicted there; class 2 is
    absent and in no mean. IoU = TP / (TP + FP + FN)."""
    truth = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 255]], dtype=torch.uint8)
    predicted = torch.tensor([[0, 0, 1, 3], [0, 1, 1, 1]], dtype=torch.uint8)
    matrix = confusion(truth, predicted, 4)
    assert matrix.tolist() == [[3, 1, 0, 0], [0, 2, 0, 1], [0] * 4, [0] * 4]
    found = scores(matrix)
    assert found["IoU"] == pytest.approx([3 / 4, 2 / 4, np.nan, 0], nan_ok=True)
    assert found["mIoU"] == pytest.approx(1.25 / 3) and found["classes"] == 3
    assert found["accuracy"] == pytest.approx(100 * 5 / 7)


def test_an_all_void_batch_harms_nothing(monkeypatch):
    """Cross-entropy over no pixel would be nan and end the training: it must be 0. With Adam's
    moments at 0 the weights stay where they are, and other batches train as ever. In bfloat16 the
    network learns and predicts, the loss stays float32."""
    of_losses, honest, device = set(), F.cross_entropy, torch.device("cpu")
    monkeypatch.setattr(F, "cross_entropy", lambda logits, *labels, **how: (
        of_losses.add(logits.dtype), honest(logits, *labels, **how))[1])
    args = argparse.Namespace(batch_size=2, lr=0.1, epochs=2, precision="bfloat16",
                              random_crops=False)
    images, dtypes = torch.randint(0, 256, (4, 3, 32, 40), dtype=torch.uint8), set()
    for void, changed in ((slice(None), False), (slice(0, 2), True)):
        labels = torch.full((4, 32, 40), 3, dtype=torch.uint8)
        labels[void] = 255
        net = torch.nn.Conv2d(3, 19, 1)
        net.register_forward_hook(
            lambda *seen: dtypes.add((seen[-1].dtype, torch.is_grad_enabled())))
        before = net.weight.detach().clone()
        train(net, images, labels, args, device, "a test")
        predict(net, images, args, device)
        assert net.weight.isfinite().all() and torch.equal(net.weight, before) != changed
    assert dtypes == {(torch.bfloat16, True), (torch.bfloat16, False)}     # False: predict
    assert of_losses == {torch.float32}
    args.lr, args.precision = torch.inf, "float32"
    with pytest.raises(UserError, match="a test: the loss is nan; try a smaller --lr"):
        train(net, images, labels, args, device, "a test")


def test_a_random_part_of_an_image_is_that_of_its_label():
    """Every pixel holds its row and its column, as does the label: parts of a quarter to all of the
    area, in the image's proportions, others for every image."""
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(80), indexing="ij")
    x = torch.stack([rows, columns, columns]).to(torch.uint8).expand(200, 3, 40, 80)
    y = torch.where(columns < 60, columns, 255).to(torch.uint8).expand(200, 40, 80)
    torch.manual_seed(0)
    parts, labels = random_crops(x, y)
    assert parts.shape == x.shape and labels.shape == y.shape and parts.dtype == labels.dtype
    shift = (parts[:, 1].float() - labels.float())[labels != 255]
    assert shift.abs().max() <= 1 and shift.mean().abs() < 0.05      # not half a pixel aside
    assert set(labels.unique().tolist()) == {*range(60), 255}
    height = (parts[:, 0, -1, 0].int() - parts[:, 0, 0, 0] + 1) / 40
    width = (parts[:, 1, 0, -1].int() - parts[:, 1, 0, 0] + 1) / 80
    assert ((height - width).abs() < 0.06).all()
    assert 0.4 < width.min() < 0.56 and 0.95 < width.max() and 0.6 < width.median() < 0.9
    corners = {tuple(part[:2, 0, 0].tolist()) for part in parts}
    assert len(corners) > 100
