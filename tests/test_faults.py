"""What a machine or a second process can do to a run: full disk, lock, memory, damaged files."""
import sys

import pytest
import torch
from conftest import call

import prepare
from support import cli
from support.cli import UserError, lock, whole, write_text


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    """Neither a temporary file nor a changed old one, whatever the error."""
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt                                   # or an OSError
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


# ------------------------------------------------------------------------- a second process

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
    write_text(fresh / "base/stamps/prepare", "prepare.py --out base/data a")    # done, for study
    before = sorted(fresh.rglob("*"))
    _, err = call(*command, cwd=fresh, status=2)
    assert f"error: {folder}: another process" in err
    assert sorted(fresh.rglob("*")) == before


# ------------------------------------------------------------------------ memory and damage


# What torch.compile raises where there is no compiler; not in every PyTorch.
InductorError = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})


@pytest.mark.parametrize("error, words", [
    (MemoryError(), ["--batch-size", "--size"]),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), ["--batch-size"]),
    (RuntimeError("MPS backend out of memory"), ["--batch-size"]),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
     ["--batch-size"]), (InductorError("No C++ compiler"), ["--compile does not work here"]),
    (ZeroDivisionError("a mistake of ours keeps its traceback"), None)])
def test_what_a_user_can_mend_is_one_line(error, words, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit if words else ZeroDivisionError) as stop:
        cli.start(main)
    if words:
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert ": error: " in err and err.count("\n") == 1
        assert all(word in err for word in words), err


def test_a_worker_that_is_killed(tmp_path, monkeypatch):
    """As the kernel does when memory runs out: one line that names --workers."""
    def broken(*_, **__):
        raise cli.BrokenProcessPool("abruptly")
    monkeypatch.setattr(cli.ProcessPoolExecutor, "map", broken)
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--demo", "--out", str(tmp_path / "d")])
    with pytest.raises(UserError, match="--workers"):
        prepare.main()
