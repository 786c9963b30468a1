"""Stage 3: adversarial training of the refiner R against the discriminator D (section 3.3).

    repeat  twice:  R <- R - grad L_R,   L_R = alpha L_adv + beta L_rec           (Eq 2), D fixed
            once:   D <- D - grad L_D,   half of its refined images from a history (Eq 1), R fixed

Reads   data/{synthetic,real}, runs/METHOD/pretrain.pt
Writes  runs/METHOD/gan.pt      R at the best step by the paper's rule: what refine.py takes
        runs/METHOD/last.pt     everything to go on from (--resume)
        runs/METHOD/log.csv     one row a step; the README explains every column
        runs/METHOD/curves.png  Figure 1;  runs/METHOD/samples/step_NNNNNN.png

    python train_gan.py --alpha 50 --beta 4e-6      the paper's run, 5000 steps
    python train_gan.py --method simgan             the baseline, same losses
    python train_gan.py --resume                    go on after a stop, with the same flags

A step of batch 16 takes about 1.7 s at 40 x 80 on 2 cores, 7 s at 80 x 160.
"""
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

from models import (Discriminator, Refiner, announce, load_checkpoint, make_optimizer,
                    patch_loss, pick_device, resume_or_start, save_checkpoint, speed_up, ssim,
                    stop_requests, to_float, to_uint8)
from prepare import (UserError, load_images, parser, positive, progress, run, save_grid,
                     write_text)

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
        rest = images[max(room, 0):]
        places = torch.randperm(len(self), generator=self.random)[:len(rest)]
        self.images[places.to(images.device)] = rest[:len(places)]

    def sample(self, n):
        """n random images of it, uint8 [n, 3, H, W]."""
        index = torch.randint(len(self), (n,), generator=self.random)
        return self.images[index.to(self.images.device)]


def score(rows):
    """The paper's rule for a good step as one number (section 5.1): "generator losses and
    discriminator losses for real images are the lowest, and the discriminator losses for
    refined images are the highest". All three are cross-entropies, so they are added as they
    are; `rows` are the log rows since the last sample, whose mean smooths them. The first 1000
    steps (half of a short run) are left out: while R leaps and D is caught out the rule has its
    highest value, whatever the images look like."""
    mean = torch.tensor(rows).nanmean(0).tolist()
    return mean[3] - mean[2] - mean[0]


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
    figure.savefig(f"{path}.tmp", format="png", dpi=90)
    plt.close(figure)
    Path(f"{path}.tmp").replace(path)


def arguments():
    p = parser(__doc__)
    p.add_argument("--device", default="auto", help="auto (cuda, mps, cpu), or one of them")
    p.add_argument("--method", choices=["ours", "simgan"], default="ours",
                   help="whose pretrain.pt to start from; the rest is the same")
    p.add_argument("--data", type=Path, default=Path("data"))
    p.add_argument("--run", type=Path, help="(default: runs/METHOD)")
    p.add_argument("--alpha", type=float, default=50, help="(paper) weight of L_adv")
    p.add_argument("--beta", type=float, default=4e-6, help="(paper) weight of L_rec")
    p.add_argument("--steps", type=positive(int), default=5000, help="(paper)")
    p.add_argument("--batch-size", type=positive(int), default=16)
    p.add_argument("--lr", type=positive(float), default=1e-4, help="(paper) of R")
    p.add_argument("--d-lr", type=positive(float), default=1e-3, help="(paper) of D")
    p.add_argument("--history", type=int, default=100, help="capacity in batches; 0: none")
    p.add_argument("--rec-batch", type=positive(int), default=512,
                   help="images over which L_rec is summed, whatever the batch size")
    p.add_argument("--optimizer", choices=["adam", "momentum", "sgd"], default="sgd",
                   help="(paper) of R; momentum is SGD with 0.9")
    p.add_argument("--d-optimizer", choices=["adam", "momentum", "sgd"], default="momentum",
                   help="of D")
    p.add_argument("--save-every", type=positive(int), default=500, help="steps")
    p.add_argument("--sample-every", type=positive(int), default=100,
                   help="steps between pictures, SSIM and a look for the best step")
    p.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    p.add_argument("--compile", action="store_true", help="torch.compile both networks")
    p.add_argument("--resume", action="store_true", help="go on with a stopped run")
    p.add_argument("--overwrite", action="store_true", help="replace an existing run")
    args = p.parse_args()
    args.run = args.run or Path("runs") / args.method
    if min(args.alpha, args.beta, args.history) < 0:
        p.error("--alpha, --beta and --history cannot be negative")
    return args


def main():
    args = arguments()
    device = pick_device(args.device)
    settings = {k: str(v) for k, v in vars(args).items()
                if k not in ("run", "resume", "overwrite", "device", "save_every", "compile")}
    state = resume_or_start(args.run / "last.pt", "gan", settings, args.resume, args.overwrite)
    pretrained = load_checkpoint(args.run / "pretrain.pt", ["pretrain"],
                                 f"run pretrain.py --method {args.method} first")
    if not pretrained["finished"]:
        raise UserError(f"{args.run / 'pretrain.pt'}: stopped at step {pretrained['step']}; "
                        "finish it with pretrain.py --resume")
    announce("train_gan.py", device, args.seed, f"{args.data}/ and {args.run}/pretrain.pt",
             f"{args.run}/")

    synthetic = load_images(args.data / "synthetic" / "train")
    real = load_images(args.data / "real" / "train")
    pairs = [load_images(args.data / d / "test")[:64] for d in ("synthetic", "real")]
    pairs = [images[:min(map(len, pairs))] for images in pairs]       # fixed, for SSIM
    random = torch.Generator().manual_seed(args.seed)         # the only source of randomness

    def batch(images, n=args.batch_size):
        index = torch.randint(len(images), (n,), generator=random)
        return to_float(images[index].to(device))

    source = state or pretrained
    R = Refiner(**source["refiner_args"])
    D = Discriminator(**source["discriminator_args"])
    R.load_state_dict(source["refiner"])
    D.load_state_dict(source["discriminator"])
    R = speed_up(R, device, args.precision, args.compile)
    D = speed_up(D, device, args.precision, args.compile)
    optimizer_R = make_optimizer(args.optimizer, R.parameters(), args.lr)
    optimizer_D = make_optimizer(args.d_optimizer, D.parameters(), args.d_lr)
    history = History(args.history * args.batch_size, random)
    n_old = args.batch_size // 2 if args.history else 0       # of D's refined batch
    start, log, best = 0, [], {"step": 0, "score": -math.inf, "refiner": {}}
    if state:
        optimizer_R.load_state_dict(state["optimizer_R"])
        optimizer_D.load_state_dict(state["optimizer_D"])
        random.set_state(state["random"])
        history.images = state["history"].to(device)
        start, log, best = state["step"], state["log"], state["best"]
    elif args.history:
        with torch.no_grad():
            history.add(to_uint8(R(batch(synthetic))))

    def update_R():
        """One step on L_R with D fixed; returns L_adv, L_rec and mean |R(x) - x|."""
        D.requires_grad_(False)
        x = batch(synthetic)
        refined = R(x)                                                # x' = R(x)
        loss_adv = patch_loss(D(refined), REAL)                       # Eq 3: -log(1 - D(x'))
        change = (refined - x).abs().mean()
        loss_rec = args.rec_batch * VALUES * change                   # Eq 4: an L1 sum
        loss_R = args.alpha * loss_adv + args.beta * loss_rec         # Eq 2
        optimizer_R.zero_grad()
        loss_R.backward()
        optimizer_R.step()
        D.requires_grad_(True)
        return loss_adv, loss_rec, change

    def update_D():
        """One step on L_D with R fixed; returns both losses and the share of right patches."""
        with torch.no_grad():
            new = to_uint8(R(batch(synthetic, args.batch_size - n_old)))
        old = history.sample(n_old) if n_old else new[:0]
        logits_refined, logits_real = D(to_float(torch.cat([new, old]))), D(batch(real))
        loss_refined = patch_loss(logits_refined, REFINED)            # Eq 1: -log D(x')
        loss_real = patch_loss(logits_real, REAL)                     #       -log(1 - D(y))
        optimizer_D.zero_grad()
        (loss_refined + loss_real).backward()
        optimizer_D.step()
        if args.history:
            history.add(new)
        return (loss_real, loss_refined, (logits_real.argmax(1) == REAL).float().mean(),
                (logits_refined.argmax(1) == REFINED).float().mean())

    @torch.no_grad()
    def sample(step):
        """A picture of fixed test images at this step; returns their mean SSIM to fixed real
        ones (never used to choose anything)."""
        refined = torch.cat([to_uint8(R(to_float(x.to(device)))).cpu() for x in pairs[0].split(8)])
        x, y, r = pairs[0][:6], pairs[1][:6], refined[:6]
        save_grid(args.run / "samples" / f"step_{step:06d}.png",
                  {"synthetic": x, "refined": r, "real": y,
                   "|difference|": (r.int() - x.int()).abs().to(torch.uint8)})
        return ssim(refined, pairs[1]).mean().item()

    def save(step):
        write_text(args.run / "log.csv", "\n".join(
            [",".join(["step"] + COLUMNS)] + [",".join([str(i + 1)] + [f"{v:.6g}" for v in row])
                                              for i, row in enumerate(log)]) + "\n")
        if best["step"]:
            save_checkpoint(args.run / "gan.pt", "best", settings=settings, step=best["step"],
                            score=best["score"], refiner_args=R.args, refiner=best["refiner"])
        save_checkpoint(args.run / "last.pt", "gan", settings=settings, step=step, log=log,
                        best=best, refiner_args=R.args, refiner=R.state_dict(),
                        discriminator_args=D.args, discriminator=D.state_dict(),
                        optimizer_R=optimizer_R.state_dict(),
                        optimizer_D=optimizer_D.state_dict(), history=history.images.cpu(),
                        random=random.get_state())

    warm_up = min(WARM_UP, args.steps // 2)
    stop, said, clock = stop_requests(), set(), time.perf_counter()
    bar = progress(total=args.steps, initial=start, unit="step", desc=f"train_gan {args.method}")
    for step in range(start + 1, args.steps + 1):
        update_R()
        adv, rec, change = update_R()
        d_losses = update_D()
        values = torch.stack([adv, rec, *d_losses, change]).tolist()
        if not all(map(math.isfinite, values)):
            bad = next(c for c, v in zip(COLUMNS, values) if not math.isfinite(v))
            raise UserError(f"step {step}: {bad} is not finite; the last good state is in "
                            f"{args.run / 'last.pt'} (if any was saved); try a smaller --lr")
        now = time.perf_counter()
        log.append(values + [len(history), args.batch_size / (now - clock), math.nan])
        clock = now
        bar.set_postfix_str(f"adv {adv:.2f} |R(x)-x| {change:.3f} D real {d_losses[0]:.2f} "
                            f"refined {d_losses[1]:.2f}", refresh=False)
        bar.update()
        if step % args.sample_every == 0 or step == args.steps:
            log[-1][-1] = sample(step)
            window = log[-args.sample_every:]
            watch(window, step, said)
            if score(window) > best["score"] and step > warm_up:
                best = {"step": step, "score": score(window),
                        "refiner": {k: v.clone() for k, v in R.state_dict().items()}}
        if step % args.save_every == 0 or step == args.steps or stop:
            save(step)
        if stop:
            raise KeyboardInterrupt
    bar.close()
    draw_curves(args.run / "curves.png", log, args.sample_every, best["step"])
    print(f"best step by the paper's rule: {best['step']} of {args.steps} (score "
          f"{best['score']:.3f})")
    print(f"done: {args.run / 'gan.pt'}, {args.run / 'curves.png'}, {args.run / 'samples'}/")


if __name__ == "__main__":
    run(main)
