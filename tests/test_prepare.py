"""prepare.py: class table, crop, tiny folders in every format it reads, and what it refuses."""
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import Cityscapes

from prepare import (CLASSES, IGNORE, PALETTE, TABLE, crop_and_resize, load_images,
                     load_labels, names, read_rgb)
from support.cli import UserError
from support.raw import lookup

SCRIPT = Path(__file__).resolve().parents[1] / "prepare.py"
SMALL = ["--crop", "none", "--size", "24", "48", "--test", "3"]
OFFICIAL = {c.id: c.train_id for c in Cityscapes.classes if 0 <= c.train_id < 19}


def prepare(*args):
    """Run the script as a user does."""
    return subprocess.run([sys.executable, SCRIPT, "--workers", "1", *map(str, args)],
                          capture_output=True, encoding="utf-8", timeout=60)


def good(*args):
    result = prepare(*args)
    assert result.returncode == 0, result.stderr
    return result.stdout


def error_line(*args):
    """The one error line of a run that must fail with status 2."""
    result = prepare(*args)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if "error" in line]
    assert len(lines) == 1 and lines[0].startswith("prepare.py: error: "), result.stderr
    assert result.stderr.splitlines()[-1] == lines[0]
    return lines[0]


def files(folder):
    """{relative path: bytes} of everything below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes()
            for p in sorted(folder.rglob("*")) if p.is_file()}


def record(out):
    return json.loads((out / "prepare.json").read_text(encoding="utf-8"))


def draw(path, seed, size=(48, 64), mode="RGB"):
    """A noisy image file of `size` (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def draw_label(path, seed, ids, size=(48, 64), palette=False):
    """A label file of 4 x 4 blocks of the given ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    blocks = rng.choice(np.array(ids, np.uint8), (size[0] // 4, size[1] // 4))
    image = Image.fromarray(blocks.repeat(4, 0).repeat(4, 1))
    if palette:
        image.putpalette(rng.integers(0, 256, 768).tolist())             # means nothing
    image.save(path)


LABEL_IDS = [0, 1, 4, 7, 8, 11, 17, 18, 21, 23, 26, 33, 34]      # 18 and 34: no class of ours


def make_gta5(root):
    """12 frames: 03's sizes differ, 05 has no label, 07 an unknown id, 09 is cut off."""
    for i in range(1, 13):
        draw(root / "images" / f"{i:05d}.png", i)
        if i != 5:
            draw_label(root / "labels" / f"{i:05d}.png", i, LABEL_IDS + [77] * (i == 7),
                       (44, 64) if i == 3 else (48, 64), palette=True)
    cut_off = root / "images" / "00009.png"
    cut_off.write_bytes(cut_off.read_bytes()[:3000])


def make_cityscapes(root):
    """6 frames of train/, 4 of val/."""
    for split, city, count in (("train", "aachen", 6), ("val", "lindau", 4)):
        for i in range(count):
            name = f"{city}_{i:06d}_000019"
            draw(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", 100 + i)
            draw_label(root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", 100 + i,
                       LABEL_IDS)


# ------------------------------------------------------------------------------ class table


def test_classes_are_those_of_cityscapes():
    """Names and colours of trainId 0..18 as torchvision (from cityscapesScripts) has them."""
    official = sorted((c for c in Cityscapes.classes if 0 <= c.train_id < 19),
                      key=lambda c: c.train_id)
    assert CLASSES == [c.name for c in official]
    assert PALETTE[:19].tolist() == [list(c.color) for c in official]
    assert not PALETTE[IGNORE].any()


def test_label_ids_become_train_ids():
    """19 labelIds have a class; the others, polegroup (18) and licence plate (34, or -1 = 255)
    among them, are void. 35 to 254 are in no table and must be refused, not made void."""
    known = lookup("labelIds", TABLE)
    for label_id in [*range(35), 255]:
        assert known[label_id] == OFFICIAL.get(label_id, IGNORE)
    assert not set(known[35:255]) & {*range(19), IGNORE}


def test_train_ids_stay():
    """Labels that hold trainIds already: 0..18 and 255, nothing else."""
    known = lookup("trainIds", TABLE)
    assert known[:19].tolist() == list(range(19)) and known[255] == IGNORE
    assert not set(known[19:255]) & {*range(19), IGNORE}


# --------------------------------------------------------------------------- crop and resize


def test_crop_is_the_papers_box():
    """Section 4.1: 400 x 600 pixels from row 200 and column 600. Red and green number the
    rows, blue the columns (modulo 256, shifted), so that a pixel tells where it comes from."""
    y, x = np.mgrid[:1052, :1914]
    pixels = np.stack([y % 256, y // 256 * 16 + x // 256, x % 256], 2).astype(np.uint8)
    box = crop_and_resize(Image.fromarray(pixels), [200, 600, 400, 600], (400, 600),
                          Image.BILINEAR)
    assert np.array_equal(np.array(box), pixels[200:600, 600:1200])


def test_crop_none_keeps_the_whole_image():
    """`size` is (height, width), like everywhere in this project."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    image = crop_and_resize(Image.fromarray(pixels), None, (30, 50), Image.BILINEAR)
    assert np.array_equal(np.array(image), pixels)


def test_images_are_shrunk_with_antialias():
    """Stripes of one pixel become grey; without antialias each target pixel would be black or
    white, a style of its own."""
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (400, 300)))
    small = np.array(crop_and_resize(stripes, None, (80, 160), Image.BILINEAR)).astype(int)
    assert small.shape == (80, 160) and abs(small - 127.5).max() < 40


# ------------------------------------------------------------------ the two official formats


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw")
    make_gta5(root / "gta5")
    make_cityscapes(root / "cityscapes")
    return root


def official(raw, out):
    return ["--gta5", raw / "gta5", "--cityscapes", raw / "cityscapes", "--out", out, *SMALL]


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "data"
    good(*official(raw, out))
    return out


def test_official_folders_counts(prepared):
    """12 synthetic frames, 4 of them bad: 8 pairs; all 6 of train/ and 3 of val/."""
    count = record(prepared)["counts"]
    assert record(prepared)["finished"] is True
    assert count["synthetic/train"] + count["synthetic/test"] == 8
    assert (count["real/train"], count["real/test"]) == (6, 3)
    for split, n in count.items():
        assert len(list((prepared / split / "images").iterdir())) == n
        assert names(prepared / split) == [p.stem for p in
                                           sorted((prepared / split / "labels").iterdir())]


def test_bad_frames_are_skipped_with_the_reason(prepared):
    """Nothing is left out in silence: every bad frame is listed with its file and its fault."""
    skipped = record(prepared)["skipped"]
    assert len(skipped) == 4
    for name, reason in (("00003.png", "image is 64x48, label is 64x44"),
                         ("00005.png", "no label"), ("00007.png", "label ids 77"),
                         ("00009.png", "truncated")):
        assert len([s for s in skipped if name in s and reason in s]) == 1, (name, skipped)


def test_train_and_test_are_disjoint(prepared):
    """Held-out synthetic frames; real test frames come from Cityscapes' own val/."""
    for domain in ("synthetic", "real"):
        assert not set(names(prepared / domain / "train")) & set(names(prepared / domain / "test"))
    assert all(n.startswith("aachen_") for n in names(prepared / "real" / "train"))
    assert all(n.startswith("lindau_") for n in names(prepared / "real" / "test"))
    held_out = record(prepared)["held_out"]
    assert len(held_out["synthetic"]) == 3
    assert set(names(prepared / "synthetic" / "test")) <= set(held_out["synthetic"])
    assert names(prepared / "real" / "test") == held_out["real"]


@pytest.mark.parametrize("domain", ["synthetic", "real"])
def test_labels_are_train_ids_taken_from_the_nearest_pixel(raw, prepared, domain):
    """64 x 48 to 48 x 24: target (i, j) is the source pixel under its centre, 2i + 1 and
    floor((j + 1/2) 4/3), as trainId. No new id can appear. The file shows Cityscapes colours."""
    for split in ("train", "test"):
        for name in names(prepared / domain / split):
            source = raw / "gta5" / "labels" / f"{name}.png"
            if domain == "real":
                source = next(raw.rglob(f"{name}_gtFine_labelIds.png"))
            ids = np.array(Image.open(source))[1::2][:, ((np.arange(48) + 0.5) * 4 / 3).astype(int)]
            wanted = np.vectorize(lambda i: OFFICIAL.get(i, 255))(ids)
            with Image.open(prepared / domain / split / "labels" / f"{name}.png") as label:
                assert label.mode == "P" and label.size == (48, 24)
                assert np.array_equal(np.array(label), wanted)
                assert np.array_equal(np.array(label.convert("RGB")), PALETTE[wanted])


def test_images_are_rgb_of_one_size(raw, prepared):
    """Read, shrunk and stored without loss (PNG): what PIL's antialiased bilinear gives."""
    for split in ("synthetic/train", "synthetic/test", "real/train", "real/test"):
        for path in (prepared / split / "images").iterdir():
            with Image.open(path) as image:
                assert image.mode == "RGB" and image.size == (48, 24)
    name = names(prepared / "synthetic" / "train")[0]
    source = Image.open(raw / "gta5" / "images" / f"{name}.png")
    wanted = np.array(source.resize((48, 24), Image.BILINEAR))
    got = np.array(Image.open(prepared / "synthetic" / "train" / "images" / f"{name}.png"))
    assert np.array_equal(got, wanted)


def test_running_again_gives_the_same_bytes(raw, prepared):
    """Also after files were lost: all is a function of the raw frames and the settings."""
    before = files(prepared)
    good(*official(raw, prepared))
    assert files(prepared) == before
    (prepared / "real" / "train" / "images" / "aachen_000002_000019.png").unlink()
    for path in (prepared / "synthetic" / "test" / "labels").iterdir():
        path.unlink()
    good(*official(raw, prepared))
    assert files(prepared) == before


def test_other_settings_need_another_folder(raw, prepared):
    """Two settings in one folder would mix; the error names the setting."""
    before = files(prepared)
    assert "size" in error_line(*official(raw, prepared), "--size", 32, 64)
    assert "seed" in error_line(*official(raw, prepared), "--seed", 1)
    assert files(prepared) == before


def test_seed_and_limit_choose_the_frames(raw, prepared, tmp_path):
    """--seed decides which frames are held out, --limit how many are kept to train on."""
    held_out = set()
    for seed in range(3):
        good(*official(raw, tmp_path / str(seed)), "--seed", seed, "--limit", 2)
        held_out.add(tuple(record(tmp_path / str(seed))["held_out"]["synthetic"]))
        assert record(tmp_path / str(seed))["counts"]["real/train"] == 2
    assert len(held_out) > 1


def test_other_raw_frames_do_not_leak_into_an_old_folder(tmp_path):
    """The split is drawn again when frames were added. Either the old folder is refused, or no
    frame of its old split stays behind, nor one that has become bad: a training frame must
    never be in test/ too."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    for i in range(8):
        draw(raw / f"{i}.png", i)
    args = ["--synthetic", raw, "--real", raw, "--out", out, *SMALL]
    good(*args)
    for i in range(8, 12):
        draw(raw / f"{i}.png", i)
    (raw / "0.png").write_bytes((raw / "0.png").read_bytes()[:3000])
    if prepare(*args).returncode == 0:
        train, test = (set(names(out / "real" / s)) for s in ("train", "test"))
        assert not train & test
        assert train | test == {str(i) for i in range(1, 12)}


def test_strict_stops_at_the_first_bad_frame(raw, tmp_path):
    """Both for a missing half of a pair and for a file that cannot be read."""
    line = error_line(*official(raw, tmp_path / "a"), "--strict")
    assert "00005.png" in line and "no label" in line and "--strict" in line
    images = raw / "gta5" / "images"
    line = error_line("--synthetic", images, "--real", images, "--out", tmp_path / "b", *SMALL,
                      "--strict")
    assert "00009.png" in line and "truncated" in line and "--strict" in line
    assert record(tmp_path / "b")["finished"] is False


# ------------------------------------------------------------------------- generic folders


def test_any_folder_of_images(tmp_path):
    """JPEG, capitals, spaces, other letters, subfolders, grey: all become PNG by the same name;
    16 bit is refused and said. Labels may hold trainIds; a domain may have none."""
    images, labels, real = tmp_path / "Bilder 1", tmp_path / "Etiketten ä", tmp_path / "写真"
    stems = ["straße 1", "Łódź/новый кадр", "tokyo 東京", "plain.v2"]
    for i, (stem, suffix) in enumerate(zip(stems, (".JPG", ".jpeg", ".Png", ".png"))):
        draw(images / f"{stem}{suffix}", i)
        draw_label(labels / f"{stem}.png", i, [0, 5, 18, 255])
    for i in range(4):
        draw(real / f"{i}.PNG", i, mode="L" if i == 0 else "RGB")
    Image.fromarray(np.full((48, 64), 3000, np.uint16)).save(real / "deep.png")

    text = good("--synthetic", images, labels, "--real", real, "--label-ids", "trainIds",
                "--out", tmp_path / "out", *SMALL[:-1], 2)
    assert "a domain has no labels" in text and "deep.png" in text
    (skipped,) = record(tmp_path / "out")["skipped"]
    assert "deep.png" in skipped and "8-bit" in skipped
    made = [n for s in ("train", "test") for n in names(tmp_path / "out" / "synthetic" / s)]
    assert sorted(made) == sorted(s.replace("/", "_") for s in stems)
    assert not any((tmp_path / "out" / "real").glob("*/labels/*"))

    found = {int(i) for s in ("train", "test")
             for i in load_labels(tmp_path / "out" / "synthetic" / s).unique()}
    assert found == {0, 5, 18, 255}
    assert (load_images(tmp_path / "out" / "real" / "train").shape[1:]) == (3, 24, 48)


def test_two_files_of_one_name_are_refused(tmp_path):
    """a.png and a.jpg would both become a.png, one over the other; a/b.png and a_b.png too."""
    for i, name in enumerate(("a.png", "a.jpg", "b.png", "c.png", "d.png")):
        draw(tmp_path / "raw" / name, i)
    args = ["--synthetic", tmp_path / "raw", "--real", tmp_path / "raw", "--out",
            tmp_path / "out", *SMALL]
    line = error_line(*args)
    assert "a.png" in line and "a.jpg" in line
    (tmp_path / "raw" / "a.jpg").unlink()
    draw(tmp_path / "raw" / "x" / "y.png", 0)
    draw(tmp_path / "raw" / "x_y.png", 0)
    assert "x_y.png" in error_line(*args)


def test_frames_that_the_crop_does_not_fit(tmp_path):
    """They are skipped with the reason; if that leaves nothing, it is an error."""
    for i in range(5):
        draw(tmp_path / "raw" / f"{i}.png", i)
    draw(tmp_path / "raw" / "small.png", 9, size=(30, 40))
    args = ["--synthetic", tmp_path / "raw", "--real", tmp_path / "raw", "--size", 24, 48,
            "--test", 2, "--seed", 0]
    good(*args, "--out", tmp_path / "some", "--crop", 10, 10, 30, 50)
    skipped = record(tmp_path / "some")["skipped"]
    assert len(skipped) == 2                                             # once per domain
    assert all("small.png" in s and "--crop 10 10 30 50" in s and "40x30" in s for s in skipped)
    good(*args, "--out", tmp_path / "whole")                             # own images: uncropped
    assert not record(tmp_path / "whole")["skipped"]


@pytest.mark.parametrize("given, own", [("gta5", "real"), ("cityscapes", "synthetic")])
def test_official_data_has_the_papers_crop(raw, tmp_path, given, own):
    """The line says "try --crop none": the same command with it goes through."""
    for i in range(4):
        draw(tmp_path / "raw" / f"{i}.png", i)
    command = [f"--{given}", raw / given, f"--{own}", tmp_path / "raw", "--size", 24, 48, "--test", 1,
               "--out", tmp_path / "out"]
    line = error_line(*command)
    assert "were skipped" in line and "--crop 200 600 400 600 does not fit" in line
    assert "try --crop none" in line
    good(*command, "--crop", "none")


# ------------------------------------------------------------------------------------- demo


def test_demo_is_deterministic_and_has_two_looks(tmp_path):
    """No data, no network: the same bytes in any folder, no scene twice, only known classes."""
    for name in ("a", "b"):
        good("--demo", "--limit", 4, "--test", 2, "--size", 40, 80, "--out", tmp_path / name)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert set(record(tmp_path / "a")["counts"].values()) == {2, 4}
    images = torch.cat([load_images(tmp_path / "a" / d / s)
                        for d in ("synthetic", "real") for s in ("train", "test")])
    labels = torch.cat([load_labels(tmp_path / "a" / d / s)
                        for d in ("synthetic", "real") for s in ("train", "test")])
    assert images.shape == (12, 3, 40, 80) and labels.shape == (12, 40, 80)
    assert len({image.numpy().tobytes() for image in images}) == 12
    assert len({label.numpy().tobytes() for label in labels}) == 12
    assert set(labels.unique().tolist()) <= {*range(19), IGNORE} and len(labels.unique()) > 8
    good("--demo", "--limit", 4, "--test", 2, "--size", 40, 80, "--out", tmp_path / "c",
         "--seed", 1)
    assert not torch.equal(load_images(tmp_path / "c" / "real" / "train"), images[6:10])


# ------------------------------------------------------------------------------ what it refuses


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """{name: path} for the table below."""
    root = tmp_path_factory.mktemp("places")
    for i in range(4):
        draw(root / "ok" / f"{i}.png", i)
    (root / "empty").mkdir()
    (root / "file").write_text("not a folder")
    (root / "damaged").mkdir()
    (root / "damaged" / "prepare.json").write_text('{"settings": {')
    return {p: root / p for p in ("ok", "empty", "file", "missing", "damaged")}


BOTH = "--synthetic ok --real ok --crop none --size 24 48 --test 2"


@pytest.mark.parametrize("arguments, words", [
    ("--synthetic missing --real ok --test 1", ["missing", "no such folder"]),
    ("--synthetic ok --real empty --test 1", ["empty", "no images"]),
    ("--synthetic file --real ok --test 1", ["file", "folder"]),
    ("--synthetic ok missing --real ok --test 1 --crop none", ["missing", "no such folder"]),
    ("--gta5 ok --cityscapes ok", ["ok", "images/"]),
    ("--gta5 missing --cityscapes ok", ["missing", "images/"]),
    ("--synthetic ok --cityscapes ok --test 1", ["ok", "leftImg8bit/train/"]),
    ("--synthetic ok ok ok --real ok", ["--synthetic", "IMAGES [LABELS]"]),
    (f"{BOTH} --test 4", ["--test 4", "4 frames"]),
    (f"{BOTH} --test 0", ["--test", "above 0"]),
    (f"{BOTH} --test x", ["--test", "x"]),
    (f"{BOTH} --limit -3", ["--limit", "-3"]),
    (f"{BOTH} --size -24 48", ["--size", "-24"]),
    (f"{BOTH} --size 10 48", ["--size", "24 x 24"]),
    (f"{BOTH} --crop 1 2 3", ["--crop", "four numbers"]),
    (f"{BOTH} --crop 0 0 0 0", ["--crop"]),
    (f"{BOTH} --crop 0 0 -5 10", ["--crop"]),
    (f"{BOTH} --seed -1", ["--seed"]),
    (f"{BOTH} --out file", ["file"]),
    (f"{BOTH} --out damaged", ["prepare.json"]),
    (f"{BOTH} --label-ids colours", ["--label-ids", "colours"]),
    (f"{BOTH} --unknown 3", ["--unknown"]),
    ("", ["nothing for the synthetic domain", "--gta5", "--demo"]),
    ("--synthetic ok --crop none --test 1", ["nothing for the real domain"]),
    ("--demo --gta5 ok", ["--demo"]),
    ("--demo --real ok", ["--demo"]),
    ("--demo --seed -1 --size 24 48 --limit 1 --test 1", ["--seed"]),
    ("--gta5 ok --synthetic ok --real ok", ["--gta5", "--synthetic"]),
])
def test_a_users_slip_is_one_line(places, tmp_path, arguments, words):
    """Exit status 2, no traceback, one line that names the folder or flag that is wrong."""
    line = error_line("--out", tmp_path, *(places.get(a, a) for a in arguments.split()))
    for word in words:
        assert word in line


def noise(mode, seed=0, size=(48, 64)):
    """A PIL image of `mode` with random content."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def ids(mode="L", value=7):
    """A label of one id, as PIL image."""
    image = Image.new("L", (64, 48), value)
    return image if mode == "L" else image.convert(mode)


def holed(image):
    """An image with one transparent pixel."""
    image = image.convert("RGBA")
    image.putpixel((3, 3), (0, 0, 0, 0))
    return image


def damaged(suffix, keep):
    """The first `keep` bytes of an image file."""
    file = io.BytesIO()
    noise("RGB").save(file, {".png": "PNG", ".jpg": "JPEG"}[suffix])
    return file.getvalue()[:keep]


def several(n):
    """The bytes of a GIF of n pictures."""
    file = io.BytesIO()
    noise("P").save(file, "GIF", save_all=True, append_images=[noise("P", i) for i in range(1, n)])
    return file.getvalue()


DEEP = Image.fromarray(np.full((48, 64), 3000, np.uint16))
# The table of bad (and good) input. File name of the image: image, label (as bytes or PIL), and
# words of the reason for which the pair is skipped; none for a pair that must be taken.
FRAMES = {
    "fine.png": (noise("RGB"), ids(), ""),
    "palette label.png": (noise("RGB"), ids().convert("P"), ""),
    "grey.png": (noise("L"), ids(), ""),
    "black and white.png": (noise("1"), ids(), ""),
    "palette.png": (noise("P"), ids(), ""),
    "opaque.png": (noise("RGBA"), ids(), ""),
    "PHOTO Ä 東京.JPG": (noise("RGB"), ids(), ""),
    "PHOTO.JPEG": (noise("L"), ids(), ""),
    "holed.png": (holed(noise("RGB")), ids(), "transparent"),
    "deep.png": (DEEP, ids(), "mode I 8-bit"),
    "cmyk.jpg": (noise("CMYK"), ids(), "CMYK RGB"),
    "zero.png": (b"", ids(), "cannot identify"),
    "text.png": (b"this is no image", ids(), "cannot identify"),
    "cut.png": (damaged(".png", 3000), ids(), "truncated"),
    "cut photo.jpg": (damaged(".jpg", 1000), ids(), "truncated"),
    "head only.png": (damaged(".png", 40), ids(), "cannot identify"),
    "wide.png": (noise("RGB", size=(48, 80)), ids(), "80x48 64x48"),
    "zero label.png": (noise("RGB"), b"", "cannot identify"),
    "equal channels label.png": (noise("RGB"), ids("RGB"), ""),
    "16 bit label.png": (noise("RGB"), Image.fromarray(np.full((48, 64), 7, np.uint16)), ""),
    "rgb label.png": (noise("RGB"), noise("RGB"), "label mode RGB ids"),
    "binary label.png": (noise("RGB"), ids().convert("1"), "label mode 1"),
    "lossy label.png": (noise("RGB"), damaged(".jpg", None), "label JPEG PNG"),
    "two.gif": (several(2), ids(), "2 pictures"),
    "n" * 248 + ".png": (noise("RGB"), ids(), "name too long"),
    "alpha label.png": (noise("RGB"), ids("LA"), "label mode LA"),
    "rgba label.png": (noise("RGB"), ids("RGBA"), "label mode RGBA"),
    "deep label.png": (noise("RGB"), DEEP, "label ids 3000"),
    "unknown ids.png": (noise("RGB"), ids(value=77), "label ids 77 are not labelIds"),
    "no label.png": (noise("RGB"), None, "no label"),
    "alone.png": (None, ids(), "label without an image"),
}


def test_the_table_of_bad_input(tmp_path):
    """Each is converted where that is right, else skipped with its reason; never a traceback."""
    root = tmp_path / "raw"
    for name, (image, label, _) in FRAMES.items():
        suffix = ".PNG" if "PHOTO" in name else ".png"                 # of its label
        for content, path in ((image, root / "images" / name),
                              (label, root / "labels" / f"{Path(name).stem}_{suffix}")):
            path = path.with_name(path.name.replace("_.", "."))
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif content:
                content.save(path)
    for i in range(9):
        draw(root / "real" / f"{i}.png", i)
    before = files(root)
    text = good("--synthetic", root / "images", root / "labels", "--real", root / "real",
                "--out", tmp_path / "out", "--label-ids", "labelIds", *SMALL[:-1], 8)
    assert files(root) == before                                # nothing of the user's changed
    made = {n for s in ("train", "test") for n in names(tmp_path / "out/synthetic" / s)}
    assert made == {Path(name).stem for name, (*_, words) in FRAMES.items() if not words}
    skipped = record(tmp_path / "out")["skipped"]
    bad = {Path(name).stem: words for name, (*_, words) in FRAMES.items() if words}
    assert len(skipped) == len(bad) and f"{len(bad)} frames skipped" in text
    for stem, words in bad.items():
        (line,) = [x for x in skipped if f"/{stem}." in x.split(": ")[0]]
        assert all(word in line for word in words.split()), line


def test_a_camera_held_upright(tmp_path):
    """EXIF says how a photo is to be turned; the viewer of the user does it too."""
    exif = Image.Exif()
    exif[0x0112] = 6                                            # turn by 90 degrees
    noise("RGB").save(tmp_path / "a.jpg", exif=exif)
    assert read_rgb(tmp_path / "a.jpg").size == (48, 64)


# --------------------------------------------------------------------- reading prepared folders


def test_load_images_and_labels(tmp_path):
    """[N, 3, H, W] and [N, H, W], uint8, in the order of the names; others import these."""
    for i, name in enumerate(("b", "a", "c")):
        draw(tmp_path / "images" / f"{name}.png", i)
        draw_label(tmp_path / "labels" / f"{name}.png", i, [0, 18, 255], palette=True)
    images, labels = load_images(tmp_path), load_labels(tmp_path)
    assert names(tmp_path) == ["a", "b", "c"]
    assert images.shape == (3, 3, 48, 64) and labels.shape == (3, 48, 64)
    assert images.dtype == labels.dtype == torch.uint8
    for i, name in enumerate("abc"):
        pixels = np.array(Image.open(tmp_path / "images" / f"{name}.png"))
        assert np.array_equal(images[i].permute(1, 2, 0).numpy(), pixels)
        ids = np.array(Image.open(tmp_path / "labels" / f"{name}.png"))
        assert np.array_equal(labels[i].numpy(), ids)


@pytest.mark.parametrize("record", ["real/refine.json", "prepare.json"])
def test_what_a_stopped_run_left_is_not_used(tmp_path, record):
    """A half-made folder would be a smaller data set, and nobody would notice."""
    draw(tmp_path / "real/train/images/a.png", 0)
    assert names(tmp_path / "real/train") == ["a"]
    (tmp_path / record).write_text('{"finished": false}')
    with pytest.raises(UserError, match="not finished"):
        names(tmp_path / "real/train")


def test_labels_of_other_frames_are_named(tmp_path):
    """No image has its label: the line names one that is missing, and does not blame --test."""
    draw(tmp_path / "raw/a.png", 0)
    (tmp_path / "labels").mkdir()
    line = error_line("--synthetic", tmp_path / "raw", tmp_path / "labels", "--real",
                      tmp_path / "raw", "--out", tmp_path / "out")
    assert "no label" in line and "a.png" in line and "--test" not in line


def test_load_images_names_the_bad_file(tmp_path):
    """Another size, another mode, a damaged file, a missing label, an empty folder."""
    with pytest.raises(UserError, match="prepare.py"):
        load_images(tmp_path)
    draw(tmp_path / "images" / "a.png", 0)
    with pytest.raises(UserError, match="a.png"):
        load_labels(tmp_path)
    bad = tmp_path / "images" / "b.png"
    draw(bad, 1, size=(40, 64))
    with pytest.raises(UserError, match="b.png"):
        load_images(tmp_path)
    draw(bad, 1, mode="L")
    with pytest.raises(UserError, match="b.png"):
        load_images(tmp_path)
    draw(bad, 1)
    bad.write_bytes(bad.read_bytes()[:3000])
    with pytest.raises(UserError, match="b.png"):
        load_images(tmp_path)
