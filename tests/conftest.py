"""Shared by the tests: run a script as a user does, and draw tiny raw data sets."""
import importlib
import io
import json
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# `import torch, torchvision` takes 4 s, more than most of the commands under test. So one server
# process imports them once, and every command is a fork of it: a process of its own, with its own
# arguments, folder, output and exit status, which signals can kill, but ready in 0.1 s.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["conftest", "torch", "torchvision", "matplotlib.pyplot", "models"])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"),
                                                         os.environ.get("PYTHONPATH")]))


def as_main(script, args, cwd, out, megabytes):
    """In the new process: what `python script args` does; on a disk that takes no larger file."""
    if megabytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(megabytes * 1e6),) * 2)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{out}/{name}", os.O_WRONLY | os.O_CREAT), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)   # which a shell's & ignores
    signal.signal(signal.SIGHUP, signal.SIG_DFL)               # and this one nohup
    torch = sys.modules["torch"]
    torch.set_num_threads(1)                       # two commands side by side have two cores
    if "--device" not in args:                     # equal bits are a CPU's promise
        torch.cuda.is_available = torch.backends.mps.is_available = lambda: False
    os.chdir(cwd)
    sys.argv = [script, *args]
    runpy.run_path(str(ROOT / script), run_name="__main__")


class Command:
    """A script that runs, on one thread; like subprocess.Popen."""

    def __init__(self, script, *args, cwd, megabytes=None):
        self.folder = tempfile.TemporaryDirectory()
        self.process = FORKS.Process(target=as_main, args=(
            script, [str(a) for a in args], str(cwd), self.folder.name, megabytes))
        self.process.start()
        self.pid, self.kill, self.terminate = self.process.pid, self.process.kill, \
            self.process.terminate

    def read(self, name):
        """What it has written to its stdout or stderr until now."""
        file = Path(self.folder.name) / name
        return file.read_text(encoding="utf-8") if file.exists() else ""

    def wait(self, timeout=300):
        """Its exit status: that of the script, or minus the signal that killed it."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, "still running"
        return self.process.exitcode

    def wait_for(self, condition):
        """Wait until condition() or its end."""
        while self.process.exitcode is None and not condition():
            time.sleep(0.002)


def call(script, *args, cwd, status=0, megabytes=None):
    """Run a script to its end, check its exit status; returns (stdout, stderr)."""
    process = Command(script, *args, cwd=cwd, megabytes=megabytes)
    found, out, err = process.wait(), process.read("stdout"), process.read("stderr")
    assert found == status, f"{script} {args}: {found}\n{out}\n{err}"
    if status == 2:
        last = err.strip().splitlines()[-1]
        assert re.match(r"\S+: error: ", last) and "Traceback" not in err, err
    if status == 0 and "/" not in script and "--help" not in args:
        lines = out.splitlines()
        assert lines[0].startswith(f"{script}: "), f"{script} does not say what it does"
        assert lines[-1].startswith("done: "), f"{script} does not say what it wrote"
    return out, err


def run_here(monkeypatch, folder, script, flags, seconds=2):
    """A script's main() in this process, by a clock on which a step takes so long."""
    from support import training
    module, done, log = __import__(script), [], training.Training.log
    monkeypatch.setattr(training.Training, "log",
                        lambda self, row: (done.append(row), log(self, row)))
    monkeypatch.setattr(training.time, "perf_counter",
                        lambda ticks=count(0, 1e-9): seconds * len(done) + next(ticks))
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", [f"{script}.py", *map(str, flags)])
    monkeypatch.setattr(training, "stop_requests", list)       # leave pytest's signals alone
    module.main()


def parsed(monkeypatch, module, flags):
    """What the parser of a script, or of a module of study, makes of these flags."""
    monkeypatch.setattr(sys, "argv", [f"{module}.py", *flags])
    return importlib.import_module(module).arguments()


def noise(seed, size=(48, 64), high=256):
    """A picture of `size` (height, width), as PIL has it; no pixel is like another."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, high, (*size, 3), np.uint8))


def blocks(seed, ids=(0, 1, 4, 7, 8, 11, 17, 18, 21, 23, 26, 33, 34)):
    """A label, 48 x 64, of 4 x 4 blocks of these ids; 18 and 34 are no class of ours."""
    some = np.random.default_rng(seed).choice(np.uint8(ids), (12, 16))
    return Image.fromarray(some.repeat(4, 0).repeat(4, 1))


def save(path, image):
    """Write a PIL image, or bytes, and make the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image) if isinstance(image, bytes) else image.save(path)


def encoded(image, kind, **options):
    """The bytes of a file that holds an image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def fill(folder, count, size=(48, 64)):
    """Pictures 00.png, 01.png and so on; returns the folder."""
    for i in range(count):
        save(folder / f"{i:02d}.png", noise(i, size))
    return folder


def record(folder):
    """What prepare.py says of a folder that it has made."""
    return json.loads((folder / "prepare.json").read_text(encoding="utf-8"))


def content(folder):
    """{relative path: bytes} of everything below a folder, the lock aside."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*")
            if p.is_file() and p.name != ".lock"}


def save_pair(folder, name, rgb, label=None):
    """One image of a prepared split, and its label: uint8 [H, W, 3] and [H, W]."""
    save(folder / f"images/{name}.png", Image.fromarray(rgb))
    if label is not None:
        label = Image.fromarray(label)
        label.putpalette(list(range(256)) * 3)
        save(folder / f"labels/{name}.png", label)


@pytest.fixture(autouse=True)
def on_a_cpu(request, monkeypatch):
    """What runs in this process finds no GPU either, but in test_gpu.py; and has the same weights
    every time."""
    torch = sys.modules.get("torch")
    if torch and request.module.__name__ != "test_gpu":
        torch.set_num_threads(1)               # as the commands have; and make test runs two halves
        for backend in (torch.cuda, torch.backends.mps):
            monkeypatch.setattr(backend, "is_available", lambda: False)
    if torch:
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """Tiny raw data in the official layouts: raw/gtav (12 frames), raw/cityscapes (9 + 4, dark)."""
    root = tmp_path_factory.mktemp("raw")
    for i in range(1, 13):
        save(root / f"gtav/images/{i:05d}.png", noise(i))
        save(root / f"gtav/labels/{i:05d}.png", blocks(i))
    for folder, count in (("train/aachen", 9), ("val/lindau", 4)):
        for i in range(count):
            name = f"{folder}/{folder.split('/')[1]}_{i:06d}_000019"
            save(root / f"cityscapes/leftImg8bit/{name}_leftImg8bit.png", noise(100 + i, high=128))
            save(root / f"cityscapes/gtFine/{name}_gtFine_labelIds.png", blocks(100 + i))
    return root


@pytest.fixture(scope="session")
def project(raw, tmp_path_factory):
    """A folder in which stages 1 and 2 (both methods) have run at toy size."""
    cwd = tmp_path_factory.mktemp("project")
    call("prepare.py", "--gta5", raw / "gtav", "--cityscapes", raw / "cityscapes", "--crop",
         "none", "--size", 24, 48, "--test", 3, "--workers", 1, cwd=cwd)
    for method in ("ours", "simgan"):
        call("pretrain.py", "--method", method, "--steps", 4, "--d-steps", 4, "--batch-size", 4,
             "--inception", "random", cwd=cwd)
    return cwd


@pytest.fixture
def fresh(project, tmp_path):
    """A copy of the prepared and pre-trained project, for a test to train in and to spoil."""
    return shutil.copytree(project, tmp_path / "project")
