"""Nothing vanishes and nothing is read wrongly: properties of prepare.py over random folders and
labels, and the checks without which a stage would begin what it cannot end."""
import base64
import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, blocks, call, encoded, fill, noise, record, save
from PIL import Image

import prepare
from prepare import PALETTE, TABLE, check_domains, load_labels, names
from support import cli
from support.cli import UserError, lock, write_text
from support.figures import Figure, save_figure
from support.raw import usable
from support.training import save_checkpoint

FLAGS = ["--crop", "none", "--size", 24, 48, "--workers", 1]


# ------------------------------------------------------------------ every file is accounted for

GOOD = [".png", ".PNG", ".jpg", ".JPEG", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"]


def random_tree(root, seed):
    """40 pictures of every kind, bad ones, other files, and hidden ones beside them, in folders,
    linked ones among them."""
    choose = random.Random(seed)
    folders = [root, root / "a", root / "ä" / "b c", root.parent / "elsewhere"]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    (root / "link").symlink_to(folders[3])                             # as a city may be
    (root / "a" / "circle").symlink_to(root)
    (root / "a" / "again").symlink_to(root / "ä")                      # no file twice
    for i in range(40):
        folder, kind = choose.choice(folders), choose.random()
        if kind < 0.6:
            suffix = choose.choice(GOOD)
            image = noise(i).convert("P" if suffix == ".gif" else "RGB")
            image.save(folder / f"{i}{suffix}", {".jfif": "JPEG"}.get(suffix))
        elif kind < 0.7:
            (folder / f"{i}.png").write_bytes(choose.randbytes(50))
        elif kind < 0.75:
            (folder / f"{i}.png").symlink_to("nowhere.png")
        else:
            (folder / f"{i}{choose.choice(['.txt', '.json', '', '.mp4'])}").write_text("x")
        (folder / f"._{i}.png").write_bytes(b"of a Mac")


@pytest.mark.parametrize("seed", range(3))
def test_every_file_is_used_skipped_with_a_reason_or_counted(tmp_path, seed):
    random_tree(tmp_path / "raw", seed)
    fill(tmp_path / "real", 5)
    limit = random.Random(seed).choice([[], ["--limit", 3], ["--test", 2, "--limit", 4]])
    out, _ = call("prepare.py", "--synthetic", "raw", "--real", "real", *limit, "--out", "data",
                  *FLAGS, cwd=tmp_path)
    said = record(tmp_path / "data")
    used = said["counts"]["synthetic/train"] + said["counts"]["synthetic/test"]
    real = said["counts"]["real/train"] + said["counts"]["real/test"]
    assert used + real + len(said["skipped"]) + sum(said["not_read"].values()) \
        + said["not_asked"] == 40 + 5
    for ending, n in said["not_read"].items():
        assert f"{n} {ending}" in out
    made = [n for s in ("train", "test") for n in names(tmp_path / "data/synthetic" / s)]
    assert len(made) == len(set(made)) == used                 # none twice, none in both


@pytest.mark.parametrize("seed", range(4))
def test_bad_frames_do_not_eat_test_and_limit(tmp_path, seed):
    """n are made where so many usable ones exist; else the last lines say how many there were. The
    usable ones among those that would have been held out are held out still."""
    choose = random.Random(seed)
    fill(tmp_path / "raw", 14)
    bad = set(choose.sample(range(14), choose.randint(1, 8)))
    for i in bad:
        (tmp_path / f"raw/{i:02d}.png").write_bytes(b"")
    test, limit = choose.randint(1, 4), choose.randint(1, 8)
    out, _ = call("prepare.py", "--synthetic", "raw", "--real", "raw", "--test", test, "--limit",
                  limit, "--seed", seed, *FLAGS, cwd=tmp_path)
    assert f"to test on: {test} synthetic, {test} real" in out
    for domain, stream in (("synthetic", 0), ("real", 2)):
        found = {s: names(tmp_path / "data" / domain / s) for s in ("test", "train")}
        usable = 14 - len(bad)
        assert (len(found["test"]), len(found["train"])) == (test, min(limit, usable - test))
        assert (f"{domain}/train: asked {limit}, got" in out) == (limit > usable - test)
        first = np.random.default_rng([seed, stream]).permutation(14)[:test]
        assert {f"{i:02d}" for i in first if i not in bad} <= set(found["test"])


def test_frames_that_nobody_asked_for_are_not_made():
    """But for those that other threads have begun."""
    def make(frame):
        time.sleep(0.01)
        tried.append(frame)
        return prepare.Made(why="bad" if frame.name < 4 else None)
    tried = []
    done = usable(make, [prepare.Frame(i, *[None] * 3) for i in range(100)], 3, 2)
    assert [f.name for f, made in done.items() if not made.why] == [4, 5, 6] and len(done) == 7
    assert 7 <= len(tried) < 50


@pytest.mark.parametrize("count, test", [(4, 2), (10, 3), (40, 8), (2000, 200)])
def test_the_default_for_test_is_200_or_a_fifth(count, test):
    """Of official test frames: 200. The toy town has 200 and 600. A fifth is not 200, said."""
    args, random = SimpleNamespace(test=None, limit=None, demo=True), np.random.default_rng(0)
    said, silent = (SimpleNamespace(test=test, label_ids=None) for test in (200, None))
    assert prepare.settings_of(said) != prepare.settings_of(silent)
    held_out, train = prepare.hold_out("real", range(count), None, args, random)
    assert held_out.wanted == test and len(train.frames) == count - test
    assert [len(found.frames) for found in prepare.find("real", args)] == [600, 200]
    args.limit = 9
    held_out, train = prepare.hold_out("real", range(2000), range(count), args, random)
    assert held_out.wanted == min(200, count)
    assert [0, 1, 2] not in map(list, (held_out.frames[:3], train.frames[:3]))     # by chance


def test_what_lies_beside_the_labels_of_the_official_sets(raw, tmp_path):
    """N_labelTrainIds.png beside N.png, and Cityscapes' other files: counted, not refused; alone
    they are the labels. A missing gtFine/val, or only gtCoarse, is named."""
    shutil.copytree(raw, tmp_path / "raw")
    gta, cs = tmp_path / "raw/gtav", tmp_path / "raw/cityscapes"
    beside = ["_labelTrainIds.png", "_instanceIds.png", "_color.png"]
    for file in list((gta / "labels").glob("*.png")):
        for ending in beside:
            noise(0).save(file.with_name(file.stem + ending))
    command = ["prepare.py", "--gta5", gta, "--cityscapes", cs, "--test", 3, *FLAGS]
    call(*command, "--strict", cwd=tmp_path)
    not_read = record(tmp_path / "data")["not_read"]
    assert not_read == dict.fromkeys(beside, 12) and [*not_read] == sorted(beside)
    for file in cs.rglob("*_labelIds.png"):
        new = file.with_name(file.name.replace("labelIds", "labelTrainIds"))
        Image.fromarray(TRAIN_IDS[np.array(Image.open(file))]).save(new)
        file.unlink()
    call(*command, "--out", "again", cwd=tmp_path)
    for split in ("train", "test"):
        assert torch.equal(load_labels(tmp_path / "data/real" / split),
                           load_labels(tmp_path / "again/real" / split))
    shutil.rmtree(cs / "gtFine/val")
    assert "gtFine/val: no such" in call(*command, "--out", "c", cwd=tmp_path, status=2)[1]
    (cs / "gtFine").rename(cs / "gtCoarse")
    assert "gtCoarse/ only" in call(*command, "--out", "d", cwd=tmp_path, status=2)[1]
    for folder in (gta / "labels", cs / "gtCoarse", cs / "leftImg8bit/val"):
        shutil.rmtree(folder)                                  # images alone, nothing held out
    call(*command, "--out", "e", cwd=tmp_path)
    assert [*record(tmp_path / "e")["counts"].values()] == [9, 3, 6, 3]


# ---------------------------------------------------------------------- a label is right or refused


def as_palette(ids, colours, order=np.arange(256)):
    """Mode P: the index of ids is order[ids], its colour that of the ids."""
    image, palette = Image.fromarray(order[ids].astype(np.uint8)), np.zeros((256, 3), np.uint8)
    palette[order] = colours
    image.putpalette(palette.ravel().tolist())
    return image


def official(changed=0, colour=(0, 0, 0)):
    """The colours of cityscapesScripts, two voids among them that have a class's colour; one value
    may be changed."""
    colours = np.zeros((256, 3), np.uint8)
    colours[[5, 18, 34]] = (111, 74, 0), (153, 153, 153), (0, 0, 142)
    colours[[label_id for _, label_id, _ in TABLE]] = [row[2] for row in TABLE]
    colours[changed] = colour
    return colours


# A grey PNG of 4 bits a pixel, 64 x 48, which Pillow does not write.
FOUR_BITS = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAAAwBAAAAABB0M7CAAAAFUlEQVR42mNgGAWjYBSMglEwCggDAAYwAAE6snKcAAAA"
    "AElFTkSuQmCC")
SIXTEEN_BITS = base64.b64decode(                     # and an RGB PNG of 16 bits a channel
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAAAwEAIAAAB+uTcLAAAAKUlEQVR42u3BMQEAAADCoPVPbQ0PoAAAAAAAAAAAAAAA"
    "AAAAAAAAgHcDSDAAARaVengAAAAASUVORK5CYII=")
GREYS = np.arange(256).repeat(3).reshape(256, 3).astype(np.uint8)
TRAIN_IDS = np.full(256, 255, np.uint8)
TRAIN_IDS[[row[1] for row in TABLE]] = range(19)


def grey(ids, rng):
    return Image.fromarray(ids)


# How good labels may have been saved: (ids uint8 [H, W], rng) -> image.
SAME = {
    "grey": grey, "TIFF": grey, "BMP": grey,
    "VOC's palette": lambda ids, rng: as_palette(ids, np.where(      # road's colour at vegetation
        np.arange(256)[:, None] == 21, (128, 64, 128), rng.integers(0, 256, (256, 3)))),
    "GTA-V's palette": lambda ids, rng: as_palette(ids, official()),
    "no palette": lambda ids, rng: as_palette(ids, np.zeros((256, 3))),
    "greys": lambda ids, rng: as_palette(ids, GREYS),
    "three channels": lambda ids, rng: Image.fromarray(np.stack([ids] * 3, 2)),
    "16 bits": lambda ids, rng: Image.fromarray(ids.astype(np.uint16)),
    "trainIds": lambda ids, rng: Image.fromarray(TRAIN_IDS[ids]),
    "trainIds in colour": lambda ids, rng: as_palette(TRAIN_IDS[ids], PALETTE)}
REFUSED = {                                          # -> words of the line
    "trainIds": (SAME["trainIds"], "--label-ids trainIds"), "JPEG": (grey, "JPEG"),
    "trainIds in colour": (SAME["trainIds in colour"], "give the right --label-ids"),
    "car in black": (lambda ids, rng: as_palette(ids, official(26)),
                     "shows void where the value is 26;"),
    "pole group as sky": (lambda ids, rng: as_palette(ids, official(18, (70, 130, 180))),
                          "shows sky where the value is 18;"),
    "sorted palette": (lambda ids, rng: as_palette(ids, official(), rng.permutation(256)),
                       "palette shows"),
    "a mask": (lambda ids, rng: Image.fromarray(np.uint8(255) * (ids > 20)), "a mask"),
    "colours": (lambda ids, rng: Image.fromarray(official()[ids]), "picture of colours"),
    "sorted greys": (lambda ids, rng: as_palette(ids, GREYS, rng.permutation(256)),
                     "save it in grey"),
    "4 bits": (lambda ids, rng: FOUR_BITS, "less or more than 8 bits"),
    "3 x 16 bits": (lambda ids, rng: SIXTEEN_BITS, "less or more than 8 bits"),
    "a TIFF of JPEG": (lambda ids, rng: encoded(grey(ids, rng), "TIFF", compression="jpeg"),
                       "TIFF, which does not keep"),
    "GIF": (grey, "GIF, which does not keep")}
ENDINGS = {"GIF": ".gif", "TIFF": ".tif", "BMP": ".bmp", "JPEG": ".jpg", "a TIFF of JPEG": ".tif"}
KNOWN = [row[1] for row in TABLE] + [1, 3, 5, 18, 34]     # void ids among them


def labelled(cwd, change, ending=".png"):
    """8 labels of blocks, changed, in labels/, pictures in images/: the flags that they want."""
    rng = np.random.default_rng(1)
    for i in range(8):
        save(cwd / f"labels/{i:02d}{ending}", change(np.array(blocks(i, KNOWN)), rng))
    fill(cwd / "images", 8)
    return ["--synthetic", "images", "labels", "--real", "images", *FLAGS]


@pytest.mark.parametrize("name", SAME)
def test_a_label_that_says_the_same_is_read_the_same(tmp_path, name):
    said = ["--label-ids", "trainIds"] if "trainIds" in name else []
    call("prepare.py", *labelled(tmp_path, SAME[name], ENDINGS.get(name, ".png")), *said,
         cwd=tmp_path)
    for folder in (tmp_path / "data/synthetic/train", tmp_path / "data/synthetic/test"):
        for i, label in zip(names(folder), load_labels(folder)):
            ids = np.array(blocks(int(i), KNOWN).resize((48, 24), Image.NEAREST))
            assert np.array_equal(label, TRAIN_IDS[ids])


@pytest.mark.parametrize("name", REFUSED)
def test_a_label_that_would_be_read_wrongly_is_refused(tmp_path, name):
    change, words = REFUSED[name]
    flags = labelled(tmp_path, change, ENDINGS.get(name, ".png"))
    _, err = call("prepare.py", *flags, cwd=tmp_path, status=2)
    assert words in err.splitlines()[-1]


def test_void_is_said_before_anything_is_trained_on_it(tmp_path):
    """A mask of 0 and 255 that is said to be labelIds; and segment.py refuses it."""
    flags = labelled(tmp_path, REFUSED["a mask"][0])
    out, _ = call("prepare.py", *flags, "--label-ids", "labelIds", cwd=tmp_path)
    assert "warning: synthetic: 100% of the pixels of its labels are void" in out
    (tmp_path / "classes.txt").write_text("ground\nobstacle\n")
    out, _ = call("prepare.py", *flags, "--classes", "classes.txt", "--out", "b", cwd=tmp_path)
    assert "% of the pixels of its labels are void, 1 classes in the others" in out
    shutil.copytree(tmp_path / "data/synthetic", tmp_path / "data/real", dirs_exist_ok=True)
    _, err = call("segment.py", cwd=tmp_path, status=2)
    assert "every pixel is void" in err


def test_labels_that_went_are_not_learned_from(tmp_path):
    flags = labelled(tmp_path, grey)
    call("prepare.py", *flags, cwd=tmp_path)
    (tmp_path / "data/prepare.json").write_text('{"settings": {}, "finished": true}')
    call("prepare.py", "--synthetic", "images", "--real", "images", *FLAGS, cwd=tmp_path)
    assert not list((tmp_path / "data").glob("*/*/labels/*"))


def test_trainids_of_one_domain_beside_cityscapes_own(raw, project, tmp_path):
    """--label-ids trainIds is of the files whose names do not say what they hold; files that are
    called labelIds are taken for it if they can be."""
    labelled(tmp_path / "g", SAME["trainIds"])
    command = ["prepare.py", "--gta5", "g", "--cityscapes", raw / "cityscapes", "--test", 3, *FLAGS]
    call(*command, "--label-ids", "trainIds", cwd=tmp_path)
    right = project / "data/real"
    assert torch.equal(load_labels(tmp_path / "data/real/test"), load_labels(right / "test"))
    copy = shutil.copytree(raw / "cityscapes", tmp_path / "cs")
    for file in copy.rglob("*_labelIds.png"):
        Image.fromarray(TRAIN_IDS[np.array(Image.open(file))]).save(file)
    command[command.index("--cityscapes") + 1] = "cs"
    call(*command, "--label-ids", "trainIds", "--out", "c", cwd=tmp_path)
    for split in ("train", "test"):
        assert torch.equal(load_labels(tmp_path / "c/real" / split), load_labels(right / split))
    assert 18 in load_labels(tmp_path / "c/synthetic/train")


def test_labels_among_the_images_are_none_of_them(tmp_path):
    fill(tmp_path / "raw", 6)
    for i in range(6):
        save(tmp_path / f"raw/labels/{i:02d}.png", blocks(i))
    (tmp_path / "raw/99.png").symlink_to("00.png")                     # one frame, two names
    save(tmp_path / "raw/labels/03.bmp", blocks(9))                    # of two labels the PNG
    call("prepare.py", "--synthetic", "raw", "raw/../raw/labels", "--real", "raw", "raw/labels",
         *FLAGS, cwd=tmp_path)
    said = record(tmp_path / "data")
    assert sum(said["counts"].values()) == 12 and not said["skipped"]
    assert said["not_read"] == {"links to images that are there too": 2, ".bmp": 2}


# ------------------------------------------------------------------------------- own classes


def test_classes_of_ones_own_from_end_to_end(tmp_path):
    """Names in the tables, networks of three classes, no number of the paper."""
    (tmp_path / "classes.txt").write_text("\ufeffground\nobstacle\nsky\n", encoding="utf-8")
    command = ["prepare.py", *labelled(tmp_path, lambda ids, rng: Image.fromarray(
        np.uint8([0, 1, 2, 255])[ids % 4])), "--real", "images", "labels", "--classes",
        "classes.txt"]
    out, _ = call(*command, cwd=tmp_path)
    share = 100 * (load_labels(tmp_path / "data/synthetic/train") == 1).float().mean()
    head = r"^frames +synthetic/train +synthetic/test +real/train +real/test\n +5 +3 +5 +3\n"
    found = rf"{head}ground .*\nobstacle +{share:.2f}% .*\nsky .*\n\(void\) "
    assert re.search(found, out, re.M)
    call("segment.py", "--epochs", 1, "--batch-size", 2, cwd=tmp_path)            # both networks
    for network in ("unet", "deeplabv3plus"):
        weights = torch.load(tmp_path / f"results/weights/{network}_real_seed0.pt",
                             weights_only=True)
        assert len(weights["weights"]["head.bias"]) == 3
        text = (tmp_path / f"results/segment_{network}.md").read_text()
        assert "| sky |" in text and "**" not in text and "| classes in the mean | 3 | 3 |" in text
    with Image.open(tmp_path / "results/table7.png") as image:        # 2 rows, 2 x (1 image + 2)
        assert image.height == 8 * (3 * 24 + 4)
    for content in (b"ground\nground\n", "Straße\nKöln\n".encode("latin-1"), b"\nground\nsky\n",
                    b"# of ours\nground\nsky\n", b"ground\n",
                    "\n".join(map(str, range(255))).encode()):
        (tmp_path / "classes.txt").write_bytes(content)
        _, err = call(*command, "--out", "b", cwd=tmp_path, status=2)
        assert "classes.txt: wanted 2 to 254 different names" in err


@pytest.mark.parametrize("colours", [[0, 255], [153, 255]])
def test_the_palette_of_ones_own_classes_says_nothing(tmp_path, colours):
    """A mask in black and white, or in a grey."""
    (tmp_path / "classes.txt").write_text("ground\nobstacle\n")
    def change(ids, rng):
        image = Image.fromarray((ids > 20).astype(np.uint8))
        image.putpalette(np.repeat(np.array(colours, np.uint8), 3).tolist())
        return image
    call("prepare.py", *labelled(tmp_path, change), "--classes", "classes.txt", cwd=tmp_path)
    assert load_labels(tmp_path / "data/synthetic/train").unique().tolist() == [0, 1]


# ----------------------------------------------------------- nothing begins that cannot end


def test_a_domain_of_other_images_is_named(fresh):
    """Of other frames, or of the same names whose image or label has been prepared anew; a domain
    may be refined from another one than synthetic."""
    data = fresh / "data"
    for name in (".lock", "refine.json.tmp"):                  # of a kill inside the first write
        save(data / "ours" / name, b"{")
    for source, out in (("synthetic", "ours"), ("ours", "twice")):
        call("refine.py", "--checkpoint", fresh / "runs/ours/pretrain.pt", "--data", ".", "--out",
             f"../{out}", cwd=data / source)
    (data / "link").symlink_to("synthetic")                    # it is looked for by that name
    call("refine.py", "--checkpoint", "runs/ours/pretrain.pt", "--data", "data/link", "--out",
         "data/linked", cwd=fresh)
    save(data / "synthetic/test/depth/a.png", noise(0))        # the user's, no image or label
    check_domains(data, ["ours", "twice", "linked", "real"], ["train", "test"])
    file = data / f"ours/test/images/{names(data / 'ours/test')[0]}.png"
    file.rename(file.with_name("x.png"))
    with pytest.raises(UserError, match="data/ours: was refined from other images"):
        check_domains(data, ["ours"], ["test"])
    file.with_name("x.png").rename(file)
    for kind in ("images", "labels"):
        source = data / "synthetic/test" / kind / file.name
        before = source.read_bytes()
        noise(0, (24, 48)).save(source)
        for domain, name in (("ours", "synthetic"), ("linked", "link")):
            with pytest.raises(UserError, match=f"than those in .*/{name} today"):
                check_domains(data, [domain], ["test"])
        source.write_bytes(before)


def test_figures_need_no_backend_and_printing_no_unicode(tmp_path):
    """A notebook's environment names a backend that a script may lack; ± is printed as ?."""
    done = subprocess.run(
        [sys.executable, "-c", "from support import cli, figures\n"
         f"figures.save_figure({str(tmp_path / 'a.png')!r}, figures.Figure())\n"
         "cli.start(lambda: print('\u0141 \u00b1 1'))"],
        capture_output=True, encoding="utf-8", errors="replace",
        env={**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline",
             "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert done.returncode == 0 and (tmp_path / "a.png").is_file(), done.stderr


@pytest.mark.parametrize("write", [
    lambda path: write_text(path, "new"), lambda path: cli.write_json(path, {"new": 1}),
    lambda path: cli.write_png(path, noise(0)), lambda path: save_figure(path, Figure()),
    lambda path: save_checkpoint(path, "gan", step=1)])
def test_a_file_is_written_under_another_name(write, tmp_path, monkeypatch):
    """Which is then given to it in one step."""
    path, renamed = tmp_path / "file", []
    path.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *names: renamed.append(names))
    write(path)
    ((temporary, final),) = renamed
    assert final == path and path.read_text() == "old" and temporary.stat().st_size


def test_a_reader_that_goes_away_is_said(tmp_path):
    """| head -1: one line."""
    done = subprocess.run(f"{sys.executable} {ROOT}/prepare.py --demo --size 24 48 --limit 2 "
                          "--test 1 --workers 1 | true", shell=True, cwd=tmp_path,
                          capture_output=True, text=True)
    assert "run it again, into a file" in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(cli.fcntl, "lockf", fail)
    cli.lock(tmp_path)
    assert "no locks" in capsys.readouterr().err


# --------------------------------------------------- a second process; no memory


@pytest.mark.parametrize("folder, command", [
    ("runs/ours", ["pretrain.py", "--method", "simgan", "--run", "runs/ours", "--overwrite"]),
    ("runs/ours", ["train_gan.py"]), ("data", ["prepare.py", "--demo"]),
    ("base/seed0", ["study/run.py", "x", "--prepare", "a", "--base", "base", "--seeds", 0, "--rows",
                    "real", "--inception", "random", "--epochs", 1, "--deeplab", "--random-crops"]),
    ("data/new", ["refine.py", "--checkpoint", "runs/ours/pretrain.pt", "--out", "data/new"]),
    ("new", ["refine.py", "--checkpoint", "runs/ours/pretrain.pt", "--out", "new", "--images",
             "data/real/test/images"])])
def test_every_stage_that_writes_keeps_out_of_a_locked_folder(fresh, folder, command):
    lock(fresh / folder)
    write_text(fresh / "base/data/.prepare", "prepare.py --out base/data a")    # done, for study
    before = sorted(fresh.rglob("*"))
    _, err = call(*command, cwd=fresh, status=2)
    assert f"error: {folder}: another process" in err
    assert sorted(fresh.rglob("*")) == before


def test_ctrl_c_typed_twice_is_one_line(monkeypatch, capsys):
    def main():
        raise KeyboardInterrupt
    bar = SimpleNamespace(close=lambda: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(cli, "BARS", [bar])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        cli.start(main)
    signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130 and ": stopped; run it again\n" in capsys.readouterr().err


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("MPS backend out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ZeroDivisionError("a mistake of ours keeps its traceback")])
def test_memory_that_does_not_suffice_is_one_line(error, capsys):
    def main():
        raise error
    ours = isinstance(error, ZeroDivisionError)
    with pytest.raises(ZeroDivisionError if ours else SystemExit) as stop:
        cli.start(main)
    if not ours:
        assert stop.value.code == 2
        assert re.search(r"^.*: error: .*--batch-size.* --size.*\n$", capsys.readouterr().err)
