"""Each module can be copied out alone: what it imports, what its example does, what importing it changes.

The rules are read off the source with `ast`, and then tried: a copy in an empty folder has to run.
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
MODULES = (*LEAVES, "ppo_core")
SIBLINGS = {path.stem for folder in (ROOT, ROOT / "scripts") for path in folder.glob("*.py")} | set(MODULES)
# numpy and safetensors are dependencies of transformers: whoever has that has them.
ALLOWED = {"torch", "transformers", "accelerate", "numpy", "safetensors"} | set(sys.stdlib_module_names)
HEADINGS = ("Why", "Source", "Differs", "Shapes", "Copy me")
every_module = pytest.mark.parametrize("module", MODULES)


def tree_of(module):
    return ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))


def imported_by(node):
    """-> the top-level names of the packages that an import statement brings in, a relative one as "."."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {"."} if node.level else {node.module.split(".")[0]}
    return set()


def imports_of(tree):
    """-> list of (package, outermost function or method that holds the import, or None at module level)."""
    found = []

    def walk(node, holder):
        for child in ast.iter_child_nodes(node):
            found.extend((name, holder) for name in imported_by(child))
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            walk(child, child if function and holder is None else holder)

    walk(tree, None)
    return found


def called_names(node):
    return {call.func.id for call in ast.walk(node) if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)}


# ---------------------------------------------------------------------------------------------- import rules


@every_module
def test_module_level_imports_are_standard_torch_transformers_and_accelerate(module):
    names = {name for name, holder in imports_of(tree_of(module)) if holder is None}
    assert names <= ALLOWED, names - ALLOWED
    assert not names & SIBLINGS, names & SIBLINGS


@pytest.mark.parametrize("module", LEAVES)
def test_a_leaf_module_imports_no_sibling_at_any_level(module):
    names = {name for name, _ in imports_of(tree_of(module))}
    assert not names & (SIBLINGS | {"."}), names & (SIBLINGS | {"."})


def test_ppo_core_imports_siblings_only_inside_the_trainer_and_its_checks():
    tree = tree_of("ppo_core")
    trainer = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "PPOTrainer")
    methods = [node for node in trainer.body if isinstance(node, ast.FunctionDef)]
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    # A function counts as the trainer's when the trainer calls it and nothing else in the file does.
    others = set().union(*(called_names(node) for node in tree.body if node is not trainer))
    checks = [function for function in functions if function.name in called_names(trainer) - others]
    holders = {holder for name, holder in imports_of(tree) if name in SIBLINGS}
    assert len(holders) >= 3        # the trainer does use its neighbours: the search has found something
    strangers = {getattr(holder, "name", "module level") for holder in holders if holder not in methods + checks}
    assert not strangers, strangers


@every_module
def test_nothing_but_a_function_reads_the_environment(module):
    tree = tree_of(module)
    reads = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")]
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)}
    assert all(id(node) in inside for node in reads)


# ---------------------------------------------------------------------------------------------- copy me


@every_module
def test_a_copy_in_an_empty_folder_runs_its_example(module, tmp_path):
    shutil.copy(ROOT / f"{module}.py", tmp_path)
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, f"{module}.py"], cwd=tmp_path, env=environment, capture_output=True, text=True,
                         timeout=120)
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if re.search(r"\d", line)]
    assert len(lines) >= 2, run.stdout
    assert not re.search(r"\bnan\b|\binf\b", run.stdout), run.stdout


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
    missing = [heading for heading in HEADINGS if not re.search(f"^{heading}\\b", docstring, re.MULTILINE)]
    assert not missing, missing


@every_module
def test_the_docstring_names_the_modules_own_test_file_which_exists(module):
    own = f"tests/test_{module}.py"
    assert own in ast.get_docstring(tree_of(module))
    assert (ROOT / own).is_file()


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
