"""A power can be taken away: delete its file, change the lines that docs/reading.md names, and the rest still trains.

docs/reading.md has a section "Taking a power away" with one heading for each power that names its file, and below it one
block of this form. `---` names the file that is changed; a `-` line is deleted, and `+` lines below it come in its place:

    ```diff
    --- scripts/train.py
    -import speed
    -    trainer_class = speed.FastPPOTrainer
    +    trainer_class = PPOTrainer
    ```

Each `-` line must stand in the file exactly once; its indentation is not compared, and the `+` lines are moved with it. If a
line stands in the file more than once, write the lines around it as `-` lines too: they then are searched for as one piece.
"""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
POWERS = ("speed", "checkpoint", "checks", "adapters", "decoding", "scripts/report")
SECTION = "Taking a power away"
MOST_LINES = 10             # that a person changes to take one power away
STEPS = 25
RISE = 0.1                  # of the mean score, which lies between 0 and 1
every_power = pytest.mark.parametrize("power", POWERS)


# ---------------------------------------------------------------------------------------------- reading the page


def diff_blocks(page):
    """-> {power: text of the diff block below the heading that names its file}, from the section SECTION of `page`."""
    blocks, level, power, inside = {}, None, None, None
    for line in page.splitlines():
        if inside is not None:
            if line.startswith("```"):
                assert power is not None, "a diff block stands above the first heading that names a power"
                assert power not in blocks, f"{power}.py has two diff blocks"
                blocks[power], inside = "\n".join(inside), None
            else:
                inside.append(line)
        elif heading := re.match(r"(#+) (.*)", line):
            if SECTION in heading[2]:
                level = len(heading[1])
            elif level is not None and len(heading[1]) <= level:
                break
            power = next((name for name in POWERS if f"{Path(name).name}.py" in heading[2]), None)
        elif level is not None and line.strip() == "```diff":
            inside = []
    return blocks


def hunks(block):
    """-> list of (file, deleted lines, new lines). A hunk ends where `-` follows `+`, and at any other line."""
    found, path, old, new = [], None, [], []

    def finish():
        assert old or not new, f"the line {new[0]!r} has no `-` line above it that says where it belongs"
        if old:
            assert path is not None, f"no `---` line names the file of {old[0]!r}"
            found.append((path, list(old), list(new)))
        old.clear()
        new.clear()

    for line in block.splitlines():
        if line.startswith(("---", "+++")):
            finish()
            path = line[3:].strip() if line.startswith("---") else path
        elif line.startswith("-"):
            if new:
                finish()
            old.append(line[1:])
        elif line.startswith("+"):
            new.append(line[1:])
        else:
            finish()
    finish()
    return found


def changed_lines(block):
    return sum(max(len(old), len(new)) for _, old, new in hunks(block))


# ---------------------------------------------------------------------------------------------- changing the copy


def places(lines, piece):
    """-> every index in `lines` at which the lines of `piece` begin, without regard to indentation."""
    stripped, wanted = [line.strip() for line in lines], [line.strip() for line in piece]
    return [start for start in range(len(lines)) if stripped[start:start + len(wanted)] == wanted]


def indentation(line):
    return len(line) - len(line.lstrip())


def apply_hunk(text, old, new):
    """-> text with the lines `old` deleted and `new` in place of the first of them."""
    lines = text.splitlines()
    whole = places(lines, old)
    if len(whole) == 1:
        deleted = list(range(whole[0], whole[0] + len(old)))
    else:
        deleted = []
        for line in old:
            found = places(lines, [line])
            assert len(found) == 1, f"{line.strip()!r} stands in the file {len(found)} times; it must stand there once"
            deleted.append(found[0])
    shift = indentation(lines[deleted[0]]) - indentation(old[0])
    moved = [" " * (indentation(line) + shift) + line.lstrip() for line in new]
    kept = []
    for number, line in enumerate(lines):
        if number == deleted[0]:
            kept += moved
        if number not in deleted:
            kept.append(line)
    return "\n".join(kept) + "\n"


def take_away(folder, power, block):
    """Delete a power from the copy of the project in `folder`, and change the lines that the page names."""
    (folder / f"{power}.py").unlink()
    for path in re.findall(r"^--- (.*)\n\+\+\+ /dev/null$", block, re.MULTILINE):
        (folder / path).unlink()
    for path, old, new in hunks(block):
        file = folder / path
        file.write_text(apply_hunk(file.read_text(encoding="utf-8"), old, new), encoding="utf-8")


def copy_project(folder):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    (folder / "scripts").mkdir()
    for path in (ROOT / "scripts").glob("*.*"):
        shutil.copy(path, folder / "scripts")
    shutil.copytree(ROOT / "assets", folder / "assets")


def importers(folder, power):
    """-> the files of the copy that still import the power or use its name, but for the tools that are no part of training."""
    found, power = [], Path(power).name
    for path in [*folder.glob("*.py"), *folder.glob("scripts/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module] if isinstance(node, ast.ImportFrom) else []
            used = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == power
            if power in imported or used:
                found.append(path.name)
    return sorted(set(found) - {"bench.py", "bench_worker.py", "make_assets.py", "polish_writer.py"})


def copy_without(power, folder):
    copy_project(folder)
    take_away(folder, power, diff_blocks((ROOT / "docs" / "reading.md").read_text(encoding="utf-8"))[power])
    return folder


def rise(scores):
    """How far the mean of the last three scores lies above the first one."""
    return sum(scores[-3:]) / 3 - scores[0]


# ---------------------------------------------------------------------------------------------- the tests


@every_power
def test_few_lines_have_to_be_changed_and_nothing_names_the_power_then(power, tmp_path):
    block = diff_blocks((ROOT / "docs" / "reading.md").read_text(encoding="utf-8"))[power]
    print(f"{power}.py: {changed_lines(block)} lines of {MOST_LINES}")
    assert 0 < changed_lines(block) <= MOST_LINES
    assert importers(copy_without(power, tmp_path), power) == []


@pytest.mark.long
@every_power
def test_without_a_power_the_rest_still_trains(power, tmp_path):
    folder = copy_without(power, tmp_path)
    command = [sys.executable, "scripts/train.py", "--cpu", "--steps", str(STEPS), "--eval_prompts", "20", "--save_every", "0",
               "--learning_rate", "4e-4", "--output_dir", "run"]        # the default needs more steps for this rise
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = [row["ppo/mean_raw_scores"] for row in rows]
    print(f"without {power}.py:", " ".join(f"{score:.3f}" for score in scores))
    assert len(scores) == STEPS
    assert rise(scores) > RISE, scores


# ---------------------------------------------------------------------------------------------- each check can fail


PAGE = """# Reading

```diff
--- other.py
-x
```

## Taking a power away

### `speed.py`

```diff
--- a.py
-import speed
-trainer = speed.Fast
+trainer = Plain
+other = 1
--- b.py
-    y = 2
```

### `checks.py`

```diff
--- a.py
-z
```

## Next

### `checkpoint.py`

```diff
-no
```
"""


def test_the_page_is_read_right():
    blocks = diff_blocks(PAGE)
    assert set(blocks) == {"speed", "checks"} and changed_lines(blocks["speed"]) == 3
    assert hunks(blocks["speed"]) == [("a.py", ["import speed", "trainer = speed.Fast"], ["trainer = Plain", "other = 1"]),
                                      ("b.py", ["    y = 2"], [])]
    assert [len(old) for _, old, _ in hunks("--- a\n-x\n+y\n-z\n\n-w")] == [1, 1, 1]
    for wrong, message in (("--- a.py\n+x", "has no `-` line"), ("-x", "no `---` line")):
        with pytest.raises(AssertionError, match=message):
            hunks(wrong)
    with pytest.raises(AssertionError, match="two diff blocks"):
        diff_blocks(PAGE.replace("`checks.py`", "`speed.py`"))


def test_a_hunk_is_applied_exactly_once():
    text = "import speed\nimport a\n\ndef f():\n    t = speed.Fast\n    return t\n"
    assert apply_hunk(text, ["import speed", "t = speed.Fast"], []) == "import a\n\ndef f():\n    return t\n"
    # indentation follows the file, also where the page writes a space after the sign
    assert apply_hunk(text, [" t = speed.Fast"], [" if x:", "     t = Plain"]) == text.replace(
        "    t = speed.Fast", "    if x:\n        t = Plain")
    for wrong, count in (("t = speed.Slow", 0), ("return t", 2)):
        with pytest.raises(AssertionError, match=f"{count} times"):
            apply_hunk(text + "    return t\n", [wrong], [])
    # a line that stands there twice is found by the line above it
    assert apply_hunk(text + "    x()\n    return t\n", ["x()", "return t"], []) == text


def test_a_name_that_is_left_over_is_found(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "a.py").write_text("import torch\n# speed.py is gone\n")
    (tmp_path / "scripts" / "bench.py").write_text("import speed\n")
    assert importers(tmp_path, "speed") == []
    (tmp_path / "b.py").write_text("from speed import tune_cpu\n")
    (tmp_path / "scripts" / "train.py").write_text("def f():\n    speed.tune_cpu()\n")
    assert importers(tmp_path, "speed") == ["b.py", "train.py"]


def test_a_run_that_learns_nothing_is_no_success():
    assert rise([0.5, 0.51, 0.49, 0.5, 0.52]) < RISE < rise([0.45, 0.5, 0.55, 0.6, 0.65])
