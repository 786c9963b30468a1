"""What the scripts compute is what the paper says: against plain.py, number by number."""
import csv
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, start
from PIL import Image

import plain
from models import kid, load_inception, ssim
from prepare import load_images, load_labels


@pytest.fixture(autouse=True)
def one_thread():
    """The commands of conftest have one too; with more, sums are rounded otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw_domains(cwd, train, test, domains):
    """Prepared images and labels of noise, 24 x 48, none like another; each domain has its
    brightness, real one training image more, one label in ten is void."""
    random = np.random.default_rng(0)
    for k, domain in enumerate(domains):
        for split, count in (("train", train + (domain == "real")), ("test", test)):
            folder = cwd / "data" / domain / split
            (folder / "images").mkdir(parents=True), (folder / "labels").mkdir()
            for i in range(count):
                image = random.integers(0, 120, (24, 48, 3), np.uint8) + np.uint8(130 - 30 * k)
                Image.fromarray(image).save(folder / f"images/{i:02d}.png")
                label = random.integers(0, 19, (24, 48), np.uint8)
                label[random.random(label.shape) < 0.1] = 255
                label = Image.fromarray(label)
                label.putpalette(list(range(256)) * 3)
                label.save(folder / f"labels/{i:02d}.png")


@pytest.fixture(scope="module")
def cwd(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("algorithm")
    draw_domains(cwd, 10, 4, ["synthetic", "pretrained", "simgan", "ours", "real"])
    return cwd


# ------------------------------------------------------------------------------ 1. training

# What a wrong column of a log says.
PRETRAIN = {"loss": "R: Eq 5 or, for simgan, 4, of synthetic images; D: Eq 1, in which synthetic "
                    "images are class 1 and real ones class 0",
            "mean_change_or_accuracy": "R: mean |R(x) - x|; D: the share of right patches"}
GAN = {"loss_adv": "Eq 3: D's verdict on R(x), x the second of two synthetic batches",
       "loss_rec": "Eq 4 of that batch: squares or l1, a sum over --rec-batch images",
       "d_loss_real": "Eq 1: D's verdict on a batch of real images",
       "d_loss_refined": "Eq 1: D's verdict on refined images, half of them from the history",
       "d_acc_real": "patches of real images that D takes for real",
       "d_acc_refined": "patches of refined images that D takes for refined",
       "mean_change": "mean |R(x) - x|, x the second of two synthetic batches",
       "history": "how many refined images the history holds"}
UPDATE = ("step 1 is right, so it is what a step leaves behind: the update (its sign, optimiser, "
          "learning rate), the history's new images, or what --resume brings back")
# Settings of both scripts, of pretrain.py, of train_gan.py; what is not there is the default.
RUNS = {
    "ours": (dict(batch_size=2), dict(steps=3, d_steps=3), dict(steps=6, sample_every=1)),
    "simgan": (
        dict(batch_size=2),
        dict(steps=3, d_steps=3, lr=.01, d_lr=1e-4, optimizer="sgd", d_optimizer="adam"),
        dict(steps=5, lr=1e-3, d_lr=1e-4, optimizer="momentum", d_optimizer="adam", history=0,
             rec="l1", average=3, sample_every=2)),
    "finer D": (
        dict(batch_size=3, seed=1),
        dict(steps=3, d_steps=3, d_lr=.01, optimizer="momentum", d_optimizer="sgd",
             layer="Conv2d_2b_3x3", final_relu=True, d_stride=1),
        dict(steps=7, optimizer="adam", d_optimizer="sgd", history=2, rec_batch=64, alpha=3,
             beta=1e-3, average=4, sample_every=3)),
    "resumed": (
        dict(batch_size=2), dict(steps=10, d_steps=2),
        dict(steps=10, optimizer="momentum", d_optimizer="adam", history=1, rec="l1", beta=1e-4,
             sample_every=4))}


def begin(script, where, settings, cwd, stop_at):
    """Start a script; where there is a file `stop_at`, stop it when that is written and resume."""
    args = [script, "--device", "cpu", *where]
    for name, value in settings.items():
        args += ["--" + name.replace("_", "-")] + ([] if value is True else [value])
    if stop_at:
        process = start(*args, "--save-every", 2, cwd=cwd)
        process.wait_for(stop_at.exists)
        process.terminate()
        assert process.wait() == 130, f"{script} ended before it could be stopped"
        args.append("--resume")
    return start(*args, cwd=cwd)


def compare(log, meaning, wanted, weights):
    """A log against its rows as they should be, weights {what: (found, wanted)}: fails with all
    that differs, what differs first in front."""
    rows, wrong = list(csv.DictReader(log.open())), {}
    assert [row["step"] for row in rows] == [str(i + 1) for i in range(len(wanted))], log
    for step, (row, values) in enumerate(zip(rows, wanted), 1):
        for column, value in zip(meaning, values):
            if row[column] != f"{value:.6g}":
                wrong.setdefault(column, f"step {step}: {column} is {row[column]}, not {value:.6g} "
                                         f"({meaning[column]})")
    texts = list(wrong.values())
    if texts and not texts[0].startswith("step 1:"):
        texts.append(UPDATE)
    for what, (found, right) in weights.items():
        names = [k for k in right if not torch.equal(found[k], right[k])]
        if names:
            texts.append(f"{what}: {len(names)} tensors of {len(right)} differ, {names[0]} first")
    assert not texts, "\n".join([log.name, *texts])


@pytest.mark.parametrize("name", RUNS)
def test_training_is_the_papers(name, cwd):
    """Bit for bit: both logs, R, D, the averaged R, the best step and its R."""
    both, pretrain, gan = RUNS[name]
    where = {"ours": [], "simgan": ["--method", "simgan"]}.get(name, ["--run", f"runs/{name}"])
    run, stop = cwd / "runs" / name, name == "resumed"
    x, y, x_test, y_test = (load_images(cwd / "data" / d / split) for split in ("train", "test")
                            for d in ("synthetic", "real"))

    process = begin("pretrain.py", [*where, "--inception", "random"], {**both, **pretrain}, cwd,
                    run / "pretrain.pt" if stop else None)
    R, D, log = plain.pretrain(x, y, method="simgan" if name == "simgan" else "ours",
                               **both, **pretrain)
    assert process.wait() == 0, process.read("stderr")
    file = torch.load(run / "pretrain.pt", weights_only=True)
    compare(run / "pretrain.csv", PRETRAIN, log, {
        "R after pre-training": (file["refiner"], R.state_dict()),
        "D after pre-training": (file["discriminator"], D.state_dict())})

    process = begin("train_gan.py", where, {**both, **gan}, cwd, run / "last.pt" if stop else None)
    average = max(1, gan["steps"] // 5)                          # where it is not given
    log, average, step, best = plain.train(R, D, x, y, **{"average": average, **both, **gan})
    assert process.wait() == 0, process.read("stderr")
    last, averaged, chosen = (torch.load(run / f"{stem}.pt", weights_only=True)
                              for stem in ("last", "average", "gan"))
    compare(run / "log.csv", GAN, log, {
        "R": (last["refiner"], R.state_dict()), "D": (last["discriminator"], D.state_dict()),
        "R averaged": (averaged["refiner"], average)})
    assert chosen["step"] == step, f"the best step by the rule of section 5.1 is {step}"
    compare(run / "log.csv", {}, log, {f"R at the best step, {step}": (chosen["refiner"], best)})
    rows = list(csv.DictReader((run / "log.csv").open()))
    wanted = ssim(plain.as_images(R(plain.as_input(x_test))), y_test).mean().item()
    assert float(rows[-1]["ssim"]) == pytest.approx(wanted, rel=1e-5), "SSIM of test pairs R(x), y"
    for i, row in enumerate(rows, 1):
        assert (row["ssim"] != "nan") == (i % gan["sample_every"] == 0 or i == len(rows)), i


# ------------------------------------------------------------- 3. segmentation: U-Net's training


def test_unets_training_is_the_papers(cwd):
    """Bit for bit: its weights and the confusion matrix of every kind of test image."""
    call("segment.py", "--network", "unet", "--epochs", 2, "--batch-size", 4, "--seeds", 3,
         "--train", "synthetic", "real", "--device", "cpu", "--out", "unet", cwd=cwd)
    found = json.loads((cwd / "unet/segment_unet.json").read_text())["confusion"]["3"]
    for domain in ("synthetic", "real"):
        x, y = (load(cwd / "data" / domain / "train") for load in (load_images, load_labels))
        chosen = np.random.default_rng(0).permutation(len(x))[:10]       # as many of each domain
        net = plain.train_unet(x[chosen], y[chosen], seed=3, epochs=2, batch_size=4)
        file = torch.load(cwd / f"unet/weights/unet_{domain}_seed3.pt", weights_only=True)
        wrong = [k for k, w in net.state_dict().items() if not torch.equal(w, file["weights"][k])]
        assert not wrong, (f"U-Net on {domain}: {wrong[0]} and {len(wrong) - 1} more differ: every "
                           "image goes with its own label, mirrored both or none; Adam, cosine")
        for other in found[domain]:
            x, y = (load(cwd / "data" / other / "test") for load in (load_images, load_labels))
            assert found[domain][other] == plain.confusion(net, x, y), (
                f"confusion matrix (rows truth) of U-Net on {domain}, tested on {other}")


# ------------------------------------------------------------------------------- 4. Table 2


@pytest.fixture(scope="module")
def table2(cwd):
    """The folder where evaluate.py has left Table 2 of three images of four."""
    call("evaluate.py", "--inception", "random", "--n", 3, "--pair-seed", 1, "--device", "cpu",
         cwd=cwd)
    return cwd / "results"


def test_table2_is_the_papers(table2, cwd):
    """Each cell by its formula from the images of its row and the same real partners. Up to
    rounding: plain.py takes the root of S1 S2 another way, and SSIM has float32."""
    found = json.loads((table2 / "table2.json").read_text())
    *domains, real, other = (load_images(cwd / "data" / folder) for folder in (
        "synthetic/test", "pretrained/test", "simgan/test", "ours/test", "real/test", "real/train"))
    inception = load_inception("random", "pool3", torch.cat([*domains, other]))
    random = np.random.default_rng(1)                     # partners, then other reals, then scenes
    real, other = real[random.permutation(4)[:3]], other[random.permutation(11)[:3]]
    scenes = random.permutation(4)[:3]

    def features(x):
        return inception(F.interpolate(plain.as_input(x), (299, 299), mode="bilinear")).double()
    of_real, values = features(real), {}
    for name, x in (("synthetic", domains[0][scenes]), ("ours", domains[3][scenes]),
                    ("real, other frames (the floor)", other)):
        of_x = features(x)
        values[name] = {"fid": plain.fid(of_x, of_real).item(),
                        "ssim": ssim(x, real).mean().item(), "kid": kid(of_x, of_real),
                        "ssim_range1": ssim(x, real, 1).mean().item()}
        for metric, value in values[name].items():
            assert found["rows"][name]["scores"][metric]["value"] == pytest.approx(
                value, rel=1e-5), f"Table 2: {metric} of {name} and the real images"
    for metric, cell in found["differences"]["ours - synthetic"].items():
        assert cell["value"] == pytest.approx(values["ours"][metric] - values["synthetic"][metric],
                                              rel=1e-3), f"ours less synthetic: {metric}"


# ---------------------------------------------------------------------- 6. the paper's values

DEFAULTS = {
    "prepare": {"--size": "[80, 160]", "--crop": "['200', '600', '400', '600']", "--test": "200"},
    "pretrain": {"--steps": "1200", "--d-steps": "400", "--lr": "0.0001", "--d-lr": "0.001",
                 "--d-stride": "3"},
    "train_gan": {"--alpha": "50", "--beta": "4e-06", "--steps": "5000", "--lr": "0.0001",
                  "--d-lr": "0.001", "--optimizer": "sgd"}, "refine": {}, "evaluate": {},
    "segment": {}}
TABLE2 = {"synthetic": "60.82 0.0023", "pretrained": "56.89 0.0025", "simgan": "57.04 0.0025",
          "ours": "55.71 0.0026"}
# Trained on these; tested on synthetic, refined, real: mIoU (Tables 3, 4), accuracy (5, 6).
TABLES = {
    "unet": {"synthetic": ("0.34 0.13 0.1", "78.55 31.97 32.8"),
             "simgan": ("0.26 0.31 0.1", "74.34 77.3 33.33"),
             "ours": ("0.23 0.43 0.14", "66.37 79.58 57.11"),
             "real": ("0.14 0.11 0.49", "48.83 42.48 85.42")},
    "deeplabv3plus": {"synthetic": ("0.28 0.11 0.08", "72.65 29.14 28.05"),
                      "simgan": ("0.18 0.23 0.09", "67.3 70.9 31.75"),
                      "ours": ("0.15 0.31 0.12", "63.5 72.79 56.43"),
                      "real": ("0.12 0.1 0.42", "46.39 39.38 82.9")}}


@pytest.mark.parametrize("script", DEFAULTS)
def test_the_papers_values_are_the_defaults(script, cwd):
    """In --help, where they are marked as the paper's. Every script shows its defaults."""
    text = " ".join(call(f"{script}.py", "--help", cwd=cwd)[0].split())
    assert "(default: " in text and " --seed SEED " in text
    for flag, value in DEFAULTS[script].items():
        block = text.rsplit(f" {flag} ", 1)[1].split(" --")[0]
        assert "(paper)" in block and f"(default: {value})" in block, block


def rows_of(file):
    lines = file.read_text(encoding="utf-8").replace("**", "").splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]


def test_table2_shows_the_papers_numbers(table2):
    rows = {row[0]: " ".join(row[-2:]) for row in rows_of(table2 / "table2.md")[:8]}
    assert {name: rows[name] for name in TABLE2} == TABLE2


def test_tables_3_to_6_show_the_papers_numbers(tmp_path):
    """In the cell of their training and test images; "refined" is SimGAN's in SimGAN's row."""
    draw_domains(tmp_path, 2, 1, ["synthetic", "simgan", "ours", "real"])
    call("segment.py", "--epochs", 1, "--device", "cpu", cwd=tmp_path)
    for network, wanted in TABLES.items():
        numbers = {name: [] for name in wanted}
        for row in rows_of(tmp_path / f"results/segment_{network}.md"):
            if row[0].startswith("trained on"):
                head = row
            elif row[0] in wanted:
                refined = "simgan" if row[0] == "simgan" else "ours"
                cells = [row[head.index(d)] for d in ("synthetic", refined, "real")]
                numbers[row[0]].append(" ".join(re.findall(r"\((.*?)\)", " ".join(cells))))
        assert {name: tuple(found) for name, found in numbers.items()} == wanted, network
