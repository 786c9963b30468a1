"""Stage 1: raw street images to the one data format that every later stage reads.

Reads   GTA-V and Cityscapes in their official folders, any other image (+ label) folders, or
        nothing (--demo draws a toy town).
Writes  data/{synthetic,real}/{train,test}/images/NAME.png   RGB, all of one size
        data/{synthetic,real}/{train,test}/labels/NAME.png   palette; index = trainId 0..18, 255
        data/prepare.json   the settings, which frames were held out, counts, what was skipped

    python prepare.py --gta5 ~/gtav --cityscapes ~/cityscapes          the paper's data
    python prepare.py --synthetic IMAGES LABELS --real IMAGES LABELS   any other
    python prepare.py --demo                                           no data at all: 20 s

50 to 80 ms of one core a full-size frame: about 15 minutes for all of GTA-V and Cityscapes on 2.
It is also the data format itself: CLASSES, PALETTE, IGNORE, load_images and load_labels are
imported by the other stages. It imports none of them, and torch only where tensors are made.
"""
import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

try:
    import fcntl
except ImportError:                                  # Windows: no locks there
    fcntl = None

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
SUFFIXES = {".png", ".jpg", ".jpeg"}

# Raw pixel value -> trainId. Every labelId outside the 19 classes is void; a value that no
# table knows is UNKNOWN, and its frame is refused.
UNKNOWN = 254
LOOKUP = {name: np.full(256, UNKNOWN, np.uint8) for name in ("labelIds", "trainIds")}
LOOKUP["labelIds"][list(range(35)) + [255]] = IGNORE
LOOKUP["labelIds"][[label_id for _, label_id, _ in TABLE]] = range(19)
LOOKUP["trainIds"][list(range(19)) + [255]] = list(range(19)) + [IGNORE]


class UserError(Exception):
    """Something the user can mend. Its text names the file or flag, what was found, and what
    to do; `start` prints it as one line."""


BARS = []                                            # closed before an error is printed


def start(main):
    """Call a script's main(); turn what a user can mend into one line and status 2: a UserError,
    a file that cannot be read or written, memory that does not suffice."""
    try:
        main()
    except Exception as error:
        if "OutOfMemory" in type(error).__name__ or "allocate memory" in str(error) or isinstance(
                error, MemoryError):                     # CUDA's, PyTorch's on a CPU, Python's
            error = UserError("out of memory; try a smaller --batch-size or, in prepare.py, a "
                              "smaller --size or fewer --workers")
        if not isinstance(error, (UserError, OSError)):
            raise                                        # a mistake of ours: the traceback
        for bar in BARS:
            bar.close()
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:                    # with a text: a training that has saved
        advice = f" {stop}; --resume goes on" if str(stop) else "; run it again to go on"
        print(f"\n{Path(sys.argv[0]).name}: stopped{advice}", file=sys.stderr)
        sys.exit(130)


def parser(doc):
    """An ArgumentParser whose help is the script's own docstring and shows every default."""
    class Formatter(argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            nothing = any(action.default is x for x in (None, False, argparse.SUPPRESS))
            return action.help if nothing else f"{action.help} (default: %(default)s)"
    p = argparse.ArgumentParser(description=doc, formatter_class=Formatter, allow_abbrev=False)
    p.add_argument("--seed", type=natural, default=0, help="decides every random choice")
    return p


def natural(text):
    """An argparse type: an int of 0 or more."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return int(text)


def positive(kind):
    """An argparse type: a finite number of `kind` above 0."""
    def convert(text):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value
    convert.__name__ = f"positive {kind.__name__}"
    return convert


def progress(iterable=None, **options):
    """tqdm with a rate and the time left; in a log file, a line every 20 seconds at most."""
    slow = {} if sys.stderr.isatty() else {"mininterval": 20}
    BARS.append(tqdm(iterable, dynamic_ncols=True, **slow, **options))
    return BARS[-1]


LOCKS = []                                           # open files: closing one frees its lock


def lock(folder, make=True):
    """UserError if another process writes into `folder`; else keep others out until this one ends.

    The system frees the lock however the process ends, so a kill leaves none stuck; the empty
    file .lock stays. `make`: create the folder; False: do nothing where there is none yet.
    """
    if fcntl is None or not (make or Path(folder).is_dir()):
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    LOCKS.append(open(Path(folder) / ".lock", "w"))
    try:
        fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)     # not inherited by workers
    except (BlockingIOError, PermissionError):
        raise UserError(f"{folder}: another process is writing there; wait for its end or choose "
                        "another folder") from None


def writable(folder):
    """Make a folder for results, or fail now rather than after the hours that lead to them."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextmanager
def whole(path):
    """A temporary name to write to: renamed to `path` at the end, removed if writing failed."""
    temporary = Path(f"{path}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path, text):
    """Write a text file whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_png(path, image):
    """Write a PIL image as PNG, whole or not at all."""
    with whole(path) as temporary:
        image.save(temporary, format="PNG")


def save_grid(path, rows, columns=()):
    """Save a picture of captioned rows: {caption: uint8 tensor [N, 3, H, W]}, equal N, H, W;
    `columns` are captions above the pictures. Small images are shown enlarged."""
    n, _, height, width = next(iter(rows.values())).shape
    scale = max(1, 160 // width)
    step_x, step_y, left, head = width * scale + 4, height * scale + 4, 90, 16 * bool(columns)
    grid = Image.new("RGB", (left + n * step_x, head + len(rows) * step_y), "white")
    pen = ImageDraw.Draw(grid)
    for j, caption in enumerate(columns):
        pen.text((left + j * step_x + 2, 2), caption, fill="black")
    for i, (caption, images) in enumerate(rows.items()):
        pen.text((4, head + i * step_y + step_y // 2 - 6), caption, fill="black")
        for j, array in enumerate(images.cpu().permute(0, 2, 3, 1).numpy()):
            picture = Image.fromarray(array)
            picture = picture.resize((width * scale, height * scale), Image.NEAREST)
            grid.paste(picture, (left + j * step_x, head + i * step_y + 2))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_png(path, grid)


# ---------------------------------------------------------------- reading prepared folders


def names(folder):
    """Sorted names (no suffix) of the images of a split folder like data/real/train.

    Raises UserError if there is none, or if the run that makes them has not finished."""
    images = Path(folder) / "images"
    for record in (images.parents[1] / "refine.json", images.parents[2] / "prepare.json"):
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
    """One raw frame. `label` is None where there is none."""
    name: str
    image: Path
    label: Path | None


def images_below(folder):
    """Every PNG or JPEG below `folder`, sorted; raises UserError if there is none."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"{folder}: no images (*.png, *.jpg, *.jpeg, any case) in or below it")
    return found


def find_folder(images, labels=None):
    """Frames of any image folder; the label of a/b.jpg is labels/a/b.png (or none at all)."""
    frames, skipped, seen, label_of = [], [], {}, {}
    images, labels = Path(images).expanduser(), labels and Path(labels).expanduser()
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
            frames.append(Frame(name, path, label))
    return frames, skipped + [(path, "a label without an image") for path in label_of.values()]


def find_gta5(root):
    """GTA-V: images/NNNNN.png with labels/NNNNN.png; without a labels folder, images only."""
    root = Path(root).expanduser()
    if not (root / "images").is_dir():
        raise UserError(f"{root}: no images/ folder in it; --gta5 wants images/ and labels/")
    labels = root / "labels" if (root / "labels").is_dir() else None
    return find_folder(root / "images", labels)


def find_cityscapes(root, split):
    """Cityscapes: leftImg8bit/SPLIT/CITY/*_leftImg8bit.png with gtFine/.../*_labelIds.png."""
    root = Path(root).expanduser()
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
            frames.append(Frame(name, path, label if has_labels else None))
    return frames, skipped


def hold_out(frames, count, rng, flag):
    """Split frames at random into (rest, `count` test frames), both sorted."""
    if count >= len(frames):
        raise UserError(f"{flag}: --test {count} leaves none of its {len(frames)} frames to "
                        "train on; give a smaller --test")
    order = rng.permutation(len(frames))
    return sorted(frames[i] for i in order[count:]), sorted(frames[i] for i in order[:count])


def take(frames, count, rng):
    """`count` frames at random (all if count is None), sorted."""
    return frames if count is None else sorted(frames[i] for i in
                                               rng.permutation(len(frames))[:count])


def find(domain, args):
    """Raw frames of a domain: (training frames, official test frames or None, kind of label
    ids, pairs of which a half is missing)."""
    if domain == "synthetic" and args.gta5:
        frames, bad = find_gta5(args.gta5)
        return frames, None, "labelIds", bad
    if domain == "real" and args.cityscapes:
        train, bad = find_cityscapes(args.cityscapes, "train")
        if not (Path(args.cityscapes).expanduser() / "leftImg8bit" / "val").is_dir():
            return train, None, "labelIds", bad
        test, more = find_cityscapes(args.cityscapes, "val")
        return train, test, "labelIds", bad + more
    folders = getattr(args, domain)
    if not folders:
        raise UserError(f"nothing for the {domain} domain: give --gta5 and --cityscapes, "
                        "--synthetic and --real, or --demo")
    frames, bad = find_folder(*folders)
    return frames, None, args.label_ids, bad


def plan(args):
    """Which raw frame goes where: {(domain, split): frames}, {domain: kind of ids}, skipped."""
    frames, ids, skipped = {}, {}, []
    for domain in ("synthetic", "real"):
        rng = np.random.default_rng([args.seed, len(frames)])     # another one per domain
        train, test, ids[domain], bad = find(domain, args)
        if not train:
            raise UserError(f"the {domain} frames: none has its label; {bad[0][0]}: {bad[0][1]}")
        if test is None:                                  # no official split: hold some out
            train, test = hold_out(train, args.test, rng, f"the {domain} frames")
        elif len(test) < args.test:
            raise UserError(f"the {domain} frames: --test {args.test}, but val/ has {len(test)}")
        frames[domain, "train"] = take(train, args.limit, rng)
        frames[domain, "test"] = take(test, args.test, rng)
        skipped += bad
    return frames, ids, skipped


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
    top, left, height, width = crop or (0, 0, image.height, image.width)
    box = image.crop((left, top, left + width, top + height))
    return box.resize((size[1], size[0]), resample)


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


def make_frame(job, crop, size, out):
    """Prepare one raw frame: (pixels per class, None), or (None, why it was skipped)."""
    (domain, split), frame, ids = job
    try:
        image = read_rgb(frame.image)
        label = read_label(frame.label, ids) if frame.label else None
        if label and label.size != image.size:
            raise ValueError("image is {}x{}, label is {}x{}".format(*image.size, *label.size))
        if crop and (crop[0] + crop[2] > image.height or crop[1] + crop[3] > image.width):
            raise ValueError(f"--crop {' '.join(map(str, crop))} does not fit into "
                             f"{image.width}x{image.height}; try --crop none")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return None, str(error)
    # Antialias the image (BILINEAR of PIL does), or the stride shows as a style of its own.
    image = crop_and_resize(image, crop, size, Image.BILINEAR)
    label = label and crop_and_resize(label, crop, size, Image.NEAREST)
    return save_pair(out / domain / split, frame.name, image, label), None


def make_toy(job, crop, size, out):
    """Draw one toy scene, a pure function of domain, name and seed; see toytown.py."""
    from toytown import draw
    (domain, split), frame, seed = job
    image, label = draw(domain, (seed, split == "test", int(frame.name)), size)
    return save_pair(out / domain / split, frame.name, Image.fromarray(image),
                     Image.fromarray(label)), None


# ------------------------------------------------------------------------------------ main


def check_settings(path, settings):
    """Refuse to mix two settings in one folder; the same settings just run again."""
    for domain in ("synthetic", "real"):
        if (path.parent / domain).exists() and not path.is_file():
            raise UserError(f"{path.parent / domain}: is there, but was not made by prepare.py "
                            "(no prepare.json beside it); choose another --out")
    try:
        old = json.loads(path.read_text(encoding="utf-8"))["settings"] if path.is_file() \
            else settings
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not written by prepare.py, or damaged; delete it") from None
    changed = [k for k in settings if old.get(k) != settings[k]]
    if changed and any(path.parent.glob("*/*/images/*.png")):
        raise UserError(f"{path.parent} was prepared with {changed[0]} = {old.get(changed[0])}, "
                        f"not {settings[changed[0]]}; choose another --out or delete it")


def report(counts, totals):
    """The closing table: frames per domain and split, share of pixels per class."""
    lines = [f"{'frames':15s}" + "".join(f"{d + '/' + s:>18s}" for d, s in counts)]
    lines.append(f"{'':15s}" + "".join(f"{n:18d}" for n in counts.values()))
    for i, name in enumerate(CLASSES + ["(void)"]):
        shares = [100 * t[i] / max(t.sum(), 1) for t in totals.values()]
        lines.append(f"{name:15s}" + "".join(f"{share:17.2f}%" for share in shares))
    return "\n".join(lines)


def arguments():
    p = parser(__doc__)
    p.add_argument("--gta5", metavar="DIR", help="folder with images/ and labels/")
    p.add_argument("--cityscapes", metavar="DIR", help="folder with leftImg8bit/ and gtFine/")
    p.add_argument("--synthetic", nargs="+", metavar="DIR", help="IMAGES [LABELS] of any source")
    p.add_argument("--real", nargs="+", metavar="DIR", help="IMAGES [LABELS] of any source")
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
    if args.crop == ["none"]:
        args.crop = None
    elif len(args.crop) == 4 and all(n.isdecimal() for n in args.crop) \
            and int(args.crop[2]) and int(args.crop[3]):
        args.crop = [int(n) for n in args.crop]
    else:
        p.error("--crop wants four numbers (TOP LEFT HEIGHT WIDTH) or none")
    if min(args.size) < 24:
        p.error(f"--size {args.size[0]} {args.size[1]}: 24 x 24 is the least the networks take")
    if max(args.size) > 4096:
        p.error(f"--size {args.size[0]} {args.size[1]}: 4096 is the most, twice a full frame")
    if args.demo and (args.gta5 or args.cityscapes or args.synthetic or args.real):
        p.error("--demo draws its own data: leave the folders away")
    if args.gta5 and args.synthetic or args.cityscapes and args.real:
        p.error("--gta5 or --synthetic, --cityscapes or --real: one source a domain")
    for flag in ("synthetic", "real"):
        if len(getattr(args, flag) or [1]) > 2:
            p.error(f"--{flag} wants one or two folders: IMAGES [LABELS]")
    return args


def end_with_parent():
    """In a worker: end when the main process has, since a SIGKILL of it tells nobody."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def run_jobs(make, jobs, args, skipped):
    """Make every frame, in parallel; appends to `skipped`. Returns pixels per class, int [20]
    for every (domain, split), and the set of ((domain, split), name) that were made."""
    totals = {key: np.zeros(20, np.int64) for key, _, _ in jobs}
    made = set()
    try:
        with ProcessPoolExecutor(args.workers, initializer=end_with_parent) as pool:
            results = pool.map(make, jobs, chunksize=8)
            for (key, frame, _), (pixels, why) in progress(zip(jobs, results), total=len(jobs),
                                                           unit="image"):
                if why and args.strict:
                    pool.shutdown(cancel_futures=True)
                    raise UserError(f"{frame.image}: {why} (--strict)")
                if why:
                    skipped.append((frame.image, why))
                else:
                    totals[key] += pixels
                    made.add((key, frame.name))
    except BrokenProcessPool:
        raise UserError(f"--workers {args.workers}: one of them was killed, most likely for want "
                        "of memory; use fewer, or a smaller --size") from None
    return totals, made


def main():
    args = arguments()
    if args.demo:
        counts = {"train": args.limit or 600, "test": args.test}
        frames = {(d, s): [Frame(f"{i:05d}", None, None) for i in range(counts[s])]
                  for d in ("synthetic", "real") for s in ("train", "test")}
        ids, skipped, make = dict.fromkeys(("synthetic", "real"), args.seed), [], make_toy
    else:
        (frames, ids, skipped), make = plan(args), make_frame
    if args.strict and skipped:
        raise UserError(f"{skipped[0][0]}: {skipped[0][1]} (--strict)")
    print(f"prepare.py: {sum(map(len, frames.values()))} frames -> {args.out}/, "
          f"{args.size[0]} x {args.size[1]}, crop {args.crop or 'none'}, seed {args.seed}, "
          f"{args.workers} processes")

    settings = {k: str(v) for k, v in vars(args).items() if k not in ("workers", "strict", "out")}
    lock(args.out)
    check_settings(args.out / "prepare.json", settings)
    record = {"settings": settings, "finished": False}
    write_text(args.out / "prepare.json", json.dumps(record, indent=1))
    for domain, split in frames:
        for kind in ("images", "labels"):
            (args.out / domain / split / kind).mkdir(parents=True, exist_ok=True)

    jobs = [(key, frame, ids[key[0]]) for key, some in frames.items() for frame in some]
    make = partial(make, crop=args.crop, size=args.size, out=args.out)
    totals, made = run_jobs(make, jobs, args, skipped)
    done = Counter(key for key, _ in made)
    for key, some in frames.items():
        if not done[key]:
            raise UserError(f"{'/'.join(key)}: all {len(some)} frames were skipped, the last "
                            f"because: {skipped[-1][0]}: {skipped[-1][1]}")
        for path in (args.out / key[0] / key[1]).glob("*/*.png*"):
            if (key, path.stem) not in made:          # left by an earlier run on other frames,
                path.unlink()                         # or a .png.tmp by one that was killed

    done = {key: done[key] for key in frames}
    print(report(done, totals))
    record.update(finished=True, counts={"/".join(k): n for k, n in done.items()},
                  held_out={d: [f.name for f in frames[d, "test"]] for d in ids},
                  skipped=[f"{path}: {why}" for path, why in skipped])
    write_text(args.out / "prepare.json", json.dumps(record, indent=1))
    for path, why in skipped[:5]:
        print(f"skipped {path}: {why}")
    print(f"{len(skipped)} frames skipped (all listed in {args.out / 'prepare.json'})")
    if any(not t.sum() for t in totals.values()):
        print("a domain has no labels: it can be refined and evaluated, but not segmented")
    print(f"done: {args.out}/")


if __name__ == "__main__":
    start(main)
