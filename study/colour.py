"""Matched colours: what can be had without any network, so a GAN must do better.

Every channel of the synthetic images gets the mean and the standard deviation that it has in the
real ones to train on (Reinhard et al. 2001, in RGB).

Reads   data/synthetic/{train,test}/{images,labels}, data/real/train/images
Writes  the same names and labels, other images, into --out, and refine.json as refine.py does

    python -m study.colour                    data/synthetic -> data/colour
"""
import shutil
from pathlib import Path

from PIL import Image

from prepare import load_images, names
from support.cli import UserError, lock, parser, path_of, progress, start, write_json, write_png
from support.training import to_float, to_uint8

MADE_BY = "study.colour"                                 # only its own output is replaced


def match(source, real):
    """The function that gives `source` the colours of `real`; both float [N, 3, H, W]."""
    scale = real.std((0, 2, 3)) / source.std((0, 2, 3)).clamp(min=1e-3)
    shift = real.mean((0, 2, 3)) - source.mean((0, 2, 3)) * scale
    return lambda x: x * scale.view(3, 1, 1) + shift.view(3, 1, 1)


def write_split(function, source, target):
    """Write function(source/images) to target/images and copy the labels; returns how many."""
    for kind in ("images", "labels"):
        shutil.rmtree(target / kind, ignore_errors=True)
        (target / kind).mkdir(parents=True)
    images = load_images(source)
    for name, image in zip(progress(names(source), desc=f"{source}", unit="image"), images):
        matched = to_uint8(function(to_float(image[None])))[0].permute(1, 2, 0).numpy()
        write_png(target / "images" / f"{name}.png", Image.fromarray(matched))
        label = source / "labels" / f"{name}.png"
        if label.is_file():
            shutil.copyfile(label, target / "labels" / label.name)
    return len(images)


def arguments():
    p = parser(__doc__)
    p.add_argument("--data", type=path_of, default=Path("data"), help="what prepare.py made")
    p.add_argument("--out", type=path_of, help="(default: DATA/colour)")
    args = p.parse_args()
    args.out = args.out or args.data / "colour"
    return args


def main():
    args = arguments()
    source = args.data / "synthetic"
    record_path = args.out / "refine.json"
    made_here = record_path.is_file() and MADE_BY in record_path.read_text(encoding="utf-8")
    others = [p for p in args.out.glob("*") if p.name not in (".lock", "refine.json.tmp")]
    if others and not made_here:
        raise UserError(f"{args.out}: is there already and was not made by {MADE_BY}; choose "
                        "another --out")
    print(f"{MADE_BY}: reads {source}/ and {args.data}/real/; writes {args.out}/", flush=True)
    function = match(to_float(load_images(source / "train")),
                     to_float(load_images(args.data / "real" / "train")))
    record = {"checkpoint": MADE_BY, "step": 0, "source": str(source), "finished": False}
    lock(args.out)
    write_json(record_path, record)
    count = sum([write_split(function, source / split, args.out / split)
                 for split in ("train", "test")])
    write_json(record_path, {**record, "finished": True})
    print(f"done: {count} images and their labels in {args.out}/")


if __name__ == "__main__":
    start(main)
