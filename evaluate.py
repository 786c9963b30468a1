"""Stage 5: Table 2. How far is each kind of image from real ones?

Reads   data/{synthetic,pretrained,simgan,ours,...}/test and data/real (images only)
Writes  results/table2.md    FID, KID and SSIM against real, next to the paper's figures
        results/table2.json  the same with N, weights and their hash, resize, pairing, versions

    python evaluate.py                                         torchvision's Inception V3
    python evaluate.py --inception inception_v3.pt --n 200     a file of your own
    python evaluate.py --inception random                      no download; not an FID

Every row has the same N, the same real images and, for SSIM, the same real partner per image.
200 images of a domain take 22 s on 2 cores.
"""
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import torchvision

from models import (announce, fid, inception_features, kid, load_inception, pick_device, ssim)
from prepare import (UserError, load_images, names, natural, parser, positive, progress, start,
                     write_text)

ROWS = ["synthetic", "pretrained", "simgan", "ours"]
FLOOR = "real, other frames (the floor)"
PAPER = {"synthetic": (60.82, 0.0023), "pretrained": (56.89, 0.0025),         # Table 2
         "ours": (55.71, 0.0026), "simgan": (57.04, 0.0025)}


def standard_error(values):
    """Of the mean of independent values [N]."""
    return (values.std() / len(values) ** 0.5).item()


def jackknife(metric, a, b, groups=10):
    """Standard error of metric(a, b) by leaving out a tenth of both sets at a time.

    Var = (g - 1) / g * sum (t_i - mean t)^2 (delete-a-group jackknife). No image is counted
    twice, as a bootstrap would: repeated images inflate FID.
    """
    groups = min(groups, len(a), len(b))
    t = np.array([metric(a[torch.arange(len(a)) % groups != i],
                         b[torch.arange(len(b)) % groups != i]) for i in range(groups)])
    return float(np.sqrt((groups - 1) / groups * ((t - t.mean()) ** 2).sum()))


def describe(images, features, real, real_features, baseline):
    """One row of Table 2: scores of `images` against `real`, with standard errors.

    `baseline`: SSIM values [N] of the synthetic row, for paired differences; None on that row.
    """
    right = ssim(images, real, max_val=255)
    row = {"n": len(images), "ssim": right.mean().item(), "ssim_se": standard_error(right)}
    odd = ssim(images.float(), real.float(), max_val=1.0)      # most plausibly the paper's
    row.update(ssim_range1=odd.mean().item(), ssim_range1_se=standard_error(odd))
    if baseline is not None:
        row.update(ssim_minus_synthetic=(right - baseline).mean().item(),
                   ssim_minus_synthetic_se=standard_error(right - baseline))
    if features is not None:
        row.update(fid=fid(features, real_features), kid=kid(features, real_features),
                   fid_se=jackknife(fid, features, real_features),
                   kid_se=jackknife(kid, features, real_features))
    return row, right


def table(rows, label, n):
    """The rows as Markdown, next to the paper's Table 2."""
    def cell(row, key, scale=1, digits=2):
        if key not in row:
            return "-"
        return f"{scale * row[key]:.{digits}f} ± {scale * row[key + '_se']:.{digits}f}"
    head = ["images vs real", label, "KID x 1000", "SSIM (L = 255)", "SSIM minus synthetic",
            "SSIM (L = 1)", "paper FID", "paper SSIM"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in rows.items():
        paper = PAPER.get(name, ("-", "-"))
        lines.append("| " + " | ".join([
            name, cell(row, "fid"), cell(row, "kid", 1000), cell(row, "ssim", 1, 4),
            cell(row, "ssim_minus_synthetic", 1, 4), cell(row, "ssim_range1", 1, 4),
            str(paper[0]), str(paper[1])]) + " |")
    return "\n".join(lines) + (f"\n\nN = {n} images on both sides of every row; "
                              "± is one standard error.\n")


def report(args, rows, net, n, device):
    """Write results/table2.json and .md, and print the table."""
    label = {"imagenet": "FID", "random": "random features, not an FID"}.get(
        args.inception, f"FID ({Path(args.inception).name})")
    weights = hashlib.sha256(b"".join(t.cpu().numpy().tobytes()
                                      for t in net.state_dict().values())).hexdigest()
    record = {"n": n, "label": label, "inception": args.inception, "weights_sha256": weights,
              "resize": "bilinear to 299x299, align_corners=False, no antialias",
              "pair_seed": args.pair_seed, "seed": args.seed, "data": str(args.data),
              "torch": torch.__version__, "torchvision": torchvision.__version__,
              "device": str(device), "rows": rows}
    write_text(args.out / "table2.json", json.dumps(record, indent=1))
    text = table(rows, label, n)
    write_text(args.out / "table2.md", text)
    print(text)
    print(f"done: {args.out / 'table2.md'}, {args.out / 'table2.json'}")


def arguments():
    p = parser(__doc__)
    p.add_argument("--device", default="auto", help="auto (cuda, mps, cpu), or one of them")
    p.add_argument("--data", type=Path, default=Path("data"), help="what prepare.py made")
    p.add_argument("--out", type=Path, default=Path("results"), help="where tables go")
    p.add_argument("--inception", default="imagenet", help="imagenet, random or a file")
    p.add_argument("--n", type=positive(int), help="images a row; all test images if not given")
    p.add_argument("--pair-seed", type=natural, default=0, help="which real image is whose partner")
    return p.parse_args()


def load_domains(folder):
    """Test images of every domain under `folder`, in Table 2's order: {name: uint8 [N, ...]}.

    Says which of Table 2's are missing; refuses domains whose file names differ, since their
    rows could not be compared.
    """
    found = sorted(p.parent.name for p in folder.glob("*/test") if p.parent.name != "real")
    domains = [d for d in ROWS if d in found] + [d for d in found if d not in ROWS]
    if not domains:
        raise UserError(f"{folder}: no domain folder with test/ in it; run prepare.py first")
    for missing in [d for d in ROWS if d not in found]:
        print(f"missing: {folder / missing}/ (its row is left out; refine.py makes it)")
    for d in domains:
        if names(folder / d / "test") != names(folder / domains[0] / "test"):
            raise UserError(f"{folder / d}: its file names differ from {domains[0]}'s, so rows "
                            "cannot be compared; run refine.py again")
    return {d: load_images(folder / d / "test") for d in domains}


def main():
    args = arguments()
    device = pick_device(args.device)
    announce("evaluate.py", device, args.seed, f"{args.data}/*", f"{args.out}/table2.*")
    domains = load_domains(args.data)
    real, floor = (load_images(args.data / "real" / s) for s in ("test", "train"))
    for d, x in domains.items():
        if x.shape[1:] != real.shape[1:]:
            raise UserError(f"{args.data / d}: images are {x.shape[2]} x {x.shape[3]}, real ones "
                            f"{real.shape[2]} x {real.shape[3]}; prepare both with one --size")
    smallest = min(map(len, [real, floor, *domains.values()]))
    n = args.n or smallest
    if not 3 <= n <= smallest:
        raise UserError(f"--n {n}: the smallest folder of {args.data} has {smallest} images, and "
                        "3 is the least that has a standard error")
    if n < 2000:
        print(f"warning: N = {n} is small for FID: its bias is about 1/N, so compare rows with "
              "each other and with the floor, never with other papers")
    sample = torch.cat([x[:16] for x in (*domains.values(), floor)])     # for "random" only
    net = load_inception(args.inception, "pool3", sample, args.seed)

    # The same n images of every domain, n reals as their partners, n other reals: the floor.
    random = np.random.default_rng(args.pair_seed)

    def some(images):
        return torch.from_numpy(random.permutation(len(images))[:n])
    real, floor = real[some(real)], floor[some(floor)]
    pick = some(next(iter(domains.values())))
    domains = {d: x[pick] for d, x in domains.items()}
    flat = real.float().mean((0, 2, 3)).round().to(torch.uint8)[:, None, None].expand_as(real)

    def features(x, name):
        return inception_features(net, x, device, progress=lambda batches: progress(
            batches, desc=f"Inception features of {name}", unit="batch"))
    real_features = features(real, "real")
    rows, baseline = {}, None
    for d, x in {**domains, FLOOR: floor}.items():
        rows[d], values = describe(x, features(x, d), real, real_features, baseline)
        baseline = values if d == "synthetic" else baseline
    rows["one flat colour (control)"], _ = describe(flat, None, real, None, baseline)
    report(args, rows, net, n, device)


if __name__ == "__main__":
    start(main)
