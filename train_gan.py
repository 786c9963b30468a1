"""Stage 3: adversarial training of the refiner R against the discriminator D (section 3.3).

    repeat  twice:  a step of R down L_R = alpha L_adv + beta L_rec                  (Eq 2), D fixed
            once:   a step of D down L_D, half of the refined images from a history  (Eq 1, mended)

Reads   data/{synthetic,real}, runs/METHOD/pretrain.pt (METHOD: ours or simgan)
Writes  runs/METHOD/average.pt  R averaged over the last steps: what refine.py takes
        runs/METHOD/gan.pt      R at the best step by the paper's rule
        runs/METHOD/last.pt     everything to go on from (--resume)
        runs/METHOD/log.csv     one row a step; the README explains every column
        runs/METHOD/curves.png  Figure 1;  runs/METHOD/samples/step_NNNNNN.png

    python train_gan.py --alpha 50 --beta 4e-6      the paper's weights, 5000 steps
    python train_gan.py --rec l2                    L_rec by squares, not by L1
    python train_gan.py --method simgan             the comparison, same losses
    python train_gan.py --resume                    go on after a stop, with the same flags
    python train_gan.py --resume --steps 8000       extend a run of 2000 steps or more

The 5000 steps of 16 images, 80 x 160, take two cores ten hours; linear in images and pixels.
"""
import copy
import math
import shutil
from pathlib import Path
from statistics import fmean

import torch

from models import REAL, REFINED, Discriminator, Refiner, patch_loss, ssim
from prepare import check_domains, load_images
from support.cli import UserError, announce, lock, natural, not_negative, parser, positive, start
from support.figures import save_curves, save_grid
from support.training import (OPTIMIZERS, Batches, Training, add_training_flags, autocast, keep_on,
                              load_checkpoint, make_optimizer, pick_device, place, precision_note,
                              rebuild, save_checkpoint, saved_run, settings_of, to_float, to_uint8)

VALUES = 3 * 80 * 160                                  # of one image in the paper
WARM_UP = 1000      # first steps, at most half of a run, that cannot be the best: D is weak there
COLUMNS = ["loss_adv", "loss_rec", "d_loss_real", "d_loss_refined", "d_acc_real",
           "d_acc_refined", "mean_change", "history", "ssim"]


class History:
    """The history of refined images (Shrivastava et al. 2017, section 2.3), uint8 [n, 3, H, W]. It
    grows to `capacity` images; then new ones replace old ones drawn by the generator `random`."""

    def __init__(self, capacity, random, device):
        self.capacity, self.random, self.device = capacity, random, device
        self.images = torch.empty(0, dtype=torch.uint8, device=device)

    def add(self, images):
        """Take in uint8 images [n, 3, H, W]."""
        images = images.to(self.device)
        room = self.capacity - len(self.images)
        if room > 0:
            self.images = torch.cat([self.images, images[:room]])
        rest = images[room:]
        if len(rest) and self.capacity:
            index = torch.randperm(len(self.images), generator=self.random)[:len(rest)]
            self.images[index.to(self.device, non_blocking=True)] = rest

    def draw(self, n):
        """n random images of it, with replacement, uint8 [n, 3, H, W]."""
        index = torch.randint(len(self.images), (n,), generator=self.random)
        return self.images[index.to(self.device, non_blocking=True)]

    def state_dict(self):
        return self.images.cpu()

    def load_state_dict(self, images):
        self.images = images.to(self.device)


class BestStep:
    """R at the best step by the paper's rule (sections 5.1 and 5.5): "generator losses and
    discriminator losses for real images are the lowest, and the discriminator losses for refined
    images are the highest". Here: the highest mean of d_loss_refined - d_loss_real - loss_adv, as
    no formula is given; L_adv, not L_R, is taken for the generator loss."""

    def __init__(self):
        self.step, self.score, self.refiner = 0, -math.inf, {}

    def look(self, R, step, rows):
        """Keep R if it scores higher than all before; rows: the last ones of the log."""
        score = fmean(row["d_loss_refined"] - row["d_loss_real"] - row["loss_adv"] for row in rows)
        if score > self.score:
            self.step, self.score = step, score
            self.refiner = copy.deepcopy(R.state_dict())

    def state_dict(self):
        return {"step": self.step, "score": self.score, "refiner": self.refiner}

    def load_state_dict(self, state):
        self.step, self.score, self.refiner = state["step"], state["score"], state["refiner"]


# --------------------------------------------------------------- the two updates, section 3.3


def update_R(R, D, optimizer, x, alpha, beta, rec_batch, rec="l1"):
    """One step of R on L_R with D fixed; x: synthetic images in [-1, 1], [N, 3, H, W].

    L_rec: the sum over rec_batch images of 3 x 80 x 160 values of |R(x) - x| (rec "l1", Eq 4) or
    of its square ("l2"). Returns L_adv, L_rec and mean |R(x) - x|.
    """
    D.requires_grad_(False)
    refined = R(x)                                              # x' = R(x)
    loss_adv = patch_loss(D(refined), REAL)                     # Eq 3: -log(1 - D(x'))
    change = (refined - x).abs().mean()
    distance = change if rec == "l1" else (refined - x).square().mean()
    loss_rec = rec_batch * VALUES * distance                    # Eq 4, over rec_batch images
    loss_R = alpha * loss_adv + beta * loss_rec                 # Eq 2
    optimizer.zero_grad()
    loss_R.backward()
    optimizer.step()
    D.requires_grad_(True)
    return {"loss_adv": loss_adv.detach(), "loss_rec": loss_rec.detach(),
            "mean_change": change.detach()}


def update_D(R, D, optimizer, x, y, history, n_old):
    """One step of D on L_D with R fixed; x [n - n_old, 3, H, W] synthetic, y [n, 3, H, W] real.

    Both are in [-1, 1]. D's n refined images are R(x) and n_old of the history, which then takes
    in R(x). Returns D's loss on real and on refined images, and its share of right patches on each.
    """
    new = refine(R, x)
    old = history.draw(n_old).to(x.device) if n_old else new[:0]
    logits_refined, logits_real = D(to_float(torch.cat([new, old]))), D(y)
    loss_refined = patch_loss(logits_refined, REFINED)                # Eq 1: -log D(x')
    loss_real = patch_loss(logits_real, REAL)                         #       -log(1 - D(y)), mended
    optimizer.zero_grad()
    (loss_refined + loss_real).backward()
    optimizer.step()
    history.add(new)
    return {"d_loss_real": loss_real.detach(), "d_loss_refined": loss_refined.detach(),
            "d_acc_real": (logits_real.argmax(1) == REAL).float().mean(),
            "d_acc_refined": (logits_refined.argmax(1) == REFINED).float().mean()}


@torch.no_grad()
def refine(R, x):
    """R(x) in 8 bits, as real images are, or D could tell them by that: -> uint8 [N, 3, H, W]."""
    return to_uint8(R(x))


@torch.no_grad()
def update_average(average, R, n):
    """Move `average` towards R by 1/n. With n = 1, 2, ... N, N, ... it is the mean of all steps at
    first, then an exponential moving average over about N (Yazici et al. 2019)."""
    for mean, weight in zip(average.parameters(), R.parameters()):
        mean.lerp_(weight, 1 / n)


# ------------------------------------------------------------------------------- the training


def train(R, D, synthetic, real, pairs, args, device, settings, saved):
    """Section 3.3. synthetic, real, and both of pairs (for pictures and SSIM): uint8 [N, 3, H, W].
    Returns the log's rows and the BestStep."""
    n = args.batch_size
    optimizer_R = make_optimizer("sgd", R.parameters(), args.lr)        # "an SGD step"
    optimizer_D = make_optimizer(args.d_optimizer, D.parameters(), args.d_lr)
    batches = Batches(args.seed, device)
    average, best = copy.deepcopy(R), BestStep()
    history = History(args.history * n, batches.random, synthetic.device)
    n_old = n // 2 if args.history else 0                     # of D's refined images
    training = Training(args.run / "last.pt", "gan", args.run / "log.csv", settings, COLUMNS,
                        saved, refiner=R, discriminator=D, optimizer_R=optimizer_R,
                        optimizer_D=optimizer_D, average=average, history=history, best=best,
                        random=batches)
    if not training.step:                                     # a new run
        history.add(refine(R, batches.draw(synthetic, n)))    # it begins with a batch

    for step in training.steps(args.steps, args.save_every,
                               lambda: save_refiners(R, average, best, training, args.run)):
        with autocast(device, args.precision):
            # Twice R, with D fixed:  min over theta of  L_R = alpha L_adv + beta L_rec   (Eq 2)
            #     L_adv = -log(1 - D(x'))   (Eq 3),   L_rec = |x' - x|   (Eq 4),   x' = R(x)
            for _ in range(2):
                x = batches.draw(synthetic, n)
                values_R = update_R(R, D, optimizer_R, x, args.alpha, args.beta, args.rec_batch,
                                    args.rec)
            # Once D, with R fixed:   min over phi of  L_D = -log D(x') - log(1 - D(y))   (Eq 1,
            #     mended: printed, both are -log D), where half of the x' are from the history
            x, y = batches.draw(synthetic, n - n_old), batches.draw(real, n)
            values_D = update_D(R, D, optimizer_D, x, y, history, n_old)
        update_average(average, R, min(step, args.average))
        training.log({**values_R, **values_D, "history": len(history.images)})

        if step % args.sample_every == 0 or step == args.steps:
            training.read()                                   # the log up to this step
            picture = args.run / f"samples/step_{step:06d}.png"
            training.rows[-1]["ssim"] = save_samples(picture, R, average, pairs, device)
            if step > min(WARM_UP, args.steps // 2):
                best.look(R, step, training.rows[-args.sample_every:])
    return training.rows, best


# ----------------------------------------------------------- what is seen and saved on the way


def save_samples(path, R, average, pairs, device):
    """Save a picture of fixed synthetic test images, refined; return their mean SSIM to fixed real
    ones (only for Figure 1). pairs: two uint8 [N, 3, H, W]."""
    synthetic, real = (images.to(device) for images in pairs)
    refined = torch.cat([refine(R, to_float(x)) for x in synthetic.split(8)])
    x, r = synthetic[:6], refined[:6]
    averaged = refine(average, to_float(x))
    save_grid(path, {"synthetic": x, "refined": r, "averaged R": averaged, "real": real[:6],
                     "|difference|": (r.int() - x.int()).abs().byte()})
    return ssim(refined, real).mean().item()


def save_refiners(R, average, best, training, folder):
    """Write average.pt and, once there is a best step, gan.pt."""
    same = {"settings": training.settings, "refiner_args": R.args}
    save_checkpoint(folder / "average.pt", "average", **same, step=training.step,
                    refiner=average.state_dict())
    if best.step:
        save_checkpoint(folder / "gan.pt", "best", **same, **best.state_dict())
    else:
        (folder / "gan.pt").unlink(missing_ok=True)           # of the run that was overwritten


# -------------------------------------------------------------------------------- the command


def arguments():
    p = parser(__doc__)
    add_training_flags(p)
    p.add_argument("--method", choices=["ours", "simgan"], default="ours",
                   help="whose pretrain.pt to start from; the rest is the same")
    p.add_argument("--alpha", type=not_negative, default=50.0, help="(paper) weight of L_adv")
    p.add_argument("--beta", type=not_negative, default=4e-6, help="(paper) weight of L_rec")
    p.add_argument("--steps", type=positive(int), default=5000, help="(paper)")
    p.add_argument("--lr", type=positive(float), default=1e-4, help="(paper) of R")
    p.add_argument("--d-lr", type=positive(float), default=1e-3, help="(paper) of D")
    p.add_argument("--history", type=natural, default=100, help="capacity in batches; 0: none")
    p.add_argument("--rec-batch", type=positive(int), default=512,
                   help="L_rec is scaled to the sum over so many images, whatever the batch size")
    p.add_argument("--average", type=positive(int), help="steps over which R's weights are "
                   "averaged for average.pt (default: a fifth of --steps, at most 200)")
    p.add_argument("--rec", choices=["l1", "l2"], default="l1",
                   help="(paper) L_rec: L1, or squares")
    p.add_argument("--d-optimizer", choices=OPTIMIZERS, default="momentum", help="of D")
    p.add_argument("--save-every", type=positive(int), default=500, help="steps")
    p.add_argument("--sample-every", type=positive(int), default=100,
                   help="steps between pictures, SSIM and a look for the best step")
    args = p.parse_args()
    if args.batch_size == 1 and args.history:
        p.error("--batch-size 1: no half of D's images can be of the history; give --history 0")
    args.run = args.run or Path("runs") / args.method
    args.average = args.average or max(1, min(200, args.steps // 5))
    return args


def load_checkpoints(args):
    """last.pt of the run to go on with, or None, and pretrain.pt."""
    saved = saved_run(args.run / "last.pt", "gan", args)
    pretrained = load_checkpoint(args.run / "pretrain.pt", ["pretrain"],
                                 f"run pretrain.py --method {args.method} first")
    if not pretrained["finished"]:
        raise UserError(f"{args.run / 'pretrain.pt'}: stopped at step {pretrained['step']}; "
                        "finish it with pretrain.py --resume")
    method = pretrained["settings"]["method"]
    if method != args.method:
        raise UserError(f"{args.run / 'pretrain.pt'}: is of --method {method}, not {args.method}; "
                        "give that one, or another --run")
    # Another --steps may not change the warm-up, nor the steps that were looked at (see `train`).
    if saved:
        old = int(saved["settings"]["steps"])
        same_looks = old >= 2 * WARM_UP and old % args.sample_every == 0
        if same_looks and args.steps >= 2 * WARM_UP and args.steps > saved["step"]:
            saved["settings"]["steps"] = str(args.steps)
    return saved, pretrained


def load_data(folder):
    """Training images of both domains, and up to 64 fixed test pairs for pictures and SSIM."""
    synthetic, real = load_images(folder / "synthetic/train"), load_images(folder / "real/train")
    x, y = load_images(folder / "synthetic/test"), load_images(folder / "real/test")
    n = min(64, len(x), len(y))
    return synthetic, real, (x[:n], y[:n])


def main():
    args = arguments()
    device = pick_device(args.device, args.precision)

    # 1. The checkpoint of pre-training and, to --resume, that of this script.
    saved, pretrained = load_checkpoints(args)
    announce(device, args.seed, f"{args.data}/ and {args.run}/pretrain.pt",
             f"{args.run}/", precision_note(device, args.precision))

    # 2. The images, and all that decides the run.
    check_domains(args.data, ["synthetic", "real"], ["train", "test"])
    synthetic, real, pairs = load_data(args.data)
    lock(args.run)
    saved, pretrained = load_checkpoints(args)      # again: another process may have ended by now
    settings = settings_of(args, images=[synthetic, real], pretrain=pretrained["refiner"].values(),
                           discriminator=pretrained["discriminator"].values())
    if pretrained["settings"].get("images", settings["images"]) != settings["images"]:
        print(f"warning: {args.run / 'pretrain.pt'} has learned from other images than these; if "
              "that is not meant, run pretrain.py --overwrite")

    # 3. Both networks, pre-trained; `train` brings those of a stopped run to where they were.
    path = args.run / "pretrain.pt"
    R = place(rebuild(Refiner, pretrained, "refiner", path), device)
    D = place(rebuild(Discriminator, pretrained, "discriminator", path), device)

    # 4. Train them against each other.
    if not saved:                                             # the pictures of a run to --overwrite
        shutil.rmtree(args.run / "samples", ignore_errors=True)
        (args.run / "curves.png").unlink(missing_ok=True)
    synthetic, real = keep_on(device, synthetic, real, args.history * args.batch_size)
    rows, best = train(R, D, synthetic, real, pairs, args, device, settings, saved)

    # 5. Figure 1.
    save_curves(args.run / "curves.png", rows, args.sample_every, best.step)
    print(f"best step by the paper's rule: {best.step} of {args.steps} (score {best.score:.3f})")
    print(f"done: {args.run}/average.pt, {args.run}/gan.pt (the best step), "
          f"{args.run}/curves.png, {args.run}/samples/")


if __name__ == "__main__":
    start(main)
