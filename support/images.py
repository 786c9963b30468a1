"""Prepared images and labels in memory: all of a set, or a batch at a time."""
import hashlib
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from support.cli import UserError, cpus
from support.raw import UNREADABLE


def check_memory(folder, shape):
    """UserError if uint8 images of this shape, [N, ...], do not fit into the free main memory."""
    meminfo, needed = Path("/proc/meminfo"), math.prod(shape) / 1e9
    found = meminfo.is_file() and re.search(r"MemAvailable: *(\d+)", meminfo.read_text())
    free = int(found[1]) * 1024 / 1e9 if found else math.inf  # not Linux, or WSL 1
    if needed > free:
        raise UserError(f"{folder}: {shape[0]} images of {shape[-2]} x {shape[-1]} need "
                        f"{needed:.1f} GB of memory, {free:.1f} GB are free; prepare fewer "
                        "(--limit) or smaller ones (--size)")


def read_png(file, mode):
    """A prepared image, uint8 [3, H, W], or label, [H, W]; UserError if it has another mode."""
    try:
        with Image.open(file) as image:
            if image.mode != mode:
                raise ValueError(f"it is no {mode} image")
            return np.moveaxis(np.array(image), -1, 0) if mode == "RGB" else np.array(image)
    except UNREADABLE as error:
        raise UserError(f"{file}: cannot be read ({error}); prepare the data again") from None


def read_stack(files, mode):
    """Prepared images or labels of one size as one uint8 tensor, [N, 3, H, W] or [N, H, W]; all
    processors decode into it. UserError if it does not fit into memory."""
    import torch                                     # prepare.py itself needs none
    first = read_png(files[0], mode)
    check_memory(files[0].parent, (len(files), *first.shape))
    stack = np.empty((len(files), *first.shape), np.uint8)

    def fill(i):
        array = read_png(files[i], mode)
        if array.shape != first.shape:
            raise UserError(f"{files[i]}: not of the size of {files[0].name}; prepare the data "
                            "again")
        stack[i] = array
    with ThreadPoolExecutor(cpus()) as pool:
        list(pool.map(fill, range(len(files))))
    return torch.from_numpy(stack)


class Images:
    """Prepared images that are read a batch at a time, in place of a tensor."""

    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def split(self, n):
        """Like a tensor's: uint8 [n, 3, H, W] and so on, in order."""
        for i in range(0, len(self), n):
            first = self.files[0]                             # another size is refused
            yield read_stack([first, *self.files[i:i + n]], "RGB")[1:]


def sha256_of(folder):
    """SHA-256 of the names and bytes of the images and labels of a split folder."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("images/[!.]*.png"), *folder.glob("labels/[!.]*.png")]):
        digest.update(os.fsencode(file.name) + file.read_bytes())
    return digest.hexdigest()
