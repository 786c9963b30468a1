"""Stage 5: Table 2. How far is each kind of image from real ones, and how sure is that?

Reads   data/*/test (of every domain: synthetic, pretrained, simgan, ours, others) and data/real
Writes  results/table2.md    FID, KID and SSIM against real, next to the paper's figures; the
                             differences between the rows
        results/table2.json  the same with N, weights and their hash, resize, pairing, versions

    python evaluate.py                                         torchvision's Inception V3
    python evaluate.py --inception inception_v3.pt --n 200     a file of your own
    python evaluate.py --inception random                      no download; not an FID

Every row has the same N, the same real images and, for SSIM, the same real partner per image. Two
cores take 20 images a second through Inception.
"""
from pathlib import Path

import numpy as np
import torch
from scipy.special import stdtrit

from models import (fid, inception_features, jackknife_error, kid, leave_out, load_inception,
                    ssim)
from prepare import check_domains, files_of, names
from support.cli import (UserError, announce, markdown_table, natural, parser, path_of,
                         positive, provenance, start, writable, write_json, write_text)
from support.images import Images
from support.training import add_device_flag, add_inception_flag, pick_device, sha256

PAPER = {"synthetic": (60.82, 0.0023), "pretrained": (56.89, 0.0025),         # Table 2
         "simgan": (57.04, 0.0025), "ours": (55.71, 0.0026)}
FLOOR = "real, other frames (the floor)"
CONTROL = "one flat colour (control)"


# -------------------------------------------------------------------------------- the scores


def measure(images, features, real, real_features):
    """The metrics of `images` against `real`: {metric: (value, leave_out values)}.
    images, real: uint8 [N, 3, H, W] or Images, image i and real i being partners for SSIM;
    features [N, 2048], or None for no FID and KID.
    """
    found = {}
    if features is not None:
        for name, metric in (("fid", fid), ("kid", kid)):
            found[name] = (metric(features, real_features),
                           leave_out(metric, features, real_features))
    # L = 255 is the range of the images, L = 1 most likely the one that the paper's tool assumed.
    # In float64, since float32 loses C2 = 0.0009 beside squares of up to 255^2.
    for name, max_val in (("ssim", 255), ("ssim_range1", 1)):
        values = []
        for x, y in zip(images.split(64), real.split(64)):
            values.append(ssim(x.double(), y.double(), max_val))
        values = torch.cat(values)
        without_i = (values.sum() - values) / (len(values) - 1)      # the error is std / sqrt(N)
        found[name] = (values.mean().item(), without_i)
    return found


def with_error(value, replicates):
    """A score with its standard error and its 95 % interval (Student's t, groups - 1)."""
    error = jackknife_error(replicates)
    half = stdtrit(len(replicates) - 1, 0.975) * error
    return {"value": value, "se": error, "low": value - half, "high": value + half}


def difference(row, other):
    """`row` minus `other`, both of `measure`, with the error of the paired differences. "sure" is
    false where the 95 % interval contains 0."""
    result = {}
    for metric, (value, replicates) in row.items():
        change = with_error(value - other[metric][0], replicates - other[metric][1])
        result[metric] = {**change, "sure": not change["low"] <= 0 <= change["high"]}
    return result


def compare(rows):
    """Scores with their errors, and the differences: rows minus the first, ours minus simgan."""
    found = {"rows": {}, "differences": {}}
    for d, row in rows.items():
        found["rows"][d] = {"scores": {m: with_error(*s) for m, s in row.items()}}
    first, *others = rows
    for a, b in [(d, first) for d in others] + [("ours", "simgan")]:
        if a in rows and b in rows:
            found["differences"][f"{a} - {b}"] = difference(rows[a], rows[b])
    return found


# -------------------------------------------------------------------------------- the report


def plus_minus(score, scale, digits, sign=""):
    """A score as "1.23 ± 0.04", its standard error; in brackets if it is not sure."""
    if score is None:
        return "-"
    text = f"{scale * score['value']:{sign}.{digits}f} ± {scale * score['se']:.{digits}f}"
    return text if score.get("sure", True) else f"({text})"


def cells(scores, sign=""):
    """What both tables show of a row."""
    return [plus_minus(scores.get("fid"), 1, 2, sign), plus_minus(scores.get("kid"), 1000, 2, sign),
            plus_minus(scores["ssim"], 1, 4, sign), plus_minus(scores["ssim_range1"], 1, 4, sign)]


def tables(record):
    """results/table2.md from the record in table2.json."""
    rows, differences = [], []
    for name, row in record["rows"].items():
        paper = map(str, PAPER.get(name, ("-", "-")))
        rows.append([name, *cells(row["scores"]), *paper])
    for name, d in record["differences"].items():
        differences.append([name, *cells(d, "+")])
    columns = [record["label"], "KID x 1000", "SSIM (L = 255)", "SSIM (L = 1)"]
    return "\n".join([
        markdown_table(["images vs real", *columns, "paper FID", "paper SSIM"], rows), "",
        f"N = {record['n']} images on both sides of every row; ± is one standard error "
        "(jackknife) over these. FID's bias is not in it, nor what another seed of R would "
        "change.", "",
        markdown_table(["difference", *columns], differences), "",
        "Paired: the same real images and, where both have them, the same scenes. In brackets: "
        "0 is in the 95 % interval (which one in 20 misses by chance).", ""])


def weights_of(net, inception):
    """(label of the FID column, SHA-256 of the weights)."""
    labels = {"imagenet": "FID (torchvision's ImageNet weights)",
              "random": "random features, not an FID"}
    name = Path(inception).name
    label = f"FID as pytorch-fid computes it ({name})" if net.is_pytorch_fid else f"FID ({name})"
    return labels.get(inception, label), sha256(net.state_dict().values())


# ------------------------------------------------------------------------- the command


def arguments():
    p = parser(__doc__)
    add_device_flag(p)
    p.add_argument("--data", type=path_of, default=Path("data"), help="what prepare.py made")
    p.add_argument("--out", type=path_of, default=Path("results"), help="where tables go")
    add_inception_flag(p)
    p.add_argument("--n", type=positive(int), help="images a row (default: the smallest folder's)")
    p.add_argument("--pair-seed", type=natural, default=0, help="chooses images and partners")
    return p.parse_args()


def find_domains(folder):
    """The names of the domains below `folder` but real, PAPER's first; says which are missing.
    UserError if their rows could not be compared."""
    found = sorted(p.parent.name for p in folder.glob("[!.]*/test") if p.parent.name != "real")
    if not found:
        raise UserError(f"{folder}: no domain folder with test/ in it; run prepare.py first")
    trained = {p.parent.name for p in folder.glob("[!.]*/train")} - {"real"}
    for missing in sorted({*PAPER, *trained} - {*found}):
        print(f"missing: {folder / missing}/test (left out; prepare.py or refine.py makes it)")
    domains = [d for d in PAPER if d in found] + [d for d in found if d not in PAPER]
    check_domains(folder, [*domains, "real"], ["test"])
    check_domains(folder, ["real"], ["test", "train"])        # the floor's are of train/
    for d in domains:
        if names(folder / d / "test") != names(folder / domains[0] / "test"):
            raise UserError(f"{folder / d}: its file names differ from {domains[0]}'s, so rows "
                            "cannot be compared; run refine.py again")
    return domains


def choose(folder, domains, args):
    """n images of each row by chance: ({domain or FLOOR: Images}, real Images): the same scenes of
    every domain, and the same reals as their partners in every row."""
    scenes = names(folder / domains[0] / "test")
    real, others = files_of(folder / "real/test"), files_of(folder / "real/train")
    smallest = min(map(len, (scenes, real, others)))
    n = args.n or smallest
    if not 3 <= n <= smallest:
        raise UserError(f"--n {n}: the smallest folder of {folder} has {smallest} images, and "
                        "3 is the least that has a standard error")
    if n < 2000:
        print(f"warning: N = {n} is small for FID: its bias falls as 1/N, so compare rows with "
              "each other and with the floor, never with other papers")
    random = np.random.default_rng(args.pair_seed)
    real, others = random.permutation(real)[:n], random.permutation(others)[:n]
    scenes = random.permutation(scenes)[:n]
    images = {}
    for d in domains:
        images[d] = Images([folder / d / f"test/images/{name}.png" for name in scenes])
    return {**images, FLOOR: Images(others)}, Images(real)


def flat_like(real):
    """As many images of one colour, the mean of the real ones: uint8 [N, 3, H, W]."""
    shape = next(real.split(1)).shape[1:]
    colour = sum(x.double().mean((2, 3)).sum(0) for x in real.split(64)) / len(real)
    return colour.round().to(torch.uint8)[:, None, None].expand(len(real), *shape)


def main():
    args = arguments()
    device = pick_device(args.device)
    announce(device, args.seed, f"{args.data}/*", f"{args.out}/table2.*")

    # 1. Which images: the same number of every domain, and of real ones that are their partners.
    images, partners = choose(args.data, find_domains(args.data), args)
    flat = flat_like(partners)
    writable(args.out)

    # 2. Their Inception features.
    some = torch.cat([next(x.split(16)) for x in images.values()])       # for "random" only
    net = load_inception(args.inception, "pool3", some, args.seed)
    label, weights = weights_of(net, args.inception)
    features = {}
    for name, x in {**images, "real": partners}.items():
        features[name] = inception_features(net, x, device, title=f"Inception features of {name}")

    # 3. The rows of Table 2, and two controls.
    rows = {}
    for d, x in images.items():
        rows[d] = measure(x, features[d], partners, features["real"])
    rows[CONTROL] = measure(flat, None, partners, None)

    # 4. The report.
    record = {**provenance(args, device), "label": label, "weights_sha256": weights,
              "resize": "bilinear to 299 x 299, align_corners=False, no antialias",
              "n": len(partners), **compare(rows)}
    write_json(args.out / "table2.json", record)
    write_text(args.out / "table2.md", tables(record))
    print(tables(record))
    print(f"done: {args.out}/table2.md, {args.out}/table2.json")


if __name__ == "__main__":
    start(main)
