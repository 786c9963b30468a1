"""Stage 4: run a trained refiner over a prepared domain; the labels stay as they are.

Reads   a checkpoint of stage 2 or 3, data/synthetic/{train,test}/{images,labels}
Writes  data/METHOD/{train,test}/{images,labels}: the same names, refined images, equal labels
        data/METHOD/refine.json: which checkpoint and step made them

    python refine.py                            runs/ours/average.pt -> data/ours
    python refine.py --method simgan            runs/simgan/average.pt -> data/simgan
    python refine.py --checkpoint runs/ours/gan.pt          R by the paper's rule -> data/ours
    python refine.py --checkpoint runs/ours/pretrain.pt --out data/pretrained

The fourth command makes the row "after pre-training" of Table 2. Running one again replaces its
own output.
"""
import hashlib
import shutil
from pathlib import Path

import torch
from PIL import Image

from models import Refiner
from prepare import load_images, names
from support.cli import (UserError, announce, lock, parser, positive, progress, start, write_json,
                         write_png)
from support.training import (add_device_flag, load_checkpoint, pick_device, place, rebuild,
                              to_float, to_uint8)


def arguments():
    p = parser(__doc__)
    add_device_flag(p)
    p.add_argument("--method", choices=["ours", "simgan"], default="ours", help="whose R")
    p.add_argument("--checkpoint", type=Path, help="(default: runs/METHOD/average.pt)")
    p.add_argument("--data", type=Path, default=Path("data/synthetic"), help="a domain folder")
    p.add_argument("--out", type=Path, help="(default: data/METHOD)")
    p.add_argument("--batch-size", type=positive(int), default=16, help="images a batch")
    args = p.parse_args()
    args.checkpoint = args.checkpoint or Path("runs") / args.method / "average.pt"
    args.out = args.out or Path("data") / args.method
    return args


def check_out(out, data):
    """UserError if --out is a folder that refine.py has not made, or is --data."""
    own = (".lock", "refine.json.tmp")       # a kill before refine.json leaves no more than these
    others = [p for p in out.iterdir() if p.name not in own] if out.exists() else []
    if others and not (out / "refine.json").is_file():
        raise UserError(f"{out}: is there already and was not made by refine.py; choose another "
                        "--out")
    if out.resolve() == data.resolve():
        raise UserError(f"--out {out} is --data itself; choose another --out")


@torch.no_grad()
def refine_split(R, source, target, device, batch_size):
    """Refine source/images into target/images and copy the labels; returns how many."""
    images, files = load_images(source), iter(names(source))
    for kind in ("images", "labels"):
        shutil.rmtree(target / kind, ignore_errors=True)
        (target / kind).mkdir(parents=True)
    for x in progress(images.split(batch_size), desc=f"refine {source}", unit="batch"):
        refined = to_uint8(R(to_float(x.to(device)))).cpu()           # [n, 3, H, W]
        for picture in refined.permute(0, 2, 3, 1).numpy():           # [H, W, 3]
            file = f"{next(files)}.png"
            write_png(target / "images" / file, Image.fromarray(picture))
            if (source / "labels" / file).is_file():
                shutil.copyfile(source / "labels" / file, target / "labels" / file)
    return len(images)


def main():
    args = arguments()
    device = pick_device(args.device)

    # 1. The refiner.
    state = load_checkpoint(args.checkpoint, ["pretrain", "gan", "best", "average"],
                            f"run train_gan.py --method {args.method} first")
    R = place(rebuild(Refiner, state, "refiner", args.checkpoint), device)

    # 2. What is to be refined, and whether it may be written.
    check_out(args.out, args.data)
    splits = [split for split in ("train", "test") if (args.data / split).is_dir()]
    if not splits:
        raise UserError(f"{args.data}: no train/ or test/ in it; --data wants a domain folder "
                        "made by prepare.py")
    announce("refine.py", device, args.seed, f"{args.checkpoint} (step {state['step']}) and "
             f"{args.data}/", f"{args.out}/")
    lock(args.out)

    # 3. Refine; refine.json says when all of it is there.
    digest = hashlib.sha256(args.checkpoint.read_bytes()).hexdigest()[:16]
    record = {"checkpoint": str(args.checkpoint), "step": state["step"], "sha256": digest,
              "source": str(args.data)}
    write_json(args.out / "refine.json", {**record, "finished": False})
    count = 0
    for split in splits:
        count += refine_split(R, args.data / split, args.out / split, device, args.batch_size)
    write_json(args.out / "refine.json", {**record, "finished": True})
    print(f"done: {count} refined images and their labels in {args.out}/")


if __name__ == "__main__":
    start(main)
