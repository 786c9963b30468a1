"""Raw data as people have it: every file below a folder is found, or counted as not read."""
import os
import struct
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from support.cli import UserError, progress, read_record

NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}       # Pillow knows them by name only
ENDINGS = {ending for ending, name in Image.registered_extensions().items()
           if name in Image.OPEN and name not in NO_PICTURES}
LOSSLESS = {"BMP", "PNG", "TIFF"}          # pixel values come back as saved; GIF numbers them anew
# What Pillow raises at a file that it cannot read.
UNREADABLE = (OSError, ValueError, SyntaxError, TypeError, RuntimeError, IndexError, struct.error,
              Image.DecompressionBombError)

# Endings and folders of label maps, which are no photographs.
KINDS = ["_labelIds", "_labelTrainIds", "_instanceIds", "_color"]
LABEL_FOLDERS = {"labels", "masks", "depth", "gtfine", "gtcoarse"}


class Frame(NamedTuple):
    """One raw frame. `label` is None where there is none; `ids`: which ids its pixels are."""
    name: str
    image: Path
    label: Path | None
    ids: str | None


class Found(NamedTuple):
    """What lies in a data set: frames, [(file, why it is none)], {ending: files not read}."""
    frames: list
    skipped: list
    unread: Counter


# -------------------------------------------------------------------------- what lies below


def pictures_below(folder):
    """(every picture below a folder, sorted, how many other files there are of each ending).

    Names that begin with a dot are passed over. Links to folders are followed after all else, and
    no folder is entered twice, so circles end."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --help says what is read")
    pictures, others, seen, folders, links = [], Counter(), set(), [folder], []
    while folders or links:
        here = (folders or links).pop(0)
        if here.resolve() in seen:
            continue
        seen.add(here.resolve())
        for path in sorted(here.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_dir():
                (links if path.is_symlink() else folders).append(path)
            elif path.suffix.lower() in ENDINGS:
                pictures.append(path)
            else:
                others[path.suffix.lower() or "without ending"] += 1
    return sorted(pictures), others


def only_photographs(folder, pictures):
    """UserError if label maps are among the pictures of a folder that was given for its images."""
    for path in pictures:
        folders = {part.lower() for part in path.relative_to(folder).parent.parts}
        if folders & LABEL_FOLDERS or path.stem.endswith(tuple(KINDS)):
            raise UserError(f"{path}: seems to be a label map, but {folder} was given for its "
                            "images; give the folder of the photographs alone")


def key_of(path, folder):
    """How an image and its label are found to belong together: the path below their folders, in
    one form of Unicode and without the endings of data sets, and which kind of label it is."""
    key = unicodedata.normalize("NFC", str(path.relative_to(folder).with_suffix("")))
    kind = next((kind for kind in KINDS if key.endswith(kind)), "")
    return key.removesuffix(kind).removesuffix("_leftImg8bit").removesuffix("_gtFine"), kind


def match_labels(keys, labels, ids):
    """The label maps below the folder `labels` of the images that have these keys.

    ids: what they hold, unless a name says it. Returns {key: (label, its ids)} and how many other
    files there are, by ending."""
    pictures, others = pictures_below(labels)
    file_of, label_of = {}, {}
    for path in sorted(pictures, key=lambda path: path.suffix.lower() != ".png"):
        file_of.setdefault(key_of(path, labels), path)       # of two of a kind the PNG
    named = [path for (_, kind), path in file_of.items() if kind == "_labelIds"]
    said = {"_labelTrainIds": "trainIds", "_labelIds": what_ids(named, ids), "": ids}
    kinds = list(said)[::-1] if ids == "trainIds" else list(said)
    for key in keys:
        for kind in kinds:                           # of an image's labels the last of these
            if (key, kind) in file_of:
                label_of[key] = file_of[key, kind], ids if ids == "classes" else said[kind]
    for path in sorted(set(pictures) - {path for path, _ in label_of.values()}):
        key, kind = key_of(path, labels)
        known = kind or key in keys
        others[kind + path.suffix.lower() if known else "labels without an image"] += 1
    return label_of, others


def what_ids(files, ids):
    """What files that are called labelIds hold: what --label-ids says. But if that is trainIds and
    one of the first 20 has a value that is none, they are Cityscapes' own, beside other labels."""
    if ids != "trainIds":
        return ids
    for file in files[:20]:
        try:
            values, _ = read_ids(file)
        except UNREADABLE:
            continue
        if ((values > 18) & (values < 255)).any():
            return "labelIds"
    return ids


# ------------------------------------------------------------------------------ the data sets


def find_folder(images, labels, ids, short=False):
    """Frames of any image folder; the label of a/b.jpg is labels/a/b.png (or none at all). Its name
    becomes a_b, or b if `short`."""
    pictures, unread = pictures_below(images)
    if labels:
        if labels.resolve().is_relative_to(images.resolve()):      # in other words than images
            labels = images / labels.resolve().relative_to(images.resolve())
        pictures = [file for file in pictures if labels not in file.parents or labels == images]
    if not pictures:
        raise UserError(f"{images}: no images that Pillow reads in or below it")
    only_photographs(images, pictures)
    frames, skipped, label_of, taken, seen = [], [], {}, {}, set()
    if labels:
        keys = {key_of(file, images)[0] for file in pictures}
        label_of, others = match_labels(keys, labels, ids)
        unread += others
    for file in sorted(pictures, key=lambda file: (file.is_symlink(), file)):
        if os.path.realpath(file) in seen:
            unread["links to images that are there too"] += 1
            continue
        seen.add(os.path.realpath(file))
        key, _ = key_of(file, images)
        name = Path(key).name if short else "_".join(Path(key).parts)
        if name in taken:
            raise UserError(f"{file} and {taken[name]} would both become {name}.png; rename one")
        taken[name] = file
        if labels and key not in label_of:
            skipped.append((file, f"no label {labels / key}.png"))
        else:
            frames.append(Frame(name, file, *label_of.get(key, (None, ids))))
    if not frames:
        raise UserError("{}: none has its label; {}: {}".format(images, *skipped[0]))
    return Found(sorted(frames), skipped, unread)


def find_gta5(root, ids):
    """GTA-V: images/NNNNN.png with labels/NNNNN.png; without a labels folder, images only."""
    labels = root / "labels" if (root / "labels").is_dir() else None
    return find_folder(root / "images", labels, ids)


def find_cityscapes(root, split, ids):
    """Cityscapes: leftImg8bit/SPLIT/CITY/*_leftImg8bit.png with gtFine/.../*_labelIds.png."""
    labels = root / "gtFine" / split if (root / "gtFine").is_dir() else None
    if not labels and (root / "gtCoarse").is_dir():
        raise UserError(f"{root}: has gtCoarse/ only; unpack gtFine_trainvaltest.zip")
    return find_folder(root / "leftImg8bit" / split, labels, ids, short=True)


# ------------------------------------------------------------------------------- one picture


def opened(path):
    """Image.open of a file with one picture; ValueError if it has more, or is none."""
    if not path.is_file():
        raise ValueError("a broken link, or no file")         # a named pipe would be waited for
    image = Image.open(path)
    # An MPO is a camera's: its second picture is another view of the first.
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise ValueError(f"has {image.n_frames} pictures, wanted one")
    return image


def read_rgb(path, labelled=False):
    """A picture as RGB, turned upright if a camera noted how it was held.

    Grey, palette and opaque RGBA are converted. CMYK (no profile says which colours), 16-bit
    grey (any range), what is transparent (no picture there) and, if it is `labelled`, what is to
    be turned are refused: ValueError."""
    with opened(path) as image:
        if image.mode not in ("RGB", "L", "P", "RGBA", "LA", "1"):
            raise ValueError(f"image mode {image.mode}, wanted 8-bit RGB")
        if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
            raise ValueError("it has transparent pixels, wanted an opaque image")
        turned = image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
        if labelled and turned:
            raise ValueError("EXIF turns it, but not its label; turn both and save them anew")
        image.info.pop("exif", None)       # is read; Pillow writes it anew, and fails at odd tags
        return ImageOps.exif_transpose(image).convert("RGB")


def read_ids(path):
    """A label map: its pixel values, uint8 [H, W], and their colours, uint8 [256, 3], if it has a
    palette. Never a conversion of colours; equal channels and 16 bits hold ids as well."""
    with opened(path) as image:
        if image.format not in LOSSLESS or "jpeg" in str(image.info.get("compression")):
            raise ValueError(f"a label in {image.format}, which does not keep pixel values; "
                             "wanted PNG")
        if image.mode not in ("P", "L", "RGB", "I", "I;16", "I;16B"):
            raise ValueError(f"label mode {image.mode}, wanted ids (palette or grey)")
        if any(raw in str(image.tile) for raw in ("'L;", "RGB;16")):   # Pillow makes 8 bits of them
            raise ValueError("a label of less or more than 8 bits a channel, wanted 8")
        ids = np.array(image)
        colours = None
        if image.mode == "P":
            palette = np.array(image.getpalette(), np.uint8).reshape(-1, 3)
            colours = np.pad(palette, ((0, 256 - len(palette)), (0, 0)))
    if ids.ndim == 3:
        if (ids != ids[..., :1]).any():
            raise ValueError("label mode RGB, a picture of colours, wanted ids")
        ids = ids[..., 0]
    if ids.min() < 0 or ids.max() > 255:
        raise ValueError(f"label ids up to {ids.max()}, wanted 0 to 255")
    return ids.astype(np.uint8), colours


# ---------------------------------------------------------------------------------- labels

UNKNOWN = 254                                        # no trainId: such a frame is refused
IGNORE = 255                                         # void: in no loss and no score
TWINS = {18: (153, 153, 153), 34: (0, 0, 142)}       # void, in the colours of pole and car


def palette_of(table):
    """The colours of a class table of rows (name, labelId, colour), by trainId: uint8 [256, 3]."""
    palette = np.zeros((256, 3), np.uint8)
    palette[:len(table)] = [colour for _, _, colour in table]
    return palette


def own_table(classes):
    """A class table of these names: the line number is the id, any colour."""
    colours = np.random.default_rng(3).integers(40, 256, (len(classes), 3)).tolist()
    return tuple((name, i, tuple(colours[i])) for i, name in enumerate(classes))


def read_classes(file):
    """The class table of a --classes file, which has a name a line."""
    text = file.read_text(encoding="utf-8-sig", errors="replace").rstrip()
    names = [line.strip() for line in text.splitlines()]
    bad = [name for name in names if not name or name[0] == "#" or "\ufffd" in name]
    if not 2 <= len(names) <= UNKNOWN or bad or len(set(names)) < len(names):
        raise UserError(f"--classes {file}: wanted 2 to {UNKNOWN} different names, one a line, no "
                        "empty line, no comment; the label of the first is 0, void is 255")
    return own_table(names)


def lookup(ids, table):
    """Raw value -> trainId, uint8 [256]. ids: "trainIds", "classes" (one's own), or Cityscapes'
    "labelIds", of which all but those of the table are void."""
    known = np.full(256, UNKNOWN, np.uint8)
    known[255] = IGNORE
    if ids != "labelIds":
        known[:len(table)] = range(len(table))
    else:
        known[:35] = IGNORE
        known[[label_id for _, label_id, _ in table]] = range(len(table))
    return known


def check_palette(used, colours, known, table):
    """ValueError if a palette has the classes' colours, or greys that may be ids, at other values:
    a program has renumbered it, or the ids are others. Black and white are a mask's."""
    class_of = {(0, 0, 0): IGNORE, **{colour: i for i, (_, _, colour) in enumerate(table)}}
    shown = [tuple(colour) for colour in colours[used].tolist()]
    meant = [class_of.get(colour) for colour in shown]
    of_classes = sum(i not in (None, IGNORE) for i in meant)
    if 2 * of_classes > sum(map(any, shown)):                 # else one or two by chance
        for value, colour, i in zip(used.tolist(), shown, meant):
            if i not in (None, known[value]) and TWINS.get(value) != colour:
                name = "void" if i == IGNORE else table[i][0]
                raise ValueError(f"its palette shows {name} where the value is {value}; give the "
                                 "right --label-ids, or the file as it was before a program "
                                 "renumbered it")
    greys = [red for red, green, blue in shown if red == green == blue]
    if len(set(greys)) == len(used) and (known[greys] != UNKNOWN).all() \
            and greys != used.tolist() and not set(greys) <= {0, 255}:
        raise ValueError("its palette shows other ids as grey than its values are; save it in grey")


def read_label(file, ids, table):
    """A label file as trainIds (PIL mode L)."""
    values, colours = read_ids(file)
    label, known = Image.fromarray(values), lookup(ids, table)
    used = np.flatnonzero(label.histogram())
    if colours is not None:
        check_palette(used, colours, known, table)
    bad = used[known[used] == UNKNOWN]
    if bad.size:
        raise ValueError(f"label ids {', '.join(map(str, bad[:5]))} are not {ids} of the "
                         f"{len(table)} classes")
    return label.point(known.tolist())


def check_labels(domain, made, ids):
    """UserError if the labels of a domain are no labelIds as it seems, and --label-ids is not
    given; a warning if they are nearly all void, or of one class. made: a prepare.Made of every
    frame."""
    pixels = sum(one.pixels for one in made)
    # TrainIds that are read as labelIds give classes 0 to 5 only.
    if ids is None and pixels.any() and not pixels[6:-1].any():
        raise UserError(f"the {domain} labels: no traffic light, vegetation, sky, person, car ... "
                        "in any of them, so they look like trainIds or a mask; say which by "
                        "--label-ids trainIds (or labelIds)")
    kinds = np.count_nonzero(pixels[:-1])
    if pixels[-1] > 0.9 * pixels.sum() > 0 or pixels.any() and kinds < 2:
        print(f"warning: {domain}: {pixels[-1] / pixels.sum():.0%} of the pixels of its labels are "
              f"void, {kinds} classes in the others; little can be learned from them. Do the "
              "labels hold what --label-ids or --classes says?")


# --------------------------------------------------------------------------------- records


def check_settings(file, settings):
    """Refuse to replace a finished data set by one of other settings, or what prepare.py has not
    made; the same settings just run again."""
    for domain in ("synthetic", "real"):
        folder = file.parent / domain
        if folder.is_symlink() or folder.exists() and not file.is_file():
            raise UserError(f"{folder}: is there, but was not made by prepare.py (a link, or no "
                            "prepare.json beside it); choose another --out")
    record = read_record(file)
    old = record.get("settings", {}) if record.get("finished") else {}     # else all is made anew
    changed = [k for k in settings if k in old and old[k] != settings[k]]
    if changed and any(file.parent.glob("*/*/images/*.png")):
        raise UserError(f"{file.parent} was prepared with {changed[0]} = {old[changed[0]]}, "
                        f"not {settings[changed[0]]}; choose another --out or delete it")


def usable(make, frames, wanted, workers):
    """Try frames in turn until `wanted` are usable: {frame: what make(frame) has returned} of those
    and of all bad ones before, whose `why` says what is wrong. It may make more than it returns.

    By threads, since Pillow decodes and resizes without Python's lock; the toy town gains nothing.
    """
    done, missing, pool = {}, wanted, ThreadPoolExecutor(workers)
    bar = progress(total=min(wanted, len(frames)), unit="image")
    try:
        for frame, made in zip(frames, pool.map(make, frames)):
            bar.update()
            done[frame] = made
            missing -= not made.why
            if missing == wanted == len(done):
                print(f"none of the first {wanted} frames can be used, the last: {frame.image}: "
                      f"{made.why}", flush=True)
            if not missing:
                break
    finally:
        pool.shutdown(cancel_futures=True)           # waits for those that are being made
        bar.close()
    return done


def by_ending(others):
    """What was not read, as text."""
    return ", ".join(f"{n} {ending}" for ending, n in sorted(others.items())) or "none"


# -------------------------------------------------------------------------- for refine.py


def refined_names(path, out):
    """{where it goes below `out`, as PNG: picture} of a picture or of all below a folder, and how
    many other files there are, by ending."""
    if path.is_dir():
        folder, (pictures, others) = path, pictures_below(path)
        only_photographs(path, pictures)
    else:
        folder, pictures, others = path.parent, [path], {}
    if not pictures or not path.exists():
        raise UserError(f"{path}: no picture there")
    file_of = {}
    for file in pictures:
        target = out / file.relative_to(folder).with_suffix(".png")
        if target in file_of:
            raise UserError(f"{file} and {file_of[target]} would both become {target}; rename one")
        file_of[target] = file
    return file_of, others
