"""What `make demo` shows at its end: a short table, and everything in one picture.

Reads   demo/seed0/{data,runs,results}, as the six stages leave them
Writes  demo/seed0/summary.png

    python -m study.demo
"""
from pathlib import Path

from prepare import load_images
from support.cli import read_json, start
from support.figures import save_summary
from support.training import load_checkpoint

BASE = Path("demo/seed0")
TABLES = BASE / "results/8-epochs"                   # the Makefile's --base, --seeds, --epochs


def print_table(segment, on_real):
    """mIoU on real by training set, with a bar each."""
    tests = segment["test_images"]["real"]
    print(f"\nU-Net, trained on {segment['images']} images of each kind for {segment['epochs']} "
          f"epochs, tested on {tests} real ones:\n")
    for row, value in on_real.items():
        bar = "#" * round(40 * value / max(on_real.values()))
        print(f"  {row:12s}{value:.3f} mIoU  {bar}")


def main():
    # 1. What the stages have found.
    segment = read_json(TABLES / "segment_unet.json")
    domains, table = segment["domains"], {}                   # of which real is the last
    for row, of_row in segment["scores"]["0"].items():
        table[row] = [of_row[d]["mIoU"] for d in domains]
    on_real = {row: values[-1] for row, values in table.items()}
    print_table(segment, on_real)

    # 2. The same in one picture.
    images = {}
    for caption, domain in (("synthetic", "synthetic"), ("refined", "ours"), ("real", "real")):
        images[caption] = load_images(BASE / "data" / domain / "test")[:5]
    last = load_checkpoint(BASE / "runs/ours/last.pt", ["gan"], "run train_gan.py first")
    save_summary(BASE / "summary.png", images, last["log"], last["best"]["step"], table, domains)
    print(f"\nAll in one picture: {BASE}/summary.png. Tables: {BASE}/results/table2.md, "
          f"{TABLES}/segment_unet.md. Training: {BASE}/runs/ours/samples/")


if __name__ == "__main__":
    start(main)
