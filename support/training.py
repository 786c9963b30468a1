"""What every training needs and no paper speaks of: device, batches, checkpoints, resuming."""
import hashlib
import math
import os
import signal
import time
from pathlib import Path
from timeit import repeat

import torch

from support.cli import UserError, add_seed_flag, path_of, positive, progress, whole, write_text

# --------------------------------------------------------------------- device and precision


def pick_device(name, precision="float32"):
    """torch.device for `--device`: "auto" takes cuda, then mps, then cpu. Prepares it for
    `--precision tf32`: convolutions whose factors a GPU rounds to 10 bits."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else (
            "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("no network runs on it")
    except Exception as error:                       # another kind for every device
        raise UserError(f"--device {name}: cannot be used ({str(error).splitlines()[0][:80]}); "
                        "use --device cpu, cuda, cuda:1 or mps") from None
    torch.backends.cudnn.allow_tf32 = precision == "tf32"     # SSIM's matrix products: never
    return device


def precision_note(device, precision):
    """What the first line of a training says of bfloat16, if it was asked for or is worth a try:
    how fast this CPU convolves in it (it is tried, in a moment)."""
    if device.type != "cpu":
        return ""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(2, 64, 40, 80, dtype=dtype), torch.ones(64, 64, 4, 4, dtype=dtype)
        seconds.append(min(repeat(lambda: torch.conv2d(x, weight), number=1, repeat=4)))
    gain = seconds[0] / seconds[1]
    said = precision == "bfloat16" or gain > 1.3
    return f"; --precision bfloat16 convolves {gain:.2f} times as fast here" if said else ""


def autocast(device, precision):
    """A context in which networks compute in bfloat16, if `--precision` says so. Weights change
    inside it, so their bfloat16 copies are not kept."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16",
                          cache_enabled=False)


def place(net, device):
    """Move `net` to `device`, channels last in memory, which is fastest on a CPU and in bfloat16;
    but not on MPS, whose BatchNorm learns wrongly in that order (pytorch issue 175189)."""
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    return net.to(device, memory_format=layout)


OPTIMIZERS = ["adam", "momentum", "sgd"]


def make_optimizer(name, parameters, lr):
    """One of OPTIMIZERS; momentum is SGD with 0.9. Not fused: such a kernel walks memory flat, so a
    --resume on another device, in another memory order, would go wrong."""
    if name == "adam":
        return torch.optim.Adam(parameters, lr)
    return torch.optim.SGD(parameters, lr, momentum=0.9 if name == "momentum" else 0)


# ---------------------------------------------------------------------------------- batches


def to_float(images):
    """uint8 0..255 -> float32 in [-1, 1], the range of every network input (any shape)."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float in [-1, 1] -> uint8 0..255, rounded; the inverse of `to_float`."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def keep_on(device, images, other_images, history=0):
    """Two sets of uint8 images, on a GPU if they and `history` more fill at most half of its free
    memory: a batch is then cut out there, and no step waits for a copy. Says so if not."""
    if device.type != "cuda":
        return images, other_images
    size = images.nbytes + other_images.nbytes + history * images[0].nbytes
    free = torch.cuda.mem_get_info(device.index)[0]
    if size > free / 2:
        print(f"the images ({size / 1e9:.1f} GB) stay in main memory: the GPU has "
              f"{free / 1e9:.1f} GB free")
        return images, other_images
    return images.to(device), other_images.to(device)


class Batches:
    """Random batches as network input: float32 [n, 3, H, W] in [-1, 1], on `device`.

    Its generator, on the CPU so that the choice is the same on every device, is the only source
    of randomness in a training.
    """

    def __init__(self, seed, device):
        self.random, self.device = torch.Generator().manual_seed(seed), device

    def draw(self, images, n):
        """n random images of uint8 [N, 3, H, W], with replacement."""
        index = torch.randint(len(images), (n,), generator=self.random)
        return to_float(images[index.to(images.device, non_blocking=True)].to(self.device))

    def state_dict(self):
        return self.random.get_state()

    def load_state_dict(self, state):
        self.random.set_state(state)


def sha256(tensors):
    """SHA-256 of the bytes of several tensors, as hex."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------- flags


def add_device_flag(p):
    """--device and --seed, of every stage that computes with a network."""
    add_seed_flag(p)
    p.add_argument("--device", default="auto", help="auto (cuda, mps, cpu), or one of them")


def add_precision_flag(p):
    """--precision, of every stage that trains one."""
    p.add_argument("--precision", choices=["float32", "tf32", "bfloat16"], default="float32",
                   help="of the networks; losses stay float32")


def add_inception_flag(p):
    """--inception, of whatever needs psi or FID."""
    p.add_argument("--inception", type=os.path.expanduser, default="imagenet",
                   help="imagenet (downloaded once), random or a file")


def add_training_flags(p):
    """The flags of pretrain.py and train_gan.py that no paper speaks of."""
    add_device_flag(p)
    add_precision_flag(p)
    p.add_argument("--data", type=path_of, default=Path("data"), help="what prepare.py made")
    p.add_argument("--run", type=path_of, help="(default: runs/METHOD)")
    p.add_argument("--batch-size", type=positive(int), default=16, help="images a batch")
    p.add_argument("--resume", action="store_true", help="go on with a stopped run")
    p.add_argument("--overwrite", action="store_true", help="replace an existing run")


def settings_of(args, **data):
    """What decides a training, as text: its flags but those that a --resume may change, and a
    hash of what it starts from, {name: tensors}."""
    free = {"run", "data", "resume", "overwrite", "device", "save_every"}
    settings = {flag: str(value) for flag, value in vars(args).items() if flag not in free}
    for name, tensors in data.items():
        settings[name] = sha256(tensors)[:16]
    return settings


def saved_run(path, stage, args):
    """The state to go on from, or None for a new run; refuses what would lose a run."""
    if args.resume:
        return load_checkpoint(path, [stage], "nothing to --resume: leave out the flag")
    if path.exists() and not args.overwrite:
        raise UserError(f"{path} exists: --resume goes on with that run, --overwrite starts "
                        "it anew")
    return None


# ------------------------------------------------------------------------------ the training


def stop_requests():
    """A list that becomes non-empty on the first Ctrl-C, SIGTERM, SIGHUP (the terminal was closed)
    or SIGUSR1 (a batch system). A second Ctrl-C stops at once; the others may well come twice, to
    a whole group and from a parent, and are ignored then.

    A loop looks at it after a whole step, so what it then saves is a state it can resume from.
    """
    requests = []

    def note(signum, _):
        requests.append(signum)
        signal.signal(signum, signal.SIG_DFL if signum == signal.SIGINT else signal.SIG_IGN)
        try:
            os.write(2, b"\nstopping after this step; a second Ctrl-C stops without saving\n")
        except OSError:                   # the terminal was closed, or a `| tee` has ended as well
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        signum = getattr(signal, name, None)                      # Windows has two of them
        if signum and signal.getsignal(signum) != signal.SIG_IGN:  # nohup
            signal.signal(signum, note)
    return requests


class Training:
    """A loop of steps that can be stopped at any moment and goes on as if it had not been.

        training = Training(path, stage, csv, settings, columns, saved, refiner=R, ...)
        for step in training.steps(total, save_every):
            ...                              # one step
            training.log({column: value})

    `parts` is everything that has state_dict and load_state_dict: all of it is saved in the
    checkpoint `path`, and restored if `saved` is one. The log is a list of dicts, `self.rows`;
    as a table it is written to `csv`.
    """

    def __init__(self, path, stage, csv, settings, columns, saved, **parts):
        self.path, self.stage, self.csv, self.settings = path, stage, csv, settings
        self.columns, self.parts = columns, parts
        self.step, self.rows, self.unread = 0, [], []
        if saved:
            self.restore(saved)

    def restore(self, saved):
        """Make all parts, the log and the step what they were; UserError at other settings."""
        if any(not isinstance(row, dict) for row in saved["log"]):
            raise UserError(f"{self.path}: was saved by an older version, which --resume cannot go "
                            "on with; --overwrite starts anew")
        for key, value in self.settings.items():
            old = saved["settings"].get(key)
            if old != value:
                raise UserError(f"{self.path}: was run with {key} = {old}, not {value}; --resume "
                                "goes on with the same settings only")
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        self.step, self.rows = saved["step"], saved["log"]

    def save(self, finished):
        """Write the log as a table, then everything into one checkpoint, each one whole."""
        lines = [",".join(["step", *self.columns])]
        for step, row in enumerate(self.rows, 1):
            values = [v if isinstance(v, str) else f"{v:.6g}" for v in row.values()]
            lines.append(",".join([str(step), *values]))
        write_text(self.csv, "\n".join(lines) + "\n")
        state = {}
        for name, part in self.parts.items():
            state[name] = part.state_dict()
            if hasattr(part, "args"):                     # of a network: what builds it again
                state[f"{name}_args"] = part.args
        save_checkpoint(self.path, self.stage, settings=self.settings, step=self.step,
                        finished=finished, log=self.rows, **state)

    def steps(self, total, save_every, before_saving=lambda: None):
        """Yield the numbers of the steps that are still to do. After each one: the progress bar;
        every so often, at the end and when asked to stop: `before_saving` and a save."""
        stop, self.clock = stop_requests(), time.perf_counter()
        bar = progress(total=total, initial=self.step, unit="step", desc=self.stage)
        if self.step == total:                        # what was deleted since is made again
            before_saving()
            if not self.csv.exists():
                self.save(finished=True)
        while self.step < total:
            self.step += 1
            yield self.step
            if not stop:                              # else nobody may read it any more
                bar.update()
            save = bool(self.step % save_every == 0 or self.step == total or stop)  # stop may grow
            # To read at every step would be to wait for a GPU at every step.
            if save or time.perf_counter() > self.clock + 1:
                self.read()
                shown = [(column, v) for column, v in self.rows[-1].items() if v == v]   # not nan
                bar.set_postfix(shown[:4], refresh=False)
            if save:
                before_saving()
                self.save(finished=self.step == total)
                if stop:
                    raise KeyboardInterrupt(f"at step {self.step} of {total}, saved in "
                                            f"{self.path.parent}")
        bar.close()

    def log(self, row):
        """Note a step's values: numbers, texts, or scalars that are still on the device."""
        self.unread.append(row)

    def read(self):
        """Move the values that were noted since the last call into `rows`, in one transfer.
        UserError before a loss that is not a number can be saved."""
        tensors = []
        for row in self.unread:
            tensors += [value for value in row.values() if torch.is_tensor(value)]
        numbers = iter(torch.stack(tensors).tolist() if tensors else [])
        for row in self.unread:
            for column, value in row.items():
                row[column] = next(numbers) if torch.is_tensor(value) else value
                if isinstance(row[column], float) and not math.isfinite(row[column]):
                    raise UserError(f"step {len(self.rows) + 1}: {column} is {row[column]}; the "
                                    f"last good state is {self.path}, if any was saved; try a "
                                    "smaller --lr or --d-lr")
            self.rows.append({column: row.get(column, math.nan) for column in self.columns})
        self.unread, self.clock = [], time.perf_counter()


# ------------------------------------------------------------------------------- checkpoints


def load_tensors(path, flag):
    """torch.load of tensors and plain values only; any failure is a UserError naming `flag`."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                # a damaged pickle can raise about anything
        why = (str(error) or type(error).__name__).splitlines()[0][:80]
        raise UserError(f"{flag} {path}: not a file of tensors that PyTorch can load, or "
                        f"damaged ({why})") from None


def save_checkpoint(path, stage, **state):
    """Write `state` (tensors and plain values) and its stage to `path`, whole or not at all.

    UserError, and the old file stays, if the disk is full or a weight has become inf or nan:
    the update after the last finite loss can do that."""
    for name, part in state.items():
        for weight in part.values() if isinstance(part, dict) else []:
            if torch.is_tensor(weight) and not torch.isfinite(weight).all():
                raise UserError(f"{path}: not written, the {name} has weights that are inf or "
                                "nan; try a smaller --lr or --d-lr")
    try:
        with whole(path) as temporary:
            torch.save({"stage": stage, **state}, temporary)
    except RuntimeError as error:              # PyTorch's own writer, on a full disk for example
        why = str(error).partition("\n")[0][:80]
        raise UserError(f"{path}: cannot be written, is the disk full? ({why})") from None


def load_checkpoint(path, stages, advice):
    """Read a checkpoint of one of `stages`; raises UserError, ending in `advice`, otherwise."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint; {advice}")
    state = load_tensors(path, "checkpoint")
    found = state.get("stage") if isinstance(state, dict) else None
    if found not in stages:
        raise UserError(f"{path}: wanted a checkpoint of {' or '.join(stages)}, found {found}; "
                        f"{advice}")
    return state


def rebuild(Network, state, name, path):
    """The network `name` of a checkpoint, weights loaded; UserError if it is of another kind."""
    try:
        arguments = state[f"{name}_args"].items()
        # "skip": of R in older checkpoints, always False
        net = Network(**{key: v for key, v in arguments if (key, v) != ("skip", False)})
        net.load_state_dict(state[name])
        return net
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: its {name} is not a {Network.__name__} of this models.py "
                        f"({' '.join(str(error).split())[:80]}); train it again") from None


def load_weights(net, weights, flag, imagenet, otherwise):
    """Load into `net` what it needs of a state dict, which may hold more (classifiers, say).

    weights: "imagenet" for torchvision's own (`imagenet`, a WeightsEnum, downloaded once), or a
    path. UserError if the download fails (it names `otherwise`) or the file lacks something.
    Returns all that was there.
    """
    if weights == "imagenet":
        try:
            found = imagenet.get_state_dict(check_hash=True, weights_only=True)
        except Exception as error:                    # a damaged pickle can raise about anything
            kept = Path(torch.hub.get_dir()) / "checkpoints" / Path(imagenet.url).name
            why = (f"{kept} is damaged; delete it, the next run fetches it again" if kept.is_file()
                   else f"the download failed ({error}); give a file, or {flag} {otherwise}")
            raise UserError(f"{flag} imagenet: {why}") from None
    else:
        found = load_tensors(weights, flag)
    wanted = {k: v for k, v in net.state_dict().items() if "num_batches_tracked" not in k}
    found = found if isinstance(found, dict) else {}
    missing = [k for k, v in wanted.items() if getattr(found.get(k), "shape", None) != v.shape]
    if missing:
        raise UserError(f"{flag} {weights}: not the state dict of a torchvision "
                        f"{type(net).__name__}: {len(missing)} of {len(wanted)} entries are "
                        f"missing or have another shape, the first is {missing[0]}")
    net.load_state_dict({k: found[k] for k in wanted}, strict=False)
    return found
