"""The paper's algorithms, no command line, no saving, no speed: what the stages must compute.

Read `pretrain`, `train` and `train_unet`. x is synthetic, y real; R refines, D tells refined from
real. Images are uint8 [N, 3, H, W], labels uint8 [N, H, W]; networks take floats in [-1, 1].

The stages give the same bits: this file draws its random numbers as they do, in this order:
- pre-training: torch's generator gives R's weights, then D's. Another one gives each step of R a
  synthetic batch, each step of D a synthetic and a real one; all batches with replacement.
- adversarial training: a new one gives a synthetic batch, whose refined images begin the history.
  Each step: two synthetic batches for R; for D one to refine, a real one, and places of the history
  for the old half. Once the history is full: an order of its places; new images take the first.
- U-Net: torch's generator gives the weights, each epoch the order of the images, and for each
  batch one number an image: below 1/2 it is mirrored, and its label with it.
"""
import math

import torch
import torch.nn.functional as F

from models import Discriminator, Refiner, UNet, load_inception

REAL, REFINED = 0, 1                                      # D's two classes
LAYOUT = torch.channels_last                 # order of weights in memory: it decides how sums round


def as_input(images):
    return images.float() / 127.5 - 1                     # 0..255 to -1..1


def as_images(x):
    return ((x.detach() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def draw(images, n, random):
    return as_input(images[torch.randint(len(images), (n,), generator=random)])


def judge(logits, target):
    """-log P(target), the mean over patches and images; the share of patches that say target."""
    return -F.log_softmax(logits, 1)[:, target].mean(), (logits.argmax(1) == target).float().mean()


def make_optimizer(name, net, lr):
    if name == "adam":
        return torch.optim.Adam(net.parameters(), lr)
    return torch.optim.SGD(net.parameters(), lr, momentum={"momentum": 0.9, "sgd": 0}[name])


def descend(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def pretrain(synthetic, real, seed=0, method="ours", layer="Conv2d_4a_3x3", steps=1200,
             d_steps=400, batch_size=16, lr=1e-4, d_lr=1e-3, final_relu=False, d_stride=3):
    """R learns to change nothing, D to tell x from y. Returns R, D and the log."""
    psi = None
    if method == "ours":
        psi = load_inception("random", layer, real, seed)    # pretrain.py's default: imagenet
    torch.manual_seed(seed)
    R = Refiner().to(memory_format=LAYOUT)
    D = Discriminator(final_relu, d_stride).to(memory_format=LAYOUT)
    optimizer_R, optimizer_D = make_optimizer("adam", R, lr), make_optimizer("momentum", D, d_lr)
    random, log = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        x = draw(synthetic, batch_size, random)
        refined = R(x)
        loss = change = (refined - x).abs().mean()                       # Eq 4, as a mean
        if method == "ours":
            loss = (psi(refined) - psi(x)).square().mean()               # Eq 5
        descend(optimizer_R, loss)
        log.append([loss.item(), change.item(), math.nan])
    for _ in range(d_steps):
        x, y = draw(synthetic, batch_size, random), draw(real, batch_size, random)
        (loss_x, right_x), (loss_y, right_y) = judge(D(x), REFINED), judge(D(y), REAL)
        descend(optimizer_D, loss_x + loss_y)                                   # Eq 1, mended
        log.append([(loss_x + loss_y).item(), math.nan, (right_x + right_y).item() / 2])
    return R, D, log


def train(R, D, synthetic, real, seed=0, steps=5000, batch_size=16, lr=1e-4, d_lr=1e-3, alpha=50,
          beta=4e-6, rec="l1", rec_batch=512, history=100, average=200,
          d_optimizer="momentum", sample_every=100):
    """Twice R, once D, and so on. Returns the log, R averaged, the best step and its R."""
    optimizer_R, optimizer_D = make_optimizer("sgd", R, lr), make_optimizer(d_optimizer, D, d_lr)
    random = torch.Generator().manual_seed(seed)
    capacity, n_old = history * batch_size, (batch_size // 2 if history else 0)
    past = list(as_images(R(draw(synthetic, batch_size, random))))[:capacity]
    mean = {name: weight.clone() for name, weight in R.state_dict().items()}
    log, scores, highest = [], [], -torch.inf
    for step in range(1, steps + 1):
        for _ in range(2):                                               # R; D is fixed
            x = draw(synthetic, batch_size, random)
            refined = R(x)
            loss_adv, _ = judge(D(refined), REAL)                        # Eq 3
            change = (refined - x).abs().mean()
            distance = change if rec == "l1" else (refined - x).square().mean()
            loss_rec = rec_batch * 3 * 80 * 160 * distance               # Eq 4, a sum
            descend(optimizer_R, alpha * loss_adv + beta * loss_rec)            # Eq 2
        x, y = draw(synthetic, batch_size - n_old, random), draw(real, batch_size, random)
        places = torch.randint(len(past), (n_old,), generator=random) if n_old else []
        new, old = list(as_images(R(x))), [past[i] for i in places]      # D; R is fixed
        loss_refined, right_refined = judge(D(as_input(torch.stack(new + old))), REFINED)
        loss_real, right_real = judge(D(y), REAL)
        descend(optimizer_D, loss_refined + loss_real)                          # Eq 1, mended
        free = capacity - len(past)
        past += new[:free]
        if len(new) > free:
            for place, image in zip(torch.randperm(len(past), generator=random), new[free:]):
                past[place] = image
        for name, weight in R.state_dict().items():                      # R averaged
            mean[name].lerp_(weight, 1 / min(step, average))
        log.append([value.item() for value in (loss_adv, loss_rec, loss_real, loss_refined,
                                               right_real, right_refined, change)] + [len(past)])
        scores.append(loss_refined - loss_real - loss_adv)               # the rule, section 5.1
        score = torch.stack(scores[-sample_every:]).mean()
        looks = step % sample_every == 0 or step == steps
        if looks and step > min(1000, steps // 2) and score > highest:
            highest, best_step = score, step
            best = {name: weight.clone() for name, weight in R.state_dict().items()}
    return log, mean, best_step, best


def train_unet(images, labels, seed=0, epochs=30, batch_size=16, lr=1e-3):
    """Cross-entropy where the label is not void (255); an epoch leaves out what fills no batch."""
    torch.manual_seed(seed)
    net = UNet().to(memory_format=LAYOUT)
    adam, batches = make_optimizer("adam", net, lr), len(images) // batch_size
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, epochs * batches)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(batch_size)[:batches]:
            x, y = images[chosen], labels[chosen]
            for i, number in enumerate(torch.rand(batch_size)):
                if number < 0.5:
                    x[i], y[i] = x[i].flip(-1), y[i].flip(-1)
            descend(adam, F.cross_entropy(net(as_input(x)), y.long(), ignore_index=255))
            cosine.step()
    return net.eval()
