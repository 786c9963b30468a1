"""The networks and the metrics of the paper: everything that two or more scripts share.

    Refiner, Discriminator      section 5.1 and Table 1
    load_inception              the fixed network of the perceptual loss (Eq 5) and of FID
    fid, kid, ssim              section 5.2, written by hand: this is where to read them
    leave_out, jackknife_error  how sure a score is
    UNet, DeepLabV3Plus         section 5.3
    save_checkpoint, load_checkpoint, pick_device

Reads and writes nothing but checkpoints. Images enter a network as float32 in [-1, 1],
[N, 3, H, W]; they are kept everywhere else as uint8 (see `to_float` and `to_uint8`).
Only `prepare.py` (the data format, the error class, whole-or-nothing writes) is imported.
"""
import functools
import hashlib
import math
import os
import platform
import shlex
import signal
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from torch import nn

from prepare import CLASSES, UserError, whole

# ----------------------------------------------------------------------------- small tools


def pick_device(name):
    """torch.device for `--device`: "auto" takes cuda, then mps, then cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else (
            "mps" if torch.backends.mps.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this PyTorch sees no CUDA device; use --device cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: use auto, cpu, cuda, cuda:1 or mps") from None


def announce(script, device, seed, reads, writes):
    """The first line of every script: device, versions, what it reads and what it writes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else (
        f"{torch.get_num_threads()} threads" if device.type == "cpu" else "Apple GPU")
    print(f"{script}: {device.type} ({name}), torch {torch.__version__}, torchvision "
          f"{version('torchvision')}, seed {seed}; reads {reads}; writes {writes}", flush=True)


def provenance(args, device):
    """What a report must say so that its numbers can be made again: plain values."""
    return {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
            "device": f"{device}, {torch.get_num_threads()} threads",
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "torchvision": version("torchvision"), "numpy": np.__version__,
                         "pillow": PIL.__version__}}


def learning_layout(device):
    """The memory order in which R and D learn fastest: channels last, but not on a CPU without
    AVX-512, whose gradient of 4x4 weights is slow there (a GAN step takes 1.2 to 1.4 x)."""
    narrow = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return torch.contiguous_format if narrow else torch.channels_last


def speed_up(net, device, precision="float32", compile=False, layout=torch.channels_last):
    """Move `net` to `device`, channels last (1.13 x on a CPU); optional faster arithmetic.

    tf32 lets a GPU round the factors of a product to 10 bits (a CPU ignores it). bfloat16 is for
    the network alone (autocast): its output is float32 again, so the losses are too. compile()
    works in place and leaves the checkpoint's keys as they are.
    """
    net.to(device, memory_format=layout)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = (
        precision != "float32")
    if precision == "bfloat16":
        if device.type == "cpu":
            warn_of_slow_bfloat16()
        forward = torch.autocast(device.type, torch.bfloat16)(net.forward)
        net.forward = lambda x: forward(x).float()
    if compile:
        net.compile()
    return net


def has_bfloat16():
    """Whether this CPU computes in bfloat16. Without it (AVX2, or AVX512 before AVX512-BF16)
    PyTorch converts to and fro: a training step took 20 and 4.2 times as long as in float32."""
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()       # False on AVX2
    if platform.machine() in ("x86_64", "AMD64"):
        supported &= getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)()
    return supported


@functools.cache
def warn_of_slow_bfloat16():
    if not has_bfloat16():
        print("warning: this CPU has no bfloat16 arithmetic, --precision bfloat16 is 4 to 20 "
              "times slower here than float32", file=sys.stderr)


def make_optimizer(name, parameters, lr):
    """The optimiser of `--optimizer` and `--d-optimizer`. "Fused" is one pass over the weights:
    every one on a GPU, Adam on a CPU too (0.03 s instead of 0.17 for DeepLabV3+)."""
    parameters = list(parameters)
    fused = parameters[0].device.type == "cuda"
    if name == "adam":
        return torch.optim.Adam(parameters, lr, fused=parameters[0].device.type != "mps")
    return torch.optim.SGD(parameters, lr, momentum=0.9 if name == "momentum" else 0, fused=fused)


def keep_on(device, images, other_images):
    """Two sets of uint8 images, on a GPU if they fill at most half of its free memory: a batch
    is then cut out there, and no step waits for a copy. Says where they are if not."""
    size = images.nbytes + other_images.nbytes
    if device.type != "cuda":
        return images, other_images
    free = torch.cuda.mem_get_info(device)[0]
    if size > free / 2:
        print(f"the images ({size / 1e9:.1f} GB) stay in main memory: the GPU has "
              f"{free / 1e9:.1f} GB free")
        return images, other_images
    return images.to(device), other_images.to(device)


def pick(images, n, random, device):
    """n random images of uint8 [N, 3, H, W] as network input on `device`; `random`: a generator
    on the CPU, so that the choice is the same on every device."""
    index = torch.randint(len(images), (n,), generator=random)
    return to_float(images[index.to(images.device, non_blocking=True)].to(device))


def read_every(device):
    """How many steps' losses a training loop leaves unread on the device: reading one makes the
    host wait for a GPU; a CPU has them anyway."""
    return 1 if device.type == "cpu" else 20


def read(pending):
    """Empty a list of rows (tensors of scalars on one device) into lists of floats."""
    rows = torch.stack(pending).tolist() if pending else []
    pending.clear()
    return rows


def to_float(images):
    """uint8 0..255 -> float32 in [-1, 1], the range of every network input (any shape)."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float in [-1, 1] -> uint8 0..255, rounded; the inverse of `to_float`."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def detail(images):
    """What is not in the mean of a pixel's four neighbours, [N, C, H, W] -> the same: texture and
    edges. Blur lowers it; added to an image it sharpens."""
    x = F.pad(images, (1, 1, 1, 1), mode="replicate")
    return images - (x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2]
                     + x[..., 1:-1, 2:]) / 4


def same_pad(x, kernel, stride, value=0.0):
    """Pad [N, C, H, W] as TensorFlow's SAME does: the odd pixel goes after, not before."""
    pads = []
    for n in (x.shape[3], x.shape[2]):                    # F.pad wants the last axis first
        total = max((-(-n // stride) - 1) * stride + kernel - n, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value)


# ----------------------------------------------------------------------- refiner, section 5.1


class ResnetBlock(nn.Module):
    """Two 4x4 convolutions with 64 maps and the identity beside them (section 5.1).

    An even kernel cannot be centred. Padding 1 and then 2 on all sides makes H-1 and then H
    again, so that the block as a whole is centred (TensorFlow's SAME drifts half a pixel to
    the right and down per layer). The padding reflects the image: zeros tell R where the edge
    is, and it paints a frame there. Reflecting costs 4 to 11 % of the time of this network.
    """

    def __init__(self, maps=64):
        super().__init__()
        self.conv1 = nn.Conv2d(maps, maps, 4, padding=1, padding_mode="reflect")
        self.conv2 = nn.Conv2d(maps, maps, 4, padding=2, padding_mode="reflect")

    def forward(self, x):
        y = self.conv2(F.relu(self.conv1(x), inplace=True))
        return F.relu(y.add_(x), inplace=True)         # x + y; in place: about 1.1 x


class Refiner(nn.Module):
    """R_theta: a synthetic image to a refined one, [N, 3, H, W] in [-1, 1] to the same.

    Section 5.1: 4x4 filters to 64 maps, 5 ResNet blocks, a 1x1 convolution. No normalisation;
    tanh at the end as in SimGAN (the paper does not say). 659,331 parameters.
    skip (not the paper's): the last layer gives a change that is added to the image, so that
    detail need not pass all convolutions.
    """

    def __init__(self, maps=64, blocks=5, skip=False):
        super().__init__()
        self.args = {"maps": maps, "blocks": blocks, "skip": skip}
        self.skip = skip
        self.first = nn.Conv2d(3, maps, 4)
        self.blocks = nn.Sequential(*[ResnetBlock(maps) for _ in range(blocks)])
        self.last = nn.Conv2d(maps, 3, 1)

    def forward(self, x):
        y = F.relu(self.first(F.pad(x, (1, 2, 1, 2), mode="reflect")))
        y = self.last(self.blocks(y))
        return (x + y).clamp(-1, 1) if self.skip else torch.tanh(y)


# ------------------------------------------------------------------- discriminator, Table 1


class Discriminator(nn.Module):
    """D_phi, Table 1: [N, 3, H, W] in [-1, 1] to logits [N, 2, h, w], one pair per patch.

    Class 0 is real, class 1 is refined: D(x) = softmax(logits)[:, 1] = P(x is refined).
    SAME padding; 80 x 160 gives 4 x 7 patches, each seeing 50 x 50 pixels. 125,250 parameters.
    `final_relu` is Table 1's last ReLU. It is off by default: where it cuts both logits the
    patch says 1/2 for ever and has no gradient, and all patches can be so from the first step.
    `stride` is that of the first convolution, 3 in Table 1; with 1 a patch is 20 x 20 pixels.
    """

    def __init__(self, final_relu=False, stride=3):
        super().__init__()
        self.args = {"final_relu": final_relu, "stride": stride}
        self.conv1 = nn.Conv2d(3, 96, 5, stride=stride)
        self.conv2 = nn.Conv2d(96, 64, 4, stride=2)
        self.conv3 = nn.Conv2d(64, 32, 3, stride=2)
        self.conv4 = nn.Conv2d(32, 32, 1)
        self.conv5 = nn.Conv2d(32, 2, 1)

    def forward(self, x):                                             # 3 x 80 x 160
        x = F.relu(self.conv1(same_pad(x, 5, self.args["stride"])))   # 96 x 27 x 54
        x = F.relu(self.conv2(same_pad(x, 4, 2)))                     # 64 x 14 x 27
        x = F.max_pool2d(same_pad(x, 3, 2, -torch.inf), 3, stride=2)  # 64 x 7 x 14
        x = F.relu(self.conv3(same_pad(x, 3, 2)))                     # 32 x 4 x 7
        x = F.relu(self.conv4(x))
        x = self.conv5(x)                                             # 2 x 4 x 7
        return F.relu(x) if self.args["final_relu"] else x


def patch_loss(logits, target):
    """-log P(target) as the mean over patches and batch; target 0 = real, 1 = refined."""
    return -F.log_softmax(logits.float(), dim=1)[:, target].mean()


# ------------------------------------------------------------------ Inception V3 (Szegedy 2016)


def keras_average_pool(module, inputs):
    """Forward pre-hook of `branch_pool`: make torchvision's average pool equal Keras's.

    torchvision averages the padding in (divides by 9 at the border), Keras does not. Dividing
    by the pooled ones gives the mean of the pixels that are there.
    """
    (x,) = inputs
    ones = torch.ones_like(x[:1, :1])
    return (x / F.avg_pool2d(ones, 3, stride=1, padding=1),)


def inception_state(weights):
    """The state dict of an ImageNet Inception V3, from torchvision ("imagenet") or a file."""
    if weights != "imagenet":
        return load_tensors(weights, "--inception")
    try:
        from torchvision.models import Inception_V3_Weights
        return Inception_V3_Weights.IMAGENET1K_V1.get_state_dict(
            progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--inception imagenet: the download failed ({error}); give a file "
                        "(--inception PATH) or use --inception random") from None


def load_weights(net, state, flag, name):
    """Load into `net` what it needs of `state`, which may hold more (classifiers, here).

    Raises UserError that says how much of torchvision's `name` is missing.
    """
    wanted = {k: v for k, v in net.state_dict().items() if "num_batches_tracked" not in k}
    found = state if isinstance(state, dict) else {}
    missing = [k for k, v in wanted.items() if getattr(found.get(k), "shape", None) != v.shape]
    if missing:
        raise UserError(f"{flag}: not the state dict of a torchvision {name}: {len(missing)} of "
                        f"{len(wanted)} entries are missing or have another shape, the first is "
                        f"{missing[0]}")
    net.load_state_dict({k: found[k] for k in wanted}, strict=False)


def load_inception(weights="imagenet", layer="pool3", images=None, seed=0):
    """Inception V3 up to and including `layer`, frozen: [N, 3, H, W] in [-1, 1] -> features.

    weights: "imagenet" (torchvision's, downloaded once), a path to a state dict (with or
    without fc.* and AuxLogits.*, float16 or float32), or "random": seeded weights whose
    BatchNorm is calibrated on `images` (uint8 [N, 3, H, W]); for demo and tests.
    layer: a name of torchvision's modules (Conv2d_4a_3x3 = Keras' fifth convolution,
    Mixed_6e, ...), or "pool3" for the 2048 numbers of FID.
    Raises UserError when the download fails, the file does not fit or the layer is unknown.
    """
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    from torchvision.models import inception_v3                    # 1.5 s: only where needed
    net = inception_v3(weights=None, aux_logits=False, init_weights=False, transform_input=False)
    torch.set_rng_state(state)
    net.fc = nn.Identity()
    for module in net.modules():
        if hasattr(module, "branch_pool"):
            module.branch_pool.register_forward_pre_hook(keras_average_pool)
    if weights != "random":
        load_weights(net, inception_state(weights), f"--inception {weights}", "inception_v3")
    names = [name for name, _ in net.named_children()]        # they stand in forward order
    names = names[:names.index("avgpool")] + ["pool3"]
    if layer not in names:
        raise UserError(f"--layer {layer}: Inception V3 has {', '.join(names)}")
    part = nn.Sequential(*list(net.children())[:names.index(layer) + 1])
    part.to(memory_format=torch.channels_last)                # 1.5 x faster on a CPU
    if weights == "random":
        calibrate_batchnorm(part, images)
    if layer == "pool3":
        part.append(nn.Flatten())
    return part.eval().requires_grad_(False)


def resize_299(images):
    """uint8 [N, 3, H, W] -> float in [-1, 1], [N, 3, 299, 299]: bilinear, align_corners=False,
    no antialias, as pytorch-fid does."""
    return F.interpolate(to_float(images), size=(299, 299), mode="bilinear", align_corners=False)


@torch.no_grad()
def calibrate_batchnorm(net, images):
    """Set every BatchNorm to the statistics of up to 16 of `images` (uint8).

    Without it a random net is flat; and images unlike those it was calibrated on come out
    enormous, since 94 layers each enlarge the difference: calibrate on all that you compare.
    """
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None                            # None: the plain average
    net.train()
    net(resize_299(images[::-(-len(images) // 16)]))
    net.eval()


@torch.no_grad()
def inception_features(net, images, device, batch_size=None, progress=iter):
    """pool3 features, float64 [N, 2048] on the CPU, of uint8 images [N, 3, H, W].

    `progress` wraps the loop over batches, tqdm for example. Raises UserError when a feature
    is not finite: the weights are damaged then.
    """
    net, device = net.to(device), torch.device(device)
    batch_size = batch_size or (8 if device.type == "cpu" else 64)
    features = []
    for batch in progress(images.split(batch_size)):
        features.append(net(resize_299(batch.to(device))).cpu().double())
    features = torch.cat(features)
    if not features.isfinite().all():
        raise UserError("--inception: the features are not finite, so the weights are damaged; "
                        "fetch the file again")
    return features


# ------------------------------------------------------------------- metrics, section 5.2


def fid(features_a, features_b):
    """Frechet Inception Distance of two feature sets, [N1, d] and [N2, d] -> float >= 0.

    FID = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr sqrt(S1 S2)   (Heusel et al. 2017), in float64,
    S with N - 1. Raises ValueError for fewer than 2 images or unequal d.
    """
    check_features(features_a, features_b)
    a, b = features_a.double(), features_b.double()
    distance = (a.mean(0) - b.mean(0)).square().sum()
    a = (a - a.mean(0)) / (len(a) - 1) ** 0.5                  # now S1 = a'a and S2 = b'b
    b = (b - b.mean(0)) / (len(b) - 1) ** 0.5
    trace_sqrt = trace_sqrt_nuclear if min(len(a), len(b)) <= 2000 else trace_sqrt_eigen
    value = distance + a.square().sum() + b.square().sum() - 2 * trace_sqrt(a, b)
    return max(value.item(), 0.0)                              # -1e-13 on equal sets


def trace_sqrt_nuclear(a, b):
    """tr sqrt(S1 S2) with S1 = a'a, S2 = b'b: the nuclear norm of a b', [N1, N2].

    S1 S2 = a'(a b')b has the eigenvalues of (a b')(a b')', so the trace of its root is the sum
    of the singular values of a b': no d x d matrix, no complex root. Cheap for few images.
    """
    return torch.linalg.svdvals(a @ b.T).sum()


def trace_sqrt_eigen(a, b):
    """The same as the trace of the root of the symmetric L' S2 L, where S1 = L L', [d, d].

    Cheap for many images. Eigenvalues that rounding pushed below 0 are 0.
    """
    w, v = torch.linalg.eigh(a.T @ a)
    bl = b @ (v * w.clamp(min=0).sqrt())                       # b L, so L' S2 L = (b L)'(b L)
    return torch.linalg.eigvalsh(bl.T @ bl).clamp(min=0).sqrt().sum()


def check_features(a, b):
    """ValueError unless a and b are [N1, d] and [N2, d] with two images or more each."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"wanted features [N, d] of 2 images or more, not {tuple(a.shape)} and "
                         f"{tuple(b.shape)}")


def kid(features_a, features_b, subset=None, subsets=100, seed=0):
    """Kernel Inception Distance (Binkowski et al. 2018): the unbiased squared MMD -> float.

    Kernel k(x, y) = (x.y / d + 1)^3. Unlike FID its mean does not depend on N, so it can be
    a little below 0 for equal distributions. `subset`: the mean over `subsets` random subsets
    of that many images, as packages do to save memory; None takes all pairs at once, which has
    the same expectation and less noise. Raises ValueError as `fid` does.
    """
    check_features(features_a, features_b)
    if subset is not None:
        random = torch.Generator().manual_seed(seed)
        parts = [[x[torch.randperm(len(x), generator=random)[:subset]]
                  for x in (features_a, features_b)] for _ in range(subsets)]
        return sum(kid(*part) for part in parts) / subsets
    a, b = features_a.double(), features_b.double()
    m, n, d = len(a), len(b), a.shape[1]
    k_aa, k_bb, k_ab = ((x @ y.T / d + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    within_a = (k_aa.sum() - k_aa.trace()) / (m * (m - 1))
    within_b = (k_bb.sum() - k_bb.trace()) / (n * (n - 1))
    return (within_a + within_b - 2 * k_ab.mean()).item()


def leave_out(metric, *sets, groups=20):
    """metric(*sets) with the i-th of `groups` left out of every set at once: float64 [groups].

    Element k of a set is in group k mod `groups`. Elements of equal index go together, so pairs
    stay pairs, and what two scores have in common cancels in the difference of their values.
    """
    groups = min(groups, *map(len, sets))
    return torch.tensor([metric(*[x[torch.arange(len(x)) % groups != i] for x in sets])
                         for i in range(groups)], dtype=torch.float64)


def jackknife_error(values):
    """Standard error of a score from its `leave_out` values t:

    Var = (g - 1) / g * sum (t_i - mean t)^2   (delete-a-group jackknife, Shao & Tu 1995).
    No image is counted twice, as a bootstrap would: repeated images inflate FID.
    """
    g = len(values)
    return ((g - 1) / g * (values - values.mean()).square().sum()).sqrt().item()


def ssim(x, y, max_val=255):
    """Structural similarity (Wang et al. 2004) of image pairs: [N, 3, H, W] twice -> [N].

    Equals `tf.image.ssim` on uint8: Gaussian window 11 x 11, sigma 1.5, only windows that lie
    inside the image, population moments, C1 = (.01 L)^2, C2 = (.03 L)^2 with L = `max_val`,
    mean over positions and channels. float64 stays float64, all else becomes float32.
    Raises ValueError for images under 11 x 11 or of unequal shape.
    """
    if x.shape != y.shape or x.shape[-2] < 11 or x.shape[-1] < 11:
        raise ValueError(f"ssim wants equal shapes of 11 x 11 or more, "
                         f"not {tuple(x.shape)} and {tuple(y.shape)}")
    # So many images at once that their 12 maps stay in a CPU's cache: 2.4 x faster at 80 x 160.
    n = max(1, (2 ** 16 if x.device.type == "cpu" else 2 ** 24) // (x.shape[-2] * x.shape[-1]))
    return torch.cat([ssim_of_few(a, b, max_val) for a, b in zip(x.split(n), y.split(n))])


def ssim_of_few(x, y, max_val):
    """`ssim` of images that are worked on at the same time."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, y = x.to(dtype) / max_val, y.to(dtype) / max_val        # now L = 1
    mx, my, square, product = gaussian_mean(
        torch.cat([x, y, x * x + y * y, x * y], 1)).chunk(4, 1)
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    luminance = (2 * mx * my + c1) / (mx * mx + my * my + c1)
    structure = (2 * (product - mx * my) + c2) / (square - mx * mx - my * my + c2)
    return (luminance * structure).mean((1, 2, 3))


def gaussian_mean(maps):
    """[N, C, H, W] -> [N, C, H-10, W-10]: means under the window, which is separable. Eleven
    shifted copies are added up, down and then across: 8 x faster than conv2d with one map."""
    weights = [math.exp(-(i - 5) ** 2 / (2 * 1.5 ** 2)) for i in range(11)]
    height, width = maps.shape[2] - 10, maps.shape[3] - 10
    down = torch.zeros_like(maps[:, :, :height])
    for i, w in enumerate(weights):
        down.add_(maps[:, :, i:i + height], alpha=w / sum(weights))
    across = torch.zeros_like(down[..., :width])
    for i, w in enumerate(weights):
        across.add_(down[..., i:i + width], alpha=w / sum(weights))
    return across


# --------------------------------------------------------------- segmentation, section 5.3


def double_conv(c_in, c_out):
    """(3x3 convolution, BatchNorm, ReLU) twice, size kept."""
    layers = []
    for c in (c_in, c_out):
        layers += [nn.Conv2d(c, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out),
                   nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015): [N, 3, H, W] in [-1, 1] -> class logits [N, 19, H, W].

    Four levels down, base width 32 (the original has 64), padded convolutions with BatchNorm.
    H and W must be multiples of 16 or are padded up to one by repeating the edge.
    """

    def __init__(self, classes=len(CLASSES), base=32):
        super().__init__()
        widths = [base * 2 ** i for i in range(5)]
        self.down = nn.ModuleList(double_conv(i, o) for i, o in zip([3] + widths, widths))
        pairs = list(zip(widths[:0:-1], widths[-2::-1]))       # (512, 256), (256, 128), ...
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, stride=2) for i, o in pairs)
        self.merge = nn.ModuleList(double_conv(i, o) for i, o in pairs)
        self.head = nn.Conv2d(base, classes, 1)

    def forward(self, x):
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % 16, 0, -height % 16), mode="replicate")
        skips = []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1]):
            x = merge(torch.cat([skip, up(x)], 1))
        return self.head(x)[..., :height, :width]


class AtrousConv(nn.Module):
    """A dilated 3x3 convolution that leaves out weights which meet nothing but padding.

    Where the rate reaches the size of the map only the weight in the middle meets the image (Chen
    et al. 2017, section 3.3): at 40 x 80 the maps are 3 x 5 and that is so at every rate of ASPP.
    Same result, there a ninth of the work. The nine weights of a filter are nine parameters, so
    that what is left out has no gradient at all, and the optimiser passes it over.
    """

    def __init__(self, inputs, outputs, rate):
        super().__init__()
        self.rate = rate
        whole = nn.Conv2d(inputs, outputs, 3, bias=False).weight.detach()    # its initial values
        self.weights = nn.ParameterList(whole[:, :, i, j].clone() for i in range(3)
                                        for j in range(3))                   # [outputs, inputs]

    def forward(self, x):
        tall, wide = x.shape[-2] > self.rate, x.shape[-1] > self.rate
        rows, columns = range(3) if tall else [1], range(3) if wide else [1]
        weight = torch.stack([torch.stack([self.weights[3 * i + j] for j in columns], -1)
                              for i in rows], -2)              # [outputs, inputs, 1 or 3, 1 or 3]
        return F.conv2d(x, weight, padding=(self.rate * tall, self.rate * wide),
                        dilation=self.rate)


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+ (Chen et al. 2018): [N, 3, H, W] in [-1, 1] -> logits [N, 19, H, W].

    ResNet-50 at output stride 16, ASPP with rates 6, 12, 18, and the decoder that the plus
    stands for: upsample, join with layer1's features cut to 48 maps, two 3x3 convolutions.
    backbone_weights: None, "imagenet" (torchvision's, downloaded) or a path to a state dict.
    """

    def __init__(self, classes=len(CLASSES), backbone_weights=None):
        super().__init__()
        from torchvision.models import resnet50
        from torchvision.models.segmentation.deeplabv3 import ASPP
        b = resnet50(weights=None, replace_stride_with_dilation=[False, False, True])
        if backbone_weights:
            load_weights(b, resnet_state(backbone_weights),
                         f"--backbone-weights {backbone_weights}", "resnet50")
        self.stem = nn.Sequential(b.conv1, b.bn1, b.relu, b.maxpool)
        self.layer1 = b.layer1
        self.deep = nn.Sequential(b.layer2, b.layer3, b.layer4)
        rates = [6, 12, 18]
        self.aspp = ASPP(2048, rates)
        for branch, rate in zip(self.aspp.convs[1:4], rates):
            branch[0] = AtrousConv(2048, 256, rate)
        self.low = nn.Sequential(nn.Conv2d(256, 48, 1, bias=False), nn.BatchNorm2d(48),
                                 nn.ReLU(inplace=True))
        self.decoder = double_conv(256 + 48, 256)
        self.head = nn.Conv2d(256, classes, 1)

    def forward(self, x):                                         # at 80 x 160:
        low = self.layer1(self.stem(x))                           # 256 x 20 x 40
        deep = self.aspp(self.deep(low))                          # 256 x 5 x 10
        deep = F.interpolate(deep, size=low.shape[-2:], mode="bilinear", align_corners=False)
        y = self.head(self.decoder(torch.cat([deep, self.low(low)], 1)))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


def resnet_state(weights):
    """The state dict of a ResNet-50: "imagenet" or a path."""
    if weights != "imagenet":
        return load_tensors(weights, "--backbone-weights")
    try:
        from torchvision.models import ResNet50_Weights
        return ResNet50_Weights.IMAGENET1K_V2.get_state_dict(progress=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--backbone-weights imagenet: the download failed ({error}); give a "
                        "file or use --backbone-weights none") from None


# ----------------------------------------------------------------------------- checkpoints


def load_tensors(path, flag):
    """torch.load of tensors and plain values only; any failure is a UserError naming `flag`."""
    if not Path(path).is_file():
        raise UserError(f"{flag} {path}: no such file")
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
    for key, weights in state.items():
        if key in ("refiner", "discriminator", "weights") and not all(
                torch.isfinite(w).all() for w in weights.values()):
            raise UserError(f"{path}: not written, the {key} has weights that are inf or nan; what "
                            "was there before is as it was; try a smaller --lr or --d-lr")
    try:
        with whole(path) as temporary:
            torch.save({"stage": stage, **state}, temporary)
    except RuntimeError as error:              # PyTorch's own writer, on a full disk for example
        raise UserError(f"{path}: cannot be written, is the disk full? What was there before is "
                        f"as it was ({str(error).splitlines()[0][:80]})") from None


def resume_or_start(path, stage, settings, resume, overwrite):
    """The saved state to go on from, or None for a new run; refuses what would lose a run."""
    if not resume:
        if Path(path).exists() and not overwrite:
            raise UserError(f"{path} exists: --resume goes on with that run, --overwrite starts "
                            "it anew")
        return None
    state = load_checkpoint(path, [stage], "nothing to --resume: leave the flag away")
    same_settings(path, state["settings"], settings)
    return state


def same_settings(path, old, settings):
    """UserError, naming the first that differs, unless a run had these settings."""
    for key, value in settings.items():
        if old.get(key) != value:
            raise UserError(f"{path}: was run with {key} = {old.get(key)}, not {value}; "
                            "--resume goes on with the same settings only")


def sha256(*tensors):
    """SHA-256 of the bytes of tensors, as hex."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


def stop_requests():
    """A list that becomes non-empty on the first Ctrl-C or SIGTERM; the second stops at once.

    A loop looks at it after a whole step, so what it then saves is a state it can resume from.
    """
    requests = []

    def note(signum, _):
        requests.append(signum)
        signal.signal(signum, signal.SIG_DFL)
        os.write(2, b"\nstopping after this step; once more stops at once, without saving\n")
    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)
    return requests


def load_checkpoint(path, stages, advice):
    """Read a checkpoint of one of `stages`; raises UserError, ending in `advice`, otherwise."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint; {advice}")
    state = load_tensors(path, "checkpoint")
    if not isinstance(state, dict) or state.get("stage") not in stages:
        found = state.get("stage", "none of ours") if isinstance(state, dict) else "no dict"
        raise UserError(f"{path}: wanted a checkpoint of {' or '.join(stages)}, found {found}; "
                        f"{advice}")
    return state


def rebuild(Network, state, name, path):
    """The network `name` of a checkpoint, weights loaded; UserError if it is of another kind."""
    try:
        net = Network(**state[f"{name}_args"])
        net.load_state_dict(state[name])
        return net
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: its {name} is not a {Network.__name__} of this models.py "
                        f"({' '.join(str(error).split())[:80]}); train it again") from None
