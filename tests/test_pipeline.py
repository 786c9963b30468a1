"""Stages 4 to 6 through their command lines, after stages 1 to 3, and what they leave behind."""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import call, call_all
from PIL import Image

import refine
from models import DeepLabV3Plus, detail, to_float
from prepare import load_images, names

GAN = ["--steps", 3, "--batch-size", 4, "--sample-every", 3]


@pytest.fixture(scope="module")
def finished(project, tmp_path_factory):
    """The whole chain at toy size, both methods: the folder in which all six stages have run."""
    cwd = tmp_path_factory.mktemp("finished") / "project"
    shutil.copytree(project, cwd)
    call_all(*[["train_gan.py", "--method", m, *GAN] for m in ("ours", "simgan")], cwd=cwd)
    call_all(*[["refine.py", "--method", m] for m in ("ours", "simgan", "colour")],
             ["refine.py", "--checkpoint", "runs/ours/pretrain.pt", "--out", "data/pretrained"],
             cwd=cwd)
    (out, _), _ = call_all(
        ["evaluate.py", "--inception", "random"],
        ["segment.py", "--network", "unet", "--epochs", 1, "--batch-size", 4, "--seeds", 0, 1],
        cwd=cwd)
    assert "random features, not an FID" in out and "missing" not in out
    return cwd


def test_refine_again_gives_the_same_bytes(finished):
    file = finished / "data/ours/test/images" / f"{names(finished / 'data/ours/test')[0]}.png"
    before = file.read_bytes()
    call("refine.py", cwd=finished)
    assert file.read_bytes() == before


def test_colour_match_gives_the_other_sets_mean_and_deviation():
    """Exactly, before rounding and clipping; the images keep their order and their content."""
    random = torch.Generator().manual_seed(0)
    a = torch.randint(100, 140, (4, 3, 8, 8), generator=random, dtype=torch.uint8)
    b = torch.randint(0, 256, (6, 3, 8, 8), generator=random, dtype=torch.uint8)
    matched, wanted = refine.ColourMatch(a, b)(to_float(a)), to_float(b)
    for statistic in (torch.mean, torch.std):
        torch.testing.assert_close(statistic(matched, (0, 2, 3)), statistic(wanted, (0, 2, 3)))
    assert torch.equal(matched[0, 0].flatten().argsort(stable=True),
                       to_float(a)[0, 0].flatten().argsort(stable=True))


def test_match_detail_makes_soft_images_as_detailed_as_real():
    """Whatever made them soft; an amount outside [0, 4] is not looked for."""
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randint(low, high, (20, 3, 24, 32), generator=random, dtype=torch.uint8)
            for low, high in ((60, 200), (90, 150)))
    soft = torch.nn.AvgPool2d(3, stride=1, padding=1)
    strength = [detail(x.mean(1, keepdim=True)).abs().mean().item() for x in (
        soft(to_float(a)), refine.DetailMatch(soft, a, b, "cpu")(to_float(a)), to_float(b))]
    assert strength[0] < 0.6 * strength[2] and strength[1] == pytest.approx(strength[2], rel=0.01)
    assert refine.DetailMatch(torch.nn.Identity(), a, b, "cpu").amount < 0.001


def test_match_detail_is_noted_in_the_record(finished):
    call("refine.py", "--match-detail", "--out", "data/sharp", cwd=finished)
    record = json.loads((finished / "data/sharp/refine.json").read_text())
    assert record["finished"] and 0.01 < record["detail_amount"] <= 4
    sharp, soft = (load_images(finished / f"data/{d}/train") for d in ("sharp", "ours"))
    assert not torch.equal(sharp, soft)
    shutil.rmtree(finished / "data/sharp")


def test_refine_does_not_write_into_a_folder_of_others(finished):
    _, err = call("refine.py", "--out", "data/real", cwd=finished, status=2)
    assert "data/real" in err


def test_table2_is_complete_and_consistent(finished):
    table = json.loads((finished / "results/table2.json").read_text())
    assert list(table["rows"])[:5] == ["synthetic", "colour", "pretrained", "simgan",
                                       "ours"]
    assert len(table["rows"]) == 7 and table["n"] == 3
    rows = {d: row["scores"] for d, row in table["rows"].items()}
    for row in list(rows.values())[:6]:
        for key in ("fid", "kid", "ssim", "ssim_range1"):
            assert np.isfinite(row[key]["value"]) and row[key]["se"] >= 0
    assert table["differences"]["ours - synthetic"]["ssim"]["value"] == pytest.approx(
        rows["ours"]["ssim"]["value"] - rows["synthetic"]["ssim"]["value"], abs=1e-6)
    assert "60.82" in (finished / "results/table2.md").read_text()


def test_segment_leaves_its_record_and_picture(finished):
    record = json.loads((finished / "results/segment_unet.json").read_text())
    domains = ["synthetic", "colour", "simgan", "ours", "real"]
    assert record["domains"] == domains and record["seeds"] == [0, 1]
    assert record["images"] == 9                            # equal for all: the smallest has 9
    assert record["epochs"] == 1 and "torch" in record["versions"]
    assert all(s["mIoU_se"] >= 0 for s in record["scores"]["0"]["real"].values())
    text = (finished / "results/segment_unet.md").read_text()
    assert text.count("(0.49)") == 1 and text.count("(85.42)") == 1
    with Image.open(finished / "results/table7.png") as image:
        assert image.width > 4 * 160


def test_a_finished_cell_is_not_trained_again_but_a_changed_one_is(finished):
    flags = ["--network", "unet", "--batch-size", 4, "--seeds", 0]
    before = json.loads((finished / "results/segment_unet.json").read_text())["scores"]["0"]
    out, _ = call("segment.py", *flags, "--epochs", 1, cwd=finished)
    assert out.count("trained before, not again") == 5
    after = json.loads((finished / "results/segment_unet.json").read_text())["scores"]["0"]
    assert str(before) == str(after)                        # nan equals nan as text
    (finished / "results/weights/unet_real_seed0.pt").unlink()
    older = finished / "results/weights/unet_ours_seed0.pt"  # whose layers had other names
    state = torch.load(older, weights_only=True)
    state["weights"] = {f"old.{k}": v for k, v in state["weights"].items()}
    torch.save(state, older)
    out, _ = call("segment.py", *flags, "--epochs", 1, cwd=finished)
    assert out.count("trained before, not again") == 3
    again = json.loads((finished / "results/segment_unet.json").read_text())["scores"]["0"]
    assert str(before) == str(again)                        # the same seed, the same network
    out, _ = call("segment.py", *flags, "--epochs", 2, "--train", "ours", cwd=finished)
    record = json.loads((finished / "results/segment_unet.json").read_text())
    assert "trained before" not in out and list(record["scores"]["0"]) == ["ours"]
    assert set(record["test_images"]) == set(record["scores"]["0"]["ours"])


def test_blurred_test_images_have_tables_of_their_own(finished):
    """Nothing is trained for them, and nearly no blur changes nearly nothing."""
    flags = ["segment.py", "--network", "unet", "--batch-size", 4, "--epochs", 1, "--seeds", 0]
    call(*flags, cwd=finished)
    sharp = json.loads((finished / "results/segment_unet.json").read_text())["confusion"]["0"]
    for blur, same in ((0.05, True), (2, False)):
        out, _ = call(*flags, "--blur", blur, cwd=finished)
        assert out.count("trained before, not again") == 5 and f"blurred by {blur:g} pixels" in out
        record = json.loads((finished / f"results/segment_unet_blur{blur:g}.json").read_text())
        assert (record["confusion"]["0"] == sharp) == same
    assert (finished / "results/table7_blur2.png").is_file()


def test_a_batch_larger_than_the_set(fresh):
    """9 training images: batches are drawn with replacement, segmentation takes what there is."""
    call_all(["pretrain.py", "--steps", 1, "--d-steps", 1, "--batch-size", 12, "--inception",
              "random", "--run", "runs/large"],
             ["refine.py", "--checkpoint", "runs/ours/pretrain.pt", "--batch-size", 12], cwd=fresh)
    call_all(["train_gan.py", "--run", "runs/large", "--steps", 1, "--batch-size", 12],
             ["segment.py", "--network", "unet", "--epochs", 1, "--batch-size", 12], cwd=fresh)
    assert (fresh / "runs/large/gan.pt").is_file()
