"""prepare.py: class table, crop, tiny folders in every format it reads, and what it refuses."""
import re
import shutil
import unicodedata

import numpy as np
import pytest
import torch
from conftest import call, content, encoded, fill, noise, record, save
from PIL import Image
from torchvision.datasets import Cityscapes

from prepare import CLASSES, IGNORE, PALETTE, TABLE, load_images, load_labels, names
from support.cli import UserError

TRAIN_ID = {label_id: i for i, (_, label_id, _) in enumerate(TABLE)}
SMALL = ["--crop", "2", "4", "44", "56", "--size", "24", "48", "--test", "3"]


def good(*args):
    """What prepare.py prints."""
    return call("prepare.py", "--workers", 1, *args, cwd="/")[0]


def error_line(*args):
    """The last line of a run that must fail."""
    return call("prepare.py", "--workers", 1, *args, cwd="/", status=2)[1].splitlines()[-1]


# ------------------------------------------------------------------------------ class table


def test_classes_are_those_of_cityscapes():
    """Names and colours of trainId 0..18 as torchvision (from cityscapesScripts) has them."""
    official = sorted((c for c in Cityscapes.classes if 0 <= c.train_id < 19),
                      key=lambda c: c.train_id)
    assert CLASSES == [c.name for c in official]
    assert [label_id for _, label_id, _ in TABLE] == [c.id for c in official]
    assert PALETTE[:19].tolist() == [list(c.color) for c in official]
    assert not PALETTE[IGNORE].any()


# ------------------------------------------------------------------ the two official formats


@pytest.fixture(scope="module")
def raw(raw, tmp_path_factory):
    """Of 12 frames 05 has no label and 09 is cut off."""
    root = shutil.copytree(raw, tmp_path_factory.mktemp("spoilt") / "raw")
    images, labels = root / "gtav/images", root / "gtav/labels"
    (labels / "00005.png").unlink()
    (images / "00009.png").write_bytes((images / "00009.png").read_bytes()[:3000])
    return root


def official(raw, out):
    return ["--gta5", raw / "gtav", "--cityscapes", raw / "cityscapes", "--out", out, *SMALL]


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "data"
    good(*official(raw, out))
    said = record(out)             # 12 synthetic, 2 of them bad; train/; 3 of val/, 1 not asked
    assert [*said["counts"].values(), said["not_asked"]] == [7, 3, 9, 3, 1]
    return out


@pytest.mark.parametrize("domain", ["synthetic", "real"])
def test_a_pair_is_shrunk_and_its_label_are_train_ids_of_the_nearest_pixel(raw, prepared, domain):
    """44 x 56 pixels from row 2 and column 4, to 24 x 48. The image: PIL's antialiased bilinear.
    The label's target (i, j) is the source pixel under its centre, as trainId. No new id can
    appear. The file shows Cityscapes colours."""
    rows, columns = (((np.arange(n) + 0.5) * m / n + first).astype(int)
                     for n, m, first in ((24, 44, 2), (48, 56, 4)))
    for split in ("train", "test"):
        for name in names(prepared / domain / split):
            image, label = (raw / f"gtav/{kind}/{name}.png" for kind in ("images", "labels"))
            if domain == "real":
                (image,), (label,) = (raw.rglob(f"{name}_{kind}.png")
                                      for kind in ("leftImg8bit", "gtFine_labelIds"))
            ids = np.array(Image.open(label))[rows][:, columns]
            wanted = np.vectorize(lambda i: TRAIN_ID.get(i, 255))(ids)
            with Image.open(prepared / domain / split / "labels" / f"{name}.png") as found:
                assert found.mode == "P" and np.array_equal(np.array(found), wanted)
                assert np.array_equal(np.array(found.convert("RGB")), PALETTE[wanted])
            image = Image.open(image).crop((4, 2, 60, 46))
            wanted = np.array(image.resize((48, 24), Image.BILINEAR))
            with Image.open(prepared / domain / split / "images" / f"{name}.png") as found:
                assert np.array_equal(np.array(found), wanted)


def test_running_again_gives_the_same_bytes(raw, prepared):
    """Files of the user's stay, too."""
    save(prepared / "real/train/depth/a.png", noise(0))
    save(prepared / "real/train/labels/0.png.bak", b"mine")
    before = content(prepared)                                # the default, said; more workers
    good(*official(raw, prepared), "--label-ids", "labelIds", "--workers", 2)
    assert content(prepared) == before


def test_other_settings_need_another_folder(raw, prepared, tmp_path):
    """Two settings in one folder would mix. A user's own folder is left alone."""
    assert {*record(prepared)["settings"]} == {
        "gta5", "cityscapes", "synthetic", "real", "demo", "size", "crop", "test", "limit", "seed",
        "label_ids", "classes"}
    fill(tmp_path / "mine/real/train/images", 1)
    linked = shutil.copytree(prepared, tmp_path / "linked")
    (linked / "real").rename(tmp_path / "theirs")
    (linked / "real").symlink_to(tmp_path / "theirs")
    for folder in ("mine", "linked"):
        assert "was not made by prepare.py" in error_line(*official(raw, tmp_path / folder))


def test_other_raw_frames_do_not_leak_into_an_old_folder(tmp_path):
    """The split is drawn again when frames were added: no frame of the old one stays behind, nor
    one that has become bad. A training frame must never be in test/ too."""
    raw, out = fill(tmp_path / "raw", 8), tmp_path / "out"
    args = ["--synthetic", raw, "--real", raw, "--out", out, *SMALL]
    good(*args)
    another = error_line("--synthetic", fill(tmp_path / "other", 8), *args[2:])
    assert f"prepared with synthetic = ['{raw}'], not ['{tmp_path}/other']" in another
    fill(raw, 12)
    (raw / "00.png").write_bytes((raw / "00.png").read_bytes()[:3000])
    good(*args)
    train, test = (set(names(out / "real" / s)) for s in ("train", "test"))
    assert not train & test
    assert train | test == {f"{i:02d}" for i in range(1, 12)}


def test_strict_stops_at_the_first_bad_frame(raw, tmp_path):
    """Both for a missing half of a pair and for a file that cannot be read."""
    line = error_line(*official(raw, tmp_path / "a"), "--strict")
    assert "00005.png" in line and "no label" in line and "--strict" in line
    images = raw / "gtav" / "images"
    line = error_line("--synthetic", images, "--real", images, "--out", tmp_path / "b", *SMALL,
                      "--strict")
    assert "00009.png" in line and "truncated" in line and "--strict" in line
    assert record(tmp_path / "b")["finished"] is False


# ------------------------------------------------------------------------- generic folders


def test_the_papers_data_has_the_papers_crop(raw, tmp_path):
    """If that leaves nothing it is an error, whose advice can be followed in the same folder. Only
    both: the crop would be cut out of somebody's own pictures as well."""
    gta5, cityscapes = ["--gta5", raw / "gtav"], ["--cityscapes", raw / "cityscapes"]
    flags = ["--size", 24, 48, "--test", 1, "--out"]
    own = fill(tmp_path / "raw", 4)
    good(*gta5, "--real", own, *flags, tmp_path / "a")
    good(*cityscapes, "--synthetic", own, *flags, tmp_path / "b")
    command = [*gta5, *cityscapes, *flags, tmp_path / "out"]
    out, err = call("prepare.py", *command, cwd="/", status=2)
    line = err.splitlines()[-1]
    assert re.search("none of the first 1 frames can be used, the last: .*png: --crop 200", out)
    assert "were skipped" in line and "--crop 200 600 400 600 does not fit" in line
    assert "try --crop none" in line
    good(*command, "--crop", "none")


# ------------------------------------------------------------------------------------- demo


def test_the_demo_has_two_looks(tmp_path):
    """No data, no network: no scene twice, 15 classes, others for another seed. The labels fit the
    picture: the sky up and, in the game, blue, trees green, the road down and grey. That the bytes
    are the same in any folder: test_kills.py."""
    flags = ["--demo", "--limit", 20, "--test", 10, "--size", 40, 80, "--out"]
    good(*flags, tmp_path / "a")
    assert [*record(tmp_path / "a")["counts"].values()] == [20, 10, 20, 10]
    folders = [tmp_path / "a" / d / s for d in ("synthetic", "real") for s in ("train", "test")]
    images, labels = (torch.cat([*map(load, folders)]) for load in (load_images, load_labels))
    assert images.shape == (60, 3, 40, 80) and labels.shape == (60, 40, 80)
    assert len({image.numpy().tobytes() for image in images}) == 60
    assert len({label.numpy().tobytes() for label in labels}) == 60
    game, label = images[:30].double(), labels[:30]
    assert label.unique().tolist() == [*range(12), 13, 15, 16]
    rows = torch.arange(40.)[:, None].expand(label.shape)
    row, red, green, blue = ([values[label == i].mean() for i in range(19)]
                             for values in (rows, *game.unbind(1)))
    assert row[10] < row[2] < row[8] < row[13] < row[1] < row[0]
    assert blue[10] > red[10] + 100 and green[8] > 30 + max(red[8], blue[8])
    assert max(red[0], green[0], blue[0]) - min(red[0], green[0], blue[0]) < 30
    sky = images[30:].movedim(1, -1)[labels[30:] == 10].double().mean(0)
    assert sky[2] - sky[0] < 100
    good(*flags, tmp_path / "c", "--seed", 1)
    assert not torch.equal(load_images(tmp_path / "c" / "real" / "train"), images[30:50])


# ------------------------------------------------------------------------------ what it refuses


PHOTO, LABEL = noise(0), Image.new("L", (64, 48), 7)
HOLED, DEEP = PHOTO.convert("RGBA"), Image.new("I;16", (64, 48), 3000)
HOLED.putpixel((3, 3), (0, 0, 0, 0))


def held(orientation, photo=PHOTO):
    """A JPEG whose EXIF says that the camera was held so: 2 to 8 are to be turned or mirrored."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(photo, "JPEG", exif=exif)


# The table of bad (and good) input. File name of the image: image, label (as bytes or PIL), and
# words of the reason for which the pair is skipped; none for a pair that must be taken.
FRAMES = {
    "grey.png": (PHOTO.convert("L"), LABEL, ""),
    "black and white.png": (PHOTO.convert("1"), LABEL, ""),
    "palette.png": (PHOTO.convert("P"), LABEL, ""),
    "opaque_color_.png": (PHOTO.convert("RGBA"), LABEL, ""),
    "grey and alpha.png": (PHOTO.convert("LA"), LABEL, ""),
    "Łódź/новый кадр.v2.png": (PHOTO, LABEL, ""),
    "PHOTO Ä 東京.JPG": (PHOTO, LABEL, ""),
    "holed.png": (HOLED, LABEL, "transparent"),
    "deep.png": (DEEP, LABEL, "mode I 8-bit"),
    "cmyk.jpg": (PHOTO.convert("CMYK"), LABEL, "CMYK RGB"),
    "wide.png": (noise(0, (48, 80)), LABEL, "80x48 64x48"),
    "binary label.png": (PHOTO, LABEL.convert("1"), "label mode 1"),
    "two.gif": (encoded(noise(1), "GIF", save_all=True, append_images=[PHOTO]), LABEL,
                "2 pictures"),
    "cut.gif": (encoded(PHOTO, "GIF")[:-1] + b"!", LABEL, "index out of range"),
    "camera.jpg": (encoded(PHOTO, "MPO", save_all=True, append_images=[noise(1)]), LABEL, ""),
    "unsaid.jpg": (held(0), LABEL, ""), "mirrored.jpg": (held(2), LABEL, "EXIF"),
    "turned.jpg": (held(8), LABEL, "EXIF"), "no such number.jpg": (held(9), LABEL, ""),
    "n" * 247 + ".png": (PHOTO, LABEL, ""),
    "n" * 248 + ".png": (PHOTO, LABEL, "name too long"),
    "deep label.png": (PHOTO, DEEP, "label ids 3000"),
    "fits.png": (noise(2, (46, 60)), LABEL.crop((0, 0, 60, 46)), ""),          # SMALL's crop, just
    "low.png": (noise(3, (45, 64)), LABEL.crop((0, 0, 64, 45)), "--crop 2 4 44 56 64x45"),
    "narrow.png": (noise(4, (48, 59)), LABEL.crop((0, 0, 59, 48)), "--crop 2 4 44 56 59x48"),
    "unknown ids.png": (PHOTO, Image.new("L", (64, 48), 35), "label ids 35 are not labelIds"),
}


def test_the_table_of_bad_input(tmp_path):
    """Each is converted where that is right, else skipped with its reason; never a traceback."""
    root = tmp_path / "raw"
    for name, (image, label, _) in FRAMES.items():
        stem, ending = name.rpartition(".")[0], ".PNG" if "PHOTO" in name else ".png"
        at = unicodedata.normalize("NFD", f"images/{name}")            # its label: NFC
        for picture, file in ((image, at), (label, f"labels/{stem}{ending}")):
            save(root / file, picture)
    save(root / "labels/alone.png", LABEL)
    save(fill(root / "real", 9) / "turned.jpg", held(6, noise(0, (64, 48))))
    before = content(root)
    text = good("--synthetic", root / "images", root / "labels", "--real", root / "real",
                "--out", tmp_path / "out", "--label-ids", "labelIds", *SMALL[:-1], 6)
    assert content(root) == before                                # nothing of the user's changed
    made = {n for s in ("train", "test") for n in names(tmp_path / "out/synthetic" / s)}
    bad = {name.rpartition(".")[0]: words for name, (*_, words) in FRAMES.items() if words}
    assert made == {name.rpartition(".")[0].replace("/", "_") for name in FRAMES} - {*bad}
    skipped = record(tmp_path / "out")["skipped"]
    assert record(tmp_path / "out")["not_read"]["labels without an image"] == 1
    assert len(skipped) == len(bad) and f"{len(bad)} frames skipped" in text
    for stem, words in bad.items():
        (line,) = [x for x in skipped if f"/{stem}." in x.split(": ")[0]]
        assert all(word in line for word in words.split()), line
    assert text.count("\nskipped ") == 5 and "a domain has no labels" in text
    assert "none of the first" not in text
    assert not any((tmp_path / "out/real").glob("*/labels/*"))
    line = error_line("--synthetic", root / "images", root / "labels", "--real", root / "images",
                      "--out", tmp_path / "b", *SMALL[:-1], 20)
    assert "synthetic/train: --test has taken all usable frames; the last bad one is " in line


# --------------------------------------------------------------------- reading prepared folders


@pytest.mark.parametrize("record, content, words", [
    ("real/refine.json", '{"finished": false}', "not finished"),
    ("prepare.json", '{"finished": false}', "not finished"),
    *[("prepare.json", content, "prepare.json: damaged") for content in ("", "{", "[]", "\xff")]])
def test_what_a_stopped_run_left_is_not_used(tmp_path, record, content, words):
    """A half-made folder would be a smaller data set, and nobody would notice."""
    save(fill(tmp_path / "real/train/images", 1) / "._00.png", b"of a macOS archive")
    save(tmp_path / "real/train/images/00-a.png", noise(0))
    assert names(tmp_path / "real/train") == ["00", "00-a"]
    (tmp_path / record).write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=words):
        names(tmp_path / "real/train")


def test_load_images_names_the_bad_file(tmp_path, monkeypatch):
    """Another size or mode, one that is damaged or absurdly large, no label, an empty folder."""
    with pytest.raises(UserError, match="prepare.py"):
        load_images(tmp_path)
    save(fill(tmp_path / "images", 1) / "a.jpg", noise(0))
    with pytest.raises(UserError, match="a.jpg: a domain has "):
        load_images(tmp_path)
    (tmp_path / "images/a.jpg").unlink()
    with pytest.raises(UserError, match="00.png"):
        load_labels(tmp_path)
    bad = tmp_path / "images/b.png"
    cut_off = (tmp_path / "images/00.png").read_bytes()[:3000]
    for bad_one in (noise(1, (40, 64)), noise(1).convert("L"), cut_off):
        save(bad, bad_one)
        with pytest.raises(UserError, match="b.png"):
            load_images(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="00.png: cannot be read"):
        load_images(tmp_path)
