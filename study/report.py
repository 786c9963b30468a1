"""The tables of a study: what study.run has measured, over the seeds, beside the paper's numbers.

Reads   study/results/NAME.json   the record; no data, no checkpoint
Writes  study/results/NAME.md     the claims, Tables 2 to 6, differences, classes, epochs, changes
        study/results/NAME.png    mIoU on real by training images, and over the epochs

    python -m study.report game-look-40x80
"""
import json
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student

from evaluate import PAPER as PAPER_TABLE2
from prepare import CLASSES, TABLE
from segment import (NETWORKS, PAPER, class_table, matrix_table, mean_spread, of_seeds, scores)
from support.cli import UserError, markdown_table, parser, path_of, start, write_text
from support.figures import Figure, save_figure

ROOT = Path(__file__).resolve().parents[1]
DIGITS = {"mIoU": 3, "shared": 3, "accuracy": 1, "fid": 1, "kid": 1, "ssim": 3, "ssim_range1": 4}
# What the paper says of two rows: scores on real images are higher with the first one.
CLAIMS = [("training on refined images is better than on synthetic ones", "ours", "synthetic"),
          ("the same, refined with the finer D", "finer-d", "synthetic"),
          ("the same, refined as printed", "as-printed", "synthetic"),
          ("ours is better than SimGAN: the perceptual pre-training helps", "ours", "simgan"),
          ("ours is better than matched colours: it takes a GAN", "ours", "colour")]
NOTE = ("± is the standard deviation over the seeds, [ ] a 95 % interval of their mean (Student's "
        "t); differences are paired by seed.")
CHANCE = ("± is what chance explains (95 %), from the spread of all rows together; a bold number is "
          "larger. Of twenty such numbers chance makes about one bold.")
NO_CHANGES = ["synthetic", "real", "colour", "pretrained", "ours"]     # all others change ours


# ----------------------------------------------------------------- numbers over the seeds


def mean_and_interval(values):
    """Mean, standard deviation and 95 % interval of the mean; None where one value says none."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return {"mean": mean, "sd": None, "low": None, "high": None, "n": n}
    sd = float(np.std(values, ddof=1))
    half = float(student.ppf(0.975, n - 1)) * sd / n ** 0.5
    return {"mean": mean, "sd": sd, "low": mean - half, "high": mean + half, "n": n}


def with_spread(by_seed, metric):
    """"0.123 ± 0.004" of {seed: score}, or "0.123" of one, or "-" of none."""
    return mean_spread(list(by_seed.values()), DIGITS[metric])


def with_interval(values, digits, sign=""):
    """"0.123 [0.110, 0.136]", or "0.123" of one seed, or "-" of none."""
    if not values:
        return "-"
    found = mean_and_interval(values)
    text = f"{found['mean']:{sign}.{digits}f}"
    if found["sd"] is None:
        return text
    return f"{text} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def shared_classes(record):
    """The classes that synthetic test images hold, by trainId: a renderer lacks some."""
    for numbers in record["seeds"].values():
        for entry in numbers["segment"]:
            own = entry["tested"].get("synthetic", {}).get("synthetic")
            if own:
                return np.flatnonzero(np.sum(own["confusion"], 1))
    return np.arange(len(CLASSES))


def tested_by_seed(record, network, epochs):
    """{seed: {trained on: {tested on: segment.scores, and "shared": mIoU of shared_classes}}}."""
    by_seed, shared = {}, shared_classes(record)
    for seed, numbers in record["seeds"].items():
        for entry in numbers["segment"]:
            if (entry["network"], entry["epochs"]) != (network, epochs):
                continue
            by_seed[seed] = {}
            for row, by_domain in entry["tested"].items():
                by_seed[seed][row] = {}
                for domain, found in by_domain.items():
                    score = scores(torch.tensor(found["confusion"]))
                    score["shared"] = float(np.nanmean(np.array(score["IoU"])[shared]))
                    by_seed[seed][row][domain] = score
    return by_seed


def on_real(by_seed, row, metric):
    """{seed: score on real of the network that was trained on this row}."""
    return {seed: rows[row]["real"][metric] for seed, rows in by_seed.items() if row in rows}


def minus(one, other):
    """The differences of two {seed: score} where both have the seed."""
    return [one[seed] - other[seed] for seed in one if seed in other]


def difference(by_seed, one, other, metric):
    return minus(on_real(by_seed, one, metric), on_real(by_seed, other, metric))


def gap_closed(by_seed, row, metric):
    """(row - synthetic) / (real - synthetic) of every seed that has the three, a percentage."""
    found = on_real(by_seed, row, metric)
    low, high = on_real(by_seed, "synthetic", metric), on_real(by_seed, "real", metric)
    return [100 * (found[seed] - low[seed]) / (high[seed] - low[seed])
            for seed in found if seed in low and seed in high and low[seed] != high[seed]]


def rows_in(record, by_seed):
    """The rows that a network was trained on, in the record's order, real last."""
    trained = set()
    for rows in by_seed.values():
        trained |= set(rows)
    found = [row for row in record["rows"] if row in trained and row != "real"]
    return found + ["real"] if "real" in trained else found


def quality(record, row, metric):
    """{seed: FID, KID x 1000 or SSIM of a row of Table 2}."""
    found = {}
    for seed, numbers in record["seeds"].items():
        of_row = numbers["table2"]["rows"].get(row, {"scores": {}})["scores"]
        if metric in of_row:
            found[seed] = of_row[metric]["value"] * (1000 if metric == "kid" else 1)
    return found


# ------------------------------------------------------------------------------ the claims


def verdict(values, least=0):
    """Whether the mean over the seeds is above `least`, or whether they cannot tell."""
    found = mean_and_interval(values)
    if found["sd"] is None or found["low"] <= least <= found["high"]:
        return "cannot tell"
    return "holds" if found["low"] > least else "does not hold"


def claim_rows(record, network, by_seed):
    """The rows of the claims table about one segmentation network."""
    rows = []
    for text, one, other in CLAIMS:
        found = difference(by_seed, one, other, "mIoU")
        if found:
            accuracy = with_interval(difference(by_seed, one, other, "accuracy"), 1, "+")
            rows.append([f"{NETWORKS[network]}: {text}", verdict(found),
                         f"mIoU {with_interval(found, 3, '+')}; accuracy, %: {accuracy}"])
    gap = gap_closed(by_seed, "ours", "mIoU")
    if gap:
        rows.append([f"{NETWORKS[network]}: ours closes 40 % of the gap to real images (an aim of "
                     "this repository)", verdict(gap, 40), f"{with_interval(gap, 0)} % of mIoU"])
    return rows


def highest_of(by_seed, cells, metric):
    """Which of some cells (row, domain) of Tables 3 to 6 has the highest mean over the seeds;
    None where fewer than two of them were measured."""
    means = {}
    for row, domain in cells:
        values = of_seeds(by_seed, row, domain, metric)
        if values:
            means[row, domain] = np.mean(values)
    return max(means, key=means.get) if len(means) > 1 else None


def diagonal(record, by_network):
    """How often the diagonal of Tables 3 to 6 is the highest of its row and of its column, and
    of how many rows and columns."""
    found = []
    for by_seed in by_network.values():
        names = rows_in(record, by_seed)
        for name in names:
            for metric in ("mIoU", "accuracy"):
                in_row = highest_of(by_seed, [(name, other) for other in names], metric)
                in_column = highest_of(by_seed, [(other, name) for other in names], metric)
                found += [cell == (name, name) for cell in (in_row, in_column) if cell]
    return sum(found), len(found)


def claims_table(record, by_network):
    rows = []
    for network, by_seed in by_network.items():
        rows += claim_rows(record, network, by_seed)
    fid = minus(quality(record, "synthetic", "fid"), quality(record, "ours", "fid"))
    if fid:
        rows.append(["refining brings FID nearer to real images", verdict(fid),
                     f"FID lower by {with_interval(fid, 1)}"])
    best, cases = diagonal(record, by_network)
    if cases:
        rows.append(["the diagonal of Tables 3 to 6 is the highest of its row and column",
                     "holds" if best == cases else "does not always hold",
                     f"{best} of {cases} rows and columns"])
    change = changes(record, "mIoU").get("rule")
    if change and change["margin"]:
        worse = change["mean"] + change["margin"] < 0
        rows.append(["the paper's rule picks the best step", "does not hold" if worse else
                     "cannot tell", f"mIoU {change['mean']:+.3f} to the average of the last steps; "
                     f"chance explains {change['margin']:.3f}"])
    return markdown_table(["claim", "verdict", "number [95 %]"], rows)


# ------------------------------------------------------------------------------ the tables


def table2(record):
    """Table 2 over the seeds of R."""
    first = next(iter(record["seeds"].values()))["table2"]
    names = [row for row in record["rows"] if row in first["rows"]]
    names += [row for row in first["rows"] if row not in names]      # the floor, the control
    rows = []
    for row in names:
        if len(quality(record, row, "ssim")) < len(record["seeds"]):
            continue
        cells = [with_spread(quality(record, row, metric), metric)
                 for metric in ("fid", "kid", "ssim", "ssim_range1")]
        paper = PAPER_TABLE2.get(row, ("-", "-"))
        rows.append([row, *cells, str(paper[0]), str(paper[1])])
    return markdown_table(["images vs real", f"{first['label']}, N = {first['n']}", "KID x 1000",
                           "SSIM (L = 255)", "SSIM (L = 1)", "paper FID", "paper SSIM"], rows)


def real_table(record, by_seed):
    """Scores on real of every row, what it gains over synthetic, the share of the gap closed."""
    rows = []
    for row in rows_in(record, by_seed):
        cells = [row]
        for metric, digits in (("mIoU", 3), ("accuracy", 1)):
            gain, gap = "-", "-"
            if row != "synthetic":
                gain = with_interval(difference(by_seed, row, "synthetic", metric), digits, "+")
            if row not in ("synthetic", "real"):
                gap = with_interval(gap_closed(by_seed, row, metric), 0)
            cells += [with_spread(on_real(by_seed, row, metric), metric), gain, gap]
        cells.append(with_spread(on_real(by_seed, row, "shared"), "shared"))
        rows.append(cells)
    head = ["trained on", "mIoU on real", "minus synthetic", "gap closed, %", "accuracy on real, %",
            "minus synthetic", "gap closed, %", f"mIoU of {len(shared_classes(record))} classes"]
    if len(shared_classes(record)) == len(CLASSES):           # the last column says nothing new
        head, rows = head[:-1], [cells[:-1] for cells in rows]
    return markdown_table(head, rows)


def segment_tables(record, network, by_seed):
    """Tables 3 to 6 and the IoU of every class on real, as segment.py has them of one run."""
    names, domains, tables = rows_in(record, by_seed), [], []
    for domain in names:
        if any(of_seeds(by_seed, row, domain, "mIoU") for row in names):
            domains.append(domain)
    for metric, paper in PAPER[network].items():
        tables.append(matrix_table(metric, paper, by_seed, names, domains).strip())
    return [*tables, class_table(by_seed, names, TABLE).strip()]


def epochs_in(record, network):
    """The numbers of epochs that a network was trained for, ascending."""
    found = set()
    for numbers in record["seeds"].values():
        found |= {entry["epochs"] for entry in numbers["segment"] if entry["network"] == network}
    return sorted(found)


def epochs_table(record, network):
    """mIoU on real after every number of epochs, over the seeds that were trained so long; empty
    where there is only one number."""
    epochs = epochs_in(record, network)
    found = {n: tested_by_seed(record, network, n) for n in epochs}
    rows = []
    for row in rows_in(record, found[epochs[0]] | found[epochs[-1]]):
        cells = [with_spread(on_real(found[n], row, "mIoU"), "mIoU") for n in epochs]
        if len(cells) - cells.count("-") > 1:
            rows.append([row, *cells])
    head = [f"mIoU on real of {NETWORKS[network]}, trained on", *[f"{n} epochs" for n in epochs]]
    return markdown_table(head, rows) if rows else ""


# ---------------------------------------------------------------------- what was changed


def change_scores(record, row, metric):
    """{seed: score} of a row, at the length at which the changes are compared."""
    if metric in ("fid", "kid"):
        return quality(record, row, metric)
    return on_real(tested_by_seed(record, **record["changes"]), row, metric)


def changes(record, metric):
    """{row: {"mean", "margin"}}: every changed row minus ours of the same seeds.

    The margin is what chance explains: half the 95 % interval of a mean of n seeds is
    t sd / sqrt(n). Two seeds say little of sd, so it is pooled over all rows, as if it were the
    same for all. None where no row has two seeds that differ.
    """
    ours, found = change_scores(record, "ours", metric), {}
    for row in record["rows"]:
        values = minus(change_scores(record, row, metric), ours)
        if row not in NO_CHANGES and values:
            found[row] = np.array(values)
    freedom = sum(len(values) - 1 for values in found.values())
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in found.values())
    wide = float(student.ppf(0.975, freedom)) * (squares / freedom) ** 0.5 if squares else None
    return {row: {"mean": float(values.mean()), "margin": wide and wide / len(values) ** 0.5}
            for row, values in found.items()}


def change_cell(change, digits):
    """"+0.010 ± 0.007", bold where it is more than chance explains."""
    if change is None:
        return "-"
    text = f"{change['mean']:+.{digits}f}"
    if change["margin"] is None:
        return text
    if abs(change["mean"]) > change["margin"]:
        text = f"**{text}**"
    return f"{text} ± {change['margin']:.{digits}f}"


def mean_change(record, row):
    """How far R moves an image at the end of its training, mean over the seeds, as text."""
    values = [numbers["training"][row]["mean_change"] for numbers in record["seeds"].values()
              if row in numbers["training"]]
    return f"{np.mean(values):.2f}" if values else "-"


def changes_table(record):
    """Everything that was changed, one thing a row, beside ours of the same seeds."""
    found = {metric: changes(record, metric) for metric in ("fid", "mIoU", "accuracy")}
    if not found["mIoU"]:
        return ""
    rows = []
    for row in ["ours", *found["mIoU"]]:
        seeds = ", ".join(change_scores(record, row, "mIoU"))
        cells = [record["rows"][row]["says"], seeds, mean_change(record, row)]
        for metric in found:
            if row == "ours":
                cells.append(with_spread(change_scores(record, row, metric), metric))
            else:
                cells.append(change_cell(found[metric].get(row), DIGITS[metric]))
        rows.append(cells)
    return markdown_table(["what was changed", "seeds", "mean abs(R(x) - x)", "FID minus ours",
                           "mIoU on real minus ours", "accuracy on real, %, minus ours"], rows)


# ------------------------------------------------------------------------------ the report


def network_text(record, network, by_seed):
    """The part of the report about one segmentation network."""
    title = f"## {NETWORKS[network]}, {record['epochs'][network]} epochs, seed {', '.join(by_seed)}"
    return [title, real_table(record, by_seed), *segment_tables(record, network, by_seed),
            epochs_table(record, network)]


def text_of(record):
    """The whole report of a record, as Markdown."""
    by_network = networks_of(record)
    parts = [f"# {record['name']}", NOTE, claims_table(record, by_network),
             f"## Table 2, seed {', '.join(record['seeds'])}", table2(record)]
    for network, by_seed in by_network.items():
        parts += network_text(record, network, by_seed)
    changed = changes_table(record)
    if changed:
        title = "## What was changed: {}, {} epochs".format(
            NETWORKS[record["changes"]["network"]], record["changes"]["epochs"])
        parts += [title, CHANCE, changed]
    return "\n\n".join(part for part in parts if part) + "\n"


def networks_of(record):
    """{network: `tested_by_seed`} of the networks that have been trained, at their main length."""
    found = {network: tested_by_seed(record, network, record["epochs"].get(network))
             for network in NETWORKS}
    return {network: by_seed for network, by_seed in found.items() if by_seed}


def draw(record, path):
    """mIoU on real by training images, a bar and its seeds; and over the epochs, if there
    are several numbers of them."""
    by_network = networks_of(record)
    panels = len(by_network) + (len(epochs_in(record, "unet")) > 1)
    figure = Figure(figsize=(5 * panels, 3.6), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis, (network, by_seed) in zip(axes, by_network.items()):
        names = rows_in(record, by_seed)
        for i, row in enumerate(names):
            values = list(on_real(by_seed, row, "mIoU").values())
            axis.barh(i, np.mean(values), color="0.7" if row in ("synthetic", "real") else "C0")
            axis.plot(values, [i] * len(values), "k.")
        axis.set(yticks=range(len(names)), yticklabels=names, xlabel="mIoU on real",
                 title=f"{NETWORKS[network]}, {record['epochs'][network]} epochs")
        axis.invert_yaxis()
        axis.locator_params(axis="x", nbins=5)
    if panels > len(by_network):
        draw_epochs(axes[-1], record)
    save_figure(path, figure)


def draw_epochs(axis, record):
    """mIoU of U-Net on real over the epochs, a line for every training set."""
    epochs = epochs_in(record, "unet")
    found = {n: tested_by_seed(record, "unet", n) for n in epochs}
    for row in ("synthetic", "colour", "simgan", "ours", "real"):
        here = [n for n in epochs if on_real(found[n], row, "mIoU")]
        if not here:
            continue
        means = [np.mean(list(on_real(found[n], row, "mIoU").values())) for n in here]
        axis.plot(here, means, marker="o", label=row)
    axis.set(title="U-Net over the epochs", xlabel="epochs", ylabel="mIoU on real")
    axis.legend()


def arguments():
    p = parser(__doc__)
    p.add_argument("name", help="of the study: study/results/NAME.json")
    p.add_argument("--results", type=path_of, default=ROOT / "study/results", help="of the record")
    return p.parse_args()


def main():
    args = arguments()
    source = args.results / f"{args.name}.json"
    if not source.is_file():
        raise UserError(f"{source}: no such record; study.run writes it")
    print(f"study.report: reads {source}; writes {args.results}/{args.name}.md and .png\n")
    record = json.loads(source.read_text(encoding="utf-8"))
    if not networks_of(record):
        raise UserError(f"{source}: no seed in it has been through segmentation; run study.run")
    text = text_of(record)
    write_text(source.with_suffix(".md"), text)
    draw(record, source.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    start(main)
