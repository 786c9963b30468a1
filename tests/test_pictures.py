"""refine.py --images: pictures of any size and kind; and sets that are larger than memory."""
import os
import random
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call, fill, noise, save
from PIL import Image

import refine
from models import Refiner
from prepare import load_images
from support.cli import UserError
from support.images import Images, read_stack
from support.raw import read_rgb
from support.training import to_float, to_uint8


def wild_refiner():
    """An R of the paper's depth that changes a lot and depends on all that it sees."""
    torch.manual_seed(0)
    R = Refiner(maps=6)
    for weight in R.parameters():
        weight.data *= 3
    R.register_forward_hook(lambda *_: pytest.fail("a graph") if torch.is_grad_enabled() else None)
    return R.eval()


@pytest.mark.parametrize("seed", range(8))
def test_tiles_are_r_of_the_whole(seed, monkeypatch):
    """Within one grey level, for any size, at the borders too, where R reflects."""
    monkeypatch.setattr(refine, "TILE", 20)
    choose, R = random.Random(seed), wild_refiner()
    picture = np.array(noise(seed, (choose.randint(4, 90), choose.randint(4, 90))))
    with torch.no_grad():
        whole = to_uint8(R(to_float(torch.from_numpy(picture).permute(2, 0, 1)[None])))[0]
    found = refine.refine_tiles(R, picture, "cpu")
    gap = np.abs(found.astype(int) - whole.permute(1, 2, 0).numpy())
    assert found.shape == picture.shape and gap.max() <= 1, gap.argmax()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """own/ with pictures of many kinds and what is none, and two refiners."""
    cwd = tmp_path_factory.mktemp("pictures")
    for i, name in enumerate(["1.png", "a b/2.JPG", "c/d/ä.webp", "4.bmp"]):
        save(cwd / "own" / name, noise(i, (20 + i, 30 + 3 * i)))
    odd = struct.pack(">LH HHLHH HHLL L", 8, 2, 0x112, 3, 1, 6, 0, 0x128, 4, 1, 70000, 0)
    noise(5, (20, 40)).save(cwd / "own/upright_Color.jpg", exif=b"Exif\0\0MM\0*" + odd)
    noise(9, (9, 9)).save(cwd / "own/\udcfc.png")              # a name that is no UTF-8
    (cwd / "own/broken.png").write_bytes(b"no picture")
    noise(8, (9, 9)).save(cwd / f"own/{'n' * 249}.jpg")
    (cwd / "own/damaged.dds").write_bytes(b"DDS " + bytes([124]) + bytes(123))
    noise(6, (3, 9)).save(cwd / "own/tiny.png"), noise(7, (4, 9)).save(cwd / "own/small.png")
    (cwd / "own/notes.txt").write_text("x"), os.mkfifo(cwd / "own/pipe.png")
    R = wild_refiner()
    for name, stage in (("one", "average"), ("two", "best")):
        torch.save({"stage": stage, "step": 3, "refiner_args": R.args, "refiner": R.state_dict()},
                   cwd / f"{name}.pt")
    return cwd


def test_a_folder_of_pictures(pictures):
    """Each as PNG of its own size under its own name; what is none is named; again goes on."""
    command = ["refine.py", "--checkpoint", "one.pt", "--images", "own", "--out", "new"]
    out, _ = call(*command, cwd=pictures)
    made = sorted(str(p.relative_to(pictures / "new")) for p in (pictures / "new").rglob("*.png"))
    assert made == ["1.png", "4.png", "a b/2.png", "c/d/ä.png", "small.png", "upright_Color.png",
                    "\udcfc.png"]
    R = wild_refiner()
    for name in made:
        (source,) = [p for p in (pictures / "own").rglob("*") if p.stem == (pictures / name).stem]
        picture = read_rgb(source)
        wanted = refine.refine_tiles(R, np.array(picture), "cpu")
        assert np.array_equal(np.array(Image.open(pictures / "new" / name)), wanted), name
    assert Image.open(pictures / "new/upright_Color.png").size == (20, 40)          # turned
    for words in ("broken.png: cannot identify", "tiny.png: is smaller than 4 x 4",
                  "pipe.png: a broken link, or no file", "7 pictures", "5 skipped",
                  "damaged.dds: Unknown pixel format", "nn.jpg: its name is too long",
                  "files not read: 1 .txt"):
        assert words in out
    before = {p: p.stat().st_ctime_ns for p in (pictures / "new").rglob("*.png")}
    (pictures / "new/4.png").unlink()
    same = (pictures / "own/a b/2.JPG").stat().st_mtime + 1.9  # as FAT may round it
    for name, time in (("1.png", 1e9), ("small.png", 4e9), ("a b/2.JPG", same)):   # older, newer
        os.utime(pictures / "own" / name, (time, time))
    call(*command, cwd=pictures)
    after = {p: p.stat().st_ctime_ns for p in (pictures / "new").rglob("*.png")}
    assert {p.name for p in before if after[p] != before[p]} == {"1.png", "4.png", "small.png"}
    fill(pictures / "b/own", 1)                                # another folder of that name
    _, err = call("refine.py", "--checkpoint", "../one.pt", "--images", "own", "--out", "../new",
                  cwd=pictures / "b", status=2)
    assert "was made with images = " in err
    for flags, key in ((["--images", "own", "--size", 9, 9], "size"), (["--data", "own"], "images"),
                       (["--images", "own", "--checkpoint", "two.pt"], "sha256")):
        _, err = call("refine.py", "--checkpoint", "one.pt", *flags, "--out", "new", cwd=pictures,
                      status=2)
        assert f"was made with {key} = " in err


def test_one_picture_and_the_size_of_training(pictures):
    """--size: refined small, by the same R, and scaled back to its own size."""
    out, _ = call("refine.py", "--checkpoint", "one.pt", "--images", "own/1.png", "--out", "small",
                  "--size", 4, 15, cwd=pictures)
    picture = read_rgb(pictures / "own/1.png")
    small = refine.refine_tiles(wild_refiner(), np.array(picture.resize((15, 4), Image.BILINEAR)),
                                "cpu")
    wanted = Image.fromarray(small).resize(picture.size, Image.BICUBIC)
    assert np.array_equal(np.array(Image.open(pictures / "small/1.png")), np.array(wanted))
    ours = ROOT / "study/refiner.pt"                           # as in the README
    call("refine.py", "--checkpoint", ours, "--images", "own/tiny.png", "--out", "tiny", "--size",
         4, 15, cwd=pictures)                                  # R never sees its 3 x 9
    assert Image.open(pictures / "tiny/tiny.png").size == (9, 3)
    _, err = call("refine.py", "--checkpoint", "one.pt", "--images", "own/notes.txt", "--out", "no",
                  cwd=pictures, status=2)
    assert "own/notes.txt: no picture could be refined" in err


# ---------------------------------------------------------------------------- sets of any number


def test_refining_a_domain_keeps_no_graph(tmp_path):
    fill(tmp_path / "images", 3)
    assert refine.refine_split(wild_refiner(), tmp_path, tmp_path / "new", "cpu", 2) == 3


def test_reading_a_set_takes_no_more_memory_than_it_has(tmp_path):
    fill(tmp_path / "images", 120, (200, 300))
    load_images(tmp_path)                                     # what is loaded once is loaded
    tracemalloc.start()
    size = load_images(tmp_path).nbytes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 120 * 200 * 300 * 3 and peak < 1.1 * size


def test_a_set_that_does_not_fit_is_one_line_before_it_is_read(tmp_path, monkeypatch):
    fill(tmp_path / "images", 3, (200, 300))                             # 540,000 bytes
    free = "MemFree: 9 kB\nMemAvailable: {} kB".format
    monkeypatch.setattr(Path, "read_text", lambda _: free(530))          # of 1024 bytes
    load_images(tmp_path)
    monkeypatch.setattr(Path, "read_text", lambda _: free(520))
    with pytest.raises(UserError, match="3 images of 200 x 300 need 0.0 GB .*--limit"):
        load_images(tmp_path)
    monkeypatch.setattr(Path, "read_text", lambda _: "MemFree: 9 kB")    # WSL 1: nobody knows
    load_images(tmp_path)


def test_one_image_of_another_size_in_a_batch_of_its_own(tmp_path):
    files = [*sorted(fill(tmp_path, 4).iterdir()), tmp_path / "odd.png"]
    noise(0, (9, 9)).save(files[-1])
    batches = Images(files).split(4)
    assert torch.equal(next(batches), read_stack(files[:4], "RGB"))
    with pytest.raises(UserError, match="odd.png: not of the size of 00.png"):
        next(batches)
