"""Stage 4: run a trained refiner over a prepared domain, or over anybody's pictures.

Reads   a checkpoint of stage 2 or 3, data/synthetic/{train,test}/{images,labels}, or --images
Writes  data/METHOD/{train,test}/{images,labels}: the same names, refined images, equal labels
        data/METHOD/refine.json: which checkpoint and step made them, of which images
        with --images: a PNG for every picture, of its own size, under the same name below --out,
        and refine.json

    python refine.py                            runs/ours/average.pt -> data/ours
    python refine.py --method simgan            runs/simgan/average.pt -> data/simgan
    python refine.py --checkpoint runs/ours/gan.pt --out data/rule         R by the paper's rule
    python refine.py --checkpoint runs/ours/pretrain.pt --out data/pretrained
    python refine.py --checkpoint runs/ours/average.pt --images renderings --out refined

The fourth command makes the row "after pre-training" of Table 2. Running one again replaces its
own output; with --images, what is new or changed is refined. A megapixel takes a core 10 seconds.
"""
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models import Refiner
from prepare import files_of, names
from support.cli import (UserError, announce, lock, parser, path_of, positive, progress,
                         read_record, start, write_json, write_png)
from support.images import read_stack, sha256_of
from support.raw import UNREADABLE, by_ending, read_rgb, refined_names
from support.training import (add_device_flag, load_checkpoint, pick_device, place, rebuild,
                              to_float, to_uint8)

TILE, MARGIN = 768, 24      # pixels; R sees 16 pixels up and left, 17 down and right


# --------------------------------------------------------------------------- a prepared domain


@torch.no_grad()
def refine_split(R, source, target, device, batch_size):
    """Refine source/images into target/images and copy the labels; returns how many."""
    files = files_of(source)
    for i in progress(range(0, len(files), batch_size), desc=f"refine {source}", unit="batch"):
        some = files[i:i + batch_size]
        refined = to_uint8(R(to_float(read_stack(some, "RGB").to(device)))).cpu()  # [n, 3, H, W]
        for file, picture in zip(some, refined.permute(0, 2, 3, 1).numpy()):       # [H, W, 3]
            write_png(target / "images" / file.name, Image.fromarray(picture))
            if (source / "labels" / file.name).is_file():
                shutil.copyfile(source / "labels" / file.name, target / "labels" / file.name)
    return len(files)


def refine_domain(R, args, record, device):
    """Refine train/ and test/ of --data; refine.json says when all of it is there."""
    record["source_sha256"], count = {}, 0
    for split in ("train", "test"):
        names(args.data / split)                              # or its UserError, before any work
        record["source_sha256"][split] = sha256_of(args.data / split)
    lock(args.out)
    write_json(args.out / "refine.json", {**record, "finished": False})
    for folder in ("train/images", "train/labels", "test/images", "test/labels"):
        shutil.rmtree(args.out / folder, ignore_errors=True)
        (args.out / folder).mkdir(parents=True)               # all at once: half is seen as such
    for split in ("train", "test"):
        count += refine_split(R, args.data / split, args.out / split, device, args.batch_size)
    write_json(args.out / "refine.json", {**record, "finished": True})
    print(f"done: {count} refined images, with labels where there are any, in {args.out}/")


# ------------------------------------------------------------------------------ any pictures


@torch.no_grad()
def refine_tiles(R, picture, device):
    """R of a picture of any size, uint8 [H, W, 3] to the same: tile by tile, with a margin of what
    R sees around a pixel, so that the result is R of the whole."""
    image = torch.from_numpy(picture).permute(2, 0, 1)[None]          # [1, 3, H, W]
    refined = torch.empty_like(image)
    for top in range(0, image.shape[2], TILE):
        for left in range(0, image.shape[3], TILE):
            above, before = max(0, top - MARGIN), max(0, left - MARGIN)
            tile = image[..., above:top + TILE + MARGIN, before:left + TILE + MARGIN]
            tile = to_uint8(R(to_float(tile.to(device)))).cpu()
            tile = tile[..., top - above:, left - before:][..., :TILE, :TILE]
            refined[..., top:top + TILE, left:left + TILE] = tile
    return refined[0].permute(1, 2, 0).numpy()


def refine_pictures(R, args, record, device):
    """Refine --images one by one; those that are there from an earlier run are not done again."""
    file_of, others = refined_names(args.images, args.out)
    lock(args.out)
    write_json(args.out / "refine.json", {**record, "finished": False})
    skipped = []
    for target, file in progress(file_of.items(), desc="refine", unit="picture"):
        try:
            if len(os.fsencode(f"{target.name}.tmp")) > 255:
                raise ValueError("its name is too long for a file system")
            # Done by an earlier run, which gave it its file's time (below); FAT rounds to 2 s.
            if target.exists() and abs(target.stat().st_mtime - file.stat().st_mtime) < 2:
                continue
            picture = read_rgb(file)
            if min(picture.size) < 4 and not args.size:
                raise ValueError("is smaller than 4 x 4 pixels")
        except UNREADABLE as error:
            skipped.append(f"skipped {file}: {error}\n")
            continue
        small = picture.resize(args.size[::-1], Image.BILINEAR) if args.size else picture
        refined = Image.fromarray(refine_tiles(R, np.array(small), device))
        write_png(target, refined.resize(picture.size, Image.BICUBIC))
        os.utime(target, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    write_json(args.out / "refine.json", {**record, "finished": True})
    print("".join(skipped), end="")
    if len(skipped) == len(file_of):
        raise UserError(f"{args.images}: no picture could be refined; the lines above say why")
    print(f"done: {len(file_of) - len(skipped)} pictures in {args.out}/; {len(skipped)} skipped; "
          f"files not read: {by_ending(others)}")


# -------------------------------------------------------------------------------- the command


def arguments():
    p = parser(__doc__)
    add_device_flag(p)
    p.add_argument("--method", choices=["ours", "simgan"], default="ours", help="whose R")
    p.add_argument("--checkpoint", type=path_of, help="(default: runs/METHOD/average.pt)")
    p.add_argument("--data", type=path_of, default=Path("data/synthetic"), help="a domain folder")
    p.add_argument("--images", type=path_of, help="a picture or a folder, instead of --data")
    p.add_argument("--out", type=path_of, help="(default: METHOD beside --data)")
    p.add_argument("--size", type=positive(int), nargs=2, metavar=("H", "W"), help="of --images: "
                   "refine at this size, that of R's training, and scale back")
    p.add_argument("--batch-size", type=positive(int), default=16, help="images of --data a batch")
    args = p.parse_args()
    if (args.images or args.checkpoint) and not args.out:
        p.error("--images and --checkpoint want --out, a folder for what is refined")
    if args.size and (not args.images or min(args.size) < 4 or max(args.size) > 4096):
        p.error("--size goes with --images and is from 4 x 4 to 4096 x 4096")
    args.checkpoint = args.checkpoint or Path("runs") / args.method / "average.pt"
    args.out = args.out or Path(os.path.normpath(args.data / ".." / args.method))
    return args


def check_out(args, record):
    """UserError if --out was not made by refine.py, lies in what is to be refined, or was made with
    other --images; if --images are given, also if by another R or --size."""
    out, source, made = args.out.resolve(), args.images or args.data, args.out / "refine.json"
    own = (".lock", "refine.json.tmp")       # a kill before refine.json leaves no more than these
    if out.exists() and any(p.name not in own for p in out.iterdir()) and not made.is_file():
        raise UserError(f"{args.out}: is there already and was not made by refine.py; choose "
                        "another --out")
    if out.is_relative_to(source.resolve()):
        raise UserError(f"--out {args.out} lies in {'--images' if args.images else '--data'} "
                        "itself; choose another --out")
    old = read_record(made) or record
    for key in ["images", "sha256", "size"] if args.images else ["images"]:
        if old.get(key) != record.get(key):
            raise UserError(f"{args.out}: was made with {key} = {old.get(key)}, not "
                            f"{record.get(key)}; choose another --out")


def main():
    args = arguments()
    device = pick_device(args.device)

    # 1. The refiner.
    state = load_checkpoint(args.checkpoint, ["pretrain", "gan", "best", "average"],
                            f"run train_gan.py --method {args.method} first")
    R = place(rebuild(Refiner, state, "refiner", args.checkpoint), device)

    # 2. What is to be refined, and whether it may be written.
    record = {"checkpoint": str(args.checkpoint), "step": state["step"], "size": args.size,
              "sha256": hashlib.sha256(args.checkpoint.read_bytes()).hexdigest()[:16]}
    if args.images:
        record["images"] = str(args.images.resolve())
    else:        # links not resolved: check_domains looks beside --out for a folder of this name
        record["source"] = os.path.abspath(args.data)
    check_out(args, record)
    announce(device, args.seed, f"{args.checkpoint} (step {state['step']}) and "
             f"{args.images or args.data}", f"{args.out}/")

    # 3. Refine.
    refine = refine_pictures if args.images else refine_domain
    refine(R, args, record, device)


if __name__ == "__main__":
    start(main)
