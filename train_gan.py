"""Stage 3: adversarial training of the refiner R against the discriminator D (section 3.3).

    repeat  twice:  R <- R - grad L_R,   L_R = alpha L_adv + beta L_rec           (Eq 2), D fixed
            once:   D <- D - grad L_D,   half of its refined images from a history (Eq 1), R fixed

Reads   data/{synthetic,real}, runs/METHOD/pretrain.pt
Writes  runs/METHOD/average.pt  R with its weights averaged over the last steps: what refine.py
                                takes, since it did better than the rule's step (README)
        runs/METHOD/gan.pt      R at the best step by the paper's rule
        runs/METHOD/last.pt     everything to go on from (--resume)
        runs/METHOD/log.csv     one row a step; the README explains every column
        runs/METHOD/curves.png  Figure 1;  runs/METHOD/samples/step_NNNNNN.png

    python train_gan.py --alpha 50 --beta 4e-6      the paper's run, 5000 steps (L_rec: squares)
    python train_gan.py --rec l1                    L_rec as the paper prints it
    python train_gan.py --method simgan             the baseline, same losses
    python train_gan.py --resume                    go on after a stop, with the same flags
    python train_gan.py --resume --steps 8000       go further than was asked for at first

A step of batch 8 takes 0.8 s at 32 x 64 on 2 cores; the time is linear in images and pixels, so
one of batch 16 takes about 10 s at 80 x 160: the full run wants a GPU.
"""
import math
import time
from pathlib import Path

import torch
from torch.func import functional_call
from tqdm import tqdm

from models import (Discriminator, Refiner, announce, keep_on, learning_layout, load_checkpoint,
                    make_optimizer, patch_loss, pick, pick_device, read, read_every, rebuild,
                    resume_or_start, same_settings, save_checkpoint, sha256, speed_up, ssim,
                    stop_requests, to_float, to_uint8)
from prepare import (UserError, load_images, lock, parser, positive, progress, save_grid, start,
                     whole, write_text)

REAL, REFINED = 0, 1                                   # D's two classes
VALUES = 3 * 80 * 160                                  # of one image in the paper
WARM_UP = 1000                                         # steps of which none can be the best
COLUMNS = ["loss_adv", "loss_rec", "d_loss_real", "d_loss_refined", "d_acc_real",
           "d_acc_refined", "mean_change", "history", "images_per_s", "ssim"]


class History:
    """The history of refined images (Shrivastava et al. 2017, section 2.3), uint8.

    Grows until it holds `capacity` images; from then on new images replace random old ones.
    """

    def __init__(self, capacity, random):
        self.capacity, self.random = capacity, random
        self.images = torch.empty(0, dtype=torch.uint8)

    def __len__(self):
        return len(self.images)

    def add(self, images):
        """Take in uint8 images [n, 3, H, W]."""
        room = self.capacity - len(self)
        if room > 0:
            self.images = torch.cat([self.images.to(images.device), images[:room]])
        rest = images[room:]
        if not len(rest) or not self.capacity:
            return
        places = torch.randperm(len(self), generator=self.random)[:len(rest)]
        self.images[places.to(images.device, non_blocking=True)] = rest[:len(places)]

    def sample(self, n):
        """n random images of it, uint8 [n, 3, H, W]."""
        index = torch.randint(len(self), (n,), generator=self.random)
        return self.images[index.to(self.images.device, non_blocking=True)]


def score(rows):
    """The paper's rule for a good step as one number (section 5.1): "generator losses and
    discriminator losses for real images are the lowest, and the discriminator losses for
    refined images are the highest". All three are cross-entropies, so they are added as they
    are; `rows` are the log rows since the last sample, whose mean smooths them. The first 1000
    steps (half of a short run) are left out: while R leaps and D is caught out the rule has its
    highest value, whatever the images look like."""
    adv, _, real, refined = torch.tensor(rows)[:, :4].mean(0).tolist()
    return refined - real - adv


def watch(rows, step, said):
    """Say once, in one line, when the training has left the rails. `rows`: the last log rows."""
    adv, _, real, refined, _, _, change = torch.tensor(rows)[:, :7].mean(0).tolist()
    for name, broken, text in [
            ("dead", max(abs(real - math.log(2)), abs(refined - math.log(2))) < 5e-4,
             "D is dead: both its losses stay at ln 2; leave --final-relu away, other --seed"),
            ("wins", adv > 7, "D wins outright (R's loss is above 7): R learns from L_rec "
             "alone; pre-train D less (--d-steps) or lower --d-lr"),
            ("left", change > 0.9, "R has left the image (mean |R(x) - x| above 0.9 of the "
             "[-1, 1] range): raise --beta or lower --alpha")]:
        if broken and name not in said:
            said.add(name)
            tqdm.write(f"warning, step {step}: {text}")


# --------------------------------------------------------------- the two updates, section 3.3


def update_R(R, D, optimizer, x, alpha, beta, rec_batch, rec="l2"):
    """One step of R on L_R with D fixed; x: synthetic images in [-1, 1], [N, 3, H, W].

    rec: "l1" as in Eq 4; "l2", squares. Where all of a bright image must get darker, L1 has the
    same slope for every result, and so does not mind if contrast is lost; squares do (README).
    Returns L_adv, L_rec and mean |R(x) - x|, three scalars.
    """
    D.requires_grad_(False)
    refined = R(x)                                                    # x' = R(x)
    loss_adv = patch_loss(D(refined), REAL)                           # Eq 3: -log(1 - D(x'))
    change = (refined - x).abs().mean()
    distance = change if rec == "l1" else (refined - x).square().mean()
    loss_rec = rec_batch * VALUES * distance                          # Eq 4 (l1): a sum
    loss_R = alpha * loss_adv + beta * loss_rec                       # Eq 2
    optimizer.zero_grad()
    loss_R.backward()
    optimizer.step()
    D.requires_grad_(True)
    return loss_adv.detach(), loss_rec.detach(), change.detach()


def update_D(R, D, optimizer, x, y, history, n_old):
    """One step of D on L_D with R fixed; x synthetic, y real, both [n, 3, H, W] in [-1, 1].

    D's refined images are R(x) and `n_old` of the history, which then takes R(x) in.
    Returns D's loss on real and on refined images and its share of right patches on each.
    """
    with torch.no_grad():
        new = to_uint8(R(x))
    old = history.sample(n_old) if n_old else new[:0]
    logits_refined, logits_real = D(to_float(torch.cat([new, old]))), D(y)
    loss_refined = patch_loss(logits_refined, REFINED)                # Eq 1: -log D(x')
    loss_real = patch_loss(logits_real, REAL)                         #       -log(1 - D(y))
    optimizer.zero_grad()
    (loss_refined + loss_real).backward()
    optimizer.step()
    history.add(new)
    return (loss_real.detach(), loss_refined.detach(),
            (logits_real.argmax(1) == REAL).float().mean(),
            (logits_refined.argmax(1) == REFINED).float().mean())


@torch.no_grad()
def take_average(average, R, n):
    """Move `average`, {name: tensor}, towards R's weights by 1/n, in place.

    With n = 1, 2, ... N, N, ... it is the mean of all steps at first, then a running one over
    about the last N (Yazici et al. 2019): R and D chase each other, and this is the middle.
    """
    for name, weight in R.state_dict().items():
        average[name].lerp_(weight, 1 / n)


def gan_step(run, synthetic, real):
    """One step of section 3.3: twice R, then once D; images uint8 [N, 3, H, W]. Returns the
    first columns of the log as a tensor: reading numbers here would make the host wait."""
    args, n = run.args, run.args.batch_size
    for _ in range(2):
        adv, rec, change = update_R(run.R, run.D, run.optimizer_R, run.batch(synthetic, n),
                                    args.alpha, args.beta, args.rec_batch, args.rec)
    n_old = n // 2 if args.history else 0                     # of D's refined batch
    d_values = update_D(run.R, run.D, run.optimizer_D, run.batch(synthetic, n - n_old),
                        run.batch(real, n), run.history, n_old)
    run.step += 1
    take_average(run.average, run.R, min(run.step, args.average))
    return torch.stack([adv, rec, *d_values, change, torch.full_like(adv, len(run.history))])


# ------------------------------------------------------------------------------ the pictures


@torch.no_grad()
def sample(run, pairs):
    """Save a picture of fixed synthetic test images; return their mean SSIM, refined, to fixed
    real ones (for Figure 1; it chooses nothing). pairs: two uint8 [N, 3, H, W]."""
    refined = torch.cat([to_uint8(run.R(to_float(x.to(run.device)))).cpu()
                         for x in pairs[0].split(8)])
    x, y, r = pairs[0][:6], pairs[1][:6], refined[:6]
    averaged = functional_call(run.R, run.average, to_float(x.to(run.device)))
    save_grid(run.args.run / f"samples/step_{run.step:06d}.png",
              {"synthetic": x, "refined": r, "averaged R": to_uint8(averaged).cpu(), "real": y,
               "|difference|": (r.int() - x.int()).abs().to(torch.uint8)})
    return ssim(refined, pairs[1]).mean().item()


def check_finite(rows, step, folder):
    """Stop before a loss that is not a number can be saved; the last good state stays.
    rows: new ones of the log, of which the first belongs to `step`."""
    for i, row in enumerate(rows):
        for name, value in zip(COLUMNS[:7], row):
            if not math.isfinite(value):
                raise UserError(f"step {step + i}: {name} is {value}; the last good state is "
                                f"{folder / 'last.pt'}, if any was saved; try a smaller --lr")


def draw_curves(path, log, sample_every, best):
    """Figure 1: SSIM of fixed pairs, D's loss on real, D's loss on refined, best step marked."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    values = torch.tensor(log)
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    for axis, column, title in zip(axes, ("ssim", "d_loss_real", "d_loss_refined"),
                                   ("SSIM(R(x), y), fixed pairs", "D loss, real images",
                                    "D loss, refined images")):
        curve = values[:, COLUMNS.index(column)]
        steps = torch.arange(1, len(curve) + 1)
        if column != "ssim":                            # the raw curve, and its mean over a window
            axis.plot(steps, curve, color="0.8")
            window = min(sample_every, len(curve))
            curve, steps = curve.unfold(0, window, 1).mean(1), steps[window - 1:]
        here = ~curve.isnan()
        axis.plot(steps[here], curve[here], marker="." if column == "ssim" else None)
        if best:
            axis.axvline(best, color="C3", linestyle="--", label=f"chosen step {best}")
            axis.legend()
        axis.set(title=title, xlabel="step")
    figure.tight_layout()
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
    plt.close(figure)


# ----------------------------------------------------------------- what a run is made of


class Run:
    """Everything that a stopped training needs to go on, and how it is saved.

    source: a checkpoint of pretrain.py, or of this script (then all of it is restored).
    """

    def __init__(self, args, device, source):
        self.args, self.device = args, device
        self.R = rebuild(Refiner, source, "refiner", args.run)
        self.D = rebuild(Discriminator, source, "discriminator", args.run)
        for net in (self.R, self.D):
            speed_up(net, device, args.precision, args.compile, learning_layout(device))
        self.optimizer_R = make_optimizer(args.optimizer, self.R.parameters(), args.lr)
        self.optimizer_D = make_optimizer(args.d_optimizer, self.D.parameters(), args.d_lr)
        self.random = torch.Generator().manual_seed(args.seed)   # the only source of randomness
        self.history = History(args.history * args.batch_size, self.random)
        self.step, self.log, self.average = 0, [], self.weights()
        self.best = {"step": 0, "score": -math.inf, "refiner": {}}
        if source["stage"] == "gan":
            self.optimizer_R.load_state_dict(source["optimizer_R"])
            self.optimizer_D.load_state_dict(source["optimizer_D"])
            self.random.set_state(source["random"])
            self.history.images = source["history"].to(device)
            self.step, self.log, self.best = source["step"], source["log"], source["best"]
            self.average = {k: v.to(device) for k, v in source["average"].items()}

    def weights(self):
        """A copy of R's weights."""
        return {k: v.clone() for k, v in self.R.state_dict().items()}

    def batch(self, images, n):
        """n random images of uint8 [N, 3, H, W] as network input."""
        return pick(images, n, self.random, self.device)

    def take(self, rows, seconds):
        """Append rows of `gan_step` to the log; they took `seconds` together."""
        check_finite(rows, len(self.log) + 1, self.args.run)
        rate = len(rows) * self.args.batch_size / seconds
        self.log += [[*row, rate, math.nan] for row in rows]

    def judge(self, window):
        """Keep R if the log rows of `window` score higher than all before."""
        if score(window) > self.best["score"]:
            self.best = {"step": self.step, "score": score(window),
                         "refiner": self.weights()}

    def save(self, settings):
        """Write log.csv, gan.pt (once there is a best step), average.pt and last.pt, each one
        whole."""
        rows = [[str(i + 1)] + [f"{v:.6g}" for v in row] for i, row in enumerate(self.log)]
        write_text(self.args.run / "log.csv",
                   "".join(",".join(row) + "\n" for row in [["step"] + COLUMNS] + rows))
        if self.best["step"]:
            save_checkpoint(self.args.run / "gan.pt", "best", settings=settings,
                            refiner_args=self.R.args, **self.best)
        save_checkpoint(self.args.run / "average.pt", "average", settings=settings,
                        step=self.step, refiner_args=self.R.args, refiner=self.average)
        save_checkpoint(self.args.run / "last.pt", "gan", settings=settings, step=self.step,
                        log=self.log, best=self.best, average=self.average,
                        history=self.history.images.cpu(),
                        refiner_args=self.R.args, refiner=self.R.state_dict(),
                        discriminator_args=self.D.args, discriminator=self.D.state_dict(),
                        optimizer_R=self.optimizer_R.state_dict(),
                        optimizer_D=self.optimizer_D.state_dict(),
                        random=self.random.get_state())


def arguments():
    p = parser(__doc__)
    p.add_argument("--device", default="auto", help="auto (cuda, mps, cpu), or one of them")
    p.add_argument("--method", choices=["ours", "simgan"], default="ours",
                   help="whose pretrain.pt to start from; the rest is the same")
    p.add_argument("--data", type=Path, default=Path("data"), help="what prepare.py made")
    p.add_argument("--run", type=Path, help="(default: runs/METHOD)")
    p.add_argument("--alpha", type=float, default=50, help="(paper) weight of L_adv")
    p.add_argument("--beta", type=float, default=4e-6, help="(paper) weight of L_rec")
    p.add_argument("--steps", type=positive(int), default=5000, help="(paper)")
    p.add_argument("--batch-size", type=positive(int), default=16, help="images a batch")
    p.add_argument("--lr", type=positive(float), default=1e-4, help="(paper) of R")
    p.add_argument("--d-lr", type=positive(float), default=1e-3, help="(paper) of D")
    p.add_argument("--history", type=int, default=100, help="capacity in batches; 0: none")
    p.add_argument("--rec-batch", type=positive(int), default=512,
                   help="images over which L_rec is summed, whatever the batch size")
    p.add_argument("--average", type=positive(int), help="steps over which R's weights are "
                   "averaged for average.pt (default: a fifth of --steps, at most 200)")
    p.add_argument("--rec", choices=["l1", "l2"], default="l2",
                   help="L_rec: squares, or (paper) l1, which blurs")
    p.add_argument("--optimizer", choices=["adam", "momentum", "sgd"], default="sgd",
                   help="(paper) of R; momentum is SGD with 0.9")
    p.add_argument("--d-optimizer", choices=["adam", "momentum", "sgd"], default="momentum",
                   help="of D")
    p.add_argument("--save-every", type=positive(int), default=500, help="steps")
    p.add_argument("--sample-every", type=positive(int), default=100,
                   help="steps between pictures, SSIM and a look for the best step")
    p.add_argument("--precision", choices=["float32", "tf32", "bfloat16"], default="float32",
                   help="of the networks; losses are float32")
    p.add_argument("--compile", action="store_true", help="torch.compile both networks")
    p.add_argument("--resume", action="store_true", help="go on with a stopped run")
    p.add_argument("--overwrite", action="store_true", help="replace an existing run")
    args = p.parse_args()
    args.run = args.run or Path("runs") / args.method
    args.average = args.average or min(200, args.steps // 5 or 1)
    if min(args.alpha, args.beta, args.history) < 0:
        p.error("--alpha, --beta and --history cannot be negative")
    return args


def load_data(folder):
    """Training images of both domains, and up to 64 fixed test pairs for pictures and SSIM."""
    synthetic, real, *pairs = [load_images(folder / d / s) for s in ("train", "test")
                               for d in ("synthetic", "real")]
    n = min(64, *map(len, pairs))
    return synthetic, real, [images[:n] for images in pairs]


def warm_up(steps):
    """After which step of a run the best one is looked for (see `score`)."""
    return min(WARM_UP, steps // 2)


def check_steps(path, state, args):
    """Another --steps may be asked for if until here the run would have been the same with it."""
    done, old = state["step"], int(state["settings"]["steps"])
    if args.steps < done:
        raise UserError(f"{path}: has done {done} steps, more than --steps {args.steps}")
    odd_look = done == old and done % args.sample_every        # the last step is always judged
    if args.steps != old and (warm_up(args.steps) != warm_up(old) or odd_look):
        raise UserError(f"{path}: was run with steps = {old}, not {args.steps}, and looked for its "
                        f"best step accordingly; only a run of {2 * WARM_UP} steps or more, a "
                        "multiple of --sample-every, can go further")


def main():
    args = arguments()
    lock(args.run, make=False)
    device = pick_device(args.device)
    settings = {k: str(v) for k, v in vars(args).items() if k not in (
        "run", "resume", "overwrite", "device", "save_every", "compile", "steps")}
    state = resume_or_start(args.run / "last.pt", "gan", settings, args.resume, args.overwrite)
    if state:
        check_steps(args.run / "last.pt", state, args)
    pretrained = load_checkpoint(args.run / "pretrain.pt", ["pretrain"],
                                 f"run pretrain.py --method {args.method} first")
    if not pretrained["finished"]:
        raise UserError(f"{args.run / 'pretrain.pt'}: stopped at step {pretrained['step']}; "
                        "finish it with pretrain.py --resume")
    announce("train_gan.py", device, args.seed, f"{args.data}/ and {args.run}/pretrain.pt",
             f"{args.run}/")
    synthetic, real, pairs = load_data(args.data)
    settings.update(pretrain=sha256(*pretrained["refiner"].values())[:16],
                    images=sha256(synthetic, real)[:16])
    same_settings(args.run / "last.pt", state["settings"] if state else settings, settings)
    settings["steps"] = str(args.steps)
    run = Run(args, device, state or pretrained)
    synthetic, real = keep_on(device, synthetic, real)
    if not run.step:                                          # the history is never empty
        with torch.no_grad():
            run.history.add(to_uint8(run.R(run.batch(synthetic, args.batch_size))))

    stop, said, pending, clock = stop_requests(), set(), [], time.perf_counter()
    bar = progress(total=args.steps, initial=run.step, unit="step", desc=f"GAN {args.method}")
    while run.step < args.steps:
        pending.append(gan_step(run, synthetic, real))
        bar.update()
        look, last = run.step % args.sample_every == 0, run.step == args.steps
        save = run.step % args.save_every == 0 or last or bool(stop)
        if look or save or run.step % read_every(device) == 0:
            rows, now = read(pending), time.perf_counter()
            run.take(rows, now - clock)
            clock = now
            adv, _, d_real, d_refined, _, _, change, _ = rows[-1]
            bar.set_postfix_str(f"adv {adv:.2f} |R(x)-x| {change:.3f} D real {d_real:.2f} "
                                f"refined {d_refined:.2f}", refresh=False)
        if look or last:
            run.log[-1][-1] = sample(run, pairs)
            watch(run.log[-args.sample_every:], run.step, said)
            if run.step > warm_up(args.steps):
                run.judge(run.log[-args.sample_every:])
        if save:
            run.save(settings)
        if save and stop:                       # not if it came after the save
            raise KeyboardInterrupt(f"at step {run.step} of {args.steps}, saved in {args.run}")
    bar.close()
    draw_curves(args.run / "curves.png", run.log, args.sample_every, run.best["step"])
    print(f"best step by the paper's rule: {run.best['step']} of {args.steps} (score "
          f"{run.best['score']:.3f})")
    print(f"done: {args.run / 'average.pt'}, {args.run / 'gan.pt'} (the best step), "
          f"{args.run / 'curves.png'}, {args.run / 'samples'}/")


if __name__ == "__main__":
    start(main)
