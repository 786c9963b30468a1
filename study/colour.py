"""Matched colours: what can be had without any network, so a GAN must do better.

Every channel of the synthetic images gets the mean and the standard deviation that it has in the
real ones to train on (Reinhard et al. 2001, in RGB).

Reads   data/synthetic/{train,test}/{images,labels}, data/real/train/images
Writes  data/colour: the same names and labels, other images, as refine.py does with an R

    python -m study.colour
"""
import os
from pathlib import Path

import torch

from prepare import load_images
from refine import check_out, refine_domain
from support.cli import parser, path_of, start
from support.training import to_float


def statistics(images):
    """Mean and standard deviation of every channel of uint8 [N, 3, H, W], in the [-1, 1] range:
    [3, 1, 1] each."""
    counts = torch.stack([images[:, c].flatten().bincount(minlength=256) for c in range(3)])
    shares, values = counts / images[:, 0].numel(), to_float(torch.arange(256))
    mean = shares @ values
    variance = (shares * (values - mean[:, None]).square()).sum(1)
    return mean.view(3, 1, 1), variance.sqrt().clamp(min=1e-6).view(3, 1, 1)   # no division by 0


def arguments():
    p = parser(__doc__)
    p.add_argument("--data", type=path_of, default=Path("data"), help="what prepare.py made")
    p.add_argument("--out", type=path_of, help="(default: DATA/colour)")
    p.set_defaults(images=None, batch_size=16)                # as refine.py has them
    args = p.parse_args()
    args.out = args.out or args.data / "colour"
    return args


def main():
    args = arguments()
    real, args.data = args.data / "real", args.data / "synthetic"
    print(f"study.colour: reads {args.data}/ and {real}/; writes {args.out}/", flush=True)
    record = {"checkpoint": "study.colour", "step": 0, "source": os.path.abspath(args.data)}
    check_out(args, record)
    old_mean, old_deviation = statistics(load_images(args.data / "train"))
    mean, deviation = statistics(load_images(real / "train"))
    refine_domain(lambda x: (x - old_mean) / old_deviation * deviation + mean, args, record, "cpu")


if __name__ == "__main__":
    start(main)
