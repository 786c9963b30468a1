"""bench.py: every section runs, its rows are there, and what it compares is the same thing."""
import json
import math

import pytest
import torch
from conftest import call

from models import Discriminator, Refiner, fid, ssim
from study import bench

TINY = ["--size", 24, 48, "--batch-size", 2, "--repeats", 1]


@pytest.mark.parametrize("section", ["gan", "networks"])
def test_sections(tmp_path, section):
    """Through the command line: a table on stdout, the same in the JSON, times above 0."""
    out, _ = call("study/bench.py", "--only", section, *TINY, "--json", "b.json", cwd=tmp_path)
    record = json.loads((tmp_path / "b.json").read_text())
    assert record["rows"] and record["versions"]["torch"] == torch.__version__
    table = (tmp_path / "b.md").read_text()
    for row in record["rows"]:
        assert row["name"] in out and row["name"] in table and all(t > 0 for t in row["times"])
        assert row["times"] or "not measured" in row["against"] or "no bfloat16" in row["against"]
        assert row["ratio"] is None or math.isfinite(row["ratio"]) and row["ratio"] > 0


def test_the_straightforward_loop_has_the_same_networks():
    """A baseline with smaller networks would flatter us, one with larger ones too."""
    def count(net):
        return sum(p.numel() for p in net.parameters())
    assert count(bench.plain_refiner()) == count(Refiner())
    x = torch.rand(2, 3, 24, 48)
    assert bench.plain_refiner()(x).shape == x.shape
    assert bench.straightforward_step((24, 48), 2, torch.device("cpu")).__closure__
    assert Discriminator()(x).shape[1] == 2


def test_the_slow_forms_have_the_same_values():
    """What is compared in speed must be equal in value."""
    random = torch.Generator().manual_seed(0)
    a, b = (torch.rand(30, 12, generator=random, dtype=torch.float64) for _ in range(2))
    assert fid(a, b) == pytest.approx(bench.sqrtm_fid(a, b), rel=1e-6)
    x, y = (torch.rand(2, 3, 24, 48, generator=random) * 255 for _ in range(2))
    torch.testing.assert_close(ssim(x, y), bench.direct_ssim(x, y), atol=1e-5, rtol=0)


def test_floating_point_operations_of_the_floor():
    """The floor's FLOP count is what PyTorch counts for the same convolution."""
    from torch.utils.flop_counter import FlopCounterMode
    function, flop = bench.convolution((24, 48), 2, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        function()
    assert counter.get_total_flops() == flop
