"""The tables of a study: what study.run has measured, over the seeds, beside the paper's numbers.

Reads   study/results/NAME.json   the record; no data, no checkpoint
Writes  study/results/NAME.md     the claims, Tables 2 to 6, differences, classes, epochs

    python -m study.report game-80x160
"""
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from scipy.special import stdtrit
from scipy.stats import sem

from evaluate import PAPER as PAPER_TABLE2
from prepare import TABLE
from segment import (NETWORKS, PAPER, class_table, matrix_table, mean_spread, of_seeds, scores)
from support.cli import UserError, markdown_table, parser, path_of, read_json, start, write_text

ROOT = Path(__file__).resolve().parents[1]
DIGITS = {"mIoU": 3, "accuracy": 1, "fid": 1, "kid": 1, "ssim": 3, "ssim_range1": 4}
# Claims, the paper's and others: scores on real images are higher with the first row. REFINED: of
# every kind of training.
REFINED = [("training on refined images is better than on synthetic ones", "ours", "synthetic"),
           ("by squares: training on refined images is better", "squares", "synthetic")]
CLAIMS = [("L_rec by L1 is better than by squares", "ours", "squares"),
          ("R at the paper's step is better than the average", "rule", "ours"),
          ("by squares: R at the paper's step is better", "squares-rule", "squares"),
          ("by squares: the finer D is better than that of Table 1", "squares-finer", "squares"),
          ("ours is better than SimGAN: the perceptual pre-training helps", "ours", "simgan"),
          ("ours is better than matched colours: it takes a GAN", "ours", "colour"),
          ("matched colours are better than synthetic images as they are", "colour", "synthetic")]
NOTE = ("± is the standard deviation over the n seeds, [ ] a 95 % interval of their mean "
        "(Student's t); differences are paired by seed. Each interval stands alone: of twenty, "
        "one misses by chance. A score without ± is of one seed, its differences are to the same "
        "seed.")


# ----------------------------------------------------------------- numbers over the seeds


def mean_and_half(values):
    """The mean, and half of its 95 % interval, t sd / sqrt(n); None of one value: it says none."""
    half = stdtrit(len(values) - 1, 0.975) * sem(values) if len(values) > 1 else None
    return np.mean(values), half


def with_interval(values, digits, sign=""):
    """"0.123 [0.110, 0.136]", or "0.123" of one seed, or "-" of none."""
    if not values:
        return "-"
    mean, half = mean_and_half(values)
    interval = "" if half is None else f" [{mean - half:.{digits}f}, {mean + half:.{digits}f}]"
    return f"{mean:{sign}.{digits}f}{interval}"


def tested_by_seed(record, network, epochs, crops=False):
    """{seed: {trained on: {tested on: segment.scores}}} of the trainings of a kind."""
    by_seed = {}
    for seed, numbers in record["seeds"].items():
        for entry in numbers["segment"]:
            kind = entry["network"], entry["epochs"], entry["random_crops"]
            if kind != (network, epochs, crops):
                continue
            by_seed[seed] = {}
            for row, by_domain in entry["tested"].items():
                by_seed[seed][row] = {d: scores(torch.tensor(m)) for d, m in by_domain.items()}
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
    trained = set().union(*by_seed.values())
    return sorted((row for row in record["rows"] if row in trained), key=lambda row: row == "real")


def quality(record, row, metric):
    """{seed: FID, KID x 1000 or SSIM of a row of Table 2}."""
    found, scale = {}, 1000 if metric == "kid" else 1
    for seed, numbers in record["seeds"].items():
        of_row = numbers["table2"]["rows"].get(row, {"scores": {}})["scores"]
        if metric in of_row:
            found[seed] = scale * of_row[metric]["value"]
    return found


# ------------------------------------------------------------------------------ the claims


def diagonal(record, by_network):
    """How often the diagonal of a matrix (Tables 3 to 6) is the highest of its row and of its
    column, and of how many rows and columns that have two numbers or more."""
    found = []
    for by_seed in by_network.values():
        names = rows_in(record, by_seed)
        for metric in ("mIoU", "accuracy"):
            means = np.full((len(names), len(names)), np.nan)
            for i, j in np.ndindex(means.shape):
                means[i, j] = np.mean(of_seeds(by_seed, names[i], names[j], metric) or np.nan)
            for i, line in [*enumerate(means), *enumerate(means.T)]:
                if np.isfinite(line).sum() > 1:
                    found.append(np.nanargmax(line) == i)
    return sum(found), len(found)


def fid_agrees(record, by_seed, metric):
    """In how many pairs of rows of a seed the one of lower FID scores higher on real, and of how
    many pairs."""
    found = []
    for seed, tested in by_seed.items():
        fid = {row: quality(record, row, "fid").get(seed) for row in tested}
        for one, other in combinations([row for row in fid if fid[row]], 2):
            higher = tested[one]["real"][metric] > tested[other]["real"][metric]
            found.append(higher == (fid[one] < fid[other]))
    return sum(found), len(found)


def counted(right, cases, of_what):
    """The verdict on a claim that was right in so many of all cases; "" of fewer than two."""
    word = "holds" if right == cases else "does not always hold"
    return f"{word}: {right} of {cases} {of_what}" if cases > 1 else ""


def said(values, digits, least=0):
    """Whether the mean of these numbers of seeds is above `least`, or why they cannot tell, and
    their interval and number; "" if there are none."""
    if not values:
        return ""
    mean, half = mean_and_half(values)
    word = "holds" if mean > least else "does not hold"
    if half is None or abs(mean - least) <= half:
        word = "cannot tell"
    paper = f" (paper: {least:+.{digits}f})" if least else ""
    return f"{word}: {with_interval(values, digits, '+')}, n = {len(values)}{paper}"


def papers_gap(network, metric):
    """The share of the gap between synthetic and real that ours closes in the paper, %."""
    low, ours, high = (PAPER[network][metric][row][2] for row in ("synthetic", "ours", "real"))
    return 100 * (ours - low) / (high - low)


def claims_of(record, network, by_seed):
    """The claims about a network's scores on real: [text, of its mIoU, of its accuracy]."""
    rows, both = [], ("mIoU", "accuracy")
    for text, one, other in REFINED + CLAIMS:
        rows.append([text, *[said(difference(by_seed, one, other, m), DIGITS[m]) for m in both]])
    for kind in sorted(trainings_of(record, network) - {(record["epochs"], False)}):
        found = tested_by_seed(record, network, *kind)
        for text, one, other in REFINED:
            rows.append([f"{text}, after {training_text(*kind)}",
                         *[said(difference(found, one, other, m), DIGITS[m]) for m in both]])
    rows.append(["of two rows of a seed, the one with the lower FID scores higher",
                 *[counted(*fid_agrees(record, by_seed, m), "pairs") for m in both]])
    for row in ("ours", "squares"):
        found = [said(gap_closed(by_seed, row, m), 0, papers_gap(network, m)) for m in both]
        rows.append([f"{row}: as much of the gap to real is closed as in the paper, %", *found])
    return [[f"{NETWORKS[network]}: {text}", *cells] for text, *cells in rows if any(cells)]


def claims_table(record, by_network):
    rows = []
    for network, by_seed in by_network.items():
        rows += claims_of(record, network, by_seed)
    for text, row in (("refining", "ours"), ("by squares: refining", "squares"),
                      ("by squares: refining with the finer D", "squares-finer")):
        for metric, name in (("fid", "FID"), ("kid", "KID x 1000")):
            lower = minus(quality(record, "synthetic", metric), quality(record, row, metric))
            rows.append([f"{text} lowers {name}", said(lower, DIGITS[metric]), ""])
    for metric, name in (("ssim", "SSIM (L = 255)"), ("ssim_range1", "SSIM (L = 1)")):
        higher = minus(quality(record, "ours", metric), quality(record, "synthetic", metric))
        rows.append([f"refining raises {name}", said(higher, DIGITS[metric]), ""])
    rows.append(["the diagonal (cf. Tables 3 to 6) is the highest of its row and column",
                 counted(*diagonal(record, by_network), "rows and columns"), ""])
    return markdown_table(["claim", "verdict: by how much [95 %]; of a network's mIoU",
                           "of its accuracy, points"], [row for row in rows if row[1]])


# ------------------------------------------------------------------------------ the tables


def table2(record):
    """Table 2 over the seeds of R that a row has."""
    first = next(iter(record["seeds"].values()))["table2"]
    rows = []
    for row in dict.fromkeys([*record["rows"], *first["rows"]]):     # then the floor, the control
        seeds = quality(record, row, "ssim")
        if not seeds:
            continue
        cells = [row, ", ".join(seeds)]
        for metric in ("fid", "kid", "ssim", "ssim_range1"):
            values = list(quality(record, row, metric).values())
            if values and np.allclose(values, values[0], rtol=1e-4):     # but for the processor
                values = values[:1]                           # no seed enters: no deviation
            cells.append(mean_spread(values, DIGITS[metric]))
        rows.append([*cells, *map(str, PAPER_TABLE2.get(row, ("-", "-")))])
    return markdown_table(["images vs real", "seeds", f"{first['label']}, N = {first['n']}",
                           "KID x 1000", "SSIM (L = 255)", "SSIM (L = 1)", "paper FID",
                           "paper SSIM"], rows)


def real_table(record, by_seed):
    """Scores on real of every row, what it gains over synthetic, the share of the gap closed."""
    rows = []
    for row in rows_in(record, by_seed):
        cells = [row, ", ".join(on_real(by_seed, row, "mIoU"))]
        for metric in ("mIoU", "accuracy"):
            gain = difference(by_seed, row, "synthetic", metric) if row != "synthetic" else []
            gap = gap_closed(by_seed, row, metric) if row not in ("synthetic", "real") else []
            cells += [mean_spread(of_seeds(by_seed, row, "real", metric), DIGITS[metric]),
                      with_interval(gain, DIGITS[metric], "+"), with_interval(gap, 0)]
        rows.append(cells)
    head = ["trained on", "seeds", "mIoU on real", "minus synthetic", "gap closed, %",
            "accuracy on real, %", "minus synthetic, points", "gap closed in accuracy, %"]
    return markdown_table(head, rows)


def trainings_of(record, network):
    """How a network was trained: {(epochs, with random crops)}."""
    return {(entry["epochs"], entry["random_crops"]) for numbers in record["seeds"].values()
            for entry in numbers["segment"] if entry["network"] == network}


def training_text(epochs, crops):
    return f"{epochs} epochs" + (" with random crops" if crops else "")


def trainings_table(record, network):
    """Scores on real after other trainings than the tables', beside those of the same seeds after
    that one; empty where there is no other."""
    usual, rows = (record["epochs"], False), []
    compared = tested_by_seed(record, network, *usual)
    for other in sorted(trainings_of(record, network) - {usual}):
        found = tested_by_seed(record, network, *other)
        for row in rows_in(record, found):
            seeds = [seed for seed in on_real(found, row, "mIoU") if row in compared.get(seed, {})]
            cells = [f"{row}, {training_text(*other)}", ", ".join(seeds)]
            for by_seed in (found, compared):
                some = {seed: by_seed[seed] for seed in seeds}
                both = [mean_spread(of_seeds(some, row, "real", m), DIGITS[m])
                        for m in ("mIoU", "accuracy")]
                cells.append(" / ".join(both))
            rows.append(cells)
    head = [f"{NETWORKS[network]}, trained on", "seeds", "mIoU / accuracy, %, on real",
            f"after {training_text(*usual)}, no random crops"]
    return markdown_table(head, rows) if rows else ""


# ------------------------------------------------------------------------------ the report


def settings_text(record):
    """Which seeds were computed with which settings, and of which features FID is (of random ones
    it is none). UserError if the seeds differ in these."""
    seeds, features = {}, set()
    for seed, numbers in record["seeds"].items():
        how = "prepare.py {prepare}; pretrain.py {pretrain}; train_gan.py {gan}; {precision}"
        seeds.setdefault(how.format(**numbers["settings"]), []).append(seed)
        features.add(tuple(numbers["table2"].get(key) for key in ("n", "weights_sha256")))
    if len(features) > 1:
        raise UserError(f"{record['name']}: the FID of its seeds is of other --n or --inception")
    lines = [f"- seed {', '.join(some)}: {how}" for how, some in seeds.items()]
    return "\n".join([*lines, f"- what is called FID here: {numbers['table2']['label']}"])


def text_of(record):
    """The whole report of a record, as Markdown."""
    found = {network: tested_by_seed(record, network, record["epochs"]) for network in NETWORKS}
    by_network = {network: by_seed for network, by_seed in found.items() if by_seed}
    parts = [f"# {record['name']}", NOTE, settings_text(record),
             claims_table(record, by_network), "## Table 2", table2(record)]
    for network, by_seed in by_network.items():
        names = rows_in(record, by_seed)
        parts += [f"## {NETWORKS[network]}, {record['epochs']} epochs", real_table(record, by_seed)]
        for metric, paper in PAPER[network].items():          # Tables 3 to 6, as segment.py's
            parts.append(matrix_table(metric, paper, by_seed, names, names).strip())
        parts += [class_table(by_seed, names, TABLE).strip(), trainings_table(record, network)]
    return "\n\n".join(part for part in parts if part) + "\n"


def arguments():
    p = parser(__doc__)
    p.add_argument("name", help="of the study: study/results/NAME.json")
    p.add_argument("--results", type=path_of, default=ROOT / "study/results", help="of the record")
    return p.parse_args()


def main():
    args = arguments()
    source = args.results / f"{args.name}.json"
    print(f"study.report: reads {source}; writes {args.results}/{args.name}.md\n")
    record = read_json(source)
    text = text_of(record)
    write_text(source.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    start(main)
