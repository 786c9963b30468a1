"""Shared by the tests: run a script as a user does, and draw tiny raw data sets."""
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def start(script, *args, cwd):
    """Start `python script args` in `cwd`, on one thread; returns the Popen object."""
    return subprocess.Popen([sys.executable, str(ROOT / script), *map(str, args)], cwd=cwd,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def call(script, *args, cwd, status=0):
    """Run a script to its end, check its exit status; returns (stdout, stderr)."""
    process = start(script, *args, cwd=cwd)
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, f"{script} {args}: {process.returncode}\n{out}\n{err}"
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
