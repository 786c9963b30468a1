"""Stage 6: Tables 3-7. Which images make the better training set for segmentation?

Trains each network on each domain (synthetic, simgan, ours, real, others; not pretrained) and tests
it on each. The trainings of a network differ in their data only: same number of images, epochs,
learning rate and seed, so the same initial weights and the same order.

Reads   data/*/{train,test}/{images,labels}
Writes  results/segment_NETWORK.md    full matrices of mIoU and pixel accuracy, per-class IoU
        results/segment_NETWORK.json  every confusion matrix, settings, versions
        results/table7.png            what each training set taught, on real test images
        results/weights/              the trained networks; loaded, not trained again, while data
                                      and settings are the same

    python segment.py                                both networks
    python segment.py --network unet --seeds 0 1 2   mean and spread over seeds
    python segment.py --train synthetic ours         only these rows; tested on all
    python segment.py --random-crops                 learn from random parts of the images

Two cores learn from 14 images of 80 x 160 a second with U-Net, from 6 with DeepLabV3+.
"""
from os.path import expanduser
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import resized_crop

from models import DeepLabV3Plus, UNet
from prepare import (CLASSES, IGNORE, TABLE, check_domains, classes_of, load_images, load_labels,
                     names)
from support.cli import (UserError, announce, markdown_table, natural, parser, path_of, positive,
                         progress, provenance, start, writable, write_json, write_text)
from support.figures import save_grid
from support.raw import palette_of
from support.training import (add_device_flag, add_precision_flag, autocast, keep_on,
                              load_checkpoint, make_optimizer, pick_device, place,
                              precision_note, save_checkpoint, sha256, to_float)

NETWORKS = {"unet": "U-Net", "deeplabv3plus": "DeepLabV3+"}
# Tables 3-6: rows are training images, columns synthetic, refined, real. The paper's "refined"
# column is SimGAN-refined on SimGAN's row (section 5.5); on the others we take it as by ours.
PAPER = {
    "unet": {"mIoU": {"synthetic": (.34, .13, .10), "simgan": (.26, .31, .10),
                      "ours": (.23, .43, .14), "real": (.14, .11, .49)},
             "accuracy": {"synthetic": (78.55, 31.97, 32.8), "simgan": (74.34, 77.3, 33.33),
                          "ours": (66.37, 79.58, 57.11), "real": (48.83, 42.48, 85.42)}},
    "deeplabv3plus": {
        "mIoU": {"synthetic": (.28, .11, .08), "simgan": (.18, .23, .09),
                 "ours": (.15, .31, .12), "real": (.12, .10, .42)},
        "accuracy": {"synthetic": (72.65, 29.14, 28.05), "simgan": (67.3, 70.9, 31.75),
                     "ours": (63.5, 72.79, 56.43), "real": (46.39, 39.38, 82.9)}},
}


# -------------------------------------------------------------------------------- the scores


def confusion(truth, predicted, classes=len(CLASSES)):
    """Confusion matrix, int64 [classes, classes]: rows truth, columns predicted. Both are integer
    tensors of one shape; pixels whose truth is IGNORE do not count."""
    known = truth != IGNORE
    index = truth[known].long() * classes + predicted[known].long()
    return torch.bincount(index, minlength=classes ** 2).view(classes, classes)


def scores(matrix):
    """mIoU (a fraction), pixel accuracy (%), IoU per class and how many classes were averaged.
    IoU = TP / (TP + FP + FN) over the whole test set. A class absent from truth and prediction has
    none (nan) and is left out of the mean, as in cityscapesScripts."""
    m = matrix.double()
    tp = m.diag()
    union = m.sum(0) + m.sum(1) - tp                          # TP + FP + FN
    iou = tp / union                                          # 0 / 0 is nan
    return {"mIoU": iou.nanmean().item(),
            "accuracy": (100 * tp.sum() / m.sum()).item(),
            "IoU": iou.tolist(), "classes": int((union > 0).sum())}


# ------------------------------------------------------------------------- train and test


def random_crops(x, y):
    """A random part of every image and of its label, a quarter of it or more, at the size of the
    whole: uint8 [n, 3, H, W] and integers [n, H, W] to the same."""
    height, width = x.shape[-2:]
    images, labels = [], []
    for image, label in zip(x, y[:, None]):
        box = RandomResizedCrop.get_params(image, (0.25, 1), (width / height, width / height))
        images.append(resized_crop(image, *box, [height, width]))
        labels.append(resized_crop(label, *box, [height, width], InterpolationMode.NEAREST_EXACT))
    return torch.stack(images), torch.cat(labels)


def train(net, images, labels, args, device, title):
    """Cross-entropy (void ignored), Adam, cosine learning rate, random mirroring, --random-crops.
    images uint8 [N, 3, H, W], labels trainIds [N, H, W]."""
    batch = min(args.batch_size, len(images))
    used = len(images) // batch * batch                       # what fills no batch is left out
    images, labels = keep_on(device, images, labels)
    steps = args.epochs * used // batch
    optimizer = make_optimizer("adam", net.parameters(), args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    net.train()
    for _ in progress(range(args.epochs), desc=title, unit="epoch"):
        for index in torch.randperm(len(images))[:used].split(batch):
            index = index.to(images.device, non_blocking=True)
            x, y = images[index], labels[index]
            mirror = (torch.rand(batch) < 0.5).to(images.device, non_blocking=True)
            x = torch.where(mirror[:, None, None, None], x.flip(-1), x).to(device)
            y = torch.where(mirror[:, None, None], y.flip(-1), y).to(device).long()
            if args.random_crops:
                x, y = random_crops(x, y)
            with autocast(device, args.precision):
                logits = net(to_float(x)).float()             # [batch, classes, H, W]
            loss = F.cross_entropy(logits, y, ignore_index=IGNORE, reduction="sum")
            loss = loss / (y != IGNORE).sum().clamp(min=1)    # an all-void batch: 0, not nan
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if not torch.isfinite(loss):
            raise UserError(f"{title}: the loss is {loss.item()}; try a smaller --lr")


@torch.no_grad()
def predict(net, images, args, device):
    """trainIds, uint8 [N, H, W], of uint8 images [N, 3, H, W]."""
    net.eval()
    predicted = []
    for x in images.split(16):
        with autocast(device, args.precision):
            logits = net(to_float(x.to(device))).float()
        predicted.append(logits.argmax(1).to(torch.uint8).cpu())
    return torch.cat(predicted)


def load_or_train(network, domain, seed, data, args, device):
    """The network trained on `domain`: from results/weights if that very training is there."""
    images, labels = data
    path = args.out / "weights" / f"{network}_{domain}_seed{seed}.pt"
    torch.manual_seed(seed)                                   # equal for all domains
    net = place(build(network, args), device)
    wanted = {"start": sha256(net.state_dict().values()), "data": sha256([images, labels]),
              "epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr,
              "precision": args.precision, "random_crops": args.random_crops}
    if path.is_file():
        saved = load_checkpoint(path, ["segment"], "delete it")
        if saved["settings"] == wanted:
            net.load_state_dict(saved["weights"])
            print(f"{path}: trained before, not again")
            return net
    train(net, images, labels, args, device, f"{network} on {domain}, seed {seed}")
    save_checkpoint(path, "segment", settings=wanted, weights=net.state_dict())
    return net


def build(network, args):
    """A new network on the current random state."""
    classes = len(args.table)
    return UNet(classes) if network == "unet" else DeepLabV3Plus(classes, args.backbone_weights)


def train_and_test(network, data, rows, columns, args, device):
    """One of the paper's networks: {seed: {trained on: {tested on: scores}}}, the same with
    confusion matrices, and the first seed's predictions on real, {trained on: [N, H, W]}."""
    by_seed, matrices, pictures = {}, {}, {}
    for seed in args.seeds:
        by_seed[seed], matrices[seed] = {}, {}
        for row in rows:
            net = load_or_train(network, row, seed, data[row, "train"], args, device)
            found = {}
            for d in columns:
                images, labels = data[d, "test"]
                predicted = predict(net, images, args, device)
                found[d] = confusion(labels, predicted, len(args.table))
                if d == "real":
                    pictures.setdefault(row, predicted)
            by_seed[seed][row] = {d: scores(m) for d, m in found.items()}
            matrices[seed][row] = {d: m.tolist() for d, m in found.items()}
    return by_seed, matrices, pictures


# -------------------------------------------------------------------------------- the report


def mean_spread(values, digits):
    """A mean as text, "-" of none; over several seeds with its deviation, as 0.123 ± 0.004."""
    if not values:
        return "-"
    text = f"{np.mean(values):.{digits}f}"
    return text if len(values) == 1 else text + f" ± {np.std(values, ddof=1):.{digits}f}"


def of_seeds(by_seed, row, column, metric):
    """One number of each seed that has it. by_seed: {seed: {trained on: {tested on: scores}}}."""
    return [by_domain[row][column][metric] for by_domain in by_seed.values()
            if column in by_domain.get(row, {})]


def matrix_table(metric, paper_rows, by_seed, rows, columns):
    """Trained x tested as Markdown; bold: the paper's cells, paper_rows: {trained on: 3 cells}."""
    unit, digits = ("fraction", 3) if metric == "mIoU" else ("%", 1)
    lines = []
    for row in rows:
        cells = [row]
        refined = "simgan" if row == "simgan" else "ours"
        paper = dict(zip(("synthetic", refined, "real"), paper_rows.get(row, ())))
        for column in columns:
            text = mean_spread(of_seeds(by_seed, row, column, metric), digits)
            if column in paper and text != "-":
                text = f"**{text}** ({paper[column]})"
            cells.append(text)
        lines.append(cells)
    return (f"{metric} ({unit}); the paper's cells are bold, its own figures in brackets\n\n"
            + markdown_table(["trained on \\ tested on", *columns], lines) + "\n")


def class_table(by_seed, rows, table):
    """IoU per class on real test images, by training domain; "-" where a class is absent."""
    lines = []
    for i, (name, _, _) in enumerate(table):
        cells = [name]
        for row in rows:
            values = [iou[i] for iou in of_seeds(by_seed, row, "real", "IoU")]
            cells.append("-" if np.isnan(values).any() else mean_spread(values, 3))
        lines.append(cells)
    counts = [sorted(set(of_seeds(by_seed, row, "real", "classes"))) for row in rows]
    lines.append(["classes in the mean", *[", ".join(map(str, seen)) for seen in counts]])
    return "IoU per class, tested on real\n\n" + markdown_table(["class", *rows], lines) + "\n"


def report(network, by_seed, rows, columns, count, args):
    """Write and print segment_NETWORK.md."""
    crops = ", random crops" if args.random_crops else ""
    text = [f"### {NETWORKS[network]}: {count} training images, {args.epochs} epochs, batch "
            f"{args.batch_size}, lr {args.lr}{crops}, seeds {' '.join(map(str, args.seeds))}", ""]
    for metric in ("mIoU", "accuracy"):
        paper = PAPER[network][metric] if args.table == TABLE else {}     # its 19 classes
        text.append(matrix_table(metric, paper, by_seed, rows, columns))
    text.append("One seed: nothing here says how much another seed would change (--seeds 0 1 2).\n"
                if len(by_seed) == 1 else "± is the standard deviation over the seeds.\n")
    text = "\n".join([*text, class_table(by_seed, rows, args.table)])
    write_text(args.out / f"segment_{network}.md", text)
    print(text)


def paint(labels, table):
    """Label maps [N, H, W] in the colours of their classes, uint8 [N, 3, H, W]."""
    return torch.from_numpy(palette_of(table)[labels.numpy()]).permute(0, 3, 1, 2)


def draw_table7(path, data, pictures, table):
    """Table 7: the three real test images with most classes in them, their ground truth and, per
    training domain, a training image and what each network predicts: pictures, {network: {domain:
    predictions on the real test images, [N, H, W]}}."""
    images, labels = data["real", "test"]
    kinds = [len(label[label != IGNORE].unique()) for label in labels]
    shown = sorted(range(len(kinds)), key=lambda i: -kinds[i])[:3]
    rows = {"real test image": images[shown], "ground truth": paint(labels[shown], table)}
    for domain in next(iter(pictures.values())):
        rows[f"{domain}: a training image"] = data[domain, "train"][0][:len(shown)]
        for network, predicted in pictures.items():
            rows[f"{domain}: {NETWORKS[network]}"] = paint(predicted[domain][shown], table)
    save_grid(path, rows)


# ------------------------------------------------------------------------------- the command


def arguments():
    p = parser(__doc__)
    add_device_flag(p)
    add_precision_flag(p)
    p.add_argument("--data", type=path_of, default=Path("data"), help="what prepare.py made")
    p.add_argument("--out", type=path_of, default=Path("results"), help="where tables go")
    p.add_argument("--network", choices=[*NETWORKS, "both"], default="both", help="which")
    p.add_argument("--train", nargs="+", metavar="DOMAIN", help="only on these; tested on all")
    p.add_argument("--epochs", type=positive(int), default=30, help="passes over the data")
    p.add_argument("--batch-size", type=positive(int), default=16, help="images a batch")
    p.add_argument("--lr", type=positive(float), default=1e-3, help="at the start; cosine to 0")
    p.add_argument("--random-crops", action="store_true", help="learn from random parts of the "
                   "images, a quarter or more of each, at the size of the whole")
    p.add_argument("--seeds", type=natural, nargs="+", default=[0], help="one training each")
    p.add_argument("--backbone-weights", type=expanduser, default="none",
                   help="of DeepLabV3+'s ResNet-50: none, imagenet (downloaded) or a file")
    args = p.parse_args()
    if args.batch_size < 2:
        p.error("--batch-size 1: BatchNorm needs two images at least")
    args.backbone_weights = None if args.backbone_weights == "none" else args.backbone_weights
    return args


def find_domains(args):
    """The domains below --data, synthetic first, real last. Not `pretrained`: its images are the
    synthetic ones, nearly."""
    paper = ["synthetic", "simgan", "ours", "real"]
    found = {p.parent.name for p in args.data.glob("[!.]*/train")} - {"pretrained"}
    if "real" not in found or len(found) < 2:
        raise UserError(f"{args.data}: needs real/ and at least one of synthetic, simgan, ours; "
                        "run prepare.py and refine.py first")
    tested = {p.parent.name for p in args.data.glob("[!.]*/test")} - {"pretrained"}
    for missing in sorted({*paper, *tested} - found):
        print(f"missing: {args.data / missing}/train (left out; prepare.py or refine.py makes it)")
    for d in args.train or []:
        if d not in found:
            raise UserError(f"--train {d}: not one of {', '.join(sorted(found))} in {args.data}")
    others = sorted(found - set(paper))
    return [d for d in ("synthetic", *others, "simgan", "ours", "real") if d in found]


def load_domains(args):
    """{(domain, split): (images, labels)}, the domains in order, and how many training images
    all of them have. UserError if these cannot be compared, or nothing be learned from one."""
    data, domains = {}, find_domains(args)
    check_domains(args.data, domains, ["train", "test"])
    count = min(len(names(args.data / d / "train")) for d in domains)
    if count < 2:
        raise UserError(f"{args.data}: only {count} training image in one domain; 2 at least")
    for d in domains:
        for split in ("train", "test"):
            folder = args.data / d / split
            if not any((folder / "labels").glob("*.png")):
                raise UserError(f"{folder}: has no labels; prepare.py takes them beside the images")
            images, labels = load_images(folder), load_labels(folder)
            data[d, split] = images, labels
            known = labels[labels != IGNORE]
            if not len(known):
                raise UserError(f"{folder}/labels: every pixel is void, so nothing can be learned "
                                "or tested there; see what prepare.py says of these labels")
            if known.max() >= len(args.table) or labels.shape[1:] != images.shape[2:]:
                raise UserError(f"{folder}/labels: not of the images' size, or with other values "
                                f"than 0 to {len(args.table) - 1} and {IGNORE} (void)")
        # The same choice for sets of one size: the refined domains keep synthetic's order.
        images, labels = data[d, "train"]
        order = torch.from_numpy(np.random.default_rng(args.seed).permutation(len(images))[:count])
        data[d, "train"] = images[order], labels[order]
    return data, domains, count


def main():
    args = arguments()
    device = pick_device(args.device, args.precision)
    announce(device, f"{args.seed} (of the trainings: {args.seeds})", f"{args.data}/*",
             f"{args.out}/segment_*, table7", precision_note(device, args.precision))

    # 1. The domains, the same number of training images of each.
    said = provenance(args, device)
    args.table = classes_of(args.data)                   # after provenance(), which notes flags
    data, columns, count = load_domains(args)
    rows = [d for d in columns if d in (args.train or columns)]
    networks = list(NETWORKS) if args.network == "both" else [args.network]
    if args.backbone_weights and "deeplabv3plus" in networks:
        build("deeplabv3plus", args)                          # weights that do not fit fail now
    writable(args.out)
    tested_on = {d: len(data[d, "test"][0]) for d in columns}
    print(f"{count} training images of every domain, {args.epochs} epochs, tested on "
          + ", ".join(f"{n} {d}" for d, n in tested_on.items()))

    # 2. Train every network on every domain and test it on every domain: Tables 3-6.
    pictures = {}
    for network in networks:
        by_seed, matrices, pictures[network] = train_and_test(network, data, rows, columns, args,
                                                              device)
        write_json(args.out / f"segment_{network}.json", {
            **said, "network": network, "domains": columns, "epochs": args.epochs,
            "images": count, "seeds": args.seeds, "test_images": tested_on, "scores": by_seed,
            "confusion": matrices})
        report(network, by_seed, rows, columns, count, args)

    # 3. Table 7.
    draw_table7(args.out / "table7.png", data, pictures, args.table)
    print(f"done: {args.out}/segment_*.md, {args.out}/table7.png")


if __name__ == "__main__":
    start(main)
