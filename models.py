"""The networks of the paper, then the metrics.

Inception V3, psi of the perceptual loss (Eq 5) and the features of FID, is in support/inception.py.
Images enter a network as float32 in [-1, 1], [N, 3, H, W]; everywhere else they are uint8.
"""
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import ResNet50_Weights, resnet50
from torchvision.models.segmentation.deeplabv3 import ASPP

from support.cli import UserError, progress
from support.inception import load_inception, resize_299
from support.training import load_weights


# ----------------------------------------------------------------------- refiner, section 5.1


class ResnetBlock(nn.Module):
    """Two 4x4 convolutions with 64 maps and the identity beside them (section 5.1).

    [N, maps, H, W] to the same. A 4x4 kernel has no centre: padding 1 gives H-1 rows, then
    padding 2 gives H, so the whole block is centred. Reflected, since zeros would show as a frame.
    """

    def __init__(self, maps=64):
        super().__init__()
        self.conv1 = nn.Conv2d(maps, maps, 4, padding=1, padding_mode="reflect")
        self.conv2 = nn.Conv2d(maps, maps, 4, padding=2, padding_mode="reflect")

    def forward(self, x):
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


class Refiner(nn.Module):
    """R_theta: a synthetic image to a refined one, [N, 3, H, W] in [-1, 1] to the same.

    Section 5.1: 4x4 filters to 64 maps, 5 ResNet blocks, a 1x1 convolution. The paper names no
    normalisation (none here) and no last activation (tanh here). 659,331 parameters.
    """

    def __init__(self, maps=64, blocks=5):
        super().__init__()
        self.args = {"maps": maps, "blocks": blocks}          # saved beside the weights
        self.first = nn.Conv2d(3, maps, 4)
        self.blocks = nn.Sequential(*[ResnetBlock(maps) for _ in range(blocks)])
        self.last = nn.Conv2d(maps, 3, 1)

    def forward(self, x):
        x = F.pad(x, (1, 2, 1, 2), mode="reflect")            # left, right, top, bottom
        x = F.relu(self.first(x))                                         # [N, maps, H, W]
        return torch.tanh(self.last(self.blocks(x)))                      # [N, 3, H, W]


# ------------------------------------------------------------------- discriminator, Table 1


def same_pad(x, kernel, stride, value=0.0):
    """Pad [N, C, H, W] as TensorFlow's SAME does: the odd pixel goes after, not before."""
    pads = []
    for n in (x.shape[3], x.shape[2]):                    # F.pad wants the last axis first
        total = max((n - 1) // stride * stride + kernel - n, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value)


class Discriminator(nn.Module):
    """D_phi, Table 1: [N, 3, H, W] in [-1, 1] to logits [N, 2, h, w], one pair per patch.

    Class 0 is real, class 1 is refined: D(x) = softmax(logits)[:, 1] = P(x is refined).
    SAME padding; 80 x 160 gives 4 x 7 patches, each seeing 50 x 50 pixels. 125,250 parameters.
    `final_relu` is Table 1's last ReLU. It is off by default: where it cuts both logits the
    patch says 1/2 and gives no gradient, and all patches can be so from the first step.
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


REAL, REFINED = 0, 1                                   # D's two classes


def patch_loss(logits, target):
    """-log P(target), mean over patches and batch; logits [N, 2, h, w], target REAL or REFINED."""
    return -F.log_softmax(logits.float(), dim=1)[:, target].mean()


# --------------------------------------------------------------- segmentation, section 5.3


def double_conv(c_in, c_out):
    """(3x3 convolution, BatchNorm, ReLU) twice, size kept."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(),
        nn.Conv2d(c_out, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015): [N, 3, H, W] in [-1, 1] -> logits [N, classes, H, W].

    Four levels down and up, base width 32 (the original has 64), padded convolutions with
    BatchNorm. H and W are padded up to multiples of 16 by repeating the edge.
    """

    def __init__(self, classes=19):
        super().__init__()
        self.down1 = double_conv(3, 32)
        self.down2 = double_conv(32, 64)
        self.down3 = double_conv(64, 128)
        self.down4 = double_conv(128, 256)
        self.bottom = double_conv(256, 512)
        self.up4 = nn.ConvTranspose2d(512, 256, 2, stride=2)
        self.up3 = nn.ConvTranspose2d(256, 128, 2, stride=2)
        self.up2 = nn.ConvTranspose2d(128, 64, 2, stride=2)
        self.up1 = nn.ConvTranspose2d(64, 32, 2, stride=2)
        self.merge4 = double_conv(512, 256)
        self.merge3 = double_conv(256, 128)
        self.merge2 = double_conv(128, 64)
        self.merge1 = double_conv(64, 32)
        self.head = nn.Conv2d(32, classes, 1)

    def forward(self, x):                                         # at 80 x 160:
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % 16, 0, -height % 16), mode="replicate")
        x1 = self.down1(x)                                        # 32 x 80 x 160
        x2 = self.down2(F.max_pool2d(x1, 2))                      # 64 x 40 x 80
        x3 = self.down3(F.max_pool2d(x2, 2))                      # 128 x 20 x 40
        x4 = self.down4(F.max_pool2d(x3, 2))                      # 256 x 10 x 20
        x = self.bottom(F.max_pool2d(x4, 2))                      # 512 x 5 x 10
        x = self.merge4(torch.cat([x4, self.up4(x)], 1))          # 256 x 10 x 20
        x = self.merge3(torch.cat([x3, self.up3(x)], 1))          # 128 x 20 x 40
        x = self.merge2(torch.cat([x2, self.up2(x)], 1))          # 64 x 40 x 80
        x = self.merge1(torch.cat([x1, self.up1(x)], 1))          # 32 x 80 x 160
        return self.head(x)[..., :height, :width]


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+ (Chen et al. 2018): [N, 3, H, W] in [-1, 1] -> logits [N, classes, H, W].

    ResNet-50 at output stride 16, ASPP with rates 6, 12, 18, and the decoder that the plus
    stands for: upsample, join with layer1's features cut to 48 maps, two 3x3 convolutions.
    backbone_weights: None, "imagenet" (torchvision's, downloaded) or a path to a state dict.
    """

    def __init__(self, classes=19, backbone_weights=None):
        super().__init__()
        resnet = resnet50(weights=None, replace_stride_with_dilation=[False, False, True])
        resnet.fc = nn.Identity()                    # so that a weights file needs no classifier
        if backbone_weights:
            load_weights(resnet, backbone_weights, "--backbone-weights",
                         ResNet50_Weights.IMAGENET1K_V2, "none")
        self.stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool)
        self.layer1 = resnet.layer1
        self.deep = nn.Sequential(resnet.layer2, resnet.layer3, resnet.layer4)
        self.aspp = ASPP(2048, [6, 12, 18])
        self.low = nn.Sequential(nn.Conv2d(256, 48, 1, bias=False), nn.BatchNorm2d(48),
                                 nn.ReLU())
        self.decoder = double_conv(256 + 48, 256)
        self.head = nn.Conv2d(256, classes, 1)

    def forward(self, x):                                         # at 80 x 160:
        low = self.layer1(self.stem(x))                           # 256 x 20 x 40
        deep = self.aspp(self.deep(low))                          # 256 x 5 x 10
        deep = F.interpolate(deep, size=low.shape[-2:], mode="bilinear", align_corners=False)
        y = self.head(self.decoder(torch.cat([deep, self.low(low)], 1)))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


# ------------------------------------------------------------------- metrics, section 5.2


@torch.no_grad()
def inception_features(net, images, device, title="Inception features"):
    """pool3 features, float64 [N, 2048] on the CPU, of uint8 images [N, 3, H, W], a tensor or
    Images. `title` stands beside the progress bar. UserError at a feature that is not finite.
    """
    net, device = net.to(device), torch.device(device)
    batch_size = 8 if device.type == "cpu" else 64
    features = []
    count = -(-len(images) // batch_size)
    for batch in progress(images.split(batch_size), desc=title, unit="batch", total=count):
        features.append(net(resize_299(batch.to(device))).cpu().double())
    features = torch.cat(features)
    if not features.isfinite().all():
        raise UserError("--inception: the features are not finite, so the weights are damaged; "
                        "fetch the file again")
    return features


def fid(features_a, features_b):
    """Frechet Inception Distance of two feature sets, [N1, d] and [N2, d], N > 1 -> float >= 0.

    FID = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr sqrt(S1 S2)   (Heusel et al. 2017), in float64, of
    means m and covariances S (over N - 1). With S1 = a'a and S2 = b'b the product S1 S2 has the
    eigenvalues of (a b')(a b')', so tr sqrt(S1 S2) is the sum of the singular values of a b'.
    """
    a, b = features_a.double(), features_b.double()
    distance = (a.mean(0) - b.mean(0)).square().sum()
    a = (a - a.mean(0)) / (len(a) - 1) ** 0.5                  # now S1 = a'a and S2 = b'b
    b = (b - b.mean(0)) / (len(b) - 1) ** 0.5
    a, b = (torch.linalg.qr(x, mode="r").R for x in (a, b))    # a'a, b'b stay; d rows at most
    trace_sqrt = torch.linalg.svdvals(a @ b.T).sum()
    value = distance + a.square().sum() + b.square().sum() - 2 * trace_sqrt
    return max(value.item(), 0.0)                              # -1e-13 on equal sets


def kid(features_a, features_b):
    """Kernel Inception Distance (Binkowski et al. 2018): the unbiased squared MMD -> float.

    Kernel k(x, y) = (x.y / d + 1)^3, no image with itself. Unlike FID it has no bias, so it can be
    a little below 0 for equal distributions.
    """
    a, b = features_a.double(), features_b.double()
    m, n, d = len(a), len(b), a.shape[1]
    k_aa, k_bb, k_ab = (a @ a.T / d + 1) ** 3, (b @ b.T / d + 1) ** 3, (a @ b.T / d + 1) ** 3
    within_a = (k_aa.sum() - k_aa.trace()) / (m * (m - 1))
    within_b = (k_bb.sum() - k_bb.trace()) / (n * (n - 1))
    return (within_a + within_b - 2 * k_ab.mean()).item()


def ssim(x, y, max_val=255):
    """Structural similarity (Wang et al. 2004) of pairs in 0..255: [N, 3, H, W] twice -> [N] <= 1.

        (2 mu_x mu_y + C1) (2 sigma_xy + C2)
        ------------------------------------------------------------   L = max_val
        (mu_x^2 + mu_y^2 + C1) (sigma_x^2 + sigma_y^2 + C2)            C1, C2 = (.01 L)^2, (.03 L)^2

    Equals `tf.image.ssim` on uint8: moments under a Gaussian window of 11 x 11, sigma 1.5, only
    where it lies inside the image; then the mean over positions and channels. Raises ValueError
    for images under 11 x 11 or of unequal shape.
    """
    if x.shape != y.shape or x.shape[-2] < 11 or x.shape[-1] < 11:
        raise ValueError(f"ssim wants equal shapes of 11 x 11 or more, "
                         f"not {tuple(x.shape)} and {tuple(y.shape)}")
    x, y = x / max_val, y / max_val                            # now L = 1
    C1, C2 = 0.01 ** 2, 0.03 ** 2
    mu_x, mu_y = gaussian_mean(x), gaussian_mean(y)
    variances = gaussian_mean(x * x + y * y) - mu_x ** 2 - mu_y ** 2    # sigma_x^2 + sigma_y^2
    sigma_xy = gaussian_mean(x * y) - mu_x * mu_y
    luminance = (2 * mu_x * mu_y + C1) / (mu_x ** 2 + mu_y ** 2 + C1)
    contrast_structure = (2 * sigma_xy + C2) / (variances + C2)
    return (luminance * contrast_structure).mean((1, 2, 3))


def gaussian_mean(maps):
    """[N, C, H, W] -> [N, C, H-10, W-10]: means under the window. It is separable, so they are
    two products with band matrices, down and across."""
    height, width = maps.shape[-2:]
    return window_matrix(height, maps) @ maps @ window_matrix(width, maps).T


def window_matrix(n, like):
    """[n-10, n]: row i holds the Gaussian weights of pixels i to i+10, type and device `like`."""
    distance = torch.arange(n, dtype=torch.float64) - torch.arange(n - 10)[:, None] - 5
    weights = (-distance ** 2 / (2 * 1.5 ** 2)).exp() * (distance.abs() <= 5)
    return (weights / weights.sum(1, keepdim=True)).to(like)


# ----------------------------------------------------------------------- how sure a score is


def leave_out(metric, *sets):
    """metric(*sets), of sets of one length, for `jackknife_error`: with one group left out of all
    sets at once, float64 [groups]; 20 groups, or as many as a set has elements. Element k is
    in group k mod groups, so pairs are left out together. All groups are of one size, as FID
    depends on N. Elements beyond them are never left out; the spread is corrected for that."""
    n = len(sets[0])
    groups = min(20, n)
    size, k, values = n // groups, torch.arange(n), []
    for i in range(groups):
        kept = (k % groups != i) | (k >= groups * size)
        values.append(metric(*[x[kept] for x in sets]))
    values = torch.tensor(values, dtype=torch.float64)
    # 1 if the groups hold all; then jackknife_error of a mean is s / sqrt(n), else on average.
    spread = (n - size) / (groups - 1) * (groups / (size * n)) ** 0.5
    return values.mean() + spread * (values - values.mean())


def jackknife_error(values):
    """Standard error of a score from its `leave_out` values t (delete-a-group jackknife, Shao & Tu
    1995): Var = (g - 1) / g * sum (t_i - mean t)^2."""
    g = len(values)
    return ((g - 1) / g * (values - values.mean()).square().sum()).sqrt().item()
