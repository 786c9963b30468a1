"""Stage 6: Tables 3-6. Which images make the better training set for segmentation?

Trains each network on each domain (synthetic, colour, simgan, ours, real) and tests it on each.
The trainings of a network differ in their data only: same number of images, epochs, learning
rate and seed, so the same initial weights and the same order.

Reads   data/{synthetic,colour,simgan,ours,real}/{train,test}/{images,labels}
Writes  results/segment_NETWORK.md    full matrices of mIoU and pixel accuracy, per-class IoU
        results/segment_NETWORK.json  every confusion matrix, settings, versions
        results/table7.png            what each training set taught, on a real test image
        results/weights/              the trained networks; a finished one is not trained again

    python segment.py                                both networks
    python segment.py --network unet --seeds 0 1 2   mean and spread over seeds
    python segment.py --blur 0.6                     how much depends on detail? trains nothing anew
    python segment.py --epochs 30 15                 U-Net, and DeepLabV3+, which takes longer

At 40 x 80, 700 images and 2 cores an epoch takes 16 s (U-Net) and 25 s (DeepLabV3+).
"""
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from models import (DeepLabV3Plus, UNet, announce, jackknife_error, leave_out, load_tensors,
                    make_optimizer, pick_device, provenance, save_checkpoint, sha256, speed_up,
                    to_float)
from prepare import (CLASSES, IGNORE, PALETTE, UserError, load_images, load_labels, natural,
                     parser, positive, progress, save_grid, start, writable, write_text)

DOMAINS = ["synthetic", "colour", "simgan", "ours", "real"]
NETWORKS = ["unet", "deeplabv3plus"]
TITLE = {"unet": "U-Net", "deeplabv3plus": "DeepLabV3+"}
# Tables 3-6: rows are training images, columns synthetic, refined, real. The paper's "refined"
# column is SimGAN-refined on SimGAN's row and refined by ours on the others (section 5.5).
PAPER = {
    "unet": {"mIoU": {"synthetic": (.34, .13, .10), "simgan": (.26, .31, .10),
                      "real": (.14, .11, .49), "ours": (.23, .43, .14)},
             "accuracy": {"synthetic": (78.55, 31.97, 32.8), "simgan": (74.34, 77.3, 33.33),
                          "real": (48.83, 42.48, 85.42), "ours": (66.37, 79.58, 57.11)}},
    "deeplabv3plus": {
        "mIoU": {"synthetic": (.28, .11, .08), "simgan": (.18, .23, .09),
                 "real": (.12, .10, .42), "ours": (.15, .31, .12)},
        "accuracy": {"synthetic": (72.65, 29.14, 28.05), "simgan": (67.3, 70.9, 31.75),
                     "real": (46.39, 39.38, 82.9), "ours": (63.5, 72.79, 56.43)}},
}


# -------------------------------------------------------------------------------- the scores


def confusion(truth, predicted, classes=len(CLASSES)):
    """Confusion matrix, int64 [classes, classes]: rows truth, columns predicted.

    truth, predicted: integer tensors of one shape; pixels whose truth is IGNORE do not count.
    """
    known = truth != IGNORE
    index = truth[known].long() * classes + predicted[known].long()
    return torch.bincount(index, minlength=classes ** 2).view(classes, classes)


def scores_with_error(matrices):
    """`scores` of the sum of one confusion matrix per test image, [N, classes, classes]; and
    the standard errors that the choice of those images leaves (one training, one seed)."""
    result = scores(matrices.sum(0))
    for metric in ("mIoU", "accuracy"):
        result[f"{metric}_se"] = jackknife_error(
            leave_out(lambda m: scores(m.sum(0))[metric], matrices))
    return result


def scores(matrix):
    """mIoU (a fraction), pixel accuracy (%), IoU per class and how many classes were averaged.

    IoU = TP / (TP + FP + FN) over the whole test set. A class that is absent from both truth
    and prediction has no IoU (nan) and is left out of the mean, as in cityscapesScripts.
    """
    m = matrix.double()
    hit = m.diag()
    union = m.sum(0) + m.sum(1) - hit
    iou = torch.where(union > 0, hit / union.clamp(min=1), torch.nan)
    return {"mIoU": iou.nanmean().item(),
            "accuracy": (100 * hit.sum() / m.sum().clamp(min=1)).item(),
            "IoU": iou.tolist(), "classes": int((union > 0).sum())}


# ------------------------------------------------------------------------- train and test


def build(network, backbone_weights):
    """A new network on the current random state."""
    return UNet() if network == "unet" else DeepLabV3Plus(backbone_weights=backbone_weights)


def train(net, images, labels, epochs, args, device, title):
    """Cross-entropy (void ignored), Adam, cosine learning rate, random mirroring."""
    batch = min(args.batch_size, len(images))
    steps = epochs * (len(images) // batch)                   # the odd rest of an epoch waits
    optimizer = make_optimizer("adam", net.parameters(), args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    bar = progress(total=steps, unit="step", desc=title)
    net.train()
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for index in order.split(batch):
            if len(index) < batch:
                continue
            x, y = images[index].to(device), labels[index].to(device).long()
            mirror = (torch.rand(batch) < 0.5).to(device)
            x = torch.where(mirror[:, None, None, None], x.flip(-1), x)
            y = torch.where(mirror[:, None, None], y.flip(-1), y)
            loss = F.cross_entropy(net(to_float(x)), y, ignore_index=IGNORE, reduction="sum")
            loss = loss / (y != IGNORE).sum().clamp(min=1)    # an all-void batch: 0, not nan
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
        if not torch.isfinite(loss):
            raise UserError(f"{title}: the loss is {loss.item()}; try a smaller --lr")
    bar.close()


@torch.no_grad()
def predict(net, images, device, batch_size=16):
    """trainIds, uint8 [N, H, W], of uint8 images [N, 3, H, W]."""
    net.eval()
    return torch.cat([net(to_float(x.to(device))).argmax(1).to(torch.uint8).cpu()
                      for x in images.split(batch_size)])


def epochs_of(network, args):
    """Of one or two `--epochs`, the one that counts for `network`."""
    return args.epochs[NETWORKS.index(network) % len(args.epochs)]


def trained(network, domain, seed, data, args, device):
    """The network trained on `domain`: from results/weights if that very training is there."""
    images, labels = data
    wanted = {"network": network, "domain": domain, "seed": seed, "images": len(images),
              "data": sha256(images, labels), "epochs": epochs_of(network, args),
              "batch_size": args.batch_size, "lr": args.lr, "precision": args.precision,
              "backbone_weights": str(args.backbone_weights)}
    path = args.out / "weights" / f"{network}_{domain}_seed{seed}.pt"
    torch.manual_seed(seed)                                   # equal for all domains
    net = speed_up(build(network, args.backbone_weights), device, args.precision)
    if path.is_file():
        state = load_tensors(path, "weights")
        if (isinstance(state, dict) and state.get("settings") == wanted
                and state["weights"].keys() == net.state_dict().keys()):  # not an older network's
            net.load_state_dict(state["weights"])
            print(f"{path}: trained before, not again")
            return net
    train(net, images, labels, wanted["epochs"], args, device,
          f"{network} on {domain}, seed {seed}")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, "segment", settings=wanted, weights=net.state_dict())
    return net


# -------------------------------------------------------------------------------- the report


def mean_spread(values, digits):
    """"0.123" or, over several seeds, "0.123 ± 0.004" (standard deviation)."""
    text = f"{np.mean(values):.{digits}f}"
    return text if len(values) == 1 else text + f" ± {np.std(values, ddof=1):.{digits}f}"


def matrix_table(network, metric, results, domains):
    """Ours (domains x domains, the paper's cells bold) and the paper's table, as Markdown."""
    digits = 3 if metric == "mIoU" else 1
    lines = [f"{metric} ({'fraction' if metric == 'mIoU' else '%'}); the paper's cells are "
             "bold, its own figures in brackets", "",
             "| trained on \\ tested on | " + " | ".join(domains) + " |",
             "|---" * (len(domains) + 1) + "|"]
    for row in results[0]:
        cells = []
        for column in domains:
            text = mean_spread([r[row][column][metric] for r in results], digits)
            refined = "simgan" if row == "simgan" else "ours"
            if column in ("synthetic", refined, "real") and row in PAPER[network][metric]:
                k = {"synthetic": 0, "real": 2}.get(column, 1)
                text = f"**{text}** ({PAPER[network][metric][row][k]})"
            cells.append(text)
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def class_table(results):
    """IoU per class on real test images, by training domain; "-" where a class is absent."""
    domains = list(results[0])
    lines = ["IoU per class, tested on real", "",
             "| class | " + " | ".join(domains) + " |", "|---" * (len(domains) + 1) + "|"]
    for i, name in enumerate(CLASSES):
        values = [[r[d]["real"]["IoU"][i] for r in results] for d in domains]
        lines.append(f"| {name} | " + " | ".join(
            "-" if np.isnan(v).any() else mean_spread(v, 3) for v in values) + " |")
    counts = [results[0][d]["real"]["classes"] for d in domains]
    lines.append("| classes in the mean | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines) + "\n"


def colour(labels):
    """Label maps [N, H, W] as Cityscapes colours, uint8 [N, 3, H, W]."""
    return torch.from_numpy(PALETTE[labels.numpy()]).permute(0, 3, 1, 2)


def arguments():
    p = parser(__doc__)
    p.add_argument("--device", default="auto", help="auto (cuda, mps, cpu), or one of them")
    p.add_argument("--data", type=Path, default=Path("data"), help="what prepare.py made")
    p.add_argument("--out", type=Path, default=Path("results"), help="where tables go")
    p.add_argument("--network", choices=NETWORKS + ["both"], default="both", help="which")
    p.add_argument("--train", choices=DOMAINS, nargs="+", help="only on these; tested on all")
    p.add_argument("--epochs", type=positive(int), nargs="+", default=[30], metavar="N",
                   help="passes over the data; two: of U-Net and of DeepLabV3+")
    p.add_argument("--batch-size", type=positive(int), default=16, help="images a batch")
    p.add_argument("--lr", type=positive(float), default=1e-3, help="at the start; cosine to 0")
    p.add_argument("--seeds", type=natural, nargs="+", default=[0], help="one training each")
    p.add_argument("--backbone-weights", default="none",
                   help="of DeepLabV3+'s ResNet-50: none, imagenet (downloaded) or a file")
    p.add_argument("--blur", type=positive(float), metavar="SIGMA", help="blur the test images by "
                   "so many pixels: how far do the networks rely on detail? Tables of their own")
    p.add_argument("--precision", choices=["float32", "tf32", "bfloat16"], default="float32",
                   help="of the networks; losses are float32")
    args = p.parse_args()
    if len(args.epochs) > 2:
        p.error("--epochs: one number, or one for U-Net and one for DeepLabV3+")
    if args.batch_size < 2:
        p.error("--batch-size 1: BatchNorm needs two images at least")
    args.backbone_weights = None if args.backbone_weights == "none" else args.backbone_weights
    return args


def main():
    args = arguments()
    device = pick_device(args.device)
    announce("segment.py", device, args.seeds, f"{args.data}/*", f"{args.out}/segment_*, table7")
    domains = [d for d in DOMAINS if (args.data / d / "train").is_dir()]
    if "real" not in domains or len(domains) < 2:
        raise UserError(f"{args.data}: needs real/ and at least one of {', '.join(DOMAINS[:4])}; "
                        "run prepare.py and refine.py first")
    for missing in [d for d in DOMAINS if d not in domains]:
        print(f"missing: {args.data / missing}/ (left out; refine.py makes it)")
    for d in set(args.train or []) - set(domains):
        raise UserError(f"--train {d}: {args.data / d} is not there; refine.py makes it")
    data = {(d, s): (load_images(args.data / d / s), load_labels(args.data / d / s))
            for d in domains for s in ("train", "test")}
    count = min(len(data[d, "train"][0]) for d in domains)
    if count < 2:
        raise UserError(f"{args.data}: only {count} training image in one domain; 2 at least")
    if args.blur:
        from torchvision.transforms.functional import gaussian_blur   # 1.5 s: only where needed
        data = {key: (images if key[1] == "train" else gaussian_blur(images, 5, args.blur), labels)
                for key, (images, labels) in data.items()}
    networks = NETWORKS if args.network == "both" else [args.network]
    for network in networks:                   # what cannot be built or written fails now
        build(network, args.backbone_weights)
    writable(args.out)
    print(f"{count} training images of every domain, {' and '.join(map(str, args.epochs))} epochs, "
          "tested on " + ", ".join(f"{len(data[d, 'test'][0])} {d}" for d in domains))

    # The first `count` of a seeded order; the refined domains keep synthetic's names and order.
    order = {len(data[d, "train"][0]): torch.from_numpy(np.random.default_rng(args.seed)
             .permutation(len(data[d, "train"][0]))[:count]) for d in domains}
    pictures = {}
    for network in networks:
        matrices, results = {}, []
        for seed in args.seeds:
            matrices[seed] = {d: {} for d in args.train or domains}
            for d in matrices[seed]:
                chosen = [t[order[len(t)]] for t in data[d, "train"]]
                net = trained(network, d, seed, chosen, args, device)
                for other in domains:
                    images, labels = data[other, "test"]
                    predicted = predict(net, images, device)
                    matrices[seed][d][other] = torch.stack(list(map(confusion, labels, predicted)))
                if seed == args.seeds[0]:                      # `predicted` is on real now
                    pictures.setdefault(d, {})[network] = predicted
            results.append({d: {o: scores_with_error(m) for o, m in row.items()}
                            for d, row in matrices[seed].items()})
        report(network, matrices, results, domains, count, args, device)
    draw_table7(args.out / f"table7{suffix(args)}.png", data, pictures)
    print(f"done: {args.out}/segment_*.md, {args.out}/table7{suffix(args)}.png")


def suffix(args):
    """Tables of blurred test images stand beside the others."""
    return f"_blur{args.blur:g}" if args.blur else ""


def report(network, matrices, results, domains, count, args, device):
    """Write and print segment_NETWORK.json and .md (segment_NETWORK_blurSIGMA)."""
    one_row = next(iter(matrices[args.seeds[0]].values()))     # {tested on: a matrix per image}
    record = {**provenance(args, device), "network": network, "domains": domains,
              "epochs": epochs_of(network, args),
              "images": count, "seeds": args.seeds,
              "test_images": {d: len(m) for d, m in one_row.items()},
              "scores": dict(zip(map(str, args.seeds), results)),
              "confusion": {seed: {d: {o: m.sum(0).tolist() for o, m in row.items()}
                                   for d, row in rows.items()}
                            for seed, rows in matrices.items()}}
    name = f"segment_{network}{suffix(args)}"
    write_text(args.out / f"{name}.json", json.dumps(record))
    text = "\n".join([
        f"### {TITLE[network]}: {count} training images, {record['epochs']} epochs, batch "
        f"{args.batch_size}, lr {args.lr}, seeds {' '.join(map(str, args.seeds))}"
        + (f", test images blurred by {args.blur:g} pixels" if args.blur else ""), "",
        matrix_table(network, "mIoU", results, domains),
        matrix_table(network, "accuracy", results, domains), error_note(results),
        class_table(results)])
    write_text(args.out / f"{name}.md", text)
    print(text)


def error_note(results):
    """One line: what ± is, and how much the choice of the test images alone can move a score."""
    worst = [max(r[d]["real"][f"{m}_se"] for r in results for d in r)
             for m in ("mIoU", "accuracy")]
    seeds = ("One seed: nothing here says how much another seed would change (--seeds 0 1 2)."
             if len(results) == 1 else "± is the standard deviation over the seeds.")
    return (f"{seeds} Standard error on real from the choice of test images: up to "
            f"{worst[0]:.3f} (mIoU) and {worst[1]:.1f} (accuracy).\n")


def draw_table7(path, data, pictures):
    """Table 7: per training domain a training image, then a real test image, its ground truth
    and what each network predicts. The real image is the one with most classes in it."""
    images, labels = data["real", "test"]
    richest = max(range(len(labels)), key=lambda i: len(labels[i].unique()))
    rows = {}
    for domain, predictions in pictures.items():
        row = [data[domain, "train"][0][:1], images[richest:richest + 1],
               colour(labels[richest:richest + 1])]
        row += [colour(p[richest:richest + 1]) for p in predictions.values()]
        rows[domain] = torch.cat(row)
    columns = ["training image", "real test image", "ground truth"]
    save_grid(path, rows, columns + [TITLE[n] for n in next(iter(pictures.values()))])


if __name__ == "__main__":
    start(main)
