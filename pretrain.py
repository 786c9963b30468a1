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

About 25 minutes with the defaults at 40 x 80 on 2 cores, four times that at 80 x 160.
"""
from pathlib import Path

import torch
import torch.nn.functional as F

from models import (Discriminator, Refiner, announce, load_inception, make_optimizer,
                    patch_loss, pick_device, resume_or_start, save_checkpoint, speed_up,
                    stop_requests, to_float, to_uint8)
from prepare import (UserError, load_images, parser, positive, progress, run, save_grid,
                     write_text)


def perceptual_loss(psi, refined, x):
    """Eq 5: mean over C, H, W (and the batch) of |psi(R(x)) - psi(x)|^2, squared L2."""
    with torch.no_grad():
        target = psi(x)
    return F.mse_loss(psi(refined), target)


def arguments():
    p = parser(__doc__)
    p.add_argument("--device", default="auto", help="auto (cuda, mps, cpu), or one of them")
    p.add_argument("--method", choices=["ours", "simgan"], default="ours",
                   help="ours: perceptual loss; simgan: L1")
    p.add_argument("--data", type=Path, default=Path("data"))
    p.add_argument("--run", type=Path, help="(default: runs/METHOD)")
    p.add_argument("--steps", type=positive(int), default=1200, help="(paper) steps of R")
    p.add_argument("--d-steps", type=positive(int), default=400, help="(paper) steps of D")
    p.add_argument("--batch-size", type=positive(int), default=16)
    p.add_argument("--lr", type=positive(float), default=1e-4, help="(paper) of R")
    p.add_argument("--d-lr", type=positive(float), default=1e-3, help="(paper) of D")
    p.add_argument("--layer", default="Conv2d_4a_3x3", help="psi_j of Eq 5, ours only")
    p.add_argument("--inception", default="imagenet", help="imagenet, random or a file")
    p.add_argument("--optimizer", choices=["adam", "momentum", "sgd"], default="adam",
                   help="of R; momentum is SGD with 0.9")
    p.add_argument("--d-optimizer", choices=["adam", "momentum", "sgd"], default="momentum",
                   help="of D")
    p.add_argument("--final-relu", action="store_true", help="(paper) last ReLU of Table 1")
    p.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    p.add_argument("--save-every", type=positive(int), default=200, help="steps")
    p.add_argument("--resume", action="store_true", help="go on with a stopped run")
    p.add_argument("--overwrite", action="store_true", help="replace an existing run")
    args = p.parse_args()
    args.run = args.run or Path("runs") / args.method
    return args


def main():
    args = arguments()
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
    torch.manual_seed(args.seed)
    random = torch.Generator().manual_seed(args.seed)        # the only source of batches

    def batch(images):
        index = torch.randint(len(images), (args.batch_size,), generator=random)
        return to_float(images[index].to(device))

    R = speed_up(Refiner(), device, args.precision)
    D = speed_up(Discriminator(args.final_relu), device, args.precision)
    optimizer_R = make_optimizer(args.optimizer, R.parameters(), args.lr)
    optimizer_D = make_optimizer(args.d_optimizer, D.parameters(), args.d_lr)
    start, log = 0, []
    if state:
        R.load_state_dict(state["refiner"])
        D.load_state_dict(state["discriminator"])
        optimizer_R.load_state_dict(state["optimizer_R"])
        optimizer_D.load_state_dict(state["optimizer_D"])
        random.set_state(state["random"])
        start, log = state["step"], state["log"]
    if args.method == "ours":
        psi = load_inception(args.inception, args.layer, real, args.seed).to(device)

    def update_R():
        x = batch(synthetic)
        refined = R(x)
        loss = perceptual_loss(psi, refined, x) if args.method == "ours" \
            else (refined - x).abs().mean()
        optimizer_R.zero_grad()
        loss.backward()
        optimizer_R.step()
        return loss.item(), (refined - x).abs().mean().item()

    def update_D():
        logits_synthetic, logits_real = D(batch(synthetic)), D(batch(real))
        loss = patch_loss(logits_synthetic, 1) + patch_loss(logits_real, 0)      # Eq 1
        optimizer_D.zero_grad()
        loss.backward()
        optimizer_D.step()
        right = [(logits_synthetic.argmax(1) == 1).float().mean(),
                 (logits_real.argmax(1) == 0).float().mean()]
        return loss.item(), (sum(right) / 2).item()

    def save(step):
        args.run.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, "pretrain", settings=settings, step=step, log=log,
                        finished=step == args.steps + args.d_steps,
                        refiner_args=R.args, refiner=R.state_dict(),
                        discriminator_args=D.args, discriminator=D.state_dict(),
                        optimizer_R=optimizer_R.state_dict(),
                        optimizer_D=optimizer_D.state_dict(), random=random.get_state())
        rows = [f"{i + 1},{'R' if i < args.steps else 'D'},{a:.6g},{b:.6g}"
                for i, (a, b) in enumerate(log)]
        write_text(args.run / "pretrain.csv",
                   "\n".join(["step,network,loss,mean_change_or_accuracy"] + rows) + "\n")

    stop = stop_requests()
    total = args.steps + args.d_steps
    bar = progress(total=total, initial=start, unit="step", desc=f"pretrain {args.method}")
    for step in range(start + 1, total + 1):
        loss, meaning = update_R() if step <= args.steps else update_D()
        if not abs(loss) < float("inf"):
            raise UserError(f"step {step}: the loss is {loss}; the last good state is in {path} "
                            "(if any was saved); try a smaller --lr or --d-lr")
        log.append([loss, meaning])
        if step <= args.steps:
            bar.set_postfix_str(f"R loss {loss:.4f} |R(x)-x| {meaning:.3f}", refresh=False)
        else:
            bar.set_postfix_str(f"D loss {loss:.3f} accuracy {meaning:.2f}", refresh=False)
        bar.update()
        if step % args.save_every == 0 or step == total or stop:
            save(step)
        if stop:
            raise KeyboardInterrupt
    bar.close()

    with torch.no_grad():
        x = to_float(synthetic[:6].to(device))
        refined = R(x)
    save_grid(args.run / "pretrain.png",
              {"synthetic": to_uint8(x), "R(synthetic)": to_uint8(refined),
               "|difference|": to_uint8((refined - x).abs() - 1)})
    change = [b for _, b in log[:args.steps]][-50:]
    accuracy = [b for _, b in log[args.steps:]][-50:]
    losses = [a for a, _ in log[args.steps:]][-50:]
    print(f"R: mean |R(x) - x| = {sum(change) / len(change):.3f} of the [-1, 1] range (0 is the "
          f"identity); D: loss {sum(losses) / len(losses):.3f} (1.386 is guessing), accuracy "
          f"{sum(accuracy) / len(accuracy):.2f}")
    print(f"done: {path}, {args.run}/pretrain.csv, {args.run}/pretrain.png")


if __name__ == "__main__":
    run(main)
