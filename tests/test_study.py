"""study.run, study.report and study.colour; the tables of study/README.md are the records'."""
import json
import re
import shlex
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, call, parsed
from PIL import Image

import study.run as run
from prepare import load_images
from study import colour, demo, report
from support import figures
from support.cli import UserError, write_json, write_text
from support.training import to_float

README = ROOT / "study/README.md"
RECORDS = sorted((ROOT / "study/results").glob("*-*.json"))


@pytest.fixture
def record():
    """Two seeds of the control; the record itself may get more."""
    found = json.loads((ROOT / "study/results/control-80x160.json").read_text(encoding="utf-8"))
    return {**found, "name": "test", "seeds": {seed: found["seeds"][seed] for seed in "01"}}


def test_what_is_missing_has_no_number(record):
    """No gap without both ends, no row of what was not done; the records have one seed, below."""
    by_seed = report.tested_by_seed(record, "unet", 30)
    for row in ("synthetic", "real"):
        rest = {other: by_seed["0"][other] for other in by_seed["0"] if other != row}
        assert report.gap_closed({"0": rest}, "ours", "mIoU") == []
    by_seed["0"]["real"]["real"]["mIoU"] = by_seed["0"]["synthetic"]["real"]["mIoU"]    # no gap
    assert len(report.gap_closed(by_seed, "ours", "mIoU")) == 1
    for seed in record["seeds"].values():                      # before any segmentation
        seed["segment"] = []
    assert "| ours | 0, 1 | 239.0 ± 4.7 |" in report.text_of(record)
    for seed in record["seeds"].values():
        del seed["table2"]["rows"]["ours"]
    assert report.claims_table(record, {}).count("\n") == 1    # nothing to claim


def test_the_diagonal_is_counted_by_rows_and_columns(record):
    """Of those with more than one cell: here the column of real and every row but its own."""
    for seed in record["seeds"].values():
        tested = seed["segment"][0]["tested"]                  # after 30 epochs
        for row in tested:
            tested[row] = {d: tested[row][d] for d in {row, "real"}}
        tested["ours"]["ours"] = tested["synthetic"]["real"]   # better on real than at home
    by_seed = report.tested_by_seed(record, "unet", 30)
    cells = 2 * len(report.rows_in(record, by_seed))           # in two tables
    assert report.diagonal(record, {"unet": by_seed}) == (cells - 2, cells)


def test_seeds_whose_fid_is_of_other_images_are_not_averaged(record):
    record["seeds"]["1"]["table2"]["n"] = 7
    with pytest.raises(UserError, match="test: the FID of its seeds is of other"):
        report.text_of(record)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study whose commands are noted, not run; what they make is there as empty files."""
    for domain in run.GIVEN:
        (tmp_path / "runs/data" / domain / "train").mkdir(parents=True)
    args = parsed(monkeypatch, "study.run", shlex.split(
        f"test --prepare x --base {tmp_path}/runs --results {tmp_path} --precision tf32 "
        "--pretrain '--batch-size 3' --gan '--batch-size 3 --steps 9'"))
    found = SimpleNamespace(args=args, base=tmp_path / "runs", asked=[], fails=None)

    def note(command):
        found.asked.append(command)
        if command[0] == found.fails:
            raise UserError("stopped")
        if "--run" in command:
            folder = Path(command[command.index("--run") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / run.CHECKPOINTS[command[0]]).touch()
    monkeypatch.setattr(run, "run", note)
    monkeypatch.setattr(run, "lock", lambda folder: folder.mkdir(parents=True, exist_ok=True))
    return found


def run_seed(study, seed, history="data"):
    study.asked = []
    run.run_seed(seed, [history], study.args)
    return study.asked


def test_every_command_is_one_that_the_stages_take(study, monkeypatch):
    """A row differs from ours as ROWS has it."""
    seed, found, trainings = 1, {"pretrain": {}, "train_gan": {}, "refine": {}, "segment": []}, 0
    for command in run_seed(study, seed):
        script = command[1:] if command[0] == "-m" else command
        stage = script[0].removesuffix(".py")
        flags = parsed(monkeypatch, stage, script[1:])
        if stage in ("pretrain", "train_gan"):
            assert flags.seed == seed and flags.precision == "tf32" and flags.batch_size == 3
            found[stage][flags.run.name] = flags
            trainings += 1
        elif stage == "refine":
            found[stage][flags.out.name] = flags
        elif stage == "study.colour":
            own = parsed(monkeypatch, stage, ["--data", str(flags.data)])
            assert own.out == flags.out                        # where it goes by default
        elif stage == "segment":
            assert flags.seeds == [seed] and flags.precision == "tf32"
            found[stage].append(flags)
    trained = {"simgan": {"method": "simgan"}, "ours": {}, "as-printed": {"final_relu": True},
               "squares": {"rec": "l2"}, "squares-finer": {"d_stride": 1, "rec": "l2"}}
    changed = {row: {} for row in trained}
    for stage in ("pretrain", "train_gan"):
        for row, flags in found[stage].items():
            ours = {**vars(found[stage]["ours"]), "run": flags.run}
            changed[row].update(vars(flags).items() - ours.items())
    assert changed == trained and trainings == 10 and found["train_gan"]["ours"].steps == 9
    assert set(found["refine"]) == trained.keys() | {"pretrained", "rule", "squares-rule"}
    checkpoints = {row: flags.checkpoint.name for row, flags in found["refine"].items()}
    assert checkpoints["as-printed"] == "gan.pt" and checkpoints["ours"] == "average.pt"
    for row in ("pretrained", "rule"):
        assert found["refine"][row].checkpoint.parent.name == "ours"
    asked = [(flags.network, flags.epochs, flags.random_crops) for flags in found["segment"]]
    assert asked == [("unet", 30, False), ("unet", 8, False), ("unet", 30, True),
                     ("deeplabv3plus", 30, False)]
    assert len({(flags.out, flags.network) for flags in found["segment"]}) == len(asked)
    rows = [row for row in run.ROWS if row != "pretrained"]
    assert [flags.train for flags in found["segment"]] == [
        rows, rows, ["synthetic", "ours"], ["synthetic", "simgan", "ours", "real"]]
    study.args.rows = ["rule", "ours"]                          # no other row is trained on
    assert run.segmentations(study.args) == [
        ("unet", 30, ["rule", "ours"], []), ("unet", 8, ["rule", "ours"], []),
        ("unet", 30, ["ours"], ["--random-crops"]), ("deeplabv3plus", 30, ["ours"], [])]
    claimed = {row for _, *two in report.REFINED + report.CLAIMS for row in two}
    assert study.args.seeds == [0, 1, 2] and claimed <= set(run.ROWS)
    assert (study.base / f"seed{seed}/data/real/train").is_dir()


def test_what_is_finished_is_not_run_again(study, monkeypatch):
    """A stopped training goes on; other flags ask again for what depends on them, nothing else."""
    study.fails = "train_gan.py"
    with pytest.raises(UserError):
        run_seed(study, 0)
    (study.base / "seed0/runs/simgan/last.pt").touch()
    study.fails = None
    first = run_seed(study, 0)[0]
    assert first[0] == "train_gan.py" and first[-1] == "--resume"
    assert run_seed(study, 0) == []
    shutil.rmtree(study.base / "seed0/data/rule")
    assert [command[0] for command in run_seed(study, 0)] == ["refine.py"]
    study.args.gan += ["--alpha", "10"]
    assert {command[0] for command in run_seed(study, 0)} == {
        "train_gan.py", "refine.py", "evaluate.py", "segment.py"}
    study.args.epochs, study.args.deeplab = [30, 5], ["ours"]
    assert [command[0] for command in run_seed(study, 0)] == ["segment.py"] * 2
    monkeypatch.setitem(run.ROWS, "as-printed", {**run.ROWS["as-printed"], "gan": "--rec l2"})
    assert [command[0] for command in run_seed(study, 0)] == [          # one row, not the last
        "train_gan.py", "refine.py", "evaluate.py", *["segment.py"] * 4]
    assert run_seed(study, 0, "prepared anew")[0][:2] == ["-m", "study.colour"]


def test_a_command_that_fails_is_not_taken_as_done(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    run.run(["prepare.py", "--help"])
    assert "/prepare.py --help\n" in capfd.readouterr().out
    write_text(Path("a/.failed"), "an older history")          # what is half made is not of it
    with pytest.raises(UserError, match="the same command goes on"):
        run.once("failed", ["prepare.py", "--test", "0", "--out", "a"], "")
    assert [*Path("a").iterdir()] == []
    Path("a").rmdir()
    for _ in range(2):                                          # of a path that is no UTF-8
        run.once("done", ["-m", "support.cli", "--out", "b"], "\udce9")
        monkeypatch.setattr(run, "run", pytest.fail)
    assert [str(path) for path in Path(".").rglob("*")] == ["b", "b/.done"]


def test_sigterm_reaches_the_training(monkeypatch):
    """It saves and ends; the study with it. subprocess.run would kill it at a Ctrl-C: it wants more
    than this child has."""
    ended, child = [], SimpleNamespace(terminate=lambda: ended.append(True))
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: child)
    before = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]
    for signum, status in ((signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGINT, 130)):
        child.wait = lambda: signal.raise_signal(signum) or status      # 0: it had ended already
        with pytest.raises(UserError, match="the same command goes on"):
            run.run(["train_gan.py"])
    assert ended == [True]                                     # a Ctrl-C reaches it without us
    assert before == [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]


def test_a_study_from_raw_images_to_its_record(raw, tmp_path, monkeypatch, capsys):
    """All of it through the command lines, small, in folders whose names have spaces: two rows
    besides synthetic and real."""
    def as_user(command):
        asked.append(command[0])
        if command[0] == "segment.py":                         # Table 2 is on record before it
            record = json.loads((tmp_path / "my study.json").read_text())
            assert record["seeds"]["0"]["table2"] and not record["seeds"]["0"]["segment"]
        if command[0] == "-m":
            command = [command[1].replace(".", "/") + ".py", *command[2:]]
        there, missing = {"evaluate.py": ("train", "test")}.get(command[0], ("test", "train"))
        half = tmp_path / "runs/study/my study/seed0/data/half"
        if command[0] in ("evaluate.py", "segment.py"):
            (half / there).mkdir(parents=True)
        out, _ = call(*command, cwd=tmp_path)
        if half.exists():
            shutil.rmtree(half)
            for name in ("simgan", "half"):
                assert f"missing: runs/study/my study/seed0/data/{name}/{missing} (left" in out

    (tmp_path / "my raw data").symlink_to(raw)
    asked, flags = [], shlex.split(
        "'my study' --prepare \"--gta5 'my raw data/gtav' --cityscapes 'my raw data/cityscapes' "
        "--crop none --size 24 48 --test 3 --workers 1\" --inception random --seeds 0 "
        "--rows synthetic real colour ours "
        "--pretrain '--steps 2 --d-steps 2' --gan '--steps 4 --batch-size 2 --sample-every 2' "
        "--epochs 1 --deeplab --random-crops --results .")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "run", as_user)
    monkeypatch.setattr("sys.argv", ["run.py", *flags])
    run.main()
    assert asked == ["prepare.py", "-m", "pretrain.py", "train_gan.py", "refine.py",
                     "evaluate.py", "segment.py"]
    record = json.loads((tmp_path / "my study.json").read_text())
    numbers = record["seeds"]["0"]
    assert numbers["table2"]["n"] == 3                         # of the smallest folder
    assert [*numbers["table2"]["rows"]][:3] == ["synthetic", "ours", "colour"]
    (entry,) = numbers["segment"]
    assert [*entry["tested"]] == ["synthetic", "colour", "ours", "real"]
    out, _ = call("study/report.py", "my study", "--results", ".", cwd=tmp_path)
    text = (tmp_path / "my study.md").read_text(encoding="utf-8")
    assert text == report.text_of(record) and text in out and "| colour | 0 |" in text
    assert (tmp_path / "my study-figure1.png").is_file()
    run.main()
    assert len(asked) == 7                                     # nothing was left to do

    check_the_demos_end(tmp_path / "runs/study/my study/seed0", monkeypatch, capsys)
    args = run.arguments()
    other = {**numbers, "settings": {**numbers["settings"], "precision": "bfloat16"}}
    record["rows"]["rule"] = {}
    record["seeds"] = {"10": other, "0": {}, "7": {}}          # seed 10 is of another machine
    (tmp_path / "my study.json").write_text(json.dumps(record))
    for copy in ("seed7", "seed0-old"):                         # the second is no seed
        shutil.copytree(args.base / "seed0/results", args.base / copy / "results")
    write_json(args.base / "seed7/settings.json", other["settings"])
    shutil.copytree(args.base / "seed0/results/1-epochs", args.base / "seed0/results/1-epochs-old")
    run.write_record(args)
    record = json.loads((tmp_path / "my study.json").read_text())
    assert record["seeds"] == {"0": numbers, "7": other, "10": other}
    assert list(record["seeds"]) == ["0", "7", "10"]           # by number
    assert list(record["rows"]) == ["synthetic", "real", "colour", "ours", "rule"]
    for last, wanted in (("--seeds 0 10 --epochs 1", "has seed 10 of another"),
                         ("--seeds 0 --epochs 2", "is of --epochs 1")):
        monkeypatch.setattr("sys.argv", ["run.py", *flags, *last.split()])
        with pytest.raises(UserError, match=f"my study.json: {wanted}"):
            run.main()                                         # before any work
    assert len(asked) == 7


def check_the_demos_end(base, monkeypatch, capsys):
    """study.demo, of this run: every number at its place."""
    drawn, save = [], figures.save_figure
    segment = json.loads((base / "results/1-epochs/segment_unet.json").read_text())
    domains, table = segment["domains"], {}
    for row, of_row in segment["scores"]["0"].items():
        table[row] = [of_row[domain]["mIoU"] for domain in domains]
    monkeypatch.setattr(figures, "save_figure",
                        lambda path, figure: (drawn.append(figure), save(path, figure)))
    monkeypatch.setattr(demo, "BASE", base)
    monkeypatch.setattr(demo, "TABLES", base / "results/1-epochs")
    demo.main()
    out = capsys.readouterr().out
    for row, values in table.items():
        assert f"\n  {row:12s}{values[-1]:.3f} mIoU  " in out
    *strips, ssim, _, _, matrix = drawn[0].axes
    assert [axis.get_ylabel() for axis in strips] == ["synthetic", "refined", "real"]
    assert list(dict(ssim.lines[0].get_xydata())) == [2, 4] and (base / "summary.png").is_file()
    assert {text.get_position(): text.get_text() for text in matrix.texts} == {
        (j, i): f"{value:.3f}" for i, row in enumerate(table) for j, value in enumerate(table[row])}
    assert matrix.get_xlabel() == "tested on" and matrix.get_ylabel() == "trained on"
    for labels, wanted in ((matrix.get_xticklabels(), domains), (matrix.get_yticklabels(), table)):
        assert [text.get_text() for text in labels] == [*wanted]


def test_colour_gives_the_mean_and_the_deviation_of_real(fresh, tmp_path):
    """Of those to train on, not to test; the labels stay; only a folder of its own is replaced."""
    for domain in ("real", "synthetic"):
        for file in (fresh / f"data/{domain}/test/images").iterdir():
            Image.new("RGB", (48, 24), "navy").save(file)
    (fresh / "data/synthetic/test/labels").rename(fresh / "labels")     # it needs none
    flags = ["--data", fresh / "data", "--out"]
    call("study/colour.py", *flags, tmp_path / "colour", cwd=tmp_path)
    call("study/colour.py", *flags, tmp_path / "colour", cwd=tmp_path)
    source = fresh / "data/synthetic/train"
    real = to_float(load_images(fresh / "data/real/train"))
    found = to_float(load_images(tmp_path / "colour/train"))
    for statistic in (torch.mean, torch.std):                           # rounded and cut off
        torch.testing.assert_close(statistic(found, (0, 2, 3)), statistic(real, (0, 2, 3)),
                                   atol=0.03, rtol=0)
    for label in (source / "labels").iterdir():
        assert (tmp_path / "colour/train/labels" / label.name).read_bytes() == label.read_bytes()
    _, err = call("study/colour.py", *flags, fresh / "data/synthetic", cwd=tmp_path, status=2)
    assert "not made by" in err
    assert colour.statistics(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))[1].min() > 0


def test_the_text_of_a_record_is_made_from_it():
    for path in RECORDS:
        text = path.with_suffix(".md").read_text(encoding="utf-8")
        assert report.text_of(json.loads(path.read_text(encoding="utf-8"))) == text, path
    assert RECORDS


def test_the_readmes_tables_are_the_records():
    """Every row with a decimal number is one that a command wrote; the earlier study is history."""
    written = [line for path in (ROOT / "study/results").glob("*.md")
               for line in path.read_text(encoding="utf-8").splitlines()]
    text, _ = README.read_text(encoding="utf-8").split("## An earlier study")
    rows = re.findall(r"^\|.*\d\.\d.*$", text, re.M)
    assert len(rows) > 20 and not [row for row in rows if row not in written]
