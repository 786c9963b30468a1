"""Stages 4 to 6 through their command lines, after stages 1 to 3, and what they leave behind."""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import call, call_all
from PIL import Image

from prepare import names

GAN = ["--steps", 3, "--batch-size", 4, "--sample-every", 3]


@pytest.fixture(scope="module")
def finished(project, tmp_path_factory):
    """The whole chain at toy size, both methods: the folder in which all six stages have run."""
    cwd = tmp_path_factory.mktemp("finished") / "project"
    shutil.copytree(project, cwd)
    call_all(*[["train_gan.py", "--method", m, *GAN] for m in ("ours", "simgan")], cwd=cwd)
    call_all(*[["refine.py", "--method", m] for m in ("ours", "simgan")],
             ["refine.py", "--checkpoint", "runs/ours/pretrain.pt", "--out", "data/pretrained"],
             cwd=cwd)
    (out, _), _ = call_all(
        ["evaluate.py", "--inception", "random"],
        ["segment.py", "--network", "unet", "--epochs", 1, "--batch-size", 4, "--seeds", 0, 1],
        cwd=cwd)
    assert "random features, not an FID" in out and "missing" not in out
    return cwd


def test_refine_again_gives_the_same_bytes(finished):
    """Beside what it refines: other data leaves data/ours as it was."""
    shutil.copytree(finished / "data/synthetic", finished / "other/synthetic")
    file = finished / "data/ours/test/images" / f"{names(finished / 'data/ours/test')[0]}.png"
    before = file.read_bytes()
    call("refine.py", cwd=finished)
    when = file.stat().st_mtime_ns
    call("refine.py", "--data", "other/synthetic", cwd=finished)
    other = finished / "other/ours/test/images" / file.name
    assert file.read_bytes() == other.read_bytes() == before
    assert file.stat().st_mtime_ns == when


def test_refine_does_not_write_into_a_folder_of_others(finished):
    _, err = call("refine.py", "--out", "data/real", cwd=finished, status=2)
    assert "data/real" in err


def test_table2_is_complete_and_consistent(finished):
    table = json.loads((finished / "results/table2.json").read_text())
    assert list(table["rows"])[:4] == ["synthetic", "pretrained", "simgan", "ours"]
    assert len(table["rows"]) == 6 and table["n"] == 3
    rows = {d: row["scores"] for d, row in table["rows"].items()}
    for row in list(rows.values())[:5]:
        for key in ("fid", "kid", "ssim", "ssim_range1"):
            assert np.isfinite(row[key]["value"]) and row[key]["se"] >= 0
    assert table["differences"]["ours - synthetic"]["ssim"]["value"] == pytest.approx(
        rows["ours"]["ssim"]["value"] - rows["synthetic"]["ssim"]["value"], abs=1e-6)
    assert "60.82" in (finished / "results/table2.md").read_text()


def test_segment_leaves_its_record_and_picture(finished):
    record = json.loads((finished / "results/segment_unet.json").read_text())
    domains = ["synthetic", "simgan", "ours", "real"]
    assert record["domains"] == domains and record["seeds"] == [0, 1]
    assert record["images"] == 9                            # equal for all: the smallest has 9
    assert record["epochs"] == 1 and "torch" in record["versions"]
    text = (finished / "results/segment_unet.md").read_text()
    assert text.count("(0.49)") == 1 and text.count("(85.42)") == 1
    for picture in ("table7.png", "segment_unet.png"):
        with Image.open(finished / "results" / picture) as image:
            assert image.width > 3 * 160


def test_a_finished_cell_is_not_trained_again_but_a_changed_one_is(finished):
    flags = ["--network", "unet", "--batch-size", 4, "--seeds", 0]
    before = json.loads((finished / "results/segment_unet.json").read_text())["scores"]["0"]
    out, _ = call("segment.py", *flags, "--epochs", 1, cwd=finished)
    assert out.count("trained before, not again") == 4
    after = json.loads((finished / "results/segment_unet.json").read_text())["scores"]["0"]
    assert str(before) == str(after)                        # nan equals nan as text
    (finished / "results/weights/unet_real_seed0.pt").unlink()
    older = finished / "results/weights/unet_ours_seed0.pt"  # whose layers had other names
    state = torch.load(older, weights_only=True)
    state["weights"] = {f"old.{k}": v for k, v in state["weights"].items()}
    torch.save(state, older)
    out, _ = call("segment.py", *flags, "--epochs", 1, cwd=finished)
    assert out.count("trained before, not again") == 2
    again = json.loads((finished / "results/segment_unet.json").read_text())["scores"]["0"]
    assert str(before) == str(again)                        # the same seed, the same network
    out, _ = call("segment.py", *flags, "--epochs", 2, "--train", "ours", cwd=finished)
    record = json.loads((finished / "results/segment_unet.json").read_text())
    assert "trained before" not in out and list(record["scores"]["0"]) == ["ours"]
    assert set(record["test_images"]) == set(record["scores"]["0"]["ours"])


def test_a_batch_larger_than_the_set(fresh):
    """9 training images: batches are drawn with replacement, segmentation takes what there is."""
    call_all(["pretrain.py", "--steps", 1, "--d-steps", 1, "--batch-size", 12, "--inception",
              "random", "--run", "runs/large"],
             ["refine.py", "--checkpoint", "runs/ours/pretrain.pt", "--out", "data/ours",
              "--batch-size", 12], cwd=fresh)
    call_all(["train_gan.py", "--run", "runs/large", "--steps", 1, "--batch-size", 12],
             ["segment.py", "--network", "unet", "--epochs", 1, "--batch-size", 12], cwd=fresh)
    assert (fresh / "runs/large/gan.pt").is_file()
