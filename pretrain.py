"""Stage 2: pre-train the refiner R, then the discriminator D (sections 3.3 and 5.1).

R learns to give back its input: `ours` by the perceptual loss (Eq 5), `simgan` by the L1
self-regularisation (Eq 4). D learns to tell synthetic images from real ones. The adversarial
training (train_gan.py) starts there, with R(x) nearly x.

Reads   data/{synthetic,real}/train (images only; those of test must have the same size)
Writes  runs/METHOD/pretrain.pt   both networks, both optimisers, the random state
        runs/METHOD/pretrain.csv  one row a step: loss; of R mean |R(x) - x|, of D its accuracy
        runs/METHOD/pretrain.png  synthetic / R(synthetic) / |difference|

    python pretrain.py                       ours, the paper's 1200 + 400 steps
    python pretrain.py --method simgan       the comparison
    python pretrain.py --resume              go on after a stop, with the same flags

A step of R takes half as long as one of train_gan.py.
"""
from pathlib import Path
from statistics import fmean

import torch

from models import REAL, REFINED, Discriminator, Refiner, load_inception, patch_loss
from prepare import check_domains, load_images
from support.cli import announce, lock, parser, positive, start
from support.figures import save_grid
from support.training import (Batches, Training, add_inception_flag, add_training_flags, autocast,
                              keep_on, make_optimizer, pick_device, place, precision_note,
                              saved_run, settings_of, to_float, to_uint8)

COLUMNS = ["network", "loss", "mean_change", "accuracy"]


def perceptual_loss(psi, refined, x):
    """Eq 5: mean over C, H, W (and the batch) of |psi(R(x)) - psi(x)|^2, squared L2."""
    with torch.autocast(x.device.type, enabled=False):        # psi in float32
        return (psi(refined) - psi(x)).square().mean()


def update_R(R, optimizer, x, psi):
    """One step of R towards the identity; x: synthetic images in [-1, 1], [N, 3, H, W].

    The loss is Eq 5 with psi, or the L1 self-regularisation of SimGAN (Eq 4, as a mean) where
    psi is None. Returns the loss and mean |R(x) - x|.
    """
    refined = R(x).float()
    change = (refined - x).abs().mean()
    loss = change if psi is None else perceptual_loss(psi, refined, x)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"network": "R", "loss": loss.detach(), "mean_change": change.detach()}


def update_D(D, optimizer, x, y):
    """One step of D on Eq 1, mended, with synthetic images x in place of refined ones, y real.

    Returns the loss (2 ln 2 = 1.386 is guessing) and the share of right patches.
    """
    logits_x, logits_y = D(x), D(y)
    loss = patch_loss(logits_x, REFINED) + patch_loss(logits_y, REAL)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    right = torch.cat([logits_x.argmax(1) == REFINED, logits_y.argmax(1) == REAL])
    return {"network": "D", "loss": loss.detach(), "accuracy": right.float().mean()}


def train(R, D, psi, synthetic, real, args, device, settings, saved):
    """--steps updates of R, then --d-steps of D; images uint8 [N, 3, H, W]. Returns the log."""
    n = args.batch_size
    optimizer_R = make_optimizer("adam", R.parameters(), args.lr)
    optimizer_D = make_optimizer("momentum", D.parameters(), args.d_lr)
    batches = Batches(args.seed, device)
    training = Training(args.run / "pretrain.pt", "pretrain", args.run / "pretrain.csv", settings,
                        COLUMNS, saved, refiner=R, discriminator=D, optimizer_R=optimizer_R,
                        optimizer_D=optimizer_D, random=batches)
    for step in training.steps(args.steps + args.d_steps, args.save_every):
        with autocast(device, args.precision):
            if step <= args.steps:
                # R:  min |psi(R(x)) - psi(x)|^2   (Eq 5), or |R(x) - x|   (Eq 4) for simgan
                row = update_R(R, optimizer_R, batches.draw(synthetic, n), psi)
            else:
                # D:  min -log D(x) - log(1 - D(y))   (Eq 1, mended; x not yet refined)
                x, y = batches.draw(synthetic, n), batches.draw(real, n)
                row = update_D(D, optimizer_D, x, y)
        training.log(row)
    return training.rows


@torch.no_grad()
def summarise(path, R, images, rows, args):
    """Draw pretrain.png from uint8 images; print the means of the last 50 steps of each network."""
    refined = to_uint8(R(to_float(images)))
    save_grid(path, {"synthetic": images, "R(synthetic)": refined,
                     "|difference|": (refined.int() - images.int()).abs().byte()})
    rows_R, rows_D = rows[:args.steps][-50:], rows[args.steps:][-50:]
    change = fmean(row["mean_change"] for row in rows_R)
    loss, accuracy = fmean(row["loss"] for row in rows_D), fmean(row["accuracy"] for row in rows_D)
    print(f"R: mean |R(x) - x| = {change:.3f} with x in [-1, 1] (0 is the identity); D: loss "
          f"{loss:.3f} (2 ln 2 = 1.386 is guessing), accuracy {accuracy:.2f}")


def arguments():
    p = parser(__doc__)
    add_training_flags(p)
    p.add_argument("--method", choices=["ours", "simgan"], default="ours",
                   help="ours: perceptual loss; simgan: L1")
    p.add_argument("--steps", type=positive(int), default=1200, help="(paper) steps of R")
    p.add_argument("--d-steps", type=positive(int), default=400, help="(paper) steps of D")
    p.add_argument("--lr", type=positive(float), default=1e-4, help="(paper) of R")
    p.add_argument("--d-lr", type=positive(float), default=1e-3, help="(paper) of D")
    p.add_argument("--layer", default="Conv2d_4a_3x3", help="psi_j of Eq 5, ours only")
    add_inception_flag(p)
    p.add_argument("--final-relu", action="store_true", help="the last ReLU of Table 1")
    p.add_argument("--d-stride", type=positive(int), default=3,
                   help="(paper) stride of D's first layer: patches of 50 x 50 pixels; 1: 20 x 20")
    p.add_argument("--save-every", type=positive(int), default=200, help="steps")
    args = p.parse_args()
    if args.layer == "pool3":
        p.error("--layer pool3: is FID's, of 299 x 299 pixels; give Mixed_7c or an earlier one")
    args.run = args.run or Path("runs") / args.method
    return args


def main():
    args = arguments()
    device = pick_device(args.device, args.precision)
    saved_run(args.run / "pretrain.pt", "pretrain", args)      # or its UserError
    announce(device, args.seed, f"{args.data}/", f"{args.run}/pretrain.*",
             precision_note(device, args.precision))

    # 1. The images.
    check_domains(args.data, ["synthetic", "real"], ["train", "test"])
    synthetic = load_images(args.data / "synthetic/train")
    real = load_images(args.data / "real/train")
    settings = settings_of(args, images=[synthetic, real])

    # 2. The networks: psi of Eq 5, R and D.
    psi = None
    if args.method == "ours":
        psi = place(load_inception(args.inception, args.layer, real, args.seed), device)
    torch.manual_seed(args.seed)
    R = place(Refiner(), device)
    D = place(Discriminator(args.final_relu, args.d_stride), device)

    # 3. Train R, then D.
    lock(args.run)
    saved = saved_run(args.run / "pretrain.pt", "pretrain", args)    # again: another may have ended
    if not saved:                                             # the picture of a run to --overwrite
        (args.run / "pretrain.png").unlink(missing_ok=True)
    synthetic, real = keep_on(device, synthetic, real)
    rows = train(R, D, psi, synthetic, real, args, device, settings, saved)

    # 4. What R has learned, as a picture.
    summarise(args.run / "pretrain.png", R, synthetic[:6].to(device), rows, args)
    print(f"done: {args.run}/pretrain.pt, {args.run}/pretrain.csv, {args.run}/pretrain.png")


if __name__ == "__main__":
    start(main)
