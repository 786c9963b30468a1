"""Stage 5: Table 2. How far is each kind of image from real ones, and how sure is that?

Reads   data/{synthetic,colour,pretrained,simgan,ours,...}/test and data/real (labels if any)
Writes  results/table2.md    FID, KID and SSIM against real, next to the paper's figures; the
                             differences between the rows; FID and KID of fewer images; colour
                             and detail class by class
        results/table2.json  the same with N, weights and their hash, resize, pairing, versions

    python evaluate.py                                         torchvision's Inception V3
    python evaluate.py --inception inception_v3.pt --n 200     a file of your own
    python evaluate.py --inception random                      no download; not an FID

Every row has the same N, the same real images and, for SSIM, the same real partner per image.
200 images of a domain take 22 s on 2 cores.
"""
import json
from pathlib import Path

import numpy as np
import torch
from scipy.special import stdtrit

from models import (announce, detail, fid, inception_features, jackknife_error, kid, leave_out,
                    load_inception, pick_device, provenance, sha256, ssim)
from prepare import (CLASSES, UserError, load_images, load_labels, names, natural, parser,
                     positive, progress, start, writable, write_text)

ROWS = ["synthetic", "colour", "pretrained", "simgan", "ours"]
FLOOR = "real, other frames (the floor)"
CONTROL = "one flat colour (control)"
PAPER = {"synthetic": (60.82, 0.0023), "pretrained": (56.89, 0.0025),         # Table 2
         "ours": (55.71, 0.0026), "simgan": (57.04, 0.0025)}
METRICS = ["fid", "kid", "ssim", "ssim_range1"]


# -------------------------------------------------------------------------------- the scores


def score(images, features, real, real_features, device):
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
        values = ssim(images.to(device), real.to(device), max_val).cpu().double()
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
    for m in [m for m in METRICS if m in row and m in other]:
        d = with_error(row[m][0] - other[m][0], row[m][1] - other[m][1])
        result[m] = {**d, "sure": not d["low"] <= 0 <= d["high"]}
    return result


def by_size(features, real_features):
    """FID and KID of the same images in 4, 2 and 1 disjoint parts, the mean over the parts:
    what N alone does. {images a part: {"fid": .., "kid": ..}}"""
    sizes = {}
    for parts in (4, 2, 1):
        n = len(features) // parts
        if n >= 2:
            pairs = [(features[i * n:(i + 1) * n], real_features[i * n:(i + 1) * n])
                     for i in range(parts)]
            sizes[n] = {name: float(np.mean([metric(a, b) for a, b in pairs]))
                        for name, metric in (("fid", fid), ("kid", kid))}
    return sizes


def by_class(images, labels):
    """What a class looks like: {class: [R, G, B, detail]}, means over all its pixels, 0..255.

    detail: how far a pixel's brightness is from the mean of its four neighbours; blur lowers it.
    images uint8 [N, 3, H, W], labels trainIds [N, H, W].
    """
    images = images.float()
    fine = detail(images.mean(1, keepdim=True)).abs()
    values = torch.cat([images, fine], 1).transpose(0, 1)                   # [4, N, H, W]
    return {name: values[:, labels == i].mean(1).tolist()
            for i, name in enumerate(CLASSES) if (labels == i).any()}


def looks(domains, folder):
    """`by_class` of the test images of every domain and of real, and each class's share of the
    pixels of real, in %; None where there are no labels."""
    if not all(any((folder / d / "test/labels").glob("*.png")) for d in [*domains, "real"]):
        return None
    labels = {d: load_labels(folder / d / "test") for d in [*domains, "real"]}
    images = {**domains, "real": load_images(folder / "real/test")}
    known = sum((labels["real"] == i).sum().item() for i in range(len(CLASSES)))
    return {"share": {name: 100 * (labels["real"] == i).sum().item() / max(known, 1)
                      for i, name in enumerate(CLASSES)},
            "look": {d: by_class(images[d], labels[d]) for d in images}}


# -------------------------------------------------------------------------------- the report


def cell(score, scale=1, digits=2, interval=False, sign=""):
    """"1.23 ± 0.04", "1.23 [1.15, 1.31]" or, for what is inside its error, in brackets."""
    if score is None:
        return "-"
    value, error, low, high = (f"{scale * score[k]:.{digits}f}" for k in
                               ("value", "se", "low", "high"))
    text = f"{value} [{low}, {high}]" if interval else (
        f"{scale * score['value']:{sign}.{digits}f} ± {error}")
    return text if score.get("sure", True) else f"({text}) inside its error"


def markdown(head, lines):
    return "\n".join(["| " + " | ".join(line) + " |" for line in (
        head, ["---"] * len(head), *lines)])


def tables(record):
    """results/table2.md from the record in table2.json."""
    label, n = record["label"], record["n"]
    rows = []
    for name, row in record["rows"].items():
        get = row["scores"].get
        rows.append([name, str(row["n"]), cell(get("fid"), interval=True),
                     cell(get("kid"), 1000), cell(get("ssim"), 1, 4),
                     cell(get("ssim_range1"), 1, 4), *map(str, PAPER.get(name, ("-", "-")))])
    differences = [[name, cell(d.get("fid"), sign="+"), cell(d.get("kid"), 1000, sign="+"),
                    cell(d.get("ssim"), 1, 4, sign="+"),
                    cell(d.get("ssim_range1"), 1, 4, sign="+")]
                   for name, d in record["differences"].items()]
    sizes = [[name, key.upper()] + [f"{scale * s[key]:.2f}" for s in by_n.values()]
             for name, by_n in record["by_size"].items()
             for key, scale in (("fid", 1), ("kid", 1000))]
    count = next(iter(record["by_size"].values()))
    return "\n".join([
        markdown(["images vs real", "N", f"{label} [95 %]", "KID x 1000", "SSIM (L = 255)",
                  "SSIM (L = 1)", "paper FID", "paper SSIM"], rows), "",
        f"N = {n} images on both sides of every row; ± is one standard error, [ ] a 95 % "
        "interval (jackknife). It is the uncertainty at this N: FID's bias is not in it.", "",
        markdown(["difference", "FID", "KID x 1000", "SSIM (L = 255)", "SSIM (L = 1)"],
                 differences), "",
        "Paired: the same real images and, where both have them, the same scenes. In brackets: "
        "0 is in the 95 % interval (which one in 20 misses by chance).", "",
        markdown(["the same images, in parts of N =", "", *map(str, count)], sizes), "",
        "The images are the same: FID's bias shrinks with N, KID (here x 1000) has none.", ""]
        + class_tables(record.get("classes")))


def class_tables(classes):
    """The last table of table2.md: classes with 2 % of the pixels of real or more."""
    if not classes:
        return []
    shown = [name for name, share in classes["share"].items() if share >= 2]
    rows = [[f"{name} ({classes['share'][name]:.0f} %)"] + [
        "{:.0f} {:.0f} {:.0f}, **{:.1f}**".format(*look[name]) if name in look else "-"
        for look in classes["look"].values()] for name in shown]
    return [markdown(["class (share of real)", *classes["look"]], rows), "",
            "Mean R G B of a class and, bold, its detail: how far a pixel's brightness is from the "
            "mean of its four neighbours.", ""]


def report(record, out):
    """Write results/table2.json and .md, and print the tables."""
    write_text(out / "table2.json", json.dumps(record, indent=1))
    text = tables(record)
    write_text(out / "table2.md", text)
    print(text)
    print(f"done: {out / 'table2.md'}, {out / 'table2.json'}")


def weights_of(net, inception):
    """(label of the FID column, SHA-256 of the weights)."""
    label = {"imagenet": "FID (torchvision's ImageNet weights)",
             "random": "random features, not an FID"}.get(
        inception, f"FID ({Path(inception).name})")
    return label, sha256(*net.state_dict().values())


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

    def some(images):
        return torch.from_numpy(random.permutation(len(images))[:n])
    real, floor = real[some(real)], floor[some(floor)]
    scenes = some(next(iter(domains.values())))
    return {**{d: x[scenes] for d, x in domains.items()}, FLOOR: floor}, real


def main():
    args = arguments()
    device = pick_device(args.device)
    announce("evaluate.py", device, args.seed, f"{args.data}/*", f"{args.out}/table2.*")
    domains = load_domains(args.data)
    real, floor = (load_images(args.data / "real" / s) for s in ("test", "train"))
    n = check(domains, real, floor, args)
    writable(args.out)
    sample = torch.cat([x[:16] for x in (*domains.values(), floor)])     # for "random" only
    net = load_inception(args.inception, "pool3", sample, args.seed)
    label, weights = weights_of(net, args.inception)

    images, real = choose(domains, real, floor, n, args.pair_seed)
    flat = real.float().mean((0, 2, 3)).round().to(torch.uint8)[:, None, None].expand_as(real)

    features = {d: inception_features(net, x, device, progress=lambda batches: progress(
        batches, desc=f"Inception features of {d}", unit="batch"))
        for d, x in {**images, "real": real}.items()}
    if device.type == "cuda" and n >= 2000:          # eigenvalues of 2048 x 2048: for a GPU
        features = {d: f.to(device) for d, f in features.items()}
    rows = {d: score(x, features[d], real, features["real"], device) for d, x in images.items()}
    rows[CONTROL] = score(flat, None, real, None, device)
    pairs = [(d, next(iter(rows))) for d in rows][1:] + [("ours", "simgan"), ("ours", "colour")]
    report({
        **provenance(args, device), "label": label, "weights_sha256": weights,
        "resize": "bilinear to 299 x 299, align_corners=False, no antialias", "n": n,
        "pair_seed": args.pair_seed, "real_sha256": sha256(real),
        "rows": {d: {"n": n, "images_sha256": sha256({**images, CONTROL: flat}[d]),
                     "scores": {m: with_error(*s) for m, s in row.items()}}
                 for d, row in rows.items()},
        "differences": {f"{a} - {b}": difference(rows[a], rows[b]) for a, b in pairs
                        if a in rows and b in rows},
        "by_size": {d: by_size(features[d], features["real"])
                    for d in (next(iter(rows)), FLOOR)},
        "classes": looks(domains, args.data)}, args.out)


if __name__ == "__main__":
    start(main)
