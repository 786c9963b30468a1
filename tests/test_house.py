"""The house of design.md: which file imports which, how long functions are, what lies where."""
import ast
import re
import subprocess

import pytest
from conftest import ROOT

PAPER = ["prepare", "pretrain", "train_gan", "refine", "evaluate", "segment", "models"]


def test_nothing_imports_upwards():
    """support/ and models.py import support/, prepare.py too; the other stages all of these."""
    for file in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py")]:
        found = re.findall(r"^ *(?:from|import) (\w+)", file.read_text(encoding="utf-8"), re.M)
        stage = file.parent == ROOT and file.stem not in ("prepare", "models")
        allowed = {"support", "prepare", "models"} if stage else {"support"}
        assert {*found} & {*PAPER, "support", "study", "tests"} <= allowed, file


def test_the_top_level_is_the_papers():
    """Seven files of the paper and what design.md lists beside them."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    assert top == {f"{name}.py" for name in PAPER} | {
        "README.md", "support", "study", "tests", "Makefile", "requirements.txt", "LICENSE", ".ci",
        ".gitignore"}
    for line in tracked.stdout.splitlines():
        assert line.endswith(".py") or not line.startswith(("support/", "tests/")), line


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_files_read_plainly(name):
    """No function over 40 lines, no comprehension inside another, no tuple of more than three taken
    apart, no line over 100."""
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 40, node.name
        if isinstance(node, COMPREHENSIONS):
            inner = [n for n in ast.walk(node) if n is not node and isinstance(n, COMPREHENSIONS)]
            assert not inner, f"line {node.lineno}"
        if isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Store):
            assert len(node.elts) <= 3, f"line {node.lineno}"
    assert all(len(line) <= 100 for line in text.splitlines())
