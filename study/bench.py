"""How fast every stage is on this machine: one table; compare its ratios, taken within the run.

Times of a machine that others use too move by a factor of two, ratios of two things timed in turns
far less: the table has the median of the ratios. R's convolutions cost 8.35 GMAC an image of
80 x 160 forward, all else is small beside them, so a training step can at best run at the speed of
a plain convolution.

Writes  the table; with --out PATH also as Markdown

    python -m study.bench                        everything, 7 minutes on 2 cores
    python -m study.bench --size 40 80 --batch-size 8 --out bench.md
"""
import copy
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import sqrtm
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pretrain
import train_gan
from models import (REAL, REFINED, DeepLabV3Plus, Discriminator, Refiner, UNet, fid,
                    inception_features, load_inception, patch_loss, ssim)
from support.cli import (announce, cpus, markdown_table, name_of, parser, path_of, positive,
                         start, write_text)
from support.training import (add_device_flag, autocast, make_optimizer, pick_device, place,
                              to_float, to_uint8)

ROOT = Path(__file__).resolve().parents[1]
FRAMES = 96                                          # full-size ones, of each domain


# ------------------------------------------------------------------------------ the clock


def seconds(function, device):
    """Wall time of one call, to the end of its work on `device`."""
    begin = time.perf_counter()
    function()
    torch.zeros(1, device=device).item()                      # a GPU has done all before it
    return time.perf_counter() - begin


def in_turns(functions, device, repeats):
    """Call all in turns, once to warm up: the `repeats` times of each that follow."""
    rounds = []
    for _ in range(1 + repeats):
        rounds.append([seconds(function, device) for function in functions])
    return list(zip(*rounds[1:]))


def flops(function):
    """The floating-point operations of one call, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


class Table:
    """The rows: measured, printed at once, and kept as texts."""

    def __init__(self, device, repeats):
        self.device, self.repeats, self.rows = device, repeats, []
        print(f"{'':42s} {'median':>18s} {'ratio':>7s}  against")

    def add(self, name, value, unit, ratios, against):
        """A row: what is shown, and the median of its ratios to what it is compared to."""
        ratio = statistics.median(ratios)
        self.rows.append([name, f"{value:.4g} {unit}", f"{ratio:.2f}", against])
        print("{:42s} {:>18s} {:>7s}  {}".format(*self.rows[-1]), flush=True)

    def compare(self, name, function, other, against, work=None):
        """How many times faster `function` is than `other`. work: images in a call, if images a
        second are to be shown; else the time of a call is."""
        a, b = in_turns([function, other], self.device, self.repeats)
        value, unit = statistics.median(a), "s"
        if work:
            value, unit = work / value, "images/s"
        self.add(name, value, unit, [y / x for x, y in zip(a, b)], against)


# ----------------------------------------------- the straightforward loop, what students write


def plain_refiner():
    """R of models.py but padding="same" in its blocks: PyTorch pads by hand, since 4 is even."""
    warnings.filterwarnings("ignore", "Using padding='same'")     # that it copies is the point
    R = Refiner()
    for block in R.blocks:
        block.conv1, block.conv2 = (nn.Conv2d(64, 64, 4, padding="same") for _ in range(2))
    return R


def straightforward_step(size, n, device):
    """The same algorithm as `gan_step`: nothing frozen, nothing detached, the history a Python
    list of float images."""
    torch.manual_seed(0)
    R, D = plain_refiner().to(device), Discriminator().to(device)
    optimizer_R = torch.optim.SGD(R.parameters(), 1e-4)
    optimizer_D = torch.optim.SGD(D.parameters(), 1e-3, momentum=0.9)
    x = to_float(images(n, size, device))
    history = list(x.repeat(2, 1, 1, 1))

    def descend(optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def step():
        for _ in range(2):
            refined = R(x)
            descend(optimizer_R, 50 * patch_loss(D(refined), REAL)
                    + 78.6 * (refined - x).abs().mean())
        new = R(x[n // 2:])
        old = torch.stack([history[i] for i in torch.randint(len(history), (n // 2,))])
        descend(optimizer_D, patch_loss(D(torch.cat([new, old])), REFINED)
                + patch_loss(D(x), REAL))
        for image in new.detach():
            history[torch.randint(len(history), ())] = image
    return step


# -------------------------------------------------------------------------- what is timed


def images(n, size, device="cpu"):
    """n random uint8 images [n, 3, H, W]: the contents do not matter to any of the times."""
    return torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(n)).to(device)


def gan_step(size, n, device, precision="float32"):
    """One step of train_gan.py (two updates of R, one of D) as a function without arguments."""
    torch.manual_seed(0)
    R, D = place(Refiner(), device), place(Discriminator(), device)
    optimizer_R = make_optimizer("sgd", R.parameters(), 1e-4)
    optimizer_D = make_optimizer("momentum", D.parameters(), 1e-3)
    data, n_old = images(n, size, device), n // 2
    history = train_gan.History(2 * n, torch.Generator().manual_seed(0), device)
    history.add(data)
    average = copy.deepcopy(R)

    def step():
        pick_device(str(device), precision)               # a flag of PyTorch, for all steps alike
        with autocast(device, precision):
            for _ in range(2):
                train_gan.update_R(R, D, optimizer_R, to_float(data), 50, 4e-6, 512)
            train_gan.update_D(R, D, optimizer_D, to_float(data[n_old:]), to_float(data),
                               history, n_old)
        train_gan.update_average(average, R, 200)
    return step


def convolution(size, n, device):
    """The floor: a 4x4 convolution of 64 maps to 64 of H x W, forward and backward."""
    x, grad = (torch.randn(n, 64, size[0] + k, size[1] + k, device=device).to(
        memory_format=torch.channels_last) for k in (3, 0))
    conv = nn.Conv2d(64, 64, 4).to(device, memory_format=torch.channels_last)
    x.requires_grad_()
    return lambda: conv(x).backward(grad)


def segment_step(net, size, n, device):
    """One training step of a segmentation network as a function without arguments."""
    x = images(n, size, device)
    y = (x[:, 0] % 19).long()
    net = place(net, device).train()
    adam = make_optimizer("adam", net.parameters(), 1e-3)

    def step():
        adam.zero_grad()
        F.cross_entropy(net(to_float(x)), y, ignore_index=255).backward()
        adam.step()
    return step


def direct_ssim(x, y):
    """SSIM as its definition reads: an 11 x 11 window, five convolutions."""
    g = torch.exp(-(torch.arange(11, device=x.device) - 5) ** 2 / (2 * 1.5 ** 2))
    window = (g[:, None] * g / g.sum() ** 2).expand(3, 1, 11, 11)
    mx, my, xx, yy, xy = (F.conv2d(v, window, groups=3) for v in (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return ((2 * mx * my + c1) * (2 * (xy - mx * my) + c2) / (mx * mx + my * my + c1)
            / (xx - mx * mx + yy - my * my + c2)).mean((1, 2, 3))


def sqrtm_fid(a, b):
    """FID as most packages compute it: the root of S1 S2 by scipy."""
    s1, s2 = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = sqrtm(s1 @ s2).real.trace()
    return (a.mean(0) - b.mean(0)).square().sum().item() + s1.trace() + s2.trace() - 2 * root


def draw_raw(folder):
    """A frame and a label of GTA-V's size, as PNG of about 2.5 MB and less, under FRAMES names."""
    frame = Image.effect_noise((1914, 1052), 8).convert("RGB")
    for kind, image in (("images", frame), ("labels", Image.new("L", frame.size, 21))):
        (folder / kind).mkdir(parents=True)
        image.save(folder / kind / "0.png", compress_level=3)
        for i in range(1, FRAMES):
            os.link(folder / kind / "0.png", folder / kind / f"{i}.png")


# -------------------------------------------------------------------------- the sections


def bench_prepare(table):
    """prepare.py on full-size PNGs, through its command line, on two cores and on one."""
    with tempfile.TemporaryDirectory() as folder:
        draw_raw(Path(folder) / "raw")
        raw = [f"{folder}/raw/images", f"{folder}/raw/labels"]

        def run(workers):
            subprocess.run([sys.executable, ROOT / "prepare.py", "--synthetic", *raw, "--real",
                            *raw, "--test", f"{FRAMES // 2}", "--out", f"{folder}/data",
                            "--workers", workers], check=True, capture_output=True)
        table.compare("prepare.py, full-size PNG, --workers 2", lambda: run("2"), lambda: run("1"),
                      "--workers 1", 2 * FRAMES)


def bench_gan(table, args):
    """The GAN step: against a convolution, the straightforward loop, other arithmetic."""
    size, n, device = args.size, args.batch_size, table.device
    step, floor = gan_step(size, n, device), convolution(size, n, device)
    work, least = flops(step), flops(floor)
    a, b = in_turns([step, floor], device, table.repeats)
    table.add("GAN step, arithmetic", work / statistics.median(a) / 1e9, "GFLOP/s",
              [(work / x) / (least / y) for x, y in zip(a, b)], "of a plain convolution's rate")
    table.compare("GAN step", step, straightforward_step(size, n, device),
                  "the straightforward loop")
    half = gan_step([size[0] // 2, size[1] // 2], n, device)
    table.compare("GAN step, a quarter of the pixels", half, step, "the whole; 4 is linear")
    table.compare("GAN step, bfloat16", gan_step(size, n, device, "bfloat16"), step, "float32")
    if device.type == "cuda":
        table.compare("GAN step, tf32", gan_step(size, n, device, "tf32"), step, "float32")


def bench_networks(table, args):
    """Pre-training, the segmentation networks; what refine.py and evaluate.py run."""
    size, n, device = args.size, args.batch_size, table.device
    R, x = place(Refiner(), device), images(n, size, device)
    psi = load_inception("random", "Conv2d_4a_3x3", x.cpu()).to(device)
    adam = make_optimizer("adam", R.parameters(), 1e-4)
    step = gan_step(size, n, device)
    table.compare("pre-training step of R, perceptual",
                  lambda: pretrain.update_R(R, adam, to_float(x), psi), step, "a GAN step")
    unet = segment_step(UNet(), size, n, device)
    table.compare("training step of U-Net", unet, step, "a GAN step", n)
    table.compare("training step of DeepLabV3+", segment_step(DeepLabV3Plus(), size, n, device),
                  unet, "U-Net's", n)
    some = images(16, size, device)
    plain, pool3 = plain_refiner().to(device), load_inception("random", "pool3", some.cpu())
    with torch.no_grad():
        table.compare("refine", lambda: to_uint8(R(to_float(some))),
                      lambda: to_uint8(plain(to_float(some))), "padding='same', channels first", 16)
        table.compare("Inception features", lambda: inception_features(pool3, some, device),
                      lambda: to_uint8(R(to_float(some))), "refine", 16)


def bench_metrics(table, args):
    """SSIM and FID against their usual forms; that the values are equal: tests/test_metrics.py."""
    x, y = (images(n, args.size, table.device)[:64].float() for n in (64, 65))
    table.compare("SSIM, 64 pairs", lambda: ssim(x, y), lambda: direct_ssim(x, y),
                  "the direct 11 x 11 form", 64)
    if table.device.type == "cpu":
        a, b = torch.rand(2, 200, 2048, dtype=torch.float64)
        table.compare("FID distance, N = 200", lambda: fid(a, b), lambda: sqrtm_fid(a, b),
                      "scipy's sqrtm")


def machine():
    """The processor as it calls itself, how many cores, and its widest vector instructions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return (f"{(names or [platform.machine()])[0]}, {cpus()} cores, "
            f"{torch.backends.cpu.get_cpu_capability()}")


def arguments():
    p = parser(__doc__)
    add_device_flag(p)
    p.add_argument("--size", type=positive(int), nargs=2, default=[80, 160], metavar=("H", "W"))
    p.add_argument("--batch-size", type=positive(int), default=4, help="images a batch")
    p.add_argument("--repeats", type=positive(int), default=5, help="of which the median is shown")
    p.add_argument("--out", type=path_of, help="write the table to this file, as Markdown")
    args = p.parse_args()
    if args.batch_size < 2 or min(args.size) < 24:
        p.error("--batch-size is 2 at least, for the history, and --size 24 x 24")
    return args


def main():
    args = arguments()
    device = pick_device(args.device)
    announce(device, args.seed, "nothing", args.out or "nothing")
    table = Table(device, args.repeats)
    if device.type == "cpu":                                  # a GPU has no part in it
        bench_prepare(table)
    for section in (bench_gan, bench_networks, bench_metrics):
        section(table, args)
    if args.out:
        write_text(args.out, f"{machine()}, {name_of(device)}, torch {torch.__version__}, "
                   f"{args.size[0]} x {args.size[1]}, batch {args.batch_size}\n\n" + markdown_table(
                       ["what", "median", "ratio", "against"], table.rows) + "\n")


if __name__ == "__main__":
    start(main)
