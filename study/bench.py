"""How fast every stage is on this machine: one table, each figure as a ratio within the run.

Times of a machine that others use too move by a factor of two; the ratio of two things that
were timed in turns moves far less. So every row is timed in turns with what it is compared to,
and the table has the median. The first row is the floor: R's convolutions cost 8.43 GMAC an
image of 80 x 160 forward, all else is small beside them, so a training step can at best run at
the speed of a plain convolution.

Reads   nothing; draws its own images
Writes  the table; with --json PATH also as PATH, with hardware, versions and every single time,
        and as Markdown beside it

    python bench.py                        everything, 3 to 4 minutes on 2 cores
    python bench.py --only gan sweep       some sections
    python bench.py --size 40 80 --batch-size 8 --json bench.json
"""
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import sqrtm
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pretrain
import segment
import train_gan
from models import (Discriminator, Refiner, announce, fid, has_bfloat16, inception_features,
                    learning_layout, load_inception, make_optimizer, patch_loss, pick_device,
                    provenance, speed_up, ssim, to_float, to_uint8)
from prepare import parser, positive, start, write_text


# ------------------------------------------------------------------------------ the clock


def seconds(function, device):
    """Wall time of one call, to the end of its work on `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def in_turns(functions, device, repeats):
    """Call each once to warm up, then all in turns: a list of `repeats` times for each."""
    for function in functions:
        function()
    rounds = [[seconds(f, device) for f in functions] for _ in range(repeats)]
    return [list(times) for times in zip(*rounds)]


def peak_memory(function, device):
    """MB that a call needs at its peak beyond what is held before it; None where unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    try:
        ctypes.CDLL(None).malloc_trim(0)                         # give back what is free
        Path("/proc/self/clear_refs").write_text("5")            # Linux: VmHWM starts anew
        before = status("VmRSS")
        function()
        return status("VmHWM") - before
    except (OSError, AttributeError):
        return None


def status(key):
    """A line of /proc/self/status in MB."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) / 1e3


class Table:
    """The rows: measured, printed at once, and kept for --json."""

    def __init__(self, device, repeats):
        self.device, self.repeats, self.rows = device, repeats, []
        print(f"{'':44s} {'median':>16s} {'ratio':>7s}  {'against':28s} {'memory':>8s}")

    def add(self, name, times, work=1, unit="s", ratio=None, against="", memory=None):
        """A row. times: a list of seconds; `work` units of `unit` are done in each (unit "s":
        the time itself is shown); ratio: a list or one number."""
        median = statistics.median(times) if times else None
        value = median if unit == "s" or not times else work / median
        ratio = statistics.median(ratio) if isinstance(ratio, list) else ratio
        self.rows.append({"name": name, "value": value, "unit": unit, "ratio": ratio,
                          "against": against, "memory_MB": memory, "times": times})
        shown = f"{value:.4g} {unit}" if times else "-"
        print(f"{name:44s} {shown:>16s} {'' if ratio is None else f'{ratio:.2f}':>7s}  "
              f"{against:28s} {'' if memory is None else f'{memory:.0f} MB':>8s}", flush=True)

    def markdown(self):
        """The rows as a Markdown table."""
        lines = ["| what | median | ratio | against | memory, MB |", "|---|---|---|---|---|"]
        for row in self.rows:
            value, ratio, memory = ("-" if row[k] is None else f"{row[k]:{f}}" for k, f in (
                ("value", ".4g"), ("ratio", ".2f"), ("memory_MB", ".0f")))
            unit = row["unit"] if row["times"] else ""
            lines.append(f"| {row['name']} | {value} {unit} | {ratio} | {row['against']} | "
                         f"{memory} |")
        return "\n".join(lines) + "\n"

    def compare(self, name, function, other, against, work=1, unit="s", repeats=None):
        """A row and its ratio: how many times faster `function` is than `other`."""
        a, b = in_turns([function, other], self.device, repeats or self.repeats)
        self.add(name, a, work, unit, [y / x for x, y in zip(a, b)], against,
                 peak_memory(function, self.device))
        return a, b

    def time(self, name, function, work=1, unit="s", **more):
        """A row without a comparison."""
        (times,) = in_turns([function], self.device, self.repeats)
        self.add(name, times, work, unit, memory=peak_memory(function, self.device), **more)
        return times


# ----------------------------------------------- the straightforward loop, what students write


class PlainBlock(nn.Module):
    """A ResNet block with padding="same": PyTorch pads by hand, since 4 is even."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(64, 64, 4, padding="same") for _ in range(2))

    def forward(self, x):
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


def plain_refiner():
    """R with as many parameters as models.Refiner, zero padding."""
    warnings.filterwarnings("ignore", "Using padding='same'")     # that it copies is the point
    return nn.Sequential(nn.Conv2d(3, 64, 4, padding="same"), nn.ReLU(),
                         *[PlainBlock() for _ in range(5)], nn.Conv2d(64, 3, 1), nn.Tanh())


def plain_step(R, D, optimizers, batches, history):
    """The same algorithm as train_gan.py's step: nothing frozen, nothing detached, the history
    a Python list of float images."""
    x1, x2, x3, y = batches
    for x in (x1, x2):
        refined = R(x)
        loss = 50 * patch_loss(D(refined), 0) + 78.6 * (refined - x).abs().mean()
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
    refined = R(x3)
    old = torch.stack([history[i] for i in torch.randint(len(history), (len(x3),)).tolist()])
    loss = patch_loss(D(torch.cat([refined, old])), 1) + patch_loss(D(y), 0)
    optimizers[1].zero_grad()
    loss.backward()
    optimizers[1].step()
    for image in refined.detach():
        history[torch.randint(len(history), ()).item()] = image


# -------------------------------------------------------------------------- the sections


def images(n, size, device="cpu"):
    """n random uint8 images [n, 3, H, W]: the contents do not matter to any of the times."""
    return torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(n)).to(device)


def gan_step(size, n, device, precision="float32", compile=False):
    """One step of train_gan.py (two updates of R, one of D) as a function without arguments."""
    torch.manual_seed(0)
    args = SimpleNamespace(
        run="bench", precision=precision, compile=compile, optimizer="sgd", lr=1e-4,
        d_optimizer="momentum", d_lr=1e-3, seed=0, history=2, batch_size=n, alpha=50, beta=4e-6,
        rec_batch=512, rec="l1", average=200)
    source = {"stage": "pretrain"}
    for name, net in (("refiner", Refiner()), ("discriminator", Discriminator())):
        source |= {name: net.state_dict(), f"{name}_args": net.args}
    run, data = train_gan.Run(args, device, source), images(n, size, device)
    run.history.add(data)
    return lambda: train_gan.gan_step(run, data, data)


def straightforward_step(size, n, device):
    """The same step by `plain_step`."""
    torch.manual_seed(0)
    R, D = plain_refiner().to(device), Discriminator().to(device)
    optimizers = [torch.optim.SGD(R.parameters(), 1e-4),
                  torch.optim.SGD(D.parameters(), 1e-3, momentum=0.9)]
    x = to_float(images(n, size, device))
    history = list(x.repeat(2, 1, 1, 1))
    return lambda: plain_step(R, D, optimizers, (x, x, x[:max(n // 2, 1)], x), history)


def convolution(size, n, device):
    """The floor: a 4x4 convolution of 64 maps to 64 of H x W, forward and backward. Returns the
    function and its FLOP."""
    layout = learning_layout(device)
    x, grad = (torch.randn(n, 64, size[0] + k, size[1] + k, device=device).to(
        memory_format=layout) for k in (3, 0))
    conv = nn.Conv2d(64, 64, 4).to(device, memory_format=layout)
    x.requires_grad_()
    return (lambda: conv(x).backward(grad)), 3 * 2 * n * 64 * 64 * 16 * size[0] * size[1]


def bench_gan(table, args):
    """The GAN step: against the floor, against the straightforward loop, in bfloat16."""
    size, n, device = args.size, args.batch_size, table.device
    step, (floor, flop) = gan_step(size, n, device), convolution(size, n, device)
    with FlopCounterMode(display=False) as counter:
        step()
    a, b = in_turns([step, floor], device, table.repeats)
    table.add("convolution 64 -> 64, forward + backward", b, flop / 1e9, "GFLOP/s")
    table.add("GAN step, arithmetic", a, counter.get_total_flops() / 1e9, "GFLOP/s",
              [counter.get_total_flops() / x / (flop / y) for x, y in zip(a, b)],
              "of the convolution's rate")
    table.compare("GAN step", step, straightforward_step(size, n, device),
                  "the straightforward loop")
    if device.type == "cuda" or has_bfloat16():
        table.compare("GAN step, bfloat16", gan_step(size, n, device, "bfloat16"), step,
                      "float32")
    else:                                        # 4 to 20 times slower, once seen, is enough
        table.add("GAN step, bfloat16", [], against="this CPU has no bfloat16")
    if device.type == "cuda":
        table.compare("GAN step, tf32", gan_step(size, n, device, "tf32"), step, "float32")
        table.compare("GAN step, bfloat16 and --compile",
                      gan_step(size, n, device, "bfloat16", True), step, "float32")
    else:
        table.add("GAN step on a GPU: tf32, --compile", [], against="not measured: no GPU")


def bench_pretrain(table, args):
    """A step of pretrain.py for R (both methods) and for D, against a GAN step."""
    size, n, device = args.size, args.batch_size, table.device
    R, D = (speed_up(net, device, layout=learning_layout(device))
            for net in (Refiner(), Discriminator()))
    x = images(n, size, device)
    psi = load_inception("random", "Conv2d_4a_3x3", x.cpu()).to(device)
    adam = make_optimizer("adam", R.parameters(), 1e-4)
    sgd = make_optimizer("momentum", D.parameters(), 1e-3)
    gan = gan_step(size, n, device)
    for name, step in (
            ("pre-training step of R, perceptual",
             lambda: pretrain.update_R(R, adam, to_float(x), psi)),
            ("pre-training step of R, L1", lambda: pretrain.update_R(R, adam, to_float(x), None)),
            ("pre-training step of D",
             lambda: pretrain.update_D(D, sgd, to_float(x), to_float(x)))):
        table.compare(name, step, gan, "a GAN step")


@torch.no_grad()
def bench_inference(table, args):
    """refine.py's and evaluate.py's networks."""
    device, x = table.device, images(16, args.size, table.device)
    R = speed_up(Refiner(), device)
    plain = plain_refiner().to(device)
    table.compare("refine", lambda: to_uint8(R(to_float(x))),
                  lambda: to_uint8(plain(to_float(x))), "padding='same', NCHW", 16, "images/s")
    net = load_inception("random", "pool3", x.cpu())
    table.time("Inception features", lambda: inception_features(net, x, device), 16, "images/s")


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


def bench_metrics(table, args):
    """SSIM and FID against their usual forms; first of all, the values are equal."""
    x, y = (images(n, args.size, table.device)[:64].float() for n in (64, 65))
    torch.testing.assert_close(ssim(x, y), direct_ssim(x, y), atol=1e-4, rtol=0)
    table.compare("SSIM, 64 pairs", lambda: ssim(x, y), lambda: direct_ssim(x, y),
                  "the direct 11 x 11 form", 64, "images/s")
    cpu, random = torch.device("cpu"), torch.Generator().manual_seed(0)
    for n in (200, args.most_features):
        a, b = (torch.rand(n, 2048, generator=random, dtype=torch.float64) for _ in range(2))
        value = []
        slow = seconds(lambda: value.append(sqrtm_fid(a, b)), cpu)
        assert abs(fid(a, b) - value[0]) < 1e-3 * abs(value[0])
        (times,) = in_turns([lambda: fid(a, b)], cpu, table.repeats)
        table.add(f"FID distance, N = {n}", times, ratio=[slow / t for t in times],
                  against="scipy's sqrtm (once)")


def draw_raw(folder, count, size=(1052, 1914)):
    """`count` full-size frames (8 different ones) with labels, as GTA-V's: PNG of about 2.5 MB."""
    random = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for i in range(count):
        if i < 8:
            coarse = Image.fromarray(random.integers(0, 256, (24, 48, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize(size[::-1], Image.BICUBIC)).astype(np.int16)
            noisy = smooth + random.integers(-4, 5, smooth.shape, dtype=np.int16)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(
                folder / f"images/{i:05d}.png", compress_level=3)
            ids = random.choice(np.array([7, 11, 21, 23, 26], np.uint8), (24, 48))
            Image.fromarray(ids).resize(size[::-1], Image.NEAREST).save(
                folder / f"labels/{i:05d}.png")
        else:
            for kind in ("images", "labels"):
                os.link(folder / kind / f"{i % 8:05d}.png", folder / kind / f"{i:05d}.png")


# Runs a command and prints the peak memory of its largest process in kB. In between lies a
# process of its own since a child of bench.py would be charged with bench.py's memory.
PEAK = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, "
        "stdout=subprocess.DEVNULL); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")


def bench_prepare(table, args):
    """prepare.py on full-size PNGs, through its command line, by workers."""
    cpu, count, peaks = torch.device("cpu"), args.frames, {}
    with tempfile.TemporaryDirectory() as folder:
        draw_raw(Path(folder) / "raw", count)

        def run(workers):
            out = f"{folder}/{workers}-{time.monotonic_ns()}"
            raw = [f"{folder}/raw/images", f"{folder}/raw/labels"]
            peaks[workers] = int(subprocess.run(
                [sys.executable, "-c", PEAK, sys.executable, Path(__file__).parents[1] / "prepare.py",
                 "--synthetic", *raw, "--real", *raw, "--test", "1", "--out", out, "--workers",
                 str(workers)], check=True, capture_output=True).stdout) / 1e3
        workers = sorted({1, 2, os.cpu_count()})
        runs = in_turns([lambda w=w: run(w) for w in workers], cpu, max(1, table.repeats - 1))
        for w, times in zip(workers, runs):
            table.add(f"prepare.py, full-size PNG, --workers {w}", times, 2 * count, "images/s",
                      [one / t for one, t in zip(runs[0], times)], "--workers 1", peaks[w])


def bench_segment(table, args):
    """Segmentation: a training step of batch 16 and the test, per network."""
    device, n = table.device, max(args.batch_size, 2)
    x = images(n, args.size, device)
    y = (x[:, 0] % 19).long()
    for name in segment.NETWORKS:
        net = speed_up(segment.build(name, None), device)
        adam = torch.optim.Adam(net.parameters(), 1e-3)

        def step():
            adam.zero_grad()
            F.cross_entropy(net.train()(to_float(x)), y, ignore_index=255).backward()
            adam.step()
        table.time(f"{segment.TITLE[name]}, training", step, n, "images/s")
        table.time(f"{segment.TITLE[name]}, testing",
                   lambda: segment.predict(net, x, device), n, "images/s")


def bench_sweep(table, args):
    """The cost of a GAN step by size and by batch size: linear would be a ratio of 1."""
    height, width = args.size
    cases = [((h, 2 * h), 4) for h in (height // 4, height // 2, height)]
    cases += [((height // 2, width // 2), n) for n in (1, 2, 8)]
    cases = [(size, n) for size, n in cases if min(size) >= 16]
    steps = [gan_step(size, n, table.device) for size, n in cases]
    times = in_turns(steps, table.device, max(1, table.repeats - 1))
    per_pixel = [[t / (n * size[0] * size[1]) for t in some]
                 for some, (size, n) in zip(times, cases)]
    base = per_pixel[len(cases) // 2 - 1]
    for (size, n), some, cost in zip(cases, times, per_pixel):
        table.add(f"GAN step, {size[0]} x {size[1]}, batch {n}", some,
                  ratio=[c / b for c, b in zip(cost, base)], against="cost a pixel")


def bench_start(table, args):
    """How long a user waits for --help."""
    here = Path(__file__).parents[1]
    for script in ("prepare.py", "train_gan.py"):
        table.time(f"{script} --help", lambda s=script: subprocess.run(
            [sys.executable, here / s, "--help"], check=True, capture_output=True))


def machine():
    """The processor as it calls itself, how many cores, and its widest vector instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


SECTIONS = {name.removeprefix("bench_"): function for name, function in list(globals().items())
            if name.startswith("bench_")}


def arguments():
    p = parser(__doc__)
    p.add_argument("--device", default="auto", help="auto (cuda, mps, cpu), or one of them")
    p.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME",
                   help="sections")
    p.add_argument("--size", type=positive(int), nargs=2, default=[80, 160], metavar=("H", "W"))
    p.add_argument("--batch-size", type=positive(int), default=4, help="images a batch")
    p.add_argument("--repeats", type=positive(int), default=3, help="of which the median is shown")
    p.add_argument("--frames", type=positive(int), default=48, help="full-size frames a domain")
    p.add_argument("--most-features", type=positive(int), default=5000, help="N of the second FID")
    p.add_argument("--json", type=Path, help="write the table and every time to this file")
    return p.parse_args()


def main():
    args = arguments()
    device = pick_device(args.device)
    announce("bench.py", device, args.seed, "nothing", args.json or "nothing")
    table = Table(device, args.repeats)
    for name in args.only:
        SECTIONS[name](table, args)
    if args.json:
        write_text(args.json, json.dumps(
            {"rows": table.rows, "machine": machine(), **provenance(args, device)}, indent=1))
        write_text(args.json.with_suffix(".md"), f"{machine()}, {device}, torch "
                   f"{torch.__version__}, {args.size[0]} x {args.size[1]}, batch "
                   f"{args.batch_size}\n\n{table.markdown()}")


if __name__ == "__main__":
    start(main)
