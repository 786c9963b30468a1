"""Domains that need no network: each filter reads a prepared domain and writes another one.

    colour   every channel gets the mean and the standard deviation that it has in real images
             (Reinhard et al. 2001, in RGB): what this reaches needs no GAN
    blur     a Gaussian of --sigma pixels: does a network rely on detail?
    detail   sharpened until there is as much detail as in real images

Reads   data/SOURCE/{train,test}/{images,labels}; colour and detail also data/real/train
Writes  the same names and labels, other images, into --out, and refine.json as refine.py does

    python -m study.filters colour                                   data/synthetic -> data/colour
    python -m study.filters blur --source real --out data/blurred
    python -m study.filters detail --source ours --out data/detail
"""
import shutil
from pathlib import Path

import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import gaussian_blur

from prepare import load_images, names
from support.cli import (UserError, lock, parser, path_of, positive, progress, start, write_json,
                         write_png)
from support.training import to_float, to_uint8

MADE_BY = "study.filters"                # in refine.json: a filter replaces only its own output


def detail(images):
    """What is not in the mean of a pixel's four neighbours, [N, C, H, W] -> the same."""
    x = F.pad(images, (1, 1, 1, 1), mode="replicate")
    above, below = x[..., :-2, 1:-1], x[..., 2:, 1:-1]
    left, right = x[..., 1:-1, :-2], x[..., 1:-1, 2:]
    return images - (above + below + left + right) / 4


def amount_of_detail(images):
    """Mean size of the brightness's detail, for float [N, 3, H, W]."""
    return detail(images.mean(1, keepdim=True)).abs().mean().item()


def colour(source, real):
    """The function that gives `source` the colours of `real`; both float [N, 3, H, W]."""
    mean, wanted_mean = source.mean((0, 2, 3)), real.mean((0, 2, 3))
    std, wanted_std = source.std((0, 2, 3)), real.std((0, 2, 3))
    scale = wanted_std / std.clamp(min=1e-3)
    shift = wanted_mean - mean * scale
    return lambda x: x * scale.view(3, 1, 1) + shift.view(3, 1, 1)


def blur(sigma):
    """The function that blurs float [N, 3, H, W] by a Gaussian of `sigma` pixels."""
    size = 2 * round(3 * sigma + 0.5) + 1
    return lambda x: gaussian_blur(x, size, sigma)


def match_detail(source, real):
    """The function that gives `source` as much detail as `real` has; both float [N, 3, H, W]."""
    def sharpen(x, amount):
        return (x + amount * detail(x)).clamp(-1, 1)

    wanted, low, high = amount_of_detail(real), 0, 4
    for _ in range(12):                                   # bisection: more amount, more detail
        amount = (low + high) / 2
        if amount_of_detail(sharpen(source, amount)) < wanted:
            low = amount
        else:
            high = amount
    return lambda x: sharpen(x, amount)


def make_filter(args):
    """The function of the chosen filter, float [N, 3, H, W] in [-1, 1] to the same."""
    if args.filter == "blur":
        return blur(args.sigma)
    source = to_float(load_images(args.data / args.source / "train"))
    real = to_float(load_images(args.data / "real" / "train"))
    if args.filter == "colour":
        return colour(source, real)
    return match_detail(source[:500], real[:500])


def filter_split(function, source, target):
    """Filter source/images into target/images and copy the labels; returns how many."""
    for kind in ("images", "labels"):
        shutil.rmtree(target / kind, ignore_errors=True)
        (target / kind).mkdir(parents=True)
    images = load_images(source)
    for name, image in zip(progress(names(source), desc=f"{source}", unit="image"), images):
        filtered = to_uint8(function(to_float(image[None])))[0].permute(1, 2, 0).numpy()
        write_png(target / "images" / f"{name}.png", Image.fromarray(filtered))
        label = source / "labels" / f"{name}.png"
        if label.is_file():
            shutil.copyfile(label, target / "labels" / label.name)
    return len(images)


def arguments():
    p = parser(__doc__)
    p.add_argument("filter", choices=["colour", "blur", "detail"])
    p.add_argument("--data", type=path_of, default=Path("data"), help="what prepare.py made")
    p.add_argument("--source", default="synthetic", help="the domain of it that is read")
    p.add_argument("--out", type=path_of, help="(default: DATA/FILTER)")
    p.add_argument("--sigma", type=positive(float), default=0.6, help="of blur, in pixels")
    args = p.parse_args()
    args.out = args.out or args.data / args.filter
    return args


def main():
    args = arguments()
    source = args.data / args.source
    splits = [split for split in ("train", "test") if (source / split).is_dir()]
    if not splits:
        raise UserError(f"{source}: no train/ or test/ in it; run prepare.py first")
    record_path = args.out / "refine.json"
    made_here = record_path.is_file() and MADE_BY in record_path.read_text(encoding="utf-8")
    others = [p for p in args.out.glob("*") if p.name not in (".lock", "refine.json.tmp")]
    if others and not made_here:
        raise UserError(f"{args.out}: is there already and was not made by a filter; choose "
                        "another --out")
    if args.out.resolve() == source.resolve():
        raise UserError(f"--out {args.out} is what is read; choose another --out")
    print(f"study.filters: {args.filter}; reads {source}/; writes {args.out}/", flush=True)
    function = make_filter(args)
    record = {"checkpoint": f"{MADE_BY} {args.filter}", "step": 0, "source": str(source),
              "finished": False}
    lock(args.out)
    write_json(record_path, record)
    count = sum([filter_split(function, source / split, args.out / split) for split in splits])
    write_json(record_path, {**record, "finished": True})
    print(f"done: {count} images and their labels in {args.out}/")


if __name__ == "__main__":
    start(main)
