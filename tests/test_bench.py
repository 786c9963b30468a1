"""bench.py: every section runs, its rows are there, and what it compares is the same thing."""
import json
from types import SimpleNamespace

import torch
from conftest import call

from models import Discriminator, Refiner
from study import bench
from support.training import to_float

CPU = torch.device("cpu")


def test_sections(tmp_path):
    """Through the command line: a table on stdout, the same in the JSON and as Markdown."""
    out, _ = call("study/bench.py", "--only", "gan", "networks", "--size", 24, 48, "--batch-size",
                  2, "--repeats", 1, "--json", "b.json", cwd=tmp_path)
    record = json.loads((tmp_path / "b.json").read_text())
    assert len(record["rows"]) == 10 and record["versions"]["torch"] == torch.__version__
    table = (tmp_path / "b.md").read_text()
    for row in record["rows"]:
        assert row["name"] in out and row["name"] in table and row["times"]


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
    assert [list(row["times"]) for row in table.rows] == [[2, 2, 2]] * 2
    assert table.cells() == [["a", "2 images/s", "3.00", "b"], ["a", "2 s", "3.00", "b"]]


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
    """Size, precision, compiled or not, memory order of the two that are compared."""
    def step(size, n, device, precision="float32", compile=False, layout=None):
        return list(size), precision, compile, layout
    rows = {}
    monkeypatch.setattr(bench, "gan_step", step)
    monkeypatch.setattr(bench, "flops", lambda function: 6 if type(function) is tuple else 2)
    monkeypatch.setattr(bench, "in_turns", lambda functions, device, repeats: [[4, 4], [1, 1]])
    monkeypatch.setattr(bench.Table, "compare", lambda self, name, one, other, *_: rows.update(
        {name.removeprefix("GAN step, "): (one, other)}))
    for device in (CPU, torch.device("cuda")):
        monkeypatch.setattr(bench, "convolution", lambda *_: print)
        monkeypatch.setattr(bench, "straightforward_step", lambda *_: print)
        table = bench.Table(device, 2)
        bench.bench_gan(table, SimpleNamespace(size=[24, 48], batch_size=2))
    plain = [24, 48], "float32", False, None
    assert rows == {
        "GAN step": (plain, print), "bfloat16": (([24, 48], "bfloat16", False, None), plain),
        "channels last": ((*plain[:3], torch.channels_last), (*plain[:3], torch.contiguous_format)),
        "a quarter of the pixels": (([12, 24], *plain[1:]), plain),
        "tf32": (([24, 48], "tf32", False, None), plain),
        "bfloat16 and --compile": (([24, 48], "bfloat16", True, None), plain)}
    assert table.rows[0]["ratio"] == 0.75 and table.rows[0]["value"] == 1.5e-9


def test_prepare_takes_what_the_bench_draws(monkeypatch):
    monkeypatch.setattr(bench, "FRAMES", 2)
    table = bench.Table(CPU, 1)
    bench.bench_prepare(table, None)
    assert len(table.rows) == 1
