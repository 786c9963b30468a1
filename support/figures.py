"""Pictures: grids of images, Figure 1, and the demo's summary."""
import os

import numpy as np
from PIL import Image, ImageDraw

from support.cli import whole, write_png

os.environ["MPLBACKEND"] = "agg"                     # a notebook's may not be installed here
from matplotlib.figure import Figure  # noqa: E402


def save_grid(path, rows):
    """Save a picture of captioned rows: {caption: uint8 tensor [N, 3, H, W]}, equal N, H, W. Small
    images are shown enlarged."""
    n, _, height, width = next(iter(rows.values())).shape
    scale = max(1, 160 // width)
    step_x, step_y, left = width * scale + 4, height * scale + 4, 12 + 7 * max(map(len, rows))
    grid = Image.new("RGB", (left + n * step_x, len(rows) * step_y), "white")
    pen = ImageDraw.Draw(grid)
    for i, (caption, images) in enumerate(rows.items()):
        pen.text((4, i * step_y + step_y // 2 - 6), caption, fill="black", font_size=12)
        for j, array in enumerate(images.cpu().permute(0, 2, 3, 1).numpy()):
            picture = Image.fromarray(array).resize((width * scale, height * scale), Image.NEAREST)
            grid.paste(picture, (left + j * step_x, i * step_y + 2))
    write_png(path, grid)


def save_figure(path, figure):
    """Write a matplotlib figure as PNG, whole or not at all."""
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def draw_curves(axes, rows, window, best):
    """Figure 1 on three axes: SSIM of fixed pairs, D's loss on real and on refined images.

    rows: of the log; window: over how many steps the losses are averaged; best: the chosen step.
    """
    for axis, column, title in zip(axes, ("ssim", "d_loss_real", "d_loss_refined"),
                                   ("SSIM(R(x), y), fixed pairs", "D loss, real images",
                                    "D loss, refined images")):
        values = np.array([row[column] for row in rows], float)
        steps = np.arange(1, len(values) + 1)
        if column == "ssim":
            there = ~np.isnan(values)
            axis.plot(steps[there], values[there], marker=".")
        else:                                           # the raw curve, and its running mean
            axis.plot(steps, values, color="0.8")
            window = min(window, len(values))
            mean = np.convolve(values, np.ones(window) / window, mode="valid")
            axis.plot(steps[window - 1:], mean)
        axis.axvline(best, color="C3", linestyle="--", label=f"the paper's rule: step {best}")
        axis.legend()
        axis.set(title=title, xlabel="step")


def save_curves(path, rows, window, best):
    """Figure 1 as a picture of its own; see `draw_curves`."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    draw_curves(figure.subplots(1, 3), rows, window, best)
    save_figure(path, figure)


def save_summary(path, images, log, best, table, columns):
    """The whole of a run at one look: images, Figure 1, the matrix of Tables 3-6.

    images: {caption: uint8 tensor [N, 3, H, W]}; log: its rows; best: the chosen step; table:
    {trained on: mIoU on each of the columns}, each shaded from its worst to its best.
    """
    figure = Figure(figsize=(12, 10.5), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=[4.2, 2.8, 3.2])
    for axis, (caption, some) in zip(top.subplots(len(images), 1), images.items()):
        strip = np.concatenate(list(some.permute(0, 2, 3, 1).numpy()), axis=1)   # side by side
        axis.imshow(strip, interpolation="nearest")
        axis.set_ylabel(caption)
        axis.set(xticks=[], yticks=[])
    draw_curves(middle.subplots(1, 3), log, max(1, len(log) // 10), best)
    axis, values = bottom.subplots(), np.array(list(table.values()))
    low, high = values.min(0), values.max(0)
    shades = (values - low) / np.maximum(high - low, 1e-9)
    axis.imshow(shades, cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        axis.text(j, i, f"{value:.3f}", ha="center", va="center",
                  color="white" if shades[i, j] > 0.75 else "black")
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(table)), list(table))
    axis.set(title="U-Net's mIoU, trained on x tested on", xlabel="tested on",
             ylabel="trained on")
    save_figure(path, figure)
