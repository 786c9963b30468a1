"""The study: does refining help on real images, and what is each part of the method good for?

Runs the whole chain (`make stages`) once per seed, R and D and the segmentation network anew each
time, and once per ablation, in which one thing differs from that seed.

Reads   a GTA-V and a Cityscapes folder, as prepare.py does; what is finished is not run again
Writes  study/NAME/          data, checkpoints, results of every run (large; not for git)
        results/study/NAME/  the small results of every run: tables, logs, pictures

    python study.py --gta5 ~/gtav --cityscapes ~/cityscapes     three seeds and every ablation
    python study.py --gta5 ~/gtav --cityscapes ~/cityscapes --only seed1 l1-seed1
    python report.py                                            then: the tables over all of it
    python study.py --images study --epochs 60 --base study60 --out results/study60 --only seed0
                    only segmentation, for longer, on the images that the runs in study/ have made

The scale is for 2 cores: 40 x 80 whole frames, batch 4, 1000 GAN steps, R averaged over the last
200, U-Net, 30 epochs. With --precision bfloat16, on a CPU that has it, a seed takes 75 minutes of
one core and an ablation about 25; DeepLabV3+ (--network both), 15 epochs, adds 35 to a seed.
"""
import json
import shutil
import subprocess
import sys
from pathlib import Path

from prepare import UserError, lock, natural, parser, positive, start

PREPARE = "--crop none --size 40 80"
PRETRAIN = "--steps 200 --batch-size 8 --lr 2e-4"
GAN = "--steps 1000 --batch-size 4 --sample-every 50 --save-every 50"
DOMAINS = ["synthetic", "colour", "simgan", "ours", "real"]
NETWORKS = {"unet": "U-Net", "deeplabv3plus": "DeepLabV3+"}
D_BY_ADAM = "--d-optimizer adam --d-lr 1e-4"
# What an ablation changes: flags of train_gan.py ("gan") or pretrain.py ("pretrain"), the images
# that R starts from, the checkpoint that is used ("step"), flags of refine.py ("refine"), the
# "method"; or what is added to another ablation ("from").
ABLATIONS = {
    "l1": {"says": "L1 as in Eq 4, not squares", "gan": "--rec l1"},
    "no-history": {"says": "D sees no history", "gan": "--history 0"},
    "history-10": {"says": "a history of 10 batches, not 100", "gan": "--history 10"},
    "beta0": {"says": "no L_rec (beta 0)", "gan": "--beta 0"},
    **{f"beta-{b}": {"says": f"beta {b}, not 4e-6", "gan": f"--beta {b}"}
       for b in ("1e-6", "1.6e-5")},
    "alpha0": {"says": "no adversarial term (alpha 0)", "gan": "--alpha 0"},
    "rule": {"says": "the step that the paper's rule picks, not the average", "step": "gan"},
    "last-step": {"says": "the last step, not the average", "step": "last"},
    "detail": {"says": "refined images with as much detail as real (`--match-detail`)",
               "refine": "--match-detail"},
    "colour-detail": {"says": "no R: colours and detail matched",
                      "refine": "--method colour --match-detail"},
    **{f"steps-{n}": {"says": f"{n} steps, not 1000", "gan": f"--steps {n}"}
       for n in (200, 500, 1800)},
    "batch-8": {"says": "batches of 8, not 4", "gan": "--batch-size 8"},
    "r-rate": {"says": "R at 3e-5, not 1e-4", "gan": "--lr 3e-5"},
    "r-adam": {"says": "R by Adam, not SGD", "gan": "--optimizer adam"},
    "d-adam": {"says": "D by Adam at 1e-4, not SGD with momentum at 1e-3",
               "pretrain": D_BY_ADAM, "gan": D_BY_ADAM},
    "relu": {"says": "D with the last ReLU of Table 1", "pretrain": "--final-relu"},
    "d-fine": {"says": "D sees patches of 20 x 20 pixels, not 50 x 50 (`--d-stride 1`)",
               "pretrain": "--d-stride 1"},
    "d-fine-simgan": {"says": "the same D, no perceptual pre-training", "method": "simgan",
                      "pretrain": "--d-stride 1"},
    "d-fine-detail": {"says": "the same D, and `--match-detail`", "from": "d-fine",
                      "refine": "--match-detail"},
    "d-fine-beta": {"says": "the same D, beta 1.6e-5", "from": "d-fine", "gan": "--beta 1.6e-5"},
    "layer": {"says": "psi up to Conv2d_2b_3x3, not 4a", "pretrain": "--layer Conv2d_2b_3x3"},
    "skip": {"says": "R adds a change to its input (`--skip`)", "pretrain": "--skip"},
    "colour-first": {"says": "R and D start from colour-matched frames", "images": "colour"},
    "colour-skip": {"says": "colour-matched frames and `--skip`", "pretrain": "--skip",
                    "images": "colour"}}
HERE = Path(__file__).resolve().parents[1]
KEPT = ["results/*.md", "results/*.json", "results/table7.png", "runs/*/log.csv",
        "runs/*/curves.png", "data/*/refine.json"]


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
    method = method_of(ablation)
    base, common = args.base / name, f"--seed {seed} --precision {args.precision}"
    if ablation:
        take_over(args.base / join(change.get("from", ""), seed), base, change)
    variables = {
        "BASE": f"{base}/", "INCEPTION": args.inception,
        "PREPARE": f"--gta5 {args.gta5} --cityscapes {args.cityscapes} {PREPARE}",
        "PRETRAIN": f"{common} {PRETRAIN} {change.get('pretrain', '')}",
        "GAN": f"{common} {GAN} {change.get('gan', '')}",
        "SEGMENT": segment_flags(name, args),
        "REFINE": method if ablation else "colour pretrained ours simgan",
        "STEP": change.get("step", "average"), "R_FLAGS": change.get("refine", "")}
    if any(not (base / f"results/segment_{n}.json").is_file() for n in networks(args.network)):
        (base / "runs/stamps/segment").unlink(missing_ok=True)     # asked for a further network
    call(["make", "-C", str(HERE), "--no-print-directory", "stages",
          *[f"{k}={v}" for k, v in variables.items()]], base)
    keep(base, args.out / name, method)


def segment_again(name, args):
    """Only segmentation, on the images that this run has under --images."""
    source, base = args.images / name, args.base / name
    finished(source)
    call([sys.executable, str(HERE / "segment.py"), "--data", str(source / "data"),
          "--out", str(base / "results"), *segment_flags(name, args).split()], base)
    keep(base, args.out / name)


def method_of(ablation):
    """Whose images a run is about: "ours", unless the ablation is one of SimGAN's."""
    return ABLATIONS.get(ablation, {}).get("method", "ours")


def segment_flags(name, args):
    """The flags of segment.py: a seed trains on every domain, an ablation on what it changed."""
    ablation, seed = split(name)
    return (f"--seeds {seed} --precision {args.precision} "
            f"--epochs {' '.join(map(str, args.epochs))} "
            f"--network {with_finished(args.network, args.base / name, args.epochs)} "
            f"--train {method_of(ablation) if ablation else ' '.join(args.train)}")


def call(command, base):
    """Run a command to its end; UserError if it fails."""
    if subprocess.run(command).returncode:
        raise UserError(f"{base}: the chain stopped (see above); the same command goes on")


def finished(run):
    """UserError if the images of this run are not finished."""
    if not (run / "runs/stamps/evaluate").is_file():
        raise UserError(f"{run}: not finished; run it first (--only {run.name})")


def networks(choice):
    return list(NETWORKS) if choice == "both" else [choice]


def with_finished(choice, base, epochs):
    """"both" if the other network is finished after as many epochs: its weights are taken, and
    Table 7 has both."""
    for network, wanted in zip(NETWORKS, epochs * 2):
        file = base / f"results/segment_{network}.json"
        if network not in networks(choice) and file.is_file():
            return "both" if json.loads(file.read_text()).get("epochs") == wanted else choice
    return choice


def take_over(source, base, change):
    """Start an ablation from what it shares with its seed: the data, and as far as they are the
    same the pre-training and the adversarial training."""
    stamps = base / "runs" / "stamps"
    if stamps.is_dir():
        return
    finished(source)
    for domain, origin in (("synthetic", change.get("images", "synthetic")), ("real", "real")):
        shutil.copytree(source / "data" / origin, base / "data" / domain, dirs_exist_ok=True)
    method, files, stages = change.get("method", "ours"), [], ["prepare"]
    if not {"pretrain", "images"} & set(change):
        files, stages = ["pretrain.pt"], ["prepare", f"pretrain-{method}"]
    if {"step", "refine"} & set(change):
        files += ["last.pt", "gan.pt", "average.pt", "log.csv"]
        stages += [f"gan-{method}"]
    (base / "runs" / method).mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copy(source / "runs" / method / file, base / "runs" / method / file)
    stamps.mkdir()                                     # last: from here on nothing is copied
    for stage in stages:
        (stamps / stage).touch()


def keep(base, out, method="ours"):
    """Copy the small results of a run, and the last picture of its method's samples."""
    out.mkdir(parents=True, exist_ok=True)
    for pattern in KEPT:
        for file in base.glob(pattern):
            prefix = f"{file.parent.name}_" if file.parent.parent.name in ("runs", "data") else ""
            shutil.copy(file, out / f"{prefix}{file.name}")
    pictures = sorted(base.glob(f"runs/{method}/samples/*.png"))
    if pictures:
        shutil.copy(pictures[-1], out / "samples.png")


def arguments():
    p = parser(__doc__)
    p.add_argument("--gta5", type=Path, help="folder with images/ and labels/")
    p.add_argument("--cityscapes", type=Path, help="folder with leftImg8bit/ and gtFine/")
    p.add_argument("--inception", default="imagenet", help="imagenet, random or a file")
    p.add_argument("--seeds", type=natural, nargs="+", default=[0, 1, 2], help="one run each, and "
                   "for the first two every ablation")
    p.add_argument("--only", nargs="+", metavar="NAME", help="seedN, an ablation of seed 0 (" +
                   ", ".join(ABLATIONS) + ") or of another (NAME-seedN)")
    p.add_argument("--network", choices=[*NETWORKS, "both"], default="unet",
                   help="segmentation; asking for the other one later trains only that")
    p.add_argument("--train", choices=DOMAINS, nargs="+", default=DOMAINS, help="what a seed "
                   "trains segmentation on")
    p.add_argument("--epochs", type=positive(int), nargs="+", default=[30, 15], metavar="N",
                   help="of segmentation; two: of U-Net and of DeepLabV3+")
    p.add_argument("--precision", choices=["float32", "tf32", "bfloat16"], default="float32",
                   help="of the networks (bfloat16 halves the time where the CPU has it)")
    p.add_argument("--images", type=Path, metavar="BASE", help="train only segmentation, on "
                   "the images of the finished runs in this folder (the --base of before)")
    p.add_argument("--base", type=Path, default=Path("study"), help="where the runs lie")
    p.add_argument("--out", type=Path, default=Path("results/study"), help="the small results")
    args = p.parse_args()
    if args.images and (args.images.resolve() == args.base.resolve()
                        or args.out == p.get_default("out")):
        p.error("--images needs a --base and an --out of its own: what is there stays")
    if not (args.images or (args.gta5 and args.cityscapes)):
        p.error("--gta5 and --cityscapes are needed (python report.py makes tables of what is run)")
    names = [join("", s) for s in args.seeds] + [join(a, s) for a in ABLATIONS
                                                 for s in args.seeds[:2]]
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
    for folder in ("images",) if args.images else ("gta5", "cityscapes"):
        setattr(args, folder, getattr(args, folder).resolve())
    return args


def main():
    args = arguments()
    sources = [args.images] if args.images else [args.gta5, args.cityscapes]
    print(f"study.py: reads {'/ and '.join(map(str, sources))}/; writes {args.base}/ and "
          f"{args.out}/", flush=True)
    for folder in sources:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; --gta5 and --cityscapes, or --images, "
                            "name them")
    for name in args.only:
        lock(args.base / name)
        (segment_again if args.images else run)(name, args)
    print(f"done: {args.out}/; python report.py --out {args.out} makes the tables")


if __name__ == "__main__":
    start(main)
