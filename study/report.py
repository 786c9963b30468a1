"""The tables of study.py: Tables 2 to 6 over the seeds, the share of the gap closed, ablations.

Reads   results/study/NAME/         what study.py kept of every run; no data, no checkpoints
Writes  results/study/study.md      mean and spread on real images, the gap, Tables 2 to 6
        results/study/ablations.md  one row for everything that was changed
        results/study/study.json    all of it with every digit

    python report.py
    python report.py --out results/settings
    python report.py --out results/study60 --before results/study     what longer training changed
"""
import csv
import json
from pathlib import Path

import numpy as np
from scipy.stats import t as student

import segment
from prepare import CLASSES, UserError, parser, start, write_text
from study.run import ABLATIONS, NETWORKS, join, method_of

SAYS = {"": "ours, as in the study", "simgan": "no perceptual pre-training (SimGAN's L1)",
        **{name: change["says"] for name, change in ABLATIONS.items()}}

VEGETATION = CLASSES.index("vegetation")


def seeds_with(out, file, ablation=""):
    """The seeds whose kept run has this file, ascending."""
    prefix = join(ablation, 1)[:-1]                              # "seed" or "l1-seed"
    seeds = [p.parent.name.removeprefix(prefix) for p in out.glob(f"{prefix}*/{file}")]
    first = [0] if ablation and (out / ablation / file).is_file() else []
    return first + sorted(int(s) for s in seeds if s.isdecimal())


def on_real(folder, network="unet"):
    """{training domain: {"mIoU", "accuracy", "IoU"}} on real test images of one kept run."""
    record = json.loads((folder / f"segment_{network}.json").read_text())
    (by_domain,) = record["scores"].values()
    return {domain: row["real"] for domain, row in by_domain.items()}


def runs_of(out, network, seeds):
    """`on_real` of every seed, where all have the domain; what was changed on each of the seeds
    too is beside it, as if it were a further training domain: "ours, d-fine"."""
    runs = in_all([on_real(out / join("", s), network) for s in seeds])
    for ablation in ABLATIONS:
        method = method_of(ablation)
        if seeds_with(out, f"segment_{network}.json", ablation) == seeds:
            for run, seed in zip(runs, seeds):
                changed = on_real(out / join(ablation, seed), network)[method]
                run[f"{method}, {ablation.removesuffix('-simgan')}"] = changed
    return runs


def in_all(runs):
    """Of dictionaries, what all of them have."""
    return [{d: r[d] for d in r if all(d in other for other in runs)} for r in runs]


def mean_and_interval(values):
    """Mean, standard deviation and 95 % interval (Student's t) over seeds; one seed has none."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "sd": None, "low": None, "high": None, "n": len(values)}
    sd = float(np.std(values, ddof=1))
    half = student.ppf(0.975, len(values) - 1) * sd / len(values) ** 0.5
    return {"mean": mean, "sd": sd, "low": mean - half, "high": mean + half, "n": len(values)}


def gap_closed(runs, domain, metric):
    """(domain - synthetic) / (real - synthetic) of each run, a percentage."""
    return [100 * (r[domain][metric] - r["synthetic"][metric])
            / (r["real"][metric] - r["synthetic"][metric]) for r in runs]


def gap_of_runs(out, network, by_seed, metric):
    """`gap_closed` of what was changed, {seed: scores}, between synthetic and real of its seed."""
    runs = [{**on_real(out / join("", seed), network), "changed": scores}
            for seed, scores in by_seed.items()]
    return gap_closed(runs, "changed", metric)


def cell(found, digits):
    """"0.123 ± 0.004", or without ± where there is one seed."""
    text = f"{found['mean']:.{digits}f}"
    return text if found["sd"] is None else f"{text} ± {found['sd']:.{digits}f}"


def interval(found, digits=0):
    return "" if found["sd"] is None else (
        f" [{found['low']:.{digits}f}, {found['high']:.{digits}f}]")


def markdown(head, rows):
    """A Markdown table of a list of headings and lists of cells."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def gap_table(runs):
    """The table over the seeds: scores on real, and, where the networks trained on synthetic and
    on real images are both there, the share of the gap closed."""
    record, rows, ends = {}, [], {"synthetic", "real"}
    for d in sorted(runs[0], key=lambda d: d == "real"):       # real is the last row
        row = {m: mean_and_interval([r[d][m] for r in runs]) for m in ("mIoU", "accuracy")}
        if ends <= set(runs[0]):
            row |= {f"gap_{m}": mean_and_interval(gap_closed(runs, d, m)) for m in row}
        record[d] = row
        gaps = ["-", "-"] if d in ends or "gap_mIoU" not in row else [
            f"{row[g]['mean']:.0f}{interval(row[g])}" for g in ("gap_mIoU", "gap_accuracy")]
        rows.append([d, cell(row["mIoU"], 3), cell(row["accuracy"], 1), *gaps])
    return record, markdown(["trained on", "mIoU on real", "accuracy on real, %",
                             "gap closed, mIoU, %", "gap closed, accuracy, %"], rows)


def difference_table(runs):
    """Ours minus each other training domain, seed by seed: where 0 lies in the interval, these
    seeds cannot tell the two apart. What was changed on every seed likewise."""
    record, rows = {}, []
    pairs = [("ours", d) for d in runs[0] if d not in ("ours", "real") and "," not in d]
    for changed in [d for d in runs[0] if d.startswith("ours, ")]:
        simgan = changed.replace("ours", "simgan")
        pairs += [(changed, d) for d in ("synthetic", "colour", "ours", simgan)]
    for one, other in [pair for pair in pairs if set(pair) <= set(runs[0])]:
        found = {m: mean_and_interval([r[one][m] - r[other][m] for r in runs])
                 for m in ("mIoU", "accuracy")}
        record[other if one == "ours" else f"{one} - {other}"] = found
        rows.append([f"{one} - {other}"] + [
            f"{found[m]['mean']:+.{n}f}{interval(found[m], n)}"
            for m, n in (("mIoU", 3), ("accuracy", 1))])
    return record, markdown(["difference [95 %]", "mIoU on real", "accuracy on real, %"], rows)


def change_table(title, before, after):
    """What a change did to the scores on real, [{domain: scores}, a seed each] before and after:
    the record and the table of the differences, seed by seed."""
    record, rows = {}, []
    for d in after[0]:
        found = {m: mean_and_interval([score(r[d]) - score(b[d]) for b, r in zip(before, after)])
                 for m, score in (("mIoU", lambda s: s["mIoU"]),
                                  ("accuracy", lambda s: s["accuracy"]),
                                  ("vegetation", lambda s: s["IoU"][VEGETATION]))}
        record[d] = found
        rows.append([d] + [f"{f['mean']:+.{n}f}{interval(f, n)}"
                           for f, n in zip(found.values(), (3, 1, 3))])
    return record, markdown([title, "mIoU", "accuracy, %", "IoU of vegetation"], rows) + "\n\n"


def blur_table(out, network):
    """What blurring the test images (`segment.py --blur`) does to the scores on real: a network
    that relies on detail its training images do not have may gain by it."""
    record, text = {}, ""
    for name in sorted({f.stem.removeprefix("segment_")
                        for f in out.glob(f"seed*/segment_{network}_blur*.json")}):
        seeds = seeds_with(out, f"segment_{name}.json")
        before, after = ([on_real(out / join("", s), n) for s in seeds] for n in (network, name))
        record[name], table = change_table(
            f"trained on; real blurred by {name.split('blur')[1]} pixels - sharp", before, after)
        text += table
    return record, text


def epochs_of(out, network, seeds):
    """After how many epochs the networks of these seeds were scored: "30", or "30, 60"."""
    records = [json.loads((out / join("", s) / f"segment_{network}.json").read_text())
               for s in seeds]
    return ", ".join(map(str, sorted({r["epochs"] if "epochs" in r else r["settings"]["epochs"]
                                      for r in records})))    # the oldest have it in one place


def before_table(out, earlier, network, seeds):
    """What was trained here against the same seeds of another study, say after fewer epochs;
    nothing where they have no seed in common."""
    seeds = [s for s in seeds_with(earlier, f"segment_{network}.json") if s in seeds]
    if not seeds:
        return {}, ""
    before, after = (runs_of(folder, network, seeds) for folder in (earlier, out))
    shared = in_all([before[0], after[0]])[1]
    epochs = [epochs_of(folder, network, seeds) for folder in (out, earlier)]
    return change_table(f"trained on; after {epochs[0]} epochs - after {epochs[1]}", before,
                        [{d: run[d] for d in shared} for run in after])


def quality_table(out):
    """Table 2 over the seeds: FID, KID and SSIM of every domain, seeds of R apart; None where
    only segmentation was run."""
    seeds = seeds_with(out, "table2.json")
    if not seeds:
        return None, ""
    records = [json.loads((out / join("", s) / "table2.json").read_text()) for s in seeds]
    digits, record, rows = {"fid": 1, "kid": 1, "ssim": 3, "ssim_range1": 4}, {}, []
    for d in records[0]["rows"]:
        scores = [r["rows"][d]["scores"] for r in records if d in r["rows"]]
        record[d] = {m: mean_and_interval([s[m]["value"] * (1000 if m == "kid" else 1)
                                           for s in scores]) for m in digits if m in scores[0]}
        rows.append([d] + [cell(record[d][m], n) if m in record[d] else "-"
                           for m, n in digits.items()])
    head = ["images vs real", f"{records[0]['label']}, N = {records[0]['n']}", "KID x 1000",
            "SSIM (L = 255)", "SSIM (L = 1)"]
    return record, markdown(head, rows) + "\n\n"


def one_run(folder, method, network):
    """What one training did: the step that was used, change of the image and D's accuracy
    (log.csv, mean of the last 25 steps), FID and KID, and the network's scores on real."""
    with open(folder / f"{method}_log.csv", encoding="utf-8") as file:
        log = list(csv.DictReader(file))[-25:]
    result = {k: float(np.mean([float(r[k]) for r in log]))
              for k in ("mean_change", "d_acc_real", "d_acc_refined")}
    refined = folder / f"{method}_refine.json"
    if refined.is_file():
        result["step"] = json.loads(refined.read_text())["step"]
    quality = json.loads((folder / "table2.json").read_text())["rows"][method]["scores"]
    result |= {"fid": quality["fid"]["value"], "kid": 1000 * quality["kid"]["value"]}
    scores = on_real(folder, network)[method]
    return result | {m: scores[m] for m in ("mIoU", "accuracy")}


def all_runs(out, network):
    """{what was changed: {seed: `one_run`}}; SimGAN is the row without perceptual
    pre-training."""
    record = {}
    for ablation in SAYS:
        start_from, method = ("", "simgan") if ablation == "simgan" else (
            ablation, method_of(ablation))
        seeds = seeds_with(out, f"segment_{network}.json", start_from)
        if seeds:
            record[ablation] = {s: one_run(out / join(start_from, s), method, network)
                                for s in seeds}
    return record


def against_ours(runs, metric):
    """{what was changed: {"mean", "margin"}} of its scores minus ours of the same seed.

    The margin is what chance explains: half the 95 % interval of a mean of n seeds is
    t sd / sqrt(n). Two seeds say little of sd, so it is pooled over everything that was changed,
    as if it were the same for all. None where no two seeds differ.
    """
    ours, found = runs[""], {}
    for ablation in runs:
        shared = [s for s in runs[ablation] if s in ours]
        if ablation and shared:
            found[ablation] = np.array([runs[ablation][s][metric] - ours[s][metric]
                                        for s in shared])
    freedom = sum(len(d) - 1 for d in found.values())
    spread = sum(float(((d - d.mean()) ** 2).sum()) for d in found.values())
    wide = student.ppf(0.975, freedom) * (spread / freedom) ** 0.5 if spread else None
    return {ablation: {"mean": float(d.mean()), "margin": wide and float(wide / len(d) ** 0.5)}
            for ablation, d in found.items()}


def ablations(out, network):
    """The record and the table of all that was changed: one thing a row, its seeds side by
    side."""
    runs = all_runs(out, network)
    against = {m: against_ours(runs, m) for m in ("mIoU", "accuracy")}
    rows = []
    for ablation, by_seed in runs.items():
        found = list(by_seed.values())
        cells = [" / ".join(str(r.get("step", "-")) for r in found),
                 " / ".join(f"{r['mean_change']:.3f}" for r in found),
                 " / ".join(f"{r['d_acc_real']:.2f}, {r['d_acc_refined']:.2f}" for r in found)]
        for metric, digits in (("fid", 1), ("kid", 1), ("mIoU", 3), ("accuracy", 1)):
            cells.append(" / ".join(f"{r[metric]:.{digits}f}" for r in found))
            difference = against.get(metric, {}).get(ablation)
            if difference:
                text, margin = f"{difference['mean']:+.{digits}f}", difference["margin"]
                far = margin is not None and abs(difference["mean"]) > margin
                cells[-1] += f" (**{text}**)" if far else f" ({text})"
        rows.append([SAYS[ablation], ", ".join(map(str, by_seed)), *cells])
    record = {"runs": runs, "against_ours": against, "gap_closed": {
        ablation: {m: mean_and_interval(gap_of_runs(out, network, by_seed, m)) for m in against}
        for ablation, by_seed in runs.items()}}
    table = markdown(
        ["what was changed", "seed", "step", "mean abs(R(x) - x)", "D right on real, refined",
         "FID", "KID x 1000", "mIoU on real (- ours)", "accuracy on real, % (- ours)"], rows)
    return record, f"{table}\n\n{chance(against)}"


def chance(against):
    """What the brackets of `ablations` are, and how much chance explains there."""
    text = "Seeds are divided by /. In brackets: the mean difference to ours of the same seeds"
    margins = [min(d["margin"] or np.inf for d in against[m].values()) if against[m] else np.inf
               for m in ("mIoU", "accuracy")]
    if np.inf in margins:
        return f"{text}."
    return (f"{text}, bold where it is more than chance explains (95 %; with most seeds "
            f"{margins[0]:.3f} mIoU and {margins[1]:.1f} % accuracy).")


def report_network(out, network, before=None):
    """The record of one segmentation network, its tables over the seeds, Tables 3 to 6 as means
    over them, and its ablations; None where no seed has it."""
    file = f"segment_{network}.json"
    seeds = seeds_with(out, file)
    if not seeds:
        return None, "", "", ""
    title = (f"### {NETWORKS[network]}, {epochs_of(out, network, seeds)} epochs, seed "
             f"{', '.join(map(str, seeds))}\n\n")
    runs = runs_of(out, network, seeds)
    gaps, table = gap_table(runs)
    differences, second = difference_table(runs)
    blurred, third = blur_table(out, network)
    record = {"seeds": seeds, "on_real": gaps, "differences": differences, "blurred": blurred}
    if before:
        record["since_before"], text = before_table(out, before, network, seeds)
        third += text
    changed = ""
    if seeds_with(out, "table2.json") and any(seeds_with(out, file, a) for a in ABLATIONS):
        record["ablations"], text = ablations(out, network)
        changed = f"### {NETWORKS[network]}\n\n{text}\n\n"
    scores = in_all([next(iter(json.loads((out / join("", s) / file).read_text())
                               ["scores"].values())) for s in seeds])
    domains = list(next(iter(scores[0].values())))
    matrices = [segment.matrix_table(network, metric, scores, domains)
                for metric in ("mIoU", "accuracy")]
    matrices = title + "\n".join([*matrices, segment.class_table(scores), ""])
    return record, f"{title}{table}\n\n{second}\n\n{third}", matrices, changed


def arguments():
    p = parser(__doc__)
    p.add_argument("--out", type=Path, default=Path("results/study"), help="what study.py kept")
    p.add_argument("--before", type=Path, help="another study's: what is better or worse here?")
    return p.parse_args()


def main():
    args = arguments()
    out = args.out
    for folder in [out, args.before] if args.before else [out]:
        if not any(seeds_with(folder, f"segment_{n}.json") for n in NETWORKS):
            raise UserError(f"{folder}: no finished seed in it (seed*/segment_*.json); run "
                            "study.py first")
    print(f"report.py: reads {out}/*/; writes {out}/study.md, ablations.md, study.json\n")
    quality, table = quality_table(out)
    parts = {network: report_network(out, network, args.before) for network in NETWORKS}
    records, over_seeds, matrices, changed = zip(*parts.values())
    text = "".join(["± is the standard deviation over the seeds, [ ] a 95 % interval of their mean "
                    f"(Student's t).\n\n{table}", *over_seeds, *matrices]).strip() + "\n"
    ablated = ("".join(changed).strip() or "No ablation has been run with these settings.") + "\n"
    write_text(out / "study.json", json.dumps({"quality": quality, **dict(zip(parts, records))},
                                              indent=1))
    write_text(out / "study.md", text)
    write_text(out / "ablations.md", ablated)
    print(f"{text}\n{ablated}")


if __name__ == "__main__":
    start(main)
