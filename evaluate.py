"""Stage 5: Table 2. How far is each kind of image from real ones, and how sure is that?

Reads   data/*/test (of every domain: synthetic, pretrained, simgan, ours, others) and data/real
Writes  results/table2.md    FID, KID and SSIM against real, next to the paper's figures; the
                             differences between the rows
        results/table2.json  the same with N, weights and their hash, resize, pairing, versions

    python evaluate.py                                         torchvision's Inception V3
    python evaluate.py --inception inception_v3.pt --n 200     a file of your own
    python evaluate.py --inception random                      no download; not an FID

Every row has the same N, the same real images and, for SSIM, the same real partner per image.
"""
from pathlib import Path

import numpy as np
import torch
from scipy.special import stdtrit

from models import (fid, inception_features, jackknife_error, kid, leave_out, load_inception,
                    ssim)
from prepare import load_images, names
from support.cli import (UserError, announce, markdown_table, natural, parser, positive,
                         provenance, start, writable, write_json, write_text)
from support.training import add_device_flag, pick_device, sha256

PAPER = {"synthetic": (60.82, 0.0023), "pretrained": (56.89, 0.0025),         # Table 2
         "simgan": (57.04, 0.0025), "ours": (55.71, 0.0026)}
FLOOR = "real, other frames (the floor)"
CONTROL = "one flat colour (control)"
METRICS = ["fid", "kid", "ssim", "ssim_range1"]


# -------------------------------------------------------------------------------- the scores


def measure(images, features, real, real_features, device):
    """The metrics of `images` against `real`: {metric: (value, leave_out values)}.

    images, real: uint8 [N, 3, H, W], image i and real i being partners for SSIM; features
    [N, 2048], or None for no FID and KID.
    """
    found = {}
    if features is not None:
        for name, metric in (("fid", fid), ("kid", kid)):
            found[name] = (metric(features, real_features),
                           leave_out(metric, features, real_features))
    # L = 255 is the range of the images; L = 1 is most plausibly what the paper's tool was told.
    for name, max_val in (("ssim", 255), ("ssim_range1", 1)):
        values = []
        for x, y in zip(images.split(64), real.split(64)):
            values.append(ssim(x.to(device), y.to(device), max_val).cpu().double())
        values = torch.cat(values)
        found[name] = (values.mean().item(), leave_out(
            lambda v: v.mean().item(), values, groups=len(values)))    # = std / sqrt(N)
    return found


def with_error(value, replicates):
    """A score with its standard error and its 95 % interval (Student's t, groups - 1)."""
    error = jackknife_error(replicates)
    half = stdtrit(len(replicates) - 1, 0.975) * error
    return {"value": value, "se": error, "low": value - half, "high": value + half}


def difference(row, other):
    """`row` minus `other`, metric by metric, with paired errors: the images that both have in
    common (the real ones; the scenes, if both are refined from one set) cancel.

    "sure" is false where the 95 % interval contains 0: the difference is inside its error.
    """
    result = {}
    for m in METRICS:
        if m in row and m in other:
            d = with_error(row[m][0] - other[m][0], row[m][1] - other[m][1])
            result[m] = {**d, "sure": not d["low"] <= 0 <= d["high"]}
    return result


def compare(rows, images, n):
    """Scores with their errors, and the differences: to the first row, and ours to simgan."""
    found = {"rows": {}, "differences": {}}
    for d, row in rows.items():
        found["rows"][d] = {"n": n, "images_sha256": sha256(images[d]),
                            "scores": {m: with_error(*s) for m, s in row.items()}}
    first, *others = rows
    for a, b in [(d, first) for d in others] + [("ours", "simgan")]:
        if a in rows and b in rows:
            found["differences"][f"{a} - {b}"] = difference(rows[a], rows[b])
    return found


# -------------------------------------------------------------------------------- the report


def interval(score):
    """A score as "1.23 [1.15, 1.31]", its 95 % interval in brackets; "-" where there is none."""
    if score is None:
        return "-"
    return f"{score['value']:.2f} [{score['low']:.2f}, {score['high']:.2f}]"


def plus_minus(score, scale=1, digits=2, sign=""):
    """A score as "1.23 ± 0.04", its standard error; in brackets what is inside its error."""
    if score is None:
        return "-"
    text = f"{scale * score['value']:{sign}.{digits}f} ± {scale * score['se']:.{digits}f}"
    return text if score.get("sure", True) else f"({text}) inside its error"


def cells(scores, sign=""):
    """What both tables show of KID and SSIM."""
    return [plus_minus(scores.get("kid"), 1000, 2, sign), plus_minus(scores["ssim"], 1, 4, sign),
            plus_minus(scores["ssim_range1"], 1, 4, sign)]


def tables(record):
    """results/table2.md from the record in table2.json."""
    rows, differences = [], []
    for name, row in record["rows"].items():
        scores, paper = row["scores"], PAPER.get(name, ("-", "-"))
        rows.append([name, str(row["n"]), interval(scores.get("fid")), *cells(scores),
                     *map(str, paper)])
    for name, d in record["differences"].items():
        differences.append([name, plus_minus(d.get("fid"), sign="+"), *cells(d, "+")])
    columns = ["KID x 1000", "SSIM (L = 255)", "SSIM (L = 1)"]
    return "\n".join([
        markdown_table(["images vs real", "N", f"{record['label']} [95 %]", *columns, "paper FID",
                        "paper SSIM"], rows), "",
        f"N = {record['n']} images on both sides of every row; ± is one standard error, [ ] a 95 % "
        "interval (jackknife). It is the uncertainty at this N: FID's bias is not in it.", "",
        markdown_table(["difference", "FID", *columns], differences), "",
        "Paired: the same real images and, where both have them, the same scenes. In brackets: "
        "0 is in the 95 % interval (which one in 20 misses by chance).", ""])


def weights_of(net, inception):
    """(label of the FID column, SHA-256 of the weights)."""
    labels = {"imagenet": "FID (torchvision's ImageNet weights)",
              "random": "random features, not an FID"}
    return (labels.get(inception, f"FID ({Path(inception).name})"),
            sha256(*net.state_dict().values()))


# ------------------------------------------------------------------------- the command


def arguments():
    p = parser(__doc__)
    add_device_flag(p)
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
    if not found:
        raise UserError(f"{folder}: no domain folder with test/ in it; run prepare.py first")
    for missing in [d for d in PAPER if d not in found]:
        print(f"missing: {folder / missing}/ (its row is left out; refine.py makes it)")
    domains = {}
    for d in [d for d in PAPER if d in found] + [d for d in found if d not in PAPER]:
        domains[d] = load_images(folder / d / "test")
        first = next(iter(domains))
        if names(folder / d / "test") != names(folder / first / "test"):
            raise UserError(f"{folder / d}: its file names differ from {first}'s, so rows "
                            "cannot be compared; run refine.py again")
    return domains


def check(domains, real, floor, args):
    """How many images a row has; UserError when the folders do not fit each other."""
    for d, x in domains.items():
        if x.shape[1:] != real.shape[1:]:
            raise UserError(f"{args.data / d}: images are {x.shape[2]} x {x.shape[3]}, real ones "
                            f"{real.shape[2]} x {real.shape[3]}; prepare both with one --size")
    if min(real.shape[2:]) < 11:
        raise UserError(f"{args.data / 'real'}: images are {real.shape[2]} x {real.shape[3]}; "
                        "SSIM's window needs 11 x 11")
    smallest = min(map(len, [real, floor, *domains.values()]))
    n = args.n or smallest
    if not 3 <= n <= smallest:
        raise UserError(f"--n {n}: the smallest folder of {args.data} has {smallest} images, and "
                        "3 is the least that has a standard error")
    if n < 2000:
        print(f"warning: N = {n} is small for FID: its bias is about 1/N, so compare rows with "
              "each other and with the floor, never with other papers")
    return n


def choose(domains, real, floor, n, pair_seed):
    """n images of each folder by chance: ({domain: images, FLOOR: other reals}, real).

    The same scenes of every domain, and the same reals as their partners in every row.
    """
    random = np.random.default_rng(pair_seed)
    partners = real[random.permutation(len(real))[:n]]
    others = floor[random.permutation(len(floor))[:n]]
    scenes = random.permutation(len(next(iter(domains.values()))))[:n]
    images = {d: x[scenes] for d, x in domains.items()}
    return {**images, FLOOR: others}, partners


def features_of(net, images, device):
    """{name: features, float64 [N, 2048]} of {name: uint8 [N, 3, H, W]}."""
    features = {}
    for name, x in images.items():
        features[name] = inception_features(net, x, device, title=f"Inception features of {name}")
        if device.type == "cuda" and len(x) >= 2000:  # eigenvalues of 2048 x 2048: for a GPU
            features[name] = features[name].to(device)
    return features


def main():
    args = arguments()
    device = pick_device(args.device)
    announce("evaluate.py", device, args.seed, f"{args.data}/*", f"{args.out}/table2.*")

    # 1. Which images: the same number of every domain, and of real ones that are their partners.
    domains = load_domains(args.data)
    real, floor = load_images(args.data / "real/test"), load_images(args.data / "real/train")
    n = check(domains, real, floor, args)
    writable(args.out)
    images, partners = choose(domains, real, floor, n, args.pair_seed)
    mean_colour = partners.float().mean((0, 2, 3)).round().to(torch.uint8)
    flat = mean_colour[:, None, None].expand_as(partners)

    # 2. Their Inception features.
    some = torch.cat([x[:16] for x in (*domains.values(), floor)])       # for "random" only
    net = load_inception(args.inception, "pool3", some, args.seed)
    label, weights = weights_of(net, args.inception)
    features = features_of(net, {**images, "real": partners}, device)

    # 3. The rows of Table 2, and two controls.
    rows = {}
    for d, x in images.items():
        rows[d] = measure(x, features[d], partners, features["real"], device)
    rows[CONTROL] = measure(flat, None, partners, None, device)

    # 4. The report.
    record = {**provenance(args, device), "label": label, "weights_sha256": weights,
              "resize": "bilinear to 299 x 299, align_corners=False, no antialias", "n": n,
              "pair_seed": args.pair_seed, "real_sha256": sha256(partners)}
    record |= compare(rows, {**images, CONTROL: flat}, n)
    write_json(args.out / "table2.json", record)
    write_text(args.out / "table2.md", tables(record))
    print(tables(record))
    print(f"done: {args.out}/table2.md, {args.out}/table2.json")



if __name__ == "__main__":
    start(main)
