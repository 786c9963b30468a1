"""Inception V3 (Szegedy 2016), the frozen network of the perceptual loss (Eq 5) and of FID."""
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import Inception_V3_Weights, inception_v3

from support.cli import UserError
from support.training import load_weights, to_float


def keras_average_pool(module, inputs):
    """Forward pre-hook of `branch_pool`: make torchvision's average pool equal Keras's.

    torchvision averages the padding in (divides by 9 at the border), Keras does not. Dividing
    by the pooled ones gives the mean of the pixels that are there.
    """
    (x,) = inputs
    ones = torch.ones_like(x[:1, :1])
    return (x / F.avg_pool2d(ones, 3, stride=1, padding=1),)


def pool_by_maximum(block):
    """Make `block` take the maximum where it averages, as TensorFlow's FID network of 2015 does in
    its last block, Mixed_7c."""
    seen = {}
    block.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    block.branch_pool.register_forward_pre_hook(
        lambda *_: (F.max_pool2d(seen["x"], 3, stride=1, padding=1),))


def load_inception(weights="imagenet", layer="pool3", images=None, seed=0):
    """Inception V3 up to and including `layer`, frozen: [N, 3, H, W] in [-1, 1] -> features.

    weights: "imagenet" (torchvision's, downloaded once), a path to a state dict (with or
    without fc.* and AuxLogits.*, float16 or float32; with 1008 classes it is pytorch-fid's and is
    computed as there), or "random": seeded weights whose BatchNorm is calibrated on `images`
    (uint8 [N, 3, H, W]); for demo and tests.
    layer: a name of torchvision's modules (Conv2d_4a_3x3 = Keras' fifth convolution,
    Mixed_6e, ...), or "pool3" for the 2048 numbers of FID.
    Raises UserError when the download fails, the file does not fit, the layer is unknown or
    `images` are too small for it.
    """
    with torch.random.fork_rng(devices=[]):                   # leave the random state alone
        torch.manual_seed(seed)
        net = inception_v3(weights=None, aux_logits=False, init_weights=False)
    net.fc = nn.Identity()
    for module in net.modules():
        if hasattr(module, "branch_pool"):
            module.branch_pool.register_forward_pre_hook(keras_average_pool)
    found = {}
    if weights != "random":
        found = load_weights(net, weights, "--inception", Inception_V3_Weights.IMAGENET1K_V1,
                             "random")
    is_pytorch_fid = "fc.weight" in found and len(found["fc.weight"]) == 1008
    if is_pytorch_fid:
        pool_by_maximum(net.Mixed_7c)
    names = [name for name, _ in net.named_children()]        # they stand in forward order
    names = names[:names.index("avgpool")] + ["pool3"]
    if layer not in names:
        raise UserError(f"--layer {layer}: Inception V3 has {', '.join(names)}")
    part = nn.Sequential(*list(net.children())[:names.index(layer) + 1])
    part.to(memory_format=torch.channels_last)                # faster on a CPU
    if weights == "random":
        calibrate_batchnorm(part, images)
    if layer == "pool3":
        part.append(nn.Flatten())
    part.is_pytorch_fid = is_pytorch_fid
    part.eval().requires_grad_(False)
    if layer != "pool3" and images is not None:          # pool3 sees 299 x 299 pixels
        try:
            part(to_float(images[:1]))
        except RuntimeError:
            raise UserError(f"--layer {layer}: the images are too small for it; give an earlier "
                            "one") from None
    return part


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
            module.momentum = None                            # None: the plain average
    net.train()
    net(resize_299(images[::-(-len(images) // 16)]))
