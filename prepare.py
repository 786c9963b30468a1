"""Stage 1: raw street images to the one data format that every later stage reads.

Reads   GTA-V and Cityscapes in their official folders, any other image (+ label) folders, or
        nothing (--demo draws a toy town).
Writes  data/{synthetic,real}/{train,test}/images/NAME.png   RGB, all of one size
        data/{synthetic,real}/{train,test}/labels/NAME.png   palette; index = trainId 0..18, 255
        data/prepare.json   the settings, which frames were held out, counts, what was skipped

    python prepare.py --gta5 ~/gtav --cityscapes ~/cityscapes          the paper's data
    python prepare.py --synthetic IMAGES LABELS --real IMAGES LABELS   any other
    python prepare.py --demo                                           no data at all

The other stages import the format from here: CLASSES, PALETTE, IGNORE, load_images, load_labels.
"""
import json
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from support import toytown
from support.cli import (UserError, in_parallel, lock, parser, positive, start, write_json,
                         write_png)

# The 19 classes that GTA-V and Cityscapes share (section 4.1). Row i is trainId i:
# name, Cityscapes labelId, colour (cityscapesScripts labels.py).
TABLE = [
    ("road", 7, (128, 64, 128)), ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)), ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)), ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)), ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)), ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)), ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)), ("car", 26, (0, 0, 142)), ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)), ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)), ("bicycle", 33, (119, 11, 32)),
]
CLASSES = [name for name, _, _ in TABLE]
PALETTE = np.zeros((256, 3), np.uint8)               # void (255) is black
PALETTE[:19] = [colour for _, _, colour in TABLE]
IGNORE = 255                                         # void: in no loss and no score

# Raw pixel value -> trainId. Every labelId outside the 19 classes is void; a value that no
# table knows is UNKNOWN, and its frame is refused.
UNKNOWN = 254
LOOKUP = {name: np.full(256, UNKNOWN, np.uint8) for name in ("labelIds", "trainIds")}
LOOKUP["labelIds"][list(range(35)) + [255]] = IGNORE
LOOKUP["labelIds"][[label_id for _, label_id, _ in TABLE]] = range(19)
LOOKUP["trainIds"][list(range(19)) + [255]] = list(range(19)) + [IGNORE]


# ---------------------------------------------------------------- reading prepared folders


def names(folder):
    """Sorted names (no suffix) of the images of a split folder like data/real/train.

    Raises UserError if there is none, or if the run that makes them has not finished."""
    images = Path(folder) / "images"
    above = images.absolute().parents
    for record in (above[1] / "refine.json", above[2] / "prepare.json"):
        if record.is_file() and not read_record(record).get("finished"):
            raise UserError(f"{record}: that run has not finished; run it again")
    found = sorted(p.stem for p in images.glob("*.png"))
    if not found:
        raise UserError(f"{images}: no *.png there; run prepare.py (or refine.py) first")
    return found


def read_record(path):
    """The dict in a prepare.json or refine.json; UserError if there is none in it."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{path}: damaged; run prepare.py (or refine.py) again, prepare.py "
                        "into another --out")
    return record


def read_stack(folder, kind, mode):
    """Every image of folder/kind as one uint8 array; all must have one size and `mode`."""
    arrays = []
    for name in names(folder):
        path = Path(folder) / kind / f"{name}.png"
        try:
            with Image.open(path) as image:
                array = np.array(image) if image.mode == mode else None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{path}: cannot be read ({error}); prepare the data again") from None
        if array is None or (arrays and array.shape != arrays[0].shape):
            raise UserError(f"{path}: not a {mode} image of its folder's size; "
                            "prepare the data again")
        arrays.append(array)
    return np.stack(arrays)


def load_images(folder):
    """All images of a split folder, in the order of names(): uint8 tensor [N, 3, H, W]."""
    import torch
    return torch.from_numpy(read_stack(folder, "images", "RGB")).permute(0, 3, 1, 2).contiguous()


def load_labels(folder):
    """All labels of a split folder, in the order of names(): trainIds, uint8 [N, H, W]."""
    import torch
    return torch.from_numpy(read_stack(folder, "labels", "P"))


# ------------------------------------------------------------------ finding the raw frames


class Frame(NamedTuple):
    """One raw frame. `label` is None where there is none; `ids`: which ids its pixels are."""
    name: str
    image: Path
    label: Path | None
    ids: str


def images_below(folder):
    """Every PNG or JPEG below `folder`, sorted; raises UserError if there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not found:
        raise UserError(f"{folder}: no images (*.png, *.jpg, *.jpeg, any case) in or below it")
    return found


def find_folder(images, labels=None, ids="labelIds"):
    """Frames of any image folder; the label of a/b.jpg is labels/a/b.png (or none at all)."""
    frames, skipped = [], []
    seen, label_of = {}, {}
    images, labels = Path(images), labels and Path(labels)
    if labels:
        if not labels.is_dir():
            raise UserError(f"{labels}: no such folder of labels")
        label_of = {p.relative_to(labels).with_suffix(""): p
                    for p in sorted(labels.rglob("*")) if p.suffix.lower() == ".png"}
    for path in images_below(images):
        relative = path.relative_to(images).with_suffix("")
        name = "_".join(relative.parts)
        if name in seen:
            raise UserError(f"{path} and {seen[name]} would both become {name}.png; rename one")
        seen[name] = path
        label = label_of.pop(relative, None)
        if labels and not label:
            skipped.append((path, f"no label {labels / relative}.png"))
        else:
            frames.append(Frame(name, path, label, ids))
    return frames, skipped + [(path, "a label without an image") for path in label_of.values()]


def find_gta5(root):
    """GTA-V: images/NNNNN.png with labels/NNNNN.png; without a labels folder, images only."""
    root = Path(root)
    if not (root / "images").is_dir():
        raise UserError(f"{root}: no images/ folder in it; --gta5 wants images/ and labels/")
    labels = root / "labels" if (root / "labels").is_dir() else None
    return find_folder(root / "images", labels)


def find_cityscapes(root, split):
    """Cityscapes: leftImg8bit/SPLIT/CITY/*_leftImg8bit.png with gtFine/.../*_labelIds.png."""
    root = Path(root)
    if not (root / "leftImg8bit" / "train").is_dir():
        raise UserError(f"{root}: no leftImg8bit/train/ in it; --cityscapes wants the folder "
                        "that holds leftImg8bit/ and gtFine/")
    frames, skipped = [], []
    has_labels = (root / "gtFine").is_dir()
    for path in images_below(root / "leftImg8bit" / split):
        name = path.stem.removesuffix("_leftImg8bit")
        label = root / "gtFine" / split / path.parent.name / f"{name}_gtFine_labelIds.png"
        if has_labels and not label.is_file():
            skipped.append((path, f"no label {label}"))
        else:
            frames.append(Frame(name, path, label if has_labels else None, "labelIds"))
    return frames, skipped


def hold_out(frames, count, rng, domain):
    """Split frames at random into (rest, `count` test frames), both sorted."""
    if count >= len(frames):
        raise UserError(f"the {domain} frames: --test {count} leaves none of its {len(frames)} "
                        "frames to train on; give a smaller --test")
    order = rng.permutation(len(frames))
    return sorted(frames[i] for i in order[count:]), sorted(frames[i] for i in order[:count])


def take(frames, count, rng):
    """`count` frames at random (all if count is None), sorted."""
    if count is None:
        return frames
    return sorted(frames[i] for i in rng.permutation(len(frames))[:count])


def find(domain, args):
    """Raw frames of a domain: (training frames, official test frames or None, pairs of which a
    half is missing)."""
    if domain == "synthetic" and args.gta5:
        frames, bad = find_gta5(args.gta5)
        return frames, None, bad
    if domain == "real" and args.cityscapes:
        train, bad = find_cityscapes(args.cityscapes, "train")
        if not (Path(args.cityscapes) / "leftImg8bit" / "val").is_dir():
            return train, None, bad
        test, more = find_cityscapes(args.cityscapes, "val")
        return train, test, bad + more
    folders = getattr(args, domain)
    if not folders:
        raise UserError(f"nothing for the {domain} domain: give --gta5 and --cityscapes, "
                        "--synthetic and --real, or --demo")
    frames, bad = find_folder(*folders, ids=args.label_ids)
    return frames, None, bad


def plan(args):
    """Which raw frame goes where: {(domain, split): frames}, and what is skipped."""
    frames, skipped = {}, []
    for domain, stream in (("synthetic", 0), ("real", 2)):
        rng = np.random.default_rng([args.seed, stream])          # another one per domain
        train, test, bad = find(domain, args)
        if not train:
            raise UserError(f"the {domain} frames: none has its label; {bad[0][0]}: {bad[0][1]}")
        if test is None:                                  # no official split: hold some out
            train, test = hold_out(train, args.test, rng, domain)
        elif len(test) < args.test:
            raise UserError(f"the {domain} frames: --test {args.test}, but val/ has {len(test)}")
        frames[domain, "train"] = take(train, args.limit, rng)
        frames[domain, "test"] = take(test, args.test, rng)
        skipped += bad
    return frames, skipped


def plan_demo(args):
    """What `plan` returns for the toy town: frame i of a split is drawn from its number."""
    frames = {}
    for domain in ("synthetic", "real"):
        for split, count in (("train", args.limit or 600), ("test", args.test)):
            frames[domain, split] = [Frame(f"{i:05d}", None, None, None) for i in range(count)]
    return frames, []


# ------------------------------------------------------------------------- making one frame


def read_rgb(path):
    """An image file as RGB, turned upright if a camera noted how it was held.

    Grey, palette and opaque RGBA are converted. CMYK (no profile says which colours), 16-bit
    grey (any range) and what is transparent (no picture there) are refused: ValueError."""
    with Image.open(path) as image:
        if image.mode not in ("RGB", "L", "P", "RGBA", "LA", "1"):
            raise ValueError(f"image mode {image.mode}, wanted 8-bit RGB")
        if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
            raise ValueError("it has transparent pixels, wanted an opaque image")
        return ImageOps.exif_transpose(image).convert("RGB")


def read_label(path, ids):
    """A label file as trainIds (PIL mode L). Its pixel VALUES are ids: never convert colours."""
    with Image.open(path) as image:
        if image.mode not in ("P", "L"):
            raise ValueError(f"label mode {image.mode}, wanted 8-bit ids (palette or grey)")
        label = LOOKUP[ids][np.array(image)]
        if (label == UNKNOWN).any():
            bad = np.unique(np.array(image)[label == UNKNOWN])
            raise ValueError(f"label ids {', '.join(map(str, bad[:5]))} are not {ids}")
        return Image.fromarray(label)


def crop_and_resize(image, crop, size, resample):
    """Cut (top, left, height, width) out of a PIL image and resize it to (height, width)."""
    if crop:
        (top, left), (height, width) = crop[:2], crop[2:]
        image = image.crop((left, top, left + width, top + height))
    return image.resize((size[1], size[0]), resample)


def save_pair(folder, name, image, label):
    """Write one prepared pair; return its pixels per class, int [20] (the last is void)."""
    write_png(folder / "images" / f"{name}.png", image)
    counts = np.zeros(20, np.int64)
    if label is not None:
        counts[:19] = np.bincount(np.array(label).ravel(), minlength=256)[:19]
        counts[19] = label.width * label.height - counts.sum()
        label.putpalette(PALETTE.ravel().tolist())
        write_png(folder / "labels" / f"{name}.png", label)
    return counts


def make_frame(job, args):
    """Prepare one raw frame: (pixels per class, None), or (None, why it was skipped)."""
    (domain, split), frame = job
    crop = args.crop
    try:
        image = read_rgb(frame.image)
        label = read_label(frame.label, frame.ids) if frame.label else None
        if label and label.size != image.size:
            raise ValueError("image is {}x{}, label is {}x{}".format(*image.size, *label.size))
        if crop and (crop[0] + crop[2] > image.height or crop[1] + crop[3] > image.width):
            raise ValueError(f"--crop {' '.join(map(str, crop))} does not fit into "
                             f"{image.width}x{image.height}; try --crop none")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return None, str(error)
    # Antialias the image (BILINEAR of PIL does), or the stride shows as a style of its own.
    image = crop_and_resize(image, crop, args.size, Image.BILINEAR)
    label = label and crop_and_resize(label, crop, args.size, Image.NEAREST)
    return save_pair(args.out / domain / split, frame.name, image, label), None


def make_toy(job, args):
    """Draw one toy scene, a pure function of domain, name and seed; see support/toytown.py."""
    (domain, split), frame = job
    number = (args.seed, split == "test", int(frame.name))
    image, label = map(Image.fromarray, toytown.draw(domain, number, args.size))
    return save_pair(args.out / domain / split, frame.name, image, label), None


# ------------------------------------------------------------------------------------ main


def check_settings(path, settings):
    """Refuse to mix two settings in one folder; the same settings just run again."""
    for domain in ("synthetic", "real"):
        if (path.parent / domain).exists() and not path.is_file():
            raise UserError(f"{path.parent / domain}: is there, but was not made by prepare.py "
                            "(no prepare.json beside it); choose another --out")
    old = read_record(path).get("settings", {}) if path.is_file() else settings
    changed = [k for k in settings if old.get(k) != settings[k]]
    if changed and any(path.parent.glob("*/*/images/*.png")):
        raise UserError(f"{path.parent} was prepared with {changed[0]} = {old.get(changed[0])}, "
                        f"not {settings[changed[0]]}; choose another --out or delete it")


def summarise(made, totals, skipped, out):
    """Print frames per domain and split, the share of pixels per class, and what was skipped."""
    print(f"{'frames':15s}" + "".join(f"{'/'.join(key):>18s}" for key in made))
    print(" " * 15 + "".join(f"{len(some):18d}" for some in made.values()))
    for i, name in enumerate(CLASSES + ["(void)"]):
        shares = [100 * total[i] / max(total.sum(), 1) for total in totals.values()]
        print(f"{name:15s}" + "".join(f"{share:17.2f}%" for share in shares))
    for path, why in skipped[:5]:
        print(f"skipped {path}: {why}")
    print(f"{len(skipped)} frames skipped (all listed in {out / 'prepare.json'})")
    if any(not total.sum() for total in totals.values()):
        print("a domain has no labels: it can be refined and evaluated, but not segmented")
    print(f"done: {out}/")


def arguments():
    p = parser(__doc__)
    folder = {"type": os.path.expanduser, "metavar": "DIR"}
    p.add_argument("--gta5", **folder, help="folder with images/ and labels/")
    p.add_argument("--cityscapes", **folder, help="folder with leftImg8bit/ and gtFine/")
    p.add_argument("--synthetic", nargs="+", **folder, help="IMAGES [LABELS] of any source")
    p.add_argument("--real", nargs="+", **folder, help="IMAGES [LABELS] of any source")
    p.add_argument("--demo", action="store_true", help="draw a toy town instead")
    p.add_argument("--out", type=Path, default=Path("data"), help="where the data goes")
    p.add_argument("--size", type=positive(int), nargs=2, default=[80, 160],
                   metavar=("H", "W"), help="(paper) size of every image")
    p.add_argument("--crop", nargs="+", default=["200", "600", "400", "600"],
                   metavar="N", help="(paper) TOP LEFT HEIGHT WIDTH, or none")
    p.add_argument("--test", type=positive(int), default=200, help="(paper) test frames a domain")
    p.add_argument("--limit", type=positive(int), help="training frames a domain, at most; "
                   "all if not given (--demo: 600)")
    p.add_argument("--label-ids", choices=["labelIds", "trainIds"], default="labelIds",
                   help="ids in the LABELS of --synthetic and --real")
    p.add_argument("--workers", type=positive(int), default=os.cpu_count(), help="processes")
    p.add_argument("--strict", action="store_true", help="stop at the first bad frame")
    args = p.parse_args()
    check_flags(p, args)
    return args


def check_flags(p, args):
    """Refuse flags that do not fit each other; make --crop numbers."""
    if args.crop == ["none"]:
        args.crop = None
    elif len(args.crop) == 4 and all(n.isdecimal() for n in args.crop) \
            and int(args.crop[2]) and int(args.crop[3]):
        args.crop = [int(n) for n in args.crop]
    else:
        p.error("--crop wants four numbers (TOP LEFT HEIGHT WIDTH) or none")
    if min(args.size) < 24 or max(args.size) > 4096:
        p.error(f"--size {args.size[0]} {args.size[1]}: from 24 x 24 to 4096 x 4096")
    if args.demo and (args.gta5 or args.cityscapes or args.synthetic or args.real):
        p.error("--demo draws its own data: leave the folders away")
    if args.gta5 and args.synthetic or args.cityscapes and args.real:
        p.error("--gta5 or --synthetic, --cityscapes or --real: one source a domain")
    for flag in ("synthetic", "real"):
        if len(getattr(args, flag) or [1]) > 2:
            p.error(f"--{flag} wants one or two folders: IMAGES [LABELS]")


def make_all(make, frames, args, skipped):
    """Make every frame; appends to `skipped`. Returns, for every (domain, split), the set of names
    that were made and the pixels per class, int [20]."""
    made, totals, jobs = {}, {}, []
    for key, some in frames.items():
        made[key], totals[key] = set(), np.zeros(20, np.int64)
        jobs += [(key, frame) for frame in some]
    results = in_parallel(partial(make, args=args), jobs, args.workers)
    for (key, frame), (pixels, why) in zip(jobs, results):
        if why and args.strict:
            raise UserError(f"{frame.image}: {why} (--strict)")
        if why:
            skipped.append((frame.image, why))
        else:
            made[key].add(frame.name)
            totals[key] += pixels
    for key, names_made in made.items():
        if not names_made:
            raise UserError(f"{'/'.join(key)}: all of its frames were skipped, the last because: "
                            f"{skipped[-1][0]}: {skipped[-1][1]}")
    return made, totals


def remove_others(out, made):
    """Delete what an earlier run left on other frames, or a killed one as .png.tmp."""
    for (domain, split), names_made in made.items():
        for path in (out / domain / split).glob("*/*.png*"):
            if path.suffix != ".png" or path.stem not in names_made:
                path.unlink()


def main():
    args = arguments()

    # 1. Which raw frame goes where.
    frames, skipped = plan_demo(args) if args.demo else plan(args)
    if args.strict and skipped:
        raise UserError(f"{skipped[0][0]}: {skipped[0][1]} (--strict)")
    count = sum(map(len, frames.values()))
    print(f"prepare.py: {count} frames -> {args.out}/, {args.size[0]} x {args.size[1]}, "
          f"crop {args.crop or 'none'}, seed {args.seed}, {args.workers} processes")

    # 2. A folder for them, which says that it is not finished.
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("workers", "strict", "out")}
    lock(args.out)
    check_settings(args.out / "prepare.json", settings)
    record = {"settings": settings, "finished": False}
    write_json(args.out / "prepare.json", record)
    for domain, split in frames:
        for kind in ("images", "labels"):
            (args.out / domain / split / kind).mkdir(parents=True, exist_ok=True)

    # 3. Crop, resize and relabel every frame.
    make = make_toy if args.demo else make_frame
    made, totals = make_all(make, frames, args, skipped)
    remove_others(args.out, made)

    # 4. What came of it.
    held_out = {}
    for domain in ("synthetic", "real"):
        held_out[domain] = [frame.name for frame in frames[domain, "test"]]
    record.update(finished=True, counts={"/".join(key): len(n) for key, n in made.items()},
                  held_out=held_out, skipped=[f"{path}: {why}" for path, why in skipped])
    write_json(args.out / "prepare.json", record)
    summarise(made, totals, skipped, args.out)


if __name__ == "__main__":
    start(main)
