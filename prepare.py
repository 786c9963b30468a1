"""Stage 1: raw street images to the one data format that every later stage reads.

Reads   GTA-V and Cityscapes in their official folders, any other image (+ label) folders, or
        nothing (--demo draws a toy town).
Writes  data/{synthetic,real}/{train,test}/images/NAME.png   RGB, all of one size
        data/{synthetic,real}/{train,test}/labels/NAME.png   palette; index = class, 0..18 or 255
        data/prepare.json   the settings, counts, what was skipped

    python prepare.py --gta5 ~/gtav --cityscapes ~/cityscapes          the paper's data
    python prepare.py --synthetic IMAGES LABELS --real IMAGES LABELS   any other
    python prepare.py --demo                                           no data at all

Two cores do 24 full-size frames a second. The other stages import the format from here.
"""
import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from support import toytown
from support.cli import (UserError, add_seed_flag, cpus, lock, parser, path_of, positive,
                         read_record, start, write_json, write_png)
from support.images import read_png, read_stack, sha256_of
from support.raw import (IGNORE, UNREADABLE, Found, Frame, by_ending, check_labels,
                         check_settings, find_cityscapes, find_folder, find_gta5, own_table,
                         palette_of, read_classes, read_label, read_rgb, usable)

# The 19 classes that GTA-V and Cityscapes share (section 4.1). Row i is trainId i:
# name, Cityscapes labelId, colour (cityscapesScripts labels.py).
TABLE = (
    ("road", 7, (128, 64, 128)), ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)), ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)), ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)), ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)), ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)), ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)), ("car", 26, (0, 0, 142)), ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)), ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)), ("bicycle", 33, (119, 11, 32)),
)
CLASSES = [name for name, _, _ in TABLE]
PALETTE = palette_of(TABLE)                          # uint8 [256, 3]; void, IGNORE, is black


# ---------------------------------------------------------------- reading prepared folders


def names(folder):
    """Sorted names (no suffix) of the images of a split folder like data/real/train.

    UserError if there is none, one is no PNG, or the run that makes them has not finished."""
    images = Path(folder) / "images"
    above = images.absolute().parents
    for record in (above[1] / "refine.json", above[2] / "prepare.json"):
        if record.is_file() and not read_record(record).get("finished"):
            raise UserError(f"{record}: that run has not finished; run it again")
    found = []
    for file in images.glob("[!.]*"):
        if file.suffix != ".png":
            raise UserError(f"{file}: a domain has *.png only; save it as one, or take it away")
        found.append(file.stem)
    if not found:
        raise UserError(f"{images}: no *.png there; run prepare.py (or refine.py) first")
    return sorted(found)


def classes_of(folder):
    """The rows of the class table of prepared data: TABLE, unless --classes gave others."""
    own = read_record(Path(folder) / "prepare.json").get("classes", CLASSES)
    return TABLE if own == CLASSES else own_table(own)


def files_of(folder, kind="images"):
    """The files of a split folder's images or labels, in the order of names()."""
    return [Path(folder) / kind / f"{name}.png" for name in names(folder)]


def load_images(folder):
    """All images of a split folder, in the order of names(): uint8 tensor [N, 3, H, W]."""
    return read_stack(files_of(folder), "RGB")


def load_labels(folder):
    """All labels of a split folder, in the order of names(): trainIds, uint8 [N, H, W]."""
    return read_stack(files_of(folder, "labels"), "P")


def check_domains(folder, domains, splits):
    """UserError unless these domains below `folder` can be compared: images of one size, and every
    refined domain made of its source as it is now."""
    folders = [folder / domain / split for domain in domains for split in splits]
    wanted = read_png(files_of(folders[0])[0], "RGB").shape[1:]
    for here in folders:
        size = read_png(files_of(here)[0], "RGB").shape[1:]
        if size != wanted:
            raise UserError("{}: images are {} x {}, those of {} are {} x {}; prepare both with "
                            "one --size".format(here, *size, folders[0], *wanted))
        made = read_record(here.parent / "refine.json")
        source = folder / Path(made.get("source", "synthetic")).name / here.name
        if made and (source / "images").is_dir():
            made_of = made.get("source_sha256", {}).get(here.name)
            if names(here) != names(source) or made_of and made_of != sha256_of(source):
                raise UserError(f"{here.parent}: was refined from other images or labels than "
                                f"those in {source.parent} today; run refine.py again")


# ------------------------------------------------------------------ finding the raw frames


class Part(NamedTuple):
    """One split to be made: `wanted` usable frames (None: all), tried in this order."""
    frames: list
    wanted: int | None


def toy_frames(part, count):
    """Frames of the toy town: each is drawn from its number and the part that it is in."""
    return Found([Frame(f"{i:05d}", Path(part), None, None) for i in range(count)], [], Counter())


def find(domain, args):
    """Two Found: frames to train on, and to test on (None where a data set has no test split)."""
    if args.demo:
        return toy_frames("train", args.limit or 600), toy_frames("test", args.test or 200)
    folders = getattr(args, domain) or []
    for raw in filter(None, (args.gta5, args.cityscapes, *folders)):
        if args.out.resolve().is_relative_to(raw.resolve()):
            raise UserError(f"--out {args.out} lies in {raw}, which is read; choose another --out")
    if domain == "synthetic" and args.gta5:
        return find_gta5(args.gta5, args.label_ids), None
    if domain == "real" and args.cityscapes:
        train = find_cityscapes(args.cityscapes, "train", args.label_ids)
        if not (args.cityscapes / "leftImg8bit" / "val").is_dir():
            return train, None
        return train, find_cityscapes(args.cityscapes, "val", args.label_ids)
    if not folders:
        raise UserError(f"nothing for the {domain} domain: give --gta5 and --cityscapes, "
                        "--synthetic and --real, or --demo")
    labels = folders[1] if len(folders) == 2 else None
    return find_folder(folders[0], labels, args.label_ids), None


def hold_out(domain, train, test, args, rng):
    """The test part, in random order, and the training part of a domain. Without official test
    frames --test of them are held out, or a fifth, 3 to 200."""
    if test is None:
        n = args.test or min(200, max(len(train) // 5, min(3, len(train) // 2)))
        if not 0 < n < len(train):
            raise UserError(f"the {domain} frames: --test {n} leaves none of its {len(train)} "
                            "frames to train on; give a smaller --test, or two frames at least")
        order = rng.permutation(len(train))
        held_out = Part([train[i] for i in order], n)         # those after n replace bad ones
        train = sorted(train[i] for i in order[n:])
    else:
        order = rng.permutation(len(test))
        held_out = Part([test[i] for i in order], args.test or min(200, len(test)))
    if args.limit:
        train = [train[i] for i in rng.permutation(len(train))]
    return held_out, Part(train, args.limit)


def plan(args):
    """Which raw frame goes where: {(domain, split): Part}, and all that was Found."""
    parts, found = {}, Found([], [], Counter())
    for domain, stream in (("synthetic", 0), ("real", 2)):       # two seeds for two splits
        rng = np.random.default_rng([args.seed, stream])
        train, test = find(domain, args)
        for some in filter(None, (train, test)):
            found.frames.extend(some.frames)
            found.skipped.extend(some.skipped)
            found.unread.update(some.unread)
        parts[domain, "test"], parts[domain, "train"] = hold_out(
            domain, train.frames, test.frames if test else None, args, rng)
    return parts, found


# ------------------------------------------------------------------------- making one frame


class Made(NamedTuple):
    """What came of a frame: pixels a class, int [classes + 1], the last is void; or why it was
    skipped."""
    pixels: np.ndarray | None = None
    why: str | None = None


def save_pair(folder, name, image, label, args):
    """Write one prepared pair, with the colours of its classes."""
    write_png(folder / "images" / f"{name}.png", image)
    pixels = np.zeros(len(args.table) + 1, np.int64)
    if label is not None:
        pixels = np.array(label.histogram())[[*range(len(args.table)), IGNORE]]
        label.putpalette(palette_of(args.table).ravel().tolist())
        write_png(folder / "labels" / f"{name}.png", label)
    return Made(pixels)


def make_frame(frame, folder, args):
    """Prepare one raw frame; returns a Made."""
    crop, size = args.crop, args.size[::-1]
    box = crop and (crop[1], crop[0], crop[1] + crop[3], crop[0] + crop[2])    # left, top, ...
    try:
        if len(os.fsencode(f"{frame.name}.png.tmp")) > 255:
            raise ValueError("its name is too long, with its folders, for a file system")
        image, label = read_rgb(frame.image, labelled=bool(frame.label)), None
        if frame.label:
            label = read_label(frame.label, frame.ids or "labelIds", args.table)
            if label.size != image.size:
                raise ValueError("image is {}x{}, label is {}x{}".format(*image.size, *label.size))
        if box and (box[2] > image.width or box[3] > image.height):
            raise ValueError(f"--crop {' '.join(map(str, crop))} does not fit into "
                             f"{image.width}x{image.height}; try --crop none")
    except UNREADABLE as error:
        if args.strict:
            raise UserError(f"{frame.image}: {error} (--strict)") from None
        return Made(why=str(error))
    # Antialias the image (BILINEAR of PIL does), or the stride shows as a style of its own.
    image = image.crop(box).resize(size, Image.BILINEAR)
    if label:
        label = label.crop(box).resize(size, Image.NEAREST)
    return save_pair(folder, frame.name, image, label, args)


def make_toy(frame, folder, args):
    """Draw one toy scene, which domain, split, name, --seed and --size decide; a Made."""
    seed = (args.seed, folder.name == "test", int(frame.name))
    image, label = map(Image.fromarray, toytown.draw(folder.parent.name, seed, args.size))
    return save_pair(folder, frame.name, image, label, args)


def make_domain(domain, parts, args):
    """Make the test frames of a domain, then those to train on; the next one replaces a bad one.
    Returns {split: {name: Made}} of the usable, and [(file, why it was skipped)]."""
    done, skipped, tried = {}, [], set()
    for split in ("test", "train"):
        folder, part = args.out / domain / split, parts[domain, split]
        frames = [frame for frame in part.frames if frame not in tried]
        make = partial(make_toy if args.demo else make_frame, folder=folder, args=args)
        made = usable(make, frames, part.wanted or len(frames), args.workers)
        done[split] = {frame.name: one for frame, one in made.items() if not one.why}
        skipped += [(frame.image, one.why) for frame, one in made.items() if one.why]
        tried.update(made)
        if not done[split]:
            why = "all of its frames were skipped" if made else "--test has taken all usable frames"
            file, reason = skipped[-1]
            raise UserError(f"{domain}/{split}: {why}; the last bad one is {file}: {reason}")
        # Delete what is not of this run: frames of an earlier one, *.tmp of a kill, and frames that
        # `usable` made beyond the wanted (one of test/ may be in train/ now).
        for kind in ("images", "labels"):
            for file in [*folder.glob(f"{kind}/*.png"), *folder.glob(f"{kind}/*.png.tmp")]:
                one = done[split].get(file.stem) if file.suffix == ".png" else None
                if not one or kind == "labels" and not one.pixels.any():
                    file.unlink()
    check_labels(domain, [*done["test"].values(), *done["train"].values()], args.label_ids)
    return done, skipped


# ------------------------------------------------------------------------------------ main


def summarise(done, parts, found, record, args):
    """Print frames per domain and split, the share of pixels per class, and what was skipped."""
    totals = {}
    for key, made in done.items():
        totals[key] = sum(one.pixels for one in made.values())
    print(f"{'frames':15s}" + "".join(f"{'/'.join(key):>18s}" for key in done))
    print(" " * 15 + "".join(f"{len(made):18d}" for made in done.values()))
    classes = [row[0] for row in args.table] + ["(void)"]
    labelled = any(total.any() for total in totals.values())
    for i, name in enumerate(classes if labelled else []):
        shares = [100 * total[i] / max(total.sum(), 1) for total in totals.values()]
        print(f"{name:15s}" + "".join(f"{share:17.2f}%" for share in shares))
    for key, part in parts.items():
        if part.wanted and len(done[key]) < part.wanted:
            print(f"{'/'.join(key)}: asked {part.wanted}, got {len(done[key])}")
    for file, why in found.skipped[:5]:
        print(f"skipped {file}: {why}")
    print(f"{record['not_asked']} frames not asked for (--test, --limit); {len(found.skipped)} "
          f"frames skipped (all listed in {args.out / 'prepare.json'}); files not read: "
          f"{by_ending(found.unread)}")
    if any(not total.sum() for total in totals.values()):
        print("a domain has no labels: it can be refined and evaluated, but not segmented")
    print(f"done: {args.out}/")


def arguments():
    p = parser(__doc__)
    add_seed_flag(p)
    folder = {"type": path_of, "metavar": "DIR"}
    p.add_argument("--gta5", **folder, help="folder with images/ and labels/")
    p.add_argument("--cityscapes", **folder, help="folder with leftImg8bit/{train,val} and "
                   "gtFine/{train,val}")
    p.add_argument("--synthetic", nargs="+", **folder, help="IMAGES [LABELS] of any source")
    p.add_argument("--real", nargs="+", **folder, help="IMAGES [LABELS] of any source")
    p.add_argument("--demo", action="store_true", help="draw a toy town instead")
    p.add_argument("--out", type=path_of, default=Path("data"), help="where the data goes")
    p.add_argument("--size", type=positive(int), nargs=2, default=[80, 160],
                   metavar=("H", "W"), help="(paper) size of every image")
    p.add_argument("--crop", nargs="+", metavar="N", help="(paper) TOP LEFT HEIGHT WIDTH, or "
                   "none (default: 200 600 400 600 of GTA-V with Cityscapes, else none)")
    p.add_argument("--test", type=positive(int), help="(paper) test frames a domain "
                   "(default: 200, or a fifth of all, 3 at least, if that is less)")
    p.add_argument("--limit", type=positive(int), help="training frames a domain, at most; "
                   "all if not given (--demo: 600)")
    p.add_argument("--label-ids", choices=["labelIds", "trainIds"],
                   help="what the labels hold (default: labelIds)")
    p.add_argument("--classes", type=path_of, metavar="FILE", help="names of your own classes, one "
                   "a line; the labels of --synthetic and --real hold line numbers from 0, or 255")
    p.add_argument("--workers", type=positive(int), default=cpus(), help="threads")
    p.add_argument("--strict", action="store_true", help="stop at the first bad frame")
    args = p.parse_args()
    check_flags(p, args)
    return args


def check_flags(p, args):
    """Refuse flags that do not fit each other; make --crop numbers."""
    papers = "200 600 400 600" if args.gta5 and args.cityscapes else "none"
    crop = args.crop or papers.split()
    numbers = [int(n) for n in crop if n.isdecimal()]
    if crop != ["none"] and (not len(crop) == len(numbers) == 4 or 0 in numbers[2:]):
        p.error("--crop wants four numbers (TOP LEFT HEIGHT WIDTH) or none")
    args.crop = numbers or None
    if min(args.size) < 24 or max(args.size) > 4096:
        p.error(f"--size {args.size[0]} {args.size[1]}: from 24 x 24 to 4096 x 4096")
    if args.demo and (args.gta5 or args.cityscapes or args.synthetic or args.real or args.crop
                      or args.label_ids):
        p.error("--demo draws its own data: leave out the folders, --crop and --label-ids")
    if args.gta5 and args.synthetic or args.cityscapes and args.real:
        p.error("--gta5 or --synthetic, --cityscapes or --real: one source a domain")
    if args.classes and (args.gta5 or args.cityscapes or args.demo or args.label_ids):
        p.error("--classes goes with --synthetic and --real, whose labels hold its numbers")
    if max(len(args.synthetic or []), len(args.real or [])) > 2:
        p.error("--synthetic and --real want one or two folders: IMAGES [LABELS]")


def settings_of(args):
    """What decides the data, as text."""
    settings = {}
    for flag, value in vars(args).items():
        if flag in ("synthetic", "real") and value:
            value = [str(v) for v in value]
        if flag not in ("workers", "strict", "out"):
            settings[flag] = str(value)
    return {**settings, "label_ids": args.label_ids or "labelIds"}


def main():
    args = arguments()
    settings = settings_of(args)
    args.table = read_classes(args.classes) if args.classes else TABLE
    if args.classes:
        args.label_ids = "classes"

    # 1. Which raw frame goes where.
    parts, found = plan(args)
    if args.strict and found.skipped:
        raise UserError("{}: {} (--strict)".format(*found.skipped[0]))
    print(f"prepare.py: {len(found.frames)} frames -> {args.out}/, {args.size[0]} x "
          f"{args.size[1]}, crop {args.crop or 'none'}, seed {args.seed}, {args.workers} "
          f"threads, to test on: {parts['synthetic', 'test'].wanted} synthetic, "
          f"{parts['real', 'test'].wanted} real (--test)")

    # 2. A folder for them, which says that it is not finished.
    lock(args.out)
    check_settings(args.out / "prepare.json", settings)
    record = {"settings": settings, "finished": False, "classes": [row[0] for row in args.table]}
    write_json(args.out / "prepare.json", record)

    # 3. Crop, resize and relabel every frame.
    done, bad = {}, []
    for domain in ("synthetic", "real"):
        made, skipped = make_domain(domain, parts, args)
        done[domain, "train"], done[domain, "test"] = made["train"], made["test"]
        bad += skipped

    # 4. What came of it.
    counts = {"/".join(key): len(made) for key, made in done.items()}
    not_asked = len(found.frames) - sum(counts.values()) - len(bad)
    found.skipped.extend(bad)
    record.update(finished=True, counts=counts, not_asked=not_asked, not_read=found.unread,
                  skipped=[f"{file}: {why}" for file, why in found.skipped])
    write_json(args.out / "prepare.json", record)
    summarise(done, parts, found, record, args)


if __name__ == "__main__":
    start(main)
