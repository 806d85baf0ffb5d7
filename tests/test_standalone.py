"""Each module can be copied out: what it imports, what its example does, what importing it changes.

The rules are read off the source with `ast`, and then tried: a copy in an otherwise empty folder has to run.
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
LEAVES = ("value_head", "reference", "rewards", "optim", "distributed")
CORE = (*LEAVES, "ppo_core")
POWERS = ("checkpoint", "speed", "adapters")        # they stand on the core, and not on each other
ABOVE = ("trl_names", "decoding")           # these stand on the core and on the powers
ALONE = (*LEAVES, "checks")                 # these import no sibling at all; checks is a power that the core calls
MODULES = (*LEAVES, "checks", "ppo_core", *POWERS, *ABOVE)
SIBLINGS = {path.stem for folder in (ROOT, ROOT / "scripts") for path in folder.glob("*.py")} | set(MODULES)
STANDARD = set(sys.stdlib_module_names)
# numpy and safetensors are dependencies of transformers and accelerate: whoever has these has numpy and safetensors.
ALLOWED = {"torch", "transformers", "accelerate", "numpy", "safetensors"} | STANDARD
MARK = "the trainer: from here on this file needs its neighbours"       # in a comment line between the halves of ppo_core
HEADINGS = ("Why", "Source", "Differs", "Shapes", "Copy me")
every_module = pytest.mark.parametrize("module", MODULES)


def source_of(module):
    return (ROOT / f"{module}.py").read_text(encoding="utf-8")


def tree_of(module):
    return ast.parse(source_of(module))


def imported_by(node):
    """-> the top-level names of the packages that an import statement brings in, a relative one as "."."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {"."} if node.level else {node.module.split(".")[0]}
    return set()


def imports_of(tree):
    """-> list of (package, import statement, whether it stands at the left margin)."""
    margin = {id(node) for node in tree.body}
    return [(name, node, id(node) in margin) for node in ast.walk(tree) for name in sorted(imported_by(node))]


def bound_names(node):
    """The names that an import statement makes known in its file: `import a.b` binds a, `from a import b as c` binds c."""
    return [alias.asname or (alias.name.split(".")[0] if isinstance(node, ast.Import) else alias.name) for alias in node.names]


def halves(source):
    """ppo_core.py -> number of the marked line, counted from 1."""
    marked = [number for number, line in enumerate(source.splitlines(), 1) if MARK in line and line.startswith("#")]
    assert len(marked) == 1, f"{len(marked)} lines say that {MARK!r}"
    return marked[0]


def example_of(source):
    """The block `if __name__ == "__main__":` at the end of a file."""
    return source[source.index('\nif __name__ == "__main__":'):]


# ---------------------------------------------------------------------------------------------- import rules


def broken_rules(module, source):
    """-> one sentence for each import in `source`, the text of `module`, that design forbids."""
    complaints, bound = [], set()
    mark = halves(source) if module == "ppo_core" else 0
    siblings = {"ppo_core": {*LEAVES, "checks"}, **dict.fromkeys(POWERS, set(CORE)),
                **dict.fromkeys(ABOVE, {*CORE, *POWERS})}.get(module, set())
    for name, node, at_margin in imports_of(ast.parse(source)):
        where = f"line {node.lineno} imports {name}"
        upper = node.lineno < mark
        if name in SIBLINGS or name == ".":
            if name not in siblings:
                complaints.append(f"{where}, which {module} may not")
            elif not at_margin:
                complaints.append(f"{where} inside a function or a block")
            elif upper:
                complaints.append(f"{where} in the upper half")
            # One statement binds several names, and is met once for each package: a name counts once per statement.
            twice = bound & {(alias, False) for alias in bound_names(node)}
            complaints += [f"line {node.lineno} imports {alias} a second time" for alias, _ in sorted(twice)]
            bound |= {(alias, False) for alias in bound_names(node)}
        elif upper and name not in STANDARD | {"torch", "numpy"}:
            complaints.append(f"{where} in the upper half")
        elif at_margin and name not in ALLOWED:
            complaints.append(f"{where} at the left margin, which needs another package")
    return complaints


@every_module
def test_imports_follow_the_rules(module):
    assert broken_rules(module, source_of(module)) == []


@pytest.mark.parametrize("module", ALONE)
def test_a_module_that_stands_alone_imports_no_sibling_at_any_level(module):
    assert {name for name, _, _ in imports_of(tree_of(module))} & (SIBLINGS | {"."}) == set()


@pytest.mark.parametrize("module", CORE)
def test_the_core_imports_neither_speed_nor_checkpoint(module):
    names = {name for name, _, _ in imports_of(tree_of(module))}
    assert not names & {"speed", "checkpoint", "train", "run_folder"}


@pytest.mark.parametrize("script", ["train", "run_folder"])
def test_a_script_imports_siblings_at_the_left_margin(script):
    tree = ast.parse((ROOT / "scripts" / f"{script}.py").read_text(encoding="utf-8"))
    inside = [name for name, _, at_margin in imports_of(tree) if name in SIBLINGS and not at_margin]
    assert not inside, inside


def test_only_train_names_the_powers_that_can_be_taken_away():
    """So that whoever deletes speed.py or checkpoint.py has one file to change.

    The tools that measure them, and those that make the assets with them, are no part of training, and may name them.

    scripts/run_checkpoints.py is deleted together with checkpoint.py, and trl_names.py together with adapters.py,
    decoding.py together with speed.py, whose line in trl_names.py is changed."""
    users = {power: sorted(path.relative_to(ROOT).as_posix() for folder in (ROOT, ROOT / "scripts")
                           for path in folder.glob("*.py") if power in {name for name, _, _ in imports_of(
                               ast.parse(path.read_text(encoding="utf-8")))}
                           and path.stem not in ("bench", "bench_worker", "make_assets", "polish_writer"))
             for power in POWERS}
    assert users == {**dict.fromkeys(POWERS, ["scripts/train.py", "trl_names.py"]),
                     "speed": ["decoding.py", "scripts/train.py", "trl_names.py"],
                     "checkpoint": ["scripts/run_checkpoints.py", "scripts/train.py"]}


def test_ppo_core_does_import_its_neighbours_below_the_line():
    """The rules above would also hold for a file in which the search finds nothing."""
    mark = halves(source_of("ppo_core"))
    below = {name for name, node, at_margin in imports_of(tree_of("ppo_core")) if at_margin and node.lineno > mark}
    assert {"distributed", "rewards", "reference", "checks"} <= below


def test_the_search_for_broken_rules_finds_them():
    core = f"import torch\n\n# ---- {MARK}\nimport checks\nfrom checks import BadNumbers\nimport rewards\n"
    assert broken_rules("ppo_core", core) == []
    assert broken_rules("ppo_core", "import optim\n" + core) == ["line 1 imports optim in the upper half"]
    assert broken_rules("ppo_core", "def f():\n    import accelerate\n" + core) == ["line 2 imports accelerate in the upper half"]
    assert broken_rules("ppo_core", core + "def f():\n    import optim\n") == ["line 8 imports optim inside a function or a block"]
    assert broken_rules("ppo_core", core + "import rewards\n") == ["line 7 imports rewards a second time"]
    assert broken_rules("ppo_core", core + "from speed import tune_cpu\n") == ["line 7 imports speed, which ppo_core may not"]
    assert broken_rules("optim", "import math\nimport bitsandbytes\n") == [
        "line 2 imports bitsandbytes at the left margin, which needs another package"]
    assert broken_rules("optim", "def f():\n    import bitsandbytes\n    from rewards import x\n") == [
        "line 3 imports rewards, which optim may not"]
    assert broken_rules("checks", "from . import rewards\n") == ["line 1 imports ., which checks may not"]
    assert broken_rules("speed", "import rewards\n") == [] and broken_rules("speed", "import checkpoint\n") == [
        "line 1 imports checkpoint, which speed may not"]
    with pytest.raises(AssertionError, match="0 lines"):
        broken_rules("ppo_core", "import torch\n")


@every_module
def test_nothing_but_a_function_reads_the_environment(module):
    tree = tree_of(module)
    reads = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")]
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)}
    assert all(id(node) in inside for node in reads)


# ---------------------------------------------------------------------------------------------- copy me


def named_needs(docstring):
    """-> the siblings that the sentence "Copy me: needs ..." of a module's head names."""
    sentence = re.search(r"^Copy me:(.*?)\.(?=\s|$)", docstring, re.MULTILINE | re.DOTALL)[1]
    words = " ".join(sentence.split())
    return set(re.findall(r"\b(\w+)\.py\b", words)) | (set(LEAVES) if "the five concept files" in words else set())


def needs_of(module):
    """-> the siblings that a copy of `module` needs, and those that they need in turn, as the heads say."""
    needed, new = set(), {module}
    while new:
        needed |= new
        new = set().union(*(named_needs(ast.get_docstring(tree_of(name))) for name in new)) - needed
    return needed - {module}


def runs_alone(folder, name):
    """Run the example of `name` in `folder`, where nothing of the project can be imported but what lies there."""
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, name], cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if re.search(r"\d", line)]
    assert len(lines) >= 2, run.stdout
    assert not re.search(r"\bnan\b|\binf\b", run.stdout), run.stdout


@every_module
def test_a_copy_with_what_its_head_names_runs_its_example(module, tmp_path):
    """The leaves and checks.py are alone in the folder; ppo_core and the powers have the siblings of "Copy me: needs ..."."""
    needed = needs_of(module)
    assert not (needed and module in ALONE), needed
    for name in (module, *needed):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    runs_alone(tmp_path, f"{module}.py")


def test_the_upper_half_of_ppo_core_runs_alone(tmp_path):
    source = source_of("ppo_core")
    upper = "\n".join(source.splitlines()[:halves(source) - 1]) + "\n"
    assert "def gae(" in upper and "class PPOConfig" in upper and "class PPOTrainer" not in upper
    (tmp_path / "maths.py").write_text(upper + example_of(source), encoding="utf-8")
    runs_alone(tmp_path, "maths.py")


def test_the_head_of_a_module_is_read_right():
    assert named_needs("Why: x.\nCopy me: needs ppo_core.py and what\nthat needs. Tested by tests/test_speed.py.") == {"ppo_core"}
    assert named_needs("Copy me: needs torch. ppo_core.py calls it.\n") == set()
    assert named_needs("Copy me: needs checks.py and the five\nconcept files beside this one.\n") == {"checks", *LEAVES}
    assert needs_of("speed") == {*CORE, "checks"}


@every_module
def test_the_example_is_the_last_thing_in_the_module(module):
    last = tree_of(module).body[-1]
    assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"


WATCH = '''
import importlib, json, logging, os, random, sys, warnings
import accelerate, accelerate.utils, numpy, torch, transformers
from transformers import AutoModelForCausalLM, PreTrainedModel          # these load slowly, and lazily: do it beforehand
from transformers.utils import cached_file

def state():
    root = logging.getLogger()
    return {
        "environment": sorted(os.environ.items()), "folder": os.getcwd(), "path": list(sys.path),
        "logging": [root.level, repr(root.handlers), repr(root.filters), logging.root.manager.disable],
        "warnings": [repr(f) for f in warnings.filters],
        "torch": [str(torch.get_default_dtype()), str(torch.get_default_device()), torch.is_grad_enabled(),
                  torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(),
                  torch.get_float32_matmul_precision(), torch.is_anomaly_enabled(), repr(torch._tensor_str.PRINT_OPTS)],
        "numpy": repr(numpy.get_printoptions()),
        "random": [torch.get_rng_state().sum().item(), repr(numpy.random.get_state()), repr(random.getstate())],
        "transformers": [transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()],
    }

changes = {}
for name in sys.argv[1:]:
    before = state()
    print("BEGIN", name, flush=True)
    module = importlib.import_module(name)
    print("END", flush=True)
    after = state()
    changed = [key for key in before if before[key] != after[key]]
    own = logging.getLogger(name)
    if own.handlers or own.level or not own.propagate:
        changed.append("own logger")
    changes[name] = [module.__file__, changed]
print(json.dumps(changes))
'''


def test_importing_a_module_has_no_side_effects(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", WATCH, *MODULES], cwd=tmp_path, env=environment, capture_output=True, text=True,
                         timeout=120)
    assert run.returncode == 0, run.stderr
    *printed, last = run.stdout.splitlines()
    assert printed == [line for module in MODULES for line in (f"BEGIN {module}", "END")]
    assert run.stderr == ""
    assert json.loads(last) == {module: [str(ROOT / f"{module}.py"), []] for module in MODULES}


# ---------------------------------------------------------------------------------------------- the head of a module


@every_module
def test_the_docstring_has_every_heading(module):
    docstring = ast.get_docstring(tree_of(module))
    headings = HEADINGS if module in CORE else ("Why", "Copy me")
    missing = [heading for heading in headings if not re.search(f"^{heading}\\b", docstring, re.MULTILINE)]
    assert not missing, missing


@every_module
def test_the_docstring_names_the_modules_own_test_file_which_exists(module):
    test_file = f"tests/test_{module}.py"
    assert test_file in ast.get_docstring(tree_of(module))
    assert (ROOT / test_file).is_file()


# ---------------------------------------------------------------------------------------------- copied helpers


def functions_by_name(tree):
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def syntax(function):
    """What the function does, without its docstring and comments."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return [ast.dump(node) for node in (function.args, *body)]


def wrong_copies(sources):
    """sources: {module: text}. -> how many functions say `# same as module.function`, and what is wrong with them."""
    trees = {module: ast.parse(text) for module, text in sources.items()}
    marks, complaints = 0, []
    for module, text in sources.items():
        for number, line in enumerate(text.splitlines(), start=1):
            mark = re.search(r"# same as (\w+)\.(\w+)", line)
            if mark is None:
                continue
            marks += 1
            # The comment stands on the line above the function, on its `def`, or inside it.
            copy = next((f for f in functions_by_name(trees[module]).values() if f.lineno - 1 <= number <= f.end_lineno), None)
            original = functions_by_name(trees[mark[1]]).get(mark[2]) if mark[1] in trees else None
            if copy is None or original is None:
                complaints.append(f"{module}.py:{number} marks no function or names none")
            elif syntax(copy) != syntax(original):
                complaints.append(f"{module}.{copy.name} is not {mark[1]}.{mark[2]}")
            elif len(copy.body) > 6:
                complaints.append(f"{module}.{copy.name} is too long to be copied; pass it in")
    return marks, complaints


def test_helpers_marked_as_copies_equal_their_originals():
    sources = {module: (ROOT / f"{module}.py").read_text(encoding="utf-8") for module in MODULES}
    assert wrong_copies(sources)[1] == []


def test_the_search_for_wrong_copies_finds_them():
    original = 'def mean(x):\n    """Mean."""\n    return x.sum() / len(x)\n'
    good = "def mean(x):     # same as a.mean\n    # another comment\n    return x.sum() / len(x)\n"
    assert wrong_copies({"a": original, "b": good}) == (1, [])
    assert wrong_copies({"a": original, "b": good.replace("len(x)", "(len(x) - 1)")}) == (1, ["b.mean is not a.mean"])
    assert wrong_copies({"a": original, "b": good.replace("(x):", "(x, n=1):")}) == (1, ["b.mean is not a.mean"])
    assert wrong_copies({"a": original, "b": good.replace("a.mean", "a.median")})[1] == ["b.py:1 marks no function or names none"]
    assert wrong_copies({"a": original}) == (0, [])
