"""The study: does refining help on real images, and what is each part of the method good for?

Runs the whole chain (`make stages`) once per seed, R and D and the segmentation network anew each
time, and once per ablation, in which one thing differs from that seed. Then it reports over the
seeds: mean and spread on real images, the share of the gap closed, Tables 2 to 6, the ablations.

Reads   a GTA-V and a Cityscapes folder, as prepare.py does; what is finished is not run again
Writes  study/NAME/          data, checkpoints, results of every run (large; not for git)
        results/study/NAME/  the small results of every run: tables, logs, pictures
        results/study/study.md, study.json   the report

    python study.py --gta5 ~/gtav --cityscapes ~/cityscapes     about 4 core-hours
    python study.py --gta5 ~/gtav --cityscapes ~/cityscapes --only seed1 l1-seed1
    python study.py --report                                    from results/study alone

The scale is for 2 cores: 40 x 80 whole frames, batch 4, 200 GAN steps, U-Net, 10 epochs.
DeepLabV3+ (--network deeplabv3plus) adds 36 minutes of a core to a seed, 7 to an ablation.
"""
import csv
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
from scipy.stats import t as student

import segment
from prepare import UserError, lock, natural, parser, start, write_text

PREPARE = "--crop none --size 40 80"
PRETRAIN = "--steps 200 --d-steps 60 --batch-size 8 --lr 2e-4 --d-optimizer adam --d-lr 1e-4"
GAN = ("--steps 200 --batch-size 4 --lr 3e-5 --sample-every 25 --save-every 25 "
       "--d-optimizer adam --d-lr 1e-4 --rec l2 --beta 6e-6")
SEGMENT = "--epochs 10 --train synthetic colour simgan ours real"
NETWORKS = {"unet": "U-Net", "deeplabv3plus": "DeepLabV3+"}
D_AS_IN_PAPER = "--d-optimizer momentum --d-lr 1e-3"
# What an ablation changes: flags of train_gan.py ("gan") or pretrain.py ("pretrain"), the images
# that R starts from, the checkpoint that is used ("step").
ABLATIONS = {
    "l1": {"says": "L1 as in Eq 4 (beta 4e-6), not squares", "gan": "--rec l1 --beta 4e-6"},
    "no-history": {"says": "D sees no history", "gan": "--history 0"},
    "history-10": {"says": "a history of 10 batches, not 100", "gan": "--history 10"},
    "beta0": {"says": "no L_rec (beta 0)", "gan": "--beta 0"},
    "alpha0": {"says": "no adversarial term (alpha 0)", "gan": "--alpha 0"},
    "last-step": {"says": "the last step, not the best", "step": "last"},
    **{f"step-{n}": {"says": f"step {n}", "gan": f"--steps {n}", "step": "last"}
       for n in (50, 100, 150)},
    "batch-8": {"says": "batches of 8, not 4", "gan": "--batch-size 8"},
    "r-rate": {"says": "R at the paper's rate, 1e-4", "gan": "--lr 1e-4"},
    "r-adam": {"says": "R by Adam, not SGD, at 1e-4", "gan": "--optimizer adam --lr 1e-4"},
    "d-rate": {"says": "D at the paper's rate, 1e-3 (SGD with momentum, not Adam at 1e-4)",
               "pretrain": D_AS_IN_PAPER, "gan": D_AS_IN_PAPER},
    "relu": {"says": "D with the last ReLU of Table 1", "pretrain": "--final-relu"},
    "layer": {"says": "psi up to Conv2d_2b_3x3, not 4a", "pretrain": "--layer Conv2d_2b_3x3"},
    "skip": {"says": "R adds a change to its input (`--skip`)", "pretrain": "--skip"},
    "colour-first": {"says": "R and D start from colour-matched frames", "images": "colour"},
    "colour-skip": {"says": "colour-matched frames and `--skip`", "pretrain": "--skip",
                    "images": "colour"}}
SAYS = {"": "ours, as in the study", "simgan": "no perceptual pre-training (SimGAN's L1)",
        **{name: change["says"] for name, change in ABLATIONS.items()}}
KEPT = ["results/*.md", "results/*.json", "results/table7.png", "runs/*/log.csv",
        "runs/*/curves.png"]


# ----------------------------------------------------------------------------------- the runs


def split(name):
    """The ablation and the seed of a run: "seed2" is ("", 2), "l1" ("l1", 0), "l1-seed2"
    ("l1", 2). ValueError if it is none."""
    ablation, dash, seed = name.partition("-seed") if name[:4] != "seed" else ("", "", name[4:])
    seed = seed if dash or not ablation else "0"
    if not seed.isdecimal() or (ablation and ablation not in ABLATIONS) or (dash and seed == "0"):
        raise ValueError(name)
    return ablation, int(seed)


def join(ablation, seed):
    """The reverse of `split`."""
    return f"{ablation}-seed{seed}" if ablation and seed else ablation or f"seed{seed}"


def run(name, args):
    """One run of the chain under study/NAME; returns when its small results are kept."""
    ablation, seed = split(name)
    change = ABLATIONS.get(ablation, {})
    base, common = args.base / name, f"--seed {seed} --precision {args.precision}"
    if ablation:
        take_over(args.base / f"seed{seed}", base, change)
    variables = {
        "BASE": f"{base}/", "INCEPTION": args.inception,
        "PREPARE": f"--gta5 {args.gta5} --cityscapes {args.cityscapes} {PREPARE}",
        "PRETRAIN": f"{common} {PRETRAIN} {change.get('pretrain', '')}",
        "GAN": f"{common} {GAN} {change.get('gan', '')}",
        "SEGMENT": f"--seeds {seed} --precision {args.precision} {SEGMENT}"
                   f" --network {with_finished(args.network, base)}"
                   + " --train ours" * bool(ablation),
        "REFINE": "ours" if ablation else "colour pretrained ours simgan",
        "STEP": change.get("step", "gan")}
    if any(not (base / f"results/segment_{n}.json").is_file() for n in networks(args.network)):
        (base / "runs/stamps/segment").unlink(missing_ok=True)     # asked for a further network
    done = subprocess.run(["make", "-C", str(Path(__file__).resolve().parent),
                           "--no-print-directory", "stages",
                           *[f"{k}={v}" for k, v in variables.items()]])
    if done.returncode:
        raise UserError(f"{base}: the chain stopped (see above); the same command goes on")
    keep(base, args.out / name)


def networks(choice):
    return list(NETWORKS) if choice == "both" else [choice]


def with_finished(choice, base):
    """"both" if the other network is finished: its weights are taken, and Table 7 has both."""
    others = [n for n in NETWORKS if n not in networks(choice)]
    finished = any((base / f"results/segment_{n}.json").is_file() for n in others)
    return "both" if finished else choice


def take_over(source, base, change):
    """Start an ablation from what it shares with its seed: the data, and as far as they are the
    same the pre-training and the adversarial training."""
    stamps = base / "runs" / "stamps"
    if stamps.is_dir():
        return
    if not (source / "runs/stamps/evaluate").is_file():
        raise UserError(f"{source}: not finished; {base.name} starts from it "
                        f"(--only {source.name})")
    for domain, origin in (("synthetic", change.get("images", "synthetic")), ("real", "real")):
        shutil.copytree(source / "data" / origin, base / "data" / domain, dirs_exist_ok=True)
    files, stages = [], ["prepare"]
    if not {"pretrain", "images"} & set(change):
        files, stages = ["pretrain.pt"], ["prepare", "pretrain-ours"]
    if "step" in change and "gan" not in change:
        files, stages = files + ["last.pt", "gan.pt", "log.csv"], stages + ["gan-ours"]
    (base / "runs/ours").mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copy(source / "runs/ours" / file, base / "runs/ours" / file)
    stamps.mkdir()                                     # last: from here on nothing is copied
    for stage in stages:
        (stamps / stage).touch()


def keep(base, out):
    """Copy the small results of a run, and the last picture of its samples."""
    out.mkdir(parents=True, exist_ok=True)
    for pattern in KEPT:
        for file in base.glob(pattern):
            method = f"{file.parent.name}_" if file.parent.parent.name == "runs" else ""
            shutil.copy(file, out / f"{method}{file.name}")
    pictures = sorted(base.glob("runs/ours/samples/*.png"))
    if pictures:
        shutil.copy(pictures[-1], out / "samples.png")


# --------------------------------------------------------------------------------- the report


def seeds_with(out, file, ablation=""):
    """The seeds whose kept run has this file, ascending."""
    prefix = join(ablation, 1)[:-1]                              # "seed" or "l1-seed"
    seeds = [p.parent.name.removeprefix(prefix) for p in out.glob(f"{prefix}*/{file}")]
    first = [0] if ablation and (out / ablation / file).is_file() else []
    return first + sorted(int(s) for s in seeds if s.isdecimal())


def over_all(out, file, seeds):
    """The ablations that have every one of two or more seeds: they join the tables over them."""
    return [a for a in ABLATIONS
            if len(seeds) > 1 and set(seeds) <= set(seeds_with(out, file, a))]


def on_real(folder, network="unet"):
    """{training domain: {"mIoU", "accuracy", "IoU"}} on real test images of one kept run."""
    record = json.loads((folder / f"segment_{network}.json").read_text())
    (by_domain,) = record["scores"].values()
    return {domain: row["real"] for domain, row in by_domain.items()}


def seed_on_real(out, seed, seeds, network):
    """`on_real` of a seed, and of every ablation that has all of `seeds`."""
    return on_real(out / join("", seed), network) | {
        f"ours, {a}": on_real(out / join(a, seed), network)["ours"]
        for a in over_all(out, f"segment_{network}.json", seeds)}


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
    """The table over the seeds: scores on real, and the share of the gap closed."""
    record, rows = {}, []
    for d in sorted(runs[0], key=lambda d: d == "real"):       # real is the last row
        row = {m: mean_and_interval([r[d][m] for r in runs]) for m in ("mIoU", "accuracy")}
        row |= {f"gap_{m}": mean_and_interval(gap_closed(runs, d, m)) for m in row}
        record[d] = row
        gaps = ["-", "-"] if d in ("synthetic", "real") else [
            f"{row[g]['mean']:.0f}{interval(row[g])}" for g in ("gap_mIoU", "gap_accuracy")]
        rows.append([d, cell(row["mIoU"], 3), cell(row["accuracy"], 1), *gaps])
    return record, markdown(["trained on", "mIoU on real", "accuracy on real, %",
                             "gap closed, mIoU, %", "gap closed, accuracy, %"], rows)


def difference_table(runs):
    """Ours (and ablations over the seeds) minus each other training domain, seed by seed: where
    0 lies in the interval, these seeds cannot tell the two apart."""
    record, rows, others = {}, [], [d for d in runs[0] if d != "real"]
    pairs = [(d, o) for i, d in enumerate(others) if d.startswith("ours") for o in others[:i]]
    for domain, other in pairs:
        found = {m: mean_and_interval([r[domain][m] - r[other][m] for r in runs])
                 for m in ("mIoU", "accuracy")}
        name = f"({domain}) - {other}".replace("(ours)", "ours")
        record[name] = found
        rows.append([name] + [
            f"{found[m]['mean']:+.{n}f}{interval(found[m], n)}"
            for m, n in (("mIoU", 3), ("accuracy", 1))])
    return record, markdown(["difference [95 %]", "mIoU on real", "accuracy on real, %"], rows)


def quality_table(out):
    """Table 2 over the seeds: FID, KID and SSIM of every domain, seeds of R apart; and of what
    ours becomes by every ablation that has all of the seeds."""
    seeds = seeds_with(out, "table2.json")
    records = [json.loads((out / join("", s) / "table2.json").read_text()) for s in seeds]
    digits, record, rows = {"fid": 1, "kid": 1, "ssim": 3, "ssim_range1": 4}, {}, []
    found = {d: [r["rows"][d] for r in records] for d in records[0]["rows"]
             if all(d in r["rows"] for r in records)}
    for a in over_all(out, "table2.json", seeds):
        found[f"ours, {a}"] = [json.loads((out / join(a, s) / "table2.json").read_text())
                               ["rows"]["ours"] for s in seeds]
    for d in found:
        scores = [row["scores"] for row in found[d]]
        record[d] = {m: mean_and_interval([s[m]["value"] * (1000 if m == "kid" else 1)
                                           for s in scores]) for m in digits if m in scores[0]}
        rows.append([d] + [cell(record[d][m], n) if m in record[d] else "-"
                           for m, n in digits.items()])
    head = ["images vs real", f"{records[0]['label']}, N = {records[0]['n']}", "KID x 1000",
            "SSIM (L = 255)", "SSIM (L = 1)"]
    return record, markdown(head, rows)


def one_run(folder, method, network):
    """What one training did: change of the image and D's accuracy (log.csv, mean of the last 25
    steps), FID and KID, and the segmentation network's scores on real."""
    with open(folder / f"{method}_log.csv", encoding="utf-8") as file:
        log = list(csv.DictReader(file))[-25:]
    quality = json.loads((folder / "table2.json").read_text())["rows"][method]["scores"]
    result = {k: float(np.mean([float(r[k]) for r in log]))
              for k in ("mean_change", "d_acc_real", "d_acc_refined")}
    result |= {"fid": quality["fid"]["value"], "kid": 1000 * quality["kid"]["value"]}
    scores = on_real(folder, network)[method]
    return result | {m: scores[m] for m in ("mIoU", "accuracy")}


def ablations(out, network):
    """One row a run: a seed with one thing changed. SimGAN is the row without perceptual
    pre-training."""
    record, rows = {}, []
    for ablation in ["", "simgan", *ABLATIONS]:
        start_from, method = ("", "simgan") if ablation == "simgan" else (ablation, "ours")
        for seed in seeds_with(out, f"segment_{network}.json", start_from):
            r = one_run(out / join(start_from, seed), method, network)
            record[f"{ablation or 'ours'}, seed {seed}"] = r
            rows.append([SAYS[ablation], str(seed), f"{r['mean_change']:.3f}",
                         f"{r['d_acc_real']:.2f}, {r['d_acc_refined']:.2f}", f"{r['fid']:.1f}",
                         f"{r['kid']:.1f}", f"{r['mIoU']:.3f}", f"{r['accuracy']:.1f}"])
    return record, markdown(
        ["what was changed", "seed", "mean abs(R(x) - x)", "D right on real, refined", "FID",
         "KID x 1000", "mIoU on real", "accuracy on real, %"], rows)


def report_network(out, network):
    """The record of one segmentation network, its tables over the seeds, and Tables 3 to 6 as
    means over them; None where no seed has it."""
    file = f"segment_{network}.json"
    seeds = seeds_with(out, file)
    if not seeds:
        return None, "", ""
    title = f"### {NETWORKS[network]}, seed {', '.join(map(str, seeds))}\n\n"
    runs = [seed_on_real(out, s, seeds, network) for s in seeds]
    gaps, table = gap_table(runs)
    differences, second = difference_table(runs)
    record = {"seeds": seeds, "on_real": gaps, "differences": differences}
    over_seeds = f"{title}{table}\n\n{second}\n\n"
    if any(seeds_with(out, file, a) for a in ABLATIONS):
        record["ablations"], table = ablations(out, network)
        over_seeds += f"{table}\n\n"
    scores = [next(iter(json.loads((out / join("", s) / file).read_text())["scores"].values()))
              for s in seeds]
    domains = list(next(iter(scores[0].values())))
    matrices = [segment.matrix_table(network, metric, scores, domains)
                for metric in ("mIoU", "accuracy")]
    return record, over_seeds, title + "\n".join([*matrices, segment.class_table(scores), ""])


def report(out):
    """results/study/study.{md,json} from the kept results; prints study.md."""
    if not seeds_with(out, "table2.json"):
        raise UserError(f"{out}: no finished seed in it (seed*/table2.json); run study.py "
                        "without --report first")
    record = {}
    record["quality"], table = quality_table(out)
    text = ("± is the standard deviation over the seeds, [ ] a 95 % interval of their mean "
            f"(Student's t).\n\n{table}\n\n")
    parts = {network: report_network(out, network) for network in NETWORKS}
    record |= {network: part[0] for network, part in parts.items()}
    text += "".join([part[1] for part in parts.values()] + [part[2] for part in parts.values()])
    write_text(out / "study.json", json.dumps(record, indent=1))
    write_text(out / "study.md", text.strip() + "\n")
    print(text)


def arguments():
    p = parser(__doc__)
    p.add_argument("--gta5", type=Path, help="folder with images/ and labels/")
    p.add_argument("--cityscapes", type=Path, help="folder with leftImg8bit/ and gtFine/")
    p.add_argument("--inception", default="imagenet", help="imagenet, random or a file")
    p.add_argument("--seeds", type=natural, nargs="+", default=[0, 1, 2], help="one run each")
    p.add_argument("--only", nargs="+", metavar="NAME", help="seedN, an ablation of seed 0 (" +
                   ", ".join(ABLATIONS) + ") or of another (NAME-seedN)")
    p.add_argument("--network", choices=[*NETWORKS, "both"], default="unet",
                   help="segmentation; asking for the other one later trains only that")
    p.add_argument("--precision", choices=["float32", "tf32", "bfloat16"], default="float32",
                   help="of the networks (bfloat16 halves the time where the CPU has it)")
    p.add_argument("--base", type=Path, default=Path("study"), help="where the runs lie")
    p.add_argument("--out", type=Path, default=Path("results/study"), help="the small results")
    p.add_argument("--report", action="store_true", help="run nothing, report what is kept")
    args = p.parse_args()
    if not args.report and not (args.gta5 and args.cityscapes):
        p.error("--gta5 and --cityscapes are needed, or --report")
    names = [join("", s) for s in args.seeds] + list(ABLATIONS)
    args.only = args.only or names
    for name in args.only:
        try:
            split(name)
        except ValueError:
            p.error(f"--only {name}: wanted seedN, NAME or NAME-seedN (N above 0), NAME one of "
                    f"{', '.join(ABLATIONS)}")
    args.base = args.base.resolve()                            # make runs in its own folder
    if args.inception not in ("imagenet", "random"):
        args.inception = Path(args.inception).resolve()
    for folder in () if args.report else ("gta5", "cityscapes"):
        setattr(args, folder, getattr(args, folder).resolve())
    return args


def main():
    args = arguments()
    print(f"study.py: reads {args.out if args.report else args.base}/; writes {args.out}/",
          flush=True)
    if not args.report:
        for folder in (args.gta5, args.cityscapes):
            if not folder.is_dir():
                raise UserError(f"{folder}: no such folder; --gta5 and --cityscapes name them")
        for name in args.only:
            lock(args.base / name)
            run(name, args)
    report(args.out)


if __name__ == "__main__":
    start(main)
