"""Shared by the tests: run a script as a user does, and draw tiny raw data sets."""
import multiprocessing
import os
import resource
import runpy
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
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
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"


def as_main(script, args, cwd, out, megabytes):
    """In the new process: what `python script args` does; on a disk that takes no larger file."""
    if megabytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(megabytes * 1e6),) * 2)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{out}/{name}", os.O_WRONLY | os.O_CREAT), stream)
    multiprocessing.set_start_method("fork", force=True)       # of its own workers, as usual
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

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=300):
        """Its exit status: that of the script, or minus the signal that killed it."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, "still running"
        return self.process.exitcode

    def wait_for(self, condition):
        """Wait until condition() or its end."""
        while self.poll() is None and not condition():
            time.sleep(0.002)


def start(script, *args, cwd, megabytes=None):
    """Start `python script args` in `cwd`; returns a Command."""
    return Command(script, *args, cwd=cwd, megabytes=megabytes)


def call(script, *args, cwd, status=0, megabytes=None):
    """Run a script to its end, check its exit status; returns (stdout, stderr)."""
    process = start(script, *args, cwd=cwd, megabytes=megabytes)
    found, out, err = process.wait(), process.read("stdout"), process.read("stderr")
    assert found == status, f"{script} {args}: {found}\n{out}\n{err}"
    if status == 0 and "/" not in script and "--help" not in args:
        lines = out.splitlines()
        assert lines[0].startswith(f"{script}: "), f"{script} does not say what it does"
        assert lines[-1].startswith("done: "), f"{script} does not say what it wrote"
    return out, err


def call_all(*commands, cwd):
    """`call` several independent commands side by side; the list of their (stdout, stderr)."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda command: call(*command, cwd=cwd), commands))


def draw_frame(rng, size, tint):
    """A street of four bands (sky, building, road with a car): RGB and labelIds, (H, W)."""
    height, width = size
    label = np.full(size, 11, np.uint8)                                  # building
    label[:height // 4] = 23                                             # sky
    label[height // 2:] = 7                                              # road
    x = rng.integers(0, width // 2)
    label[height // 2:3 * height // 4, x:x + width // 4] = 26            # car
    label[-2:] = 1                                                       # ego vehicle: void
    colour = {23: (120, 160, 230), 11: (150, 110, 90), 7: (90, 90, 90), 26: (200, 40, 40),
              1: (0, 0, 0)}
    rgb = np.zeros((*size, 3))
    for label_id, value in colour.items():
        rgb[label == label_id] = value
    rgb = rgb * tint + rng.normal(0, 6, rgb.shape)
    return rgb.clip(0, 255).astype(np.uint8), label


def save_palette(path, label):
    """A label file as GTA-V has it: mode P, the pixel index is the labelId."""
    image = Image.fromarray(label)
    image.putpalette(list(np.random.default_rng(0).integers(0, 256, 768)))
    image.save(path)


@pytest.fixture(autouse=True)
def on_a_cpu(request, monkeypatch):
    """What runs in this process finds no GPU either, but in test_gpu.py."""
    torch = sys.modules.get("torch")
    if torch and request.module.__name__ != "test_gpu":
        for backend in (torch.cuda, torch.backends.mps):
            monkeypatch.setattr(backend, "is_available", lambda: False)


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """Tiny raw data in the official layouts: raw/gtav (12 frames), raw/cityscapes (9 + 4)."""
    root, rng = tmp_path_factory.mktemp("raw"), np.random.default_rng(1)
    for kind in ("images", "labels"):
        (root / "gtav" / kind).mkdir(parents=True)
    for i in range(1, 13):
        rgb, label = draw_frame(rng, (60, 120), (1.2, 1.1, 0.8))
        Image.fromarray(rgb).save(root / "gtav" / "images" / f"{i:05d}.png")
        save_palette(root / "gtav" / "labels" / f"{i:05d}.png", label)
    for split, count in (("train", 9), ("val", 4)):
        images = root / "cityscapes" / "leftImg8bit" / split / "ulm"
        labels = root / "cityscapes" / "gtFine" / split / "ulm"
        images.mkdir(parents=True), labels.mkdir(parents=True)
        for i in range(count):
            rgb, label = draw_frame(rng, (64, 128), (0.5, 0.6, 0.5))
            name = f"ulm_{i:06d}_000019"
            Image.fromarray(rgb).save(images / f"{name}_leftImg8bit.png")
            Image.fromarray(label).save(labels / f"{name}_gtFine_labelIds.png")
    return root


@pytest.fixture(scope="session")
def project(raw, tmp_path_factory):
    """A folder in which stages 1 and 2 (both methods) have run at toy size."""
    cwd = tmp_path_factory.mktemp("project")
    call("prepare.py", "--gta5", raw / "gtav", "--cityscapes", raw / "cityscapes", "--crop",
         "none", "--size", 24, 48, "--test", 3, "--workers", 1, cwd=cwd)
    call_all(*[["pretrain.py", "--method", method, "--steps", 4, "--d-steps", 4, "--batch-size",
                4, "--inception", "random"] for method in ("ours", "simgan")], cwd=cwd)
    return cwd


@pytest.fixture
def fresh(project, tmp_path):
    """A copy of the prepared and pre-trained project, for a test to train in and to spoil."""
    return shutil.copytree(project, tmp_path / "project")
