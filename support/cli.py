"""What every script needs and no paper speaks of: one-line errors, flags, atomic writes, locks."""
import argparse
import json
import os
import platform
import shlex
import signal
import sys
import tempfile
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

try:
    import fcntl
except ImportError:                                  # Windows: no locks there
    fcntl = None


# ------------------------------------------------------------------------------- errors


class UserError(Exception):
    """Something the user can mend. Its text names the file or flag, what was found, and what
    to do; `start` prints it as one line."""


BARS = []                                            # closed before the last line is printed


def start(main):
    """Call a script's main(); turn what a user can mend into one line and status 2: a UserError,
    a file that cannot be read or written, memory that does not suffice."""
    sys.stdout.reconfigure(errors="replace")         # what cannot print ± prints ?
    try:
        main()
        sys.stdout.flush()
        return
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or (
                "out of memory" in str(error)):               # Python's, PyTorch's, CUDA's
            error = UserError("out of memory; try a smaller --batch-size or, in prepare.py, a "
                              "smaller --size or fewer --workers")
        if isinstance(error, BrokenPipeError):       # | head; what is still to print goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            error = UserError("nobody reads what this prints, so it stopped; run it again, into "
                              "a file")
        if not isinstance(error, (UserError, OSError)):
            raise                                    # a mistake of ours: the traceback
        status, line = 2, f"error: {error}"
    except KeyboardInterrupt as stop:                # with a text: a training that has saved
        signal.signal(signal.SIGINT, signal.SIG_IGN)          # typed twice: the line is printed
        status = 130
        line = f"stopped {stop}; --resume goes on" if str(stop) else "stopped; run it again"
        print(file=sys.stderr)                       # below its ^C
    for bar in BARS:
        bar.close()
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(status)


# ------------------------------------------------------------------------ the command line


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the default of every flag that has one."""

    def _get_help_string(self, action):
        if action.default in (None, "", argparse.SUPPRESS) or action.default is False:
            return action.help
        return f"{action.help} (default: %(default)s)"


def parser(doc):
    """An ArgumentParser whose help is the script's own docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter,
                                   allow_abbrev=False)


def add_seed_flag(p):
    """--seed, of every stage."""
    p.add_argument("--seed", type=natural, default=0,
                   help="of every random choice that has no flag of its own")


def natural(text):
    """An argparse type: an int of 0 or more, no larger than a generator's seed may be."""
    if not 0 <= int(text) < 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2**63 - 1")
    return int(text)


def not_negative(text):
    """An argparse type: a finite number of 0 or more."""
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is negative or no number")
    return float(text)


def path_of(text):
    """An argparse type: a Path; ~ is the home folder, also after the = of --out=~/x."""
    return Path(os.path.expanduser(text))


def cpus():
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


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
    pause = 0.1 if sys.stderr.isatty() else 20
    BARS.append(tqdm(iterable, dynamic_ncols=True, mininterval=pause, **options))
    return BARS[-1]


# ----------------------------------------------------------------------------------- files


@contextmanager
def whole(path):
    """A temporary name to write to: renamed to `path` at the end, removed if writing failed."""
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:
            error.filename = error.filename or str(path)      # a full disk names none
        raise


def write_text(path, text):
    """Write a text file whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path, record, indent=1):
    """Write plain values and paths as JSON, whole or not at all; null for what is not finite."""
    record = json.loads(json.dumps(record, default=os.fspath), parse_constant=lambda _: None)
    write_text(path, json.dumps(record, indent=indent))


def read_json(path):
    """The dict in a JSON file; UserError if it holds none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{path}: damaged; run what made it again, prepare.py into another --out")
    return record


def read_record(path):
    """The dict in a JSON file, or {} where no file is yet."""
    return read_json(path) if path.is_file() else {}


def write_png(path, image):
    """Write a PIL image as PNG, whole or not at all."""
    with whole(path) as temporary:
        image.save(temporary, format="PNG")


def writable(folder):
    """Make a folder for results, or fail now rather than after the hours that lead to them."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def lock(folder):
    """UserError if another process writes into `folder`; else keep others out until this one ends.

    The system frees the lock however the process ends, so a kill leaves none stuck; the empty
    file .lock stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        return
    file = os.open(folder / ".lock", os.O_WRONLY | os.O_CREAT, 0o666)    # open to the end
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another process is writing there; wait for its end or choose "
                        "another folder") from None
    except OSError as error:                         # NFS, Lustre, gVisor and others
        print(f"warning: {folder}: this file system has no locks ({error.strerror}), so nothing "
              "keeps a second process out", file=sys.stderr)


# ----------------------------------------------------------------------- what a run says


def name_of(device):
    """A device as text, with the name of a GPU or the number of a CPU's threads."""
    import torch
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else (
        f"{torch.get_num_threads()} threads" if device.type == "cpu" else "Apple GPU")
    return f"{device} ({name})"


def announce(device, seed, reads, writes, note=""):
    """The first line of a script: device, versions, what it reads, what it writes, a note."""
    import torch
    versions = f"torch {torch.__version__}, torchvision {version('torchvision')}"
    print(f"{Path(sys.argv[0]).name}: {name_of(device)}, {versions}, seed {seed}; reads {reads}; "
          f"writes {writes}{note}", flush=True)


def provenance(args, device):
    """What a report must say so that its numbers can be made again: plain values."""
    import torch
    return {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "settings": dict(vars(args)),
            "device": name_of(device),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "torchvision": version("torchvision"), "numpy": version("numpy"),
                         "pillow": version("pillow")}}


def markdown_table(head, rows):
    """A Markdown table of a list of headings and a list of rows of texts."""
    lines = []
    for cells in (head, ["---"] * len(head), *rows):
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
