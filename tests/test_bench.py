"""bench.py: every section runs, its rows are there, and what it compares is the same thing."""
from types import SimpleNamespace

import torch

from models import Discriminator, Refiner
from study import bench
from support.training import to_float

CPU = torch.device("cpu")


def test_sections(tmp_path, monkeypatch, capsys):
    """A table on stdout, the same as Markdown. prepare.py takes what is drawn for it; FID is
    compared to its usual form."""
    workers, shapes, honest = [], [], bench.subprocess.run
    monkeypatch.setattr(bench, "FRAMES", 2)
    monkeypatch.setattr(bench.subprocess, "run", lambda command, **how: (
        workers.append(command[-1]), honest(command, **how)))
    monkeypatch.setattr(bench, "sqrtm_fid", lambda a, b: shapes.append(a.shape))
    monkeypatch.setattr("sys.argv", ["bench.py", *"--size 24 48 --batch-size 2 --repeats 1".split(),
                                     "--out", str(tmp_path / "b.md")])
    bench.main()
    out, (head, _, *table) = capsys.readouterr().out, (tmp_path / "b.md").read_text().splitlines()
    assert f"torch {torch.__version__}, 24 x 48, batch 2" in head and len(table) == 2 + 12
    for line in table[2:]:
        assert all(cell in out for cell in line.strip("| ").split(" | "))
    assert workers == ["2", "1"] * 2 and "--workers 2" in table[2] and shapes == [(200, 2048)] * 2


def test_a_ratio_above_1_is_faster(monkeypatch):
    """2 s beside 6 s is 3 times as fast, and 2 images a second where a call takes 4; what the
    first call of each takes does not count."""
    now, firsts = [0.0], []

    def takes(span):
        def function():
            now[0] += span if function in firsts else 100
            firsts.append(function)
        return function
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    table = bench.Table(CPU, 3)
    table.compare("a", takes(2), takes(6), "b", 4)
    table.compare("a", takes(2), takes(6), "b")
    assert table.rows == [["a", "2 images/s", "3.00", "b"], ["a", "2 s", "3.00", "b"]]


def test_a_timed_step_is_two_updates_of_r_and_one_of_d():
    """By its floating-point operations; the straightforward loop spares no gradient."""
    x = to_float(bench.images(4, (24, 48)))

    def learn(net):
        return bench.flops(lambda: net(x).sum().backward())
    R, D, plain = Refiner(), Discriminator(), bench.plain_refiner()
    r, d = bench.flops(lambda: R(x)), bench.flops(lambda: D(x))
    assert bench.flops(bench.gan_step((24, 48), 4, CPU)) == (
        2 * (learn(R) + 2 * d) + r // 2 + 2 * learn(D))
    assert bench.flops(bench.straightforward_step((24, 48), 4, CPU)) == (
        2 * (learn(plain) + 3 * d) + learn(plain) // 2 + 3 * d + learn(D))


def test_a_row_of_the_gan_step_is_what_it_says(monkeypatch):
    """Size and precision of the two that are compared."""
    def step(size, n, device, precision="float32"):
        return list(size), precision
    rows = {}
    monkeypatch.setattr(bench, "gan_step", step)
    monkeypatch.setattr(bench, "flops", lambda function: 6 if type(function) is tuple else 2)
    monkeypatch.setattr(bench, "in_turns", lambda functions, device, repeats: [[4, 4], [1, 1]])
    monkeypatch.setattr(bench.Table, "compare", lambda self, name, one, other, *_: rows.update(
        {name.removeprefix("GAN step, "): (one, other)}))
    monkeypatch.setattr(bench, "convolution", lambda *_: print)
    monkeypatch.setattr(bench, "straightforward_step", lambda *_: print)
    table = bench.Table(torch.device("cuda"), 2)
    bench.bench_gan(table, SimpleNamespace(size=[24, 48], batch_size=2))
    plain = [24, 48], "float32"
    assert rows == {
        "GAN step": (plain, print), "bfloat16": (([24, 48], "bfloat16"), plain),
        "a quarter of the pixels": (([12, 24], "float32"), plain),
        "tf32": (([24, 48], "tf32"), plain)}
    assert table.rows[0][1:3] == ["1.5e-09 GFLOP/s", "0.75"]
