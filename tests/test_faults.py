"""What a machine or a second process can do to a run: full disk, lock, memory, damaged files."""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, call, start
from PIL import Image

import prepare
from prepare import load_images, read_record
from support import cli
from support.cli import UserError, lock, whole
from support.training import load_checkpoint

GAN = ["--batch-size", 4, "--sample-every", 2, "--save-every", 2]


def one_line(err, *words):
    """The error is the last line, has the words, and no traceback is above it."""
    last = err.strip().splitlines()[-1]
    assert ": error: " in last and "Traceback" not in err, err
    assert all(word in last for word in words), last


# ------------------------------------------------------------------------------ a full disk


def test_a_full_disk_keeps_what_was_saved(fresh):
    """The save of a run fails: one line, status 2, the old files whole, no rest of a broken one."""
    call("train_gan.py", "--steps", 4, *GAN, cwd=fresh)
    run = fresh / "runs/ours"
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.suffix == ".pt"}
    _, err = call("train_gan.py", "--steps", 4, *GAN, "--overwrite", cwd=fresh, status=2,
                  megabytes=0.5)
    one_line(err, "average.pt: cannot be written, is the disk full?")
    assert not list(run.glob("*.tmp"))
    assert set(before) == {"pretrain.pt", "gan.pt", "average.pt", "last.pt"}
    for name, content in before.items():
        assert (run / name).read_bytes() == content
    assert load_checkpoint(run / "last.pt", ["gan"], "")["step"] == 4


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    """Neither a temporary file nor a changed old one, whatever the error."""
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(OSError), whole(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_folder_that_cannot_be_made_is_one_line(fresh):
    """--out below a file, as a read-only disk would be: the file is named."""
    (fresh / "file").write_text("")
    _, err = call("refine.py", "--checkpoint", "runs/ours/pretrain.pt", "--out", "file/x",
                  cwd=fresh, status=2)
    one_line(err, "file/x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_one_line_before_the_work(fresh):
    """Not after an hour of training."""
    (fresh / "results").mkdir()
    (fresh / "results").chmod(0o555)
    for command in (["segment.py", "--network", "unet"], ["evaluate.py", "--inception", "random"]):
        out, err = call(*command, cwd=fresh, status=2)
        one_line(err, "results", "denied")
        assert "step" not in err


# ------------------------------------------------------------------------- a second process

HOLD = "import sys, time; sys.path.insert(0, {!r}); from support.cli import lock; " \
       "lock(sys.argv[1]); print('held', flush=True); time.sleep(60)"


def test_a_lock_ends_with_its_process(tmp_path):
    """A second process is refused; after SIGKILL of the first the folder is free at once."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD.format(str(ROOT)), tmp_path],
                              stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another process is writing"):
        lock(tmp_path)
    lock(tmp_path / "other")                                # another folder is no matter
    holder.kill()
    holder.wait()
    lock(tmp_path)


def test_two_trainings_in_one_run_folder(fresh):
    """The second is refused and harms nothing; the other method runs beside the first."""
    first = start("train_gan.py", "--steps", 400, *GAN, cwd=fresh)
    first.wait_for((fresh / "runs/ours/last.pt").exists)
    _, err = call("train_gan.py", "--steps", 400, *GAN, "--resume", cwd=fresh, status=2)
    one_line(err, "runs/ours", "another process")
    call("train_gan.py", "--method", "simgan", "--steps", 2, *GAN, cwd=fresh)
    assert first.poll() is None
    first.kill()
    first.wait()


@pytest.mark.parametrize("folder, command", [
    ("runs/ours", ["pretrain.py", "--method", "simgan", "--run", "runs/ours", "--overwrite"]),
    ("runs/ours", ["train_gan.py"]), ("data", ["prepare.py", "--demo"]),
    ("data/new", ["refine.py", "--checkpoint", "runs/ours/pretrain.pt", "--out", "data/new"])])
def test_every_stage_that_writes_keeps_out_of_a_locked_folder(fresh, folder, command):
    lock(fresh / folder)
    before = sorted(fresh.rglob("*"))
    _, err = call(*command, cwd=fresh, status=2)
    one_line(err, folder, "another process")
    assert sorted(fresh.rglob("*")) == before


# ------------------------------------------------------------------------ memory and damage


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_want_of_memory_names_the_flags(error, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as stop:
        cli.start(main)
    assert stop.value.code == 2
    one_line(capsys.readouterr().err, "--batch-size", "--size")


def test_a_mistake_of_ours_keeps_its_traceback():
    """`start` hides no bug."""
    def main():
        return 1 / 0
    with pytest.raises(ZeroDivisionError):
        cli.start(main)


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / "refine.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match="refine.json: damaged"):
        read_record(tmp_path / "refine.json")


def test_a_decompression_bomb_in_a_data_folder(tmp_path, monkeypatch):
    """Pillow refuses pictures of absurd size; the reader names the file."""
    (tmp_path / "train/images").mkdir(parents=True)
    Image.new("RGB", (64, 32)).save(tmp_path / "train/images/a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="a.png: cannot be read"):
        load_images(tmp_path / "train")


def test_a_worker_that_is_killed(raw, tmp_path, monkeypatch):
    """As the kernel does when memory runs out: one line that names --workers."""
    def broken(*_, **__):
        raise cli.BrokenProcessPool("abruptly")
    monkeypatch.setattr(cli.ProcessPoolExecutor, "map", broken)
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--gta5", str(raw / "gtav"), "--cityscapes",
                                      str(raw / "cityscapes"), "--crop", "none", "--size", "24",
                                      "48", "--test", "3", "--out", str(tmp_path / "d")])
    with pytest.raises(UserError, match="--workers"):
        prepare.main()
    assert not json.loads((tmp_path / "d/prepare.json").read_text())["finished"]
