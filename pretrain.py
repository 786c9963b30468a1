"""Stage 2: pre-train the refiner R, then the discriminator D (sections 3.3 and 5.1).

R learns to give back its input: `ours` by the perceptual loss (Eq 5), `simgan` by the L1
self-regularisation (Eq 4). D learns to tell synthetic images from real ones. After this R
changes nothing and D sees through it; the adversarial training (train_gan.py) starts there.

Reads   data/synthetic/train, data/real/train (images only)
Writes  runs/METHOD/pretrain.pt   both networks, both optimisers, the random state
        runs/METHOD/pretrain.csv  one row a step: loss, and what it means in plain units
        runs/METHOD/pretrain.png  synthetic / R(synthetic) / |difference|

    python pretrain.py                       ours, the paper's 1200 + 400 steps
    python pretrain.py --method simgan       the baseline
    python pretrain.py --resume              go on after a stop, with the same flags

R takes 0.2 s a step of batch 8 at 32 x 64 on 2 cores, and linearly more for more images and
pixels: about an hour with the defaults at 80 x 160.
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from models import (Discriminator, Refiner, announce, keep_on, learning_layout, load_inception,
                    make_optimizer, patch_loss, pick, pick_device, read, read_every, rebuild,
                    resume_or_start, same_settings, save_checkpoint, sha256, speed_up,
                    stop_requests, to_float, to_uint8)
from prepare import (UserError, load_images, lock, parser, positive, progress, save_grid, start,
                     write_text)


def perceptual_loss(psi, refined, x):
    """Eq 5: mean over C, H, W (and the batch) of |psi(R(x)) - psi(x)|^2, squared L2."""
    with torch.no_grad():
        target = psi(x)
    return F.mse_loss(psi(refined), target)


def update_R(R, optimizer, x, psi):
    """One step of R towards the identity; x: synthetic images in [-1, 1], [N, 3, H, W].

    The loss is Eq 5 with psi, or the L1 self-regularisation of SimGAN (Eq 4, as a mean) where
    psi is None. Returns the loss and mean |R(x) - x|.
    """
    refined = R(x)
    change = (refined - x).abs().mean()
    loss = change if psi is None else perceptual_loss(psi, refined, x)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return torch.stack([loss, change]).detach()


def update_D(D, optimizer, x, y):
    """One step of D on Eq 1 with synthetic images x in place of refined ones, and real ones y.

    Returns the loss (2 ln 2 = 1.386 is guessing) and the share of right patches.
    """
    logits_x, logits_y = D(x), D(y)
    loss = patch_loss(logits_x, 1) + patch_loss(logits_y, 0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    right = torch.cat([logits_x.argmax(1) == 1, logits_y.argmax(1) == 0])
    return torch.stack([loss, right.float().mean()]).detach()


class Run:
    """Everything that a stopped pre-training needs to go on, and how it is saved."""

    def __init__(self, args, device, state):
        self.args, self.device = args, device
        torch.manual_seed(args.seed)                             # the initial weights
        R = rebuild(Refiner, state, "refiner", args.run) if state else Refiner(skip=args.skip)
        D = rebuild(Discriminator, state, "discriminator", args.run) if state else \
            Discriminator(args.final_relu, args.d_stride)
        self.R, self.D = (speed_up(net, device, args.precision, layout=learning_layout(device))
                          for net in (R, D))
        self.optimizer_R = make_optimizer(args.optimizer, self.R.parameters(), args.lr)
        self.optimizer_D = make_optimizer(args.d_optimizer, self.D.parameters(), args.d_lr)
        self.random = torch.Generator().manual_seed(args.seed)   # the batches
        self.step, self.log = 0, []
        if state:
            self.optimizer_R.load_state_dict(state["optimizer_R"])
            self.optimizer_D.load_state_dict(state["optimizer_D"])
            self.random.set_state(state["random"])
            self.step, self.log = state["step"], state["log"]

    def batch(self, images):
        """A random batch of uint8 [N, 3, H, W] as network input."""
        return pick(images, self.args.batch_size, self.random, self.device)

    def take(self, rows, folder):
        """Append rows to the log; stop before a loss that is not a number can be saved."""
        for row in rows:
            self.log.append(row)
            if not math.isfinite(row[0]):
                raise UserError(f"step {len(self.log)}: the loss is {row[0]}; the last good "
                                f"state is {folder / 'pretrain.pt'}, if any was saved; try a "
                                "smaller --lr or --d-lr")

    def save(self, settings, finished):
        """Write pretrain.csv and pretrain.pt, each one whole."""
        rows = [f"{i + 1},{'R' if i < self.args.steps else 'D'},{a:.6g},{b:.6g}\n"
                for i, (a, b) in enumerate(self.log)]
        write_text(self.args.run / "pretrain.csv",
                   "".join(["step,network,loss,mean_change_or_accuracy\n"] + rows))
        save_checkpoint(self.args.run / "pretrain.pt", "pretrain", settings=settings,
                        finished=finished, step=self.step, log=self.log,
                        refiner_args=self.R.args, refiner=self.R.state_dict(),
                        discriminator_args=self.D.args, discriminator=self.D.state_dict(),
                        optimizer_R=self.optimizer_R.state_dict(),
                        optimizer_D=self.optimizer_D.state_dict(),
                        random=self.random.get_state())


def arguments():
    p = parser(__doc__)
    p.add_argument("--device", default="auto", help="auto (cuda, mps, cpu), or one of them")
    p.add_argument("--method", choices=["ours", "simgan"], default="ours",
                   help="ours: perceptual loss; simgan: L1")
    p.add_argument("--data", type=Path, default=Path("data"), help="what prepare.py made")
    p.add_argument("--run", type=Path, help="(default: runs/METHOD)")
    p.add_argument("--steps", type=positive(int), default=1200, help="(paper) steps of R")
    p.add_argument("--d-steps", type=positive(int), default=400, help="(paper) steps of D")
    p.add_argument("--batch-size", type=positive(int), default=16, help="images a batch")
    p.add_argument("--lr", type=positive(float), default=1e-4, help="(paper) of R")
    p.add_argument("--d-lr", type=positive(float), default=1e-3, help="(paper) of D")
    p.add_argument("--skip", action="store_true",
                   help="R's last layer gives a change that is added to the image (not the "
                   "paper's)")
    p.add_argument("--layer", default="Conv2d_4a_3x3", help="psi_j of Eq 5, ours only")
    p.add_argument("--inception", default="imagenet", help="imagenet, random or a file")
    p.add_argument("--optimizer", choices=["adam", "momentum", "sgd"], default="adam",
                   help="of R; momentum is SGD with 0.9")
    p.add_argument("--d-optimizer", choices=["adam", "momentum", "sgd"], default="momentum",
                   help="of D")
    p.add_argument("--final-relu", action="store_true", help="(paper) last ReLU of Table 1")
    p.add_argument("--d-stride", type=positive(int), default=3,
                   help="(paper) of D's first convolution: a patch is 50 x 50 pixels; 20 x 20 at 1")
    p.add_argument("--precision", choices=["float32", "tf32", "bfloat16"], default="float32",
                   help="of the networks; losses are float32")
    p.add_argument("--save-every", type=positive(int), default=200, help="steps")
    p.add_argument("--resume", action="store_true", help="go on with a stopped run")
    p.add_argument("--overwrite", action="store_true", help="replace an existing run")
    args = p.parse_args()
    args.run = args.run or Path("runs") / args.method
    return args


@torch.no_grad()
def summarise(run, x):
    """Draw pretrain.png from synthetic images x and print what the last 50 steps of each were."""
    refined = run.R(x)
    save_grid(run.args.run / "pretrain.png",
              {"synthetic": to_uint8(x), "R(synthetic)": to_uint8(refined),
               "|difference|": to_uint8((refined - x).abs() - 1)})
    of_R, of_D = (torch.tensor(rows[-50:]).mean(0) for rows in
                  (run.log[:run.args.steps], run.log[run.args.steps:]))
    print(f"R: mean |R(x) - x| = {of_R[1]:.3f} of the [-1, 1] range (0 is the identity); "
          f"D: loss {of_D[0]:.3f} (1.386 is guessing), accuracy {of_D[1]:.2f}")


def main():
    args = arguments()
    lock(args.run, make=False)
    device = pick_device(args.device)
    settings = {k: str(v) for k, v in vars(args).items()
                if k not in ("run", "resume", "overwrite", "device", "save_every")}
    path = args.run / "pretrain.pt"
    state = resume_or_start(path, "pretrain", settings, args.resume, args.overwrite)
    announce("pretrain.py", device, args.seed, f"{args.data}/", f"{args.run}/pretrain.*")
    synthetic = load_images(args.data / "synthetic" / "train")
    real = load_images(args.data / "real" / "train")
    if synthetic.shape[1:] != real.shape[1:]:
        raise UserError(f"{args.data}: synthetic images are {list(synthetic.shape[2:])}, real "
                        f"ones {list(real.shape[2:])}; prepare both with one --size")
    settings["images"] = sha256(synthetic, real)[:16]
    same_settings(path, state["settings"] if state else settings, settings)
    psi = None
    if args.method == "ours":
        psi = load_inception(args.inception, args.layer, real, args.seed).to(device)
    lock(args.run)
    run = Run(args, device, state)

    synthetic, real = keep_on(device, synthetic, real)
    stop, total, pending = stop_requests(), args.steps + args.d_steps, []
    bar = progress(total=total, initial=run.step, unit="step", desc=f"pretrain {args.method}")
    while run.step < total:
        if run.step < args.steps:
            values = update_R(run.R, run.optimizer_R, run.batch(synthetic), psi)
            text = "R loss {:.4f} |R(x)-x| {:.3f}"
        else:
            values = update_D(run.D, run.optimizer_D, run.batch(synthetic), run.batch(real))
            text = "D loss {:.3f} accuracy {:.2f}"
        pending.append(values)
        run.step += 1
        bar.update()
        save = run.step % args.save_every == 0 or run.step == total or bool(stop)
        if save or run.step % read_every(device) == 0:
            run.take(read(pending), args.run)
            bar.set_postfix_str(text.format(*run.log[-1]), refresh=False)
        if save:
            run.save(settings, run.step == total)
        if save and stop:                       # not if it came after the save
            raise KeyboardInterrupt(f"at step {run.step} of {total}, saved in {args.run}")
    bar.close()
    summarise(run, to_float(synthetic[:6].to(device)))
    print(f"done: {path}, {args.run}/pretrain.csv, {args.run}/pretrain.png")


if __name__ == "__main__":
    start(main)
