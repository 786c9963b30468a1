"""The study: every row of ROWS for every seed, and one record with the numbers of all runs.

A row makes a domain folder: by stages 2 to 4 (R and D learn anew for every seed), or by a filter.
evaluate.py then scores all of them, and segment.py trains a network on each.

Reads   a GTA-V and a Cityscapes folder, or others (--prepare)
Writes  runs/study/NAME/seedN/{data,runs,results}/   large; laid out as a user's own folders are
        study/results/NAME.json                      the numbers; study.report makes tables of it
        study/results/NAME-figure1.png               Figure 1 of ours, of its first seed

    python -m study.run paper-size --inception inception.pt --precision bfloat16 \\
      --prepare "--gta5 ~/gtav --cityscapes ~/cityscapes"
    python -m study.report paper-size

The same command goes on after a stop: a finished step is not run again, unless its folder has been
deleted; other flags of a training want another NAME. --seeds does a part of the study;
two commands with other --seeds can run side by side once the data is prepared; a machine that gets
the record of another one adds its own seeds to it. Street frames may not be passed on, so they stay
below --base.
"""
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from support.cli import (UserError, lock, natural, parser, path_of, positive, read_json,
                         read_record, start, whole, write_json, write_text)
from support.training import add_inception_flag, add_precision_flag

ROOT = Path(__file__).resolve().parents[1]
GIVEN = ["synthetic", "real"]                                # made by prepare.py for all seeds

# The rows, in the order of the work, and what is changed in them. "pretrain", "gan": flags added
# to those of pretrain.py, train_gan.py. "method": simgan, if not ours. "checkpoint": what refine.py
# takes, if not average.pt; "of": of that row's training, which is not done again. "filter": the
# module that makes the images, without R. "segment": False, if no network is trained on the row.
# "Squares": L_rec by squares.
ROWS = {
    "synthetic": {},
    "real": {},
    "colour": {"filter": "study.colour"},                    # no R: the channels matched to real
    "simgan": {"method": "simgan"},                          # R pre-trained by L1
    "ours": {},
    "rule": {"of": "ours", "checkpoint": "gan.pt"},          # of the paper's best step
    "pretrained": {"of": "ours", "checkpoint": "pretrain.pt", "segment": False},
    "as-printed": {"pretrain": "--final-relu", "checkpoint": "gan.pt"},       # Table 1's ReLU
    "squares": {"gan": "--rec l2"},
    "squares-rule": {"of": "squares", "checkpoint": "gan.pt"},
    "squares-finer": {"pretrain": "--d-stride 1", "gan": "--rec l2"},    # D's patches: 20 x 20
}
TABLE2 = ["label", "n", "weights_sha256", "device", "versions", "rows"]
CHECKPOINTS = {"pretrain.py": "pretrain.pt", "train_gan.py": "last.pt"}    # to --resume from


# ------------------------------------------------------------------- the commands of a row


def training(stage, name, seed, folder, args):
    """The command of a training of a row; stage: "pretrain" or "gan"."""
    script = {"pretrain": "pretrain.py", "gan": "train_gan.py"}[stage]
    inception = ["--inception", args.inception] if stage == "pretrain" else []
    return [script, "--method", ROWS[name].get("method", "ours"), "--data", f"{folder}/data",
            "--run", f"{folder}/runs/{name}", "--seed", str(seed), "--precision", args.precision,
            *inception, *getattr(args, stage), *shlex.split(ROWS[name].get(stage, ""))]


def commands_of_row(name, seed, folder, args):
    """The commands that make the domain of a row, in order: [(name of the step, command)]."""
    row, out = ROWS[name], f"{folder}/data/{name}"
    if name in GIVEN:
        return []
    if "filter" in row:
        return [("filter", ["-m", row["filter"], "--data", f"{folder}/data", "--out", out])]
    trained = row.get("of", name)
    checkpoint = f"{folder}/runs/{trained}/{row.get('checkpoint', 'average.pt')}"
    refine = ["refine.py", "--checkpoint", checkpoint, "--data", f"{folder}/data/synthetic",
              "--out", out]
    return [("pretrain", training("pretrain", trained, seed, folder, args)),
            ("gan", training("gan", trained, seed, folder, args)),
            ("refine", refine)]


def segmentations(args):
    """The segmentation trainings of a seed: [(network, epochs, rows, more flags)]."""
    rows = [name for name in args.rows if ROWS[name].get("segment", True)]
    wanted = [("unet", epochs, rows, []) for epochs in args.epochs]
    for network, names, flags in (("unet", args.random_crops, ["--random-crops"]),
                                  ("deeplabv3plus", args.deeplab, [])):
        wanted.append((network, args.epochs[0], [name for name in names if name in rows], flags))
    return [some for some in wanted if some[2]]


# ------------------------------------------------------------------------------ the loop


def run(command):
    """Run a script of the repository, or a module of it, to its end; UserError if it fails."""
    if command[0] != "-m":
        command = [str(ROOT / command[0]), *command[1:]]
    print(f"\n$ python {shlex.join(command)}", flush=True)
    child = subprocess.Popen([sys.executable, *command])
    stopped = []

    def stop(signum, _):                                      # a training saves, and ends
        stopped.append(signum)
        if signum == signal.SIGTERM:                          # Ctrl-C reaches it without us
            child.terminate()
    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    failed = child.wait()
    for signum, handler in before.items():
        signal.signal(signum, handler)
    if failed or stopped:
        raise UserError("the study stopped (see above); the same command goes on")


def once(step, command, history):
    """Run a command unless a stamp in the folder that it makes says that it has ended with this
    very history: all commands that its result comes from, as text. A stopped training goes on."""
    folder = Path(command[command.index("--run" if "--run" in command else "--out") + 1])
    stamp, checkpoint = folder / f".{step}", CHECKPOINTS.get(command[0])
    if stamp.is_file() and stamp.read_text(encoding="utf-8", errors="surrogateescape") == history:
        return
    stamp.unlink(missing_ok=True)                             # the old one is not of what comes
    run(command + ["--resume"] if checkpoint and (folder / checkpoint).exists() else command)
    write_text(stamp, history)


def run_seed(seed, history, args):
    """All rows of a seed, then their scores and the segmentation networks. history: the command
    that has prepared the data, in a list."""
    folder = args.base / f"seed{seed}"
    lock(folder)
    (folder / "data").mkdir(exist_ok=True)
    for name in GIVEN:
        link = folder / "data" / name
        if not link.is_symlink():
            link.symlink_to(f"../../data/{name}")
    made = list(history)
    for name in args.rows:
        of_row = list(history)
        for step, command in commands_of_row(name, seed, folder, args):
            of_row.append(shlex.join(command))
            once(step, command, "\n".join(of_row))
        made += of_row
    flags = {key: shlex.join(getattr(args, key)) for key in ("prepare", "pretrain", "gan")}
    write_json(folder / "settings.json", {**flags, "precision": args.precision})
    evaluate = ["evaluate.py", "--data", f"{folder}/data", "--out", f"{folder}/results",
                "--inception", args.inception]
    once("evaluate", evaluate, "\n".join([*made, shlex.join(evaluate)]))
    write_record(args)
    for network, epochs, rows, flags in segmentations(args):
        name = "".join([f"{epochs}-epochs", *flags])
        command = ["segment.py", "--data", f"{folder}/data", "--out", f"{folder}/results/{name}",
                   "--network", network, "--epochs", str(epochs), "--seeds", str(seed),
                   "--precision", args.precision, *flags, "--train", *rows]
        once(network, command, "\n".join([*made, shlex.join(command)]))
        write_record(args)


# ----------------------------------------------------------------------------- the record


def numbers_of_seed(folder):
    """All numbers of a seed: Table 2 and, of every segmentation, the confusion matrices, of which
    all scores are made; and how it was run."""
    table2 = read_json(folder / "results/table2.json")
    segment = []
    made = [*folder.glob("results/*-epochs/*.json"), *folder.glob("results/*-epochs--*/*.json")]
    for path in sorted(made):                                 # no 30-epochs-old
        found = read_json(path)
        (tested,) = found["confusion"].values()               # of one seed
        segment.append({"network": found["network"], "epochs": found["epochs"],
                        "random_crops": found["settings"]["random_crops"],
                        "tested": tested})
    settings = read_json(folder / "settings.json")
    return {"settings": settings, "table2": {key: table2[key] for key in TABLE2},
            "segment": segment}


def check_record(args):
    """UserError if the record has one of --seeds of another machine, or is of other --epochs."""
    path = args.results / f"{args.name}.json"
    old = read_record(path)
    for seed in args.seeds:
        if str(seed) in old.get("seeds", {}) and not (args.base / f"seed{seed}").exists():
            raise UserError(f"{path}: has seed {seed} of another machine; choose another NAME or "
                            "other --seeds, or delete it")
    if old.get("epochs", args.epochs[0]) != args.epochs[0]:
        raise UserError(f"{path}: is of --epochs {old['epochs']}; choose another NAME")


def write_record(args):
    """study/results/NAME.json, from every seed that has got as far as Table 2; seeds that are there
    and not below --base stay: another machine has run them."""
    path = args.results / f"{args.name}.json"
    old = read_record(path)
    rows, seeds = {*old.get("rows", []), *args.rows}, old.get("seeds", {})
    for folder in args.base.glob("seed*"):
        seed = folder.name.removeprefix("seed")
        if seed.isdecimal() and (folder / "results/table2.json").is_file():      # no seed0-old
            seeds[seed] = numbers_of_seed(folder)
    record = {"name": args.name, "epochs": args.epochs[0],
              "rows": {name: row for name, row in ROWS.items() if name in rows},
              "seeds": dict(sorted(seeds.items(), key=lambda seed: int(seed[0])))}
    write_json(path, record, indent=None)
    curves = sorted(args.base.glob("seed*/runs/ours/curves.png"))
    if curves:
        with whole(args.results / f"{args.name}-figure1.png") as temporary:
            shutil.copy(curves[0], temporary)


def arguments():
    p = parser(__doc__)
    p.add_argument("name", help="of the study: its folder in runs/study, its record")
    p.add_argument("--prepare", type=shlex.split, required=True, help="of prepare.py, one string")
    add_inception_flag(p)
    p.add_argument("--seeds", type=natural, nargs="+", default=[0, 1, 2], help="all of it for each")
    p.add_argument("--rows", choices=ROWS, nargs="+", default=list(ROWS), metavar="ROW",
                   help="of the study, the same in every command: " + ", ".join(ROWS))
    p.add_argument("--pretrain", type=shlex.split, default="", help="of pretrain.py, every row; "
                   "a single one as --pretrain=--d-stride=1")
    p.add_argument("--gan", type=shlex.split, default="", help="of train_gan.py, every row")
    add_precision_flag(p)
    p.add_argument("--epochs", type=positive(int), nargs="+", default=[30, 8],
                   help="of the segmenters: the tables are of the first, U-Net has all of them")
    p.add_argument("--deeplab", choices=ROWS, nargs="*", metavar="ROW",
                   default=["synthetic", "simgan", "ours", "real"],
                   help="the rows that DeepLabV3+ learns from; none if empty")
    p.add_argument("--random-crops", choices=ROWS, nargs="*", metavar="ROW",
                   default=["synthetic", "ours"],
                   help="the rows that U-Net learns from by random crops as well")
    p.add_argument("--base", type=path_of, help="where the runs lie (default: runs/study/NAME)")
    p.add_argument("--results", type=path_of, default=ROOT / "study/results", help="of the record")
    args = p.parse_args()
    if "--classes" in shlex.join(args.prepare):
        p.error("--prepare: the study's tables are of the 19 classes, leave out --classes")
    args.base = args.base or Path("runs/study") / args.name
    return args


def main():
    args = arguments()
    print(f"study.run: reads prepare.py {shlex.join(args.prepare)}; writes {args.base}/ and "
          f"{args.results}/{args.name}.json", flush=True)
    check_record(args)
    prepare = ["prepare.py", "--out", f"{args.base}/data", *args.prepare]
    once("prepare", prepare, shlex.join(prepare))
    for seed in args.seeds:
        run_seed(seed, [shlex.join(prepare)], args)
    print(f"done: {args.results}/{args.name}.json; python -m study.report {args.name} --results "
          f"{args.results} makes the tables")


if __name__ == "__main__":
    start(main)
