"""Stage 4: run a trained refiner over a prepared domain; the labels stay as they are.

Reads   a checkpoint of stage 2 or 3, data/synthetic/{train,test}/{images,labels}; for colour and
        --match-detail also data/real/train
Writes  data/METHOD/{train,test}/{images,labels}: the same names, refined images, equal labels
        data/METHOD/refine.json: which checkpoint and step made them

    python refine.py                            runs/ours/average.pt -> data/ours
    python refine.py --method simgan            runs/simgan/average.pt -> data/simgan
    python refine.py --checkpoint runs/ours/gan.pt          R by the paper's rule -> data/ours
    python refine.py --checkpoint runs/ours/pretrain.pt --out data/pretrained
    python refine.py --method colour            no network: the control that a GAN must beat
    python refine.py --match-detail             then as much detail as real (not the paper's)

The row "after pre-training" of Table 2 is the fourth command. 40 images a second at 40 x 80 on
2 cores. Running it again replaces its own output.
"""
import hashlib
import json
import shutil
from pathlib import Path

import torch
from PIL import Image

from models import (Refiner, announce, detail, load_checkpoint, pick_device, rebuild, speed_up,
                    to_float, to_uint8)
from prepare import (UserError, load_images, lock, names, parser, positive, progress, start,
                     write_png, write_text)


def arguments():
    p = parser(__doc__)
    p.add_argument("--device", default="auto", help="auto (cuda, mps, cpu), or one of them")
    p.add_argument("--method", choices=["ours", "simgan", "colour"], default="ours",
                   help="whose R; colour: match mean and deviation of every channel")
    p.add_argument("--checkpoint", type=Path, help="(default: runs/METHOD/average.pt)")
    p.add_argument("--match-detail", action="store_true", help="give the refined images as much "
                   "detail as real ones have")
    p.add_argument("--data", type=Path, default=Path("data/synthetic"), help="a domain folder")
    p.add_argument("--out", type=Path, help="(default: data/METHOD)")
    p.add_argument("--batch-size", type=positive(int), default=16, help="images a batch")
    args = p.parse_args()
    args.checkpoint = args.checkpoint or Path("runs") / args.method / "average.pt"
    args.out = args.out or Path("data") / args.method
    return args


class ColourMatch(torch.nn.Module):
    """Give every image of a set the colours of another set: per channel, the mean and the standard
    deviation over all pixels (Reinhard et al. 2001, in RGB). What this reaches needs no GAN.

    synthetic, real: uint8 [N, 3, H, W].
    """

    def __init__(self, synthetic, real):
        super().__init__()
        (mean, std), (wanted_mean, wanted_std) = (
            [t.view(3, 1, 1) for t in (x.mean((0, 2, 3)), x.std((0, 2, 3)))]
            for x in map(to_float, (synthetic, real)))
        self.scale = wanted_std / std.clamp(min=1e-3)
        self.shift = wanted_mean - mean * self.scale

    def forward(self, x):
        return x * self.scale.to(x) + self.shift.to(x)


class DetailMatch(torch.nn.Module):
    """R, and then its detail made stronger, until the brightness of the training images has as
    much of it as real ones have. R leaves images softer than real, and what a network learns of
    texture from them is then wrong (README).

    synthetic, real: uint8 [N, 3, H, W]; the first 500 of each set the amount, in [0, 4].
    """

    def __init__(self, R, synthetic, real, device):
        super().__init__()
        self.R, self.amount = R, 0
        refined = torch.cat([R(to_float(x.to(device))) for x in synthetic[:500].split(16)])
        wanted = detail(to_float(real[:500]).mean(1, keepdim=True)).abs().mean().item()
        low, high = 0, 4
        for _ in range(12):                                   # bisection: more amount, more detail
            self.amount = (low + high) / 2
            grey = self.sharpen(refined).mean(1, keepdim=True)
            if detail(grey).abs().mean().item() < wanted:
                low = self.amount
            else:
                high = self.amount

    def sharpen(self, x):
        return (x + self.amount * detail(x)).clamp(-1, 1)

    def forward(self, x):
        return self.sharpen(self.R(x))


@torch.no_grad()
def load_refiner(args, device):
    """What refines, and what refine.json and the first line say of it."""
    real = args.data.parent / "real" / "train"
    if args.method == "colour":
        R = ColourMatch(load_images(args.data / "train"), load_images(real))
        made_by = {"checkpoint": f"colour statistics of {real}", "step": 0}
    else:
        state = load_checkpoint(args.checkpoint, ["pretrain", "gan", "best", "average"],
                                f"run train_gan.py --method {args.method} first")
        R = speed_up(rebuild(Refiner, state, "refiner", args.checkpoint), device)
        digest = hashlib.sha256(args.checkpoint.read_bytes()).hexdigest()[:16]
        made_by = {"checkpoint": str(args.checkpoint), "step": state["step"], "sha256": digest}
    if args.match_detail:
        R = DetailMatch(R, load_images(args.data / "train"), load_images(real), device)
        made_by["detail_amount"] = R.amount
    return R, made_by


@torch.no_grad()
def refine_split(R, source, target, device, batch_size):
    """Refine source/images into target/images and copy the labels; returns how many."""
    images, files = load_images(source), [f"{name}.png" for name in names(source)]
    for kind in ("images", "labels"):
        shutil.rmtree(target / kind, ignore_errors=True)
        (target / kind).mkdir(parents=True)
    bar = progress(total=len(images), unit="image", desc=f"refine {source}")
    for start in range(0, len(images), batch_size):
        x = to_float(images[start:start + batch_size].to(device))
        refined = to_uint8(R(x)).cpu().permute(0, 2, 3, 1).numpy()
        for file, array in zip(files[start:], refined):
            write_png(target / "images" / file, Image.fromarray(array))
            if (source / "labels" / file).is_file():
                shutil.copyfile(source / "labels" / file, target / "labels" / file)
        bar.update(len(x))
    bar.close()
    return len(images)


def main():
    args = arguments()
    device = pick_device(args.device)
    R, made_by = load_refiner(args, device)
    own = (".lock", "refine.json.tmp")       # a kill before refine.json leaves no more than these
    if args.out.exists() and not (args.out / "refine.json").is_file() and any(
            p.name not in own for p in args.out.iterdir()):
        raise UserError(f"{args.out}: is there already and was not made by refine.py; choose "
                        "another --out")
    if args.out.resolve() == args.data.resolve():
        raise UserError(f"--out {args.out} is --data itself; choose another --out")
    splits = [s for s in ("train", "test") if (args.data / s).is_dir()]
    if not splits:
        raise UserError(f"{args.data}: no train/ or test/ in it; --data wants a domain folder "
                        "made by prepare.py")
    announce("refine.py", device, args.seed, f"{made_by['checkpoint']} (step {made_by['step']}) "
             f"and {args.data}/", f"{args.out}/")

    lock(args.out)
    record = {**made_by, "source": str(args.data), "finished": False}
    write_text(args.out / "refine.json", json.dumps(record, indent=1))
    counts = [refine_split(R, args.data / s, args.out / s, device, args.batch_size)
              for s in splits]
    write_text(args.out / "refine.json", json.dumps({**record, "finished": True}, indent=1))
    print(f"done: {sum(counts)} refined images and their labels in {args.out}/")


if __name__ == "__main__":
    start(main)
