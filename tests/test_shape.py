"""The bounds that keep the project readable: lengths of files, lines, functions and classes, nesting, prose, words, and
how much code one PPO step enters.

A bound is a ceiling, not an aim. Do not press code together to meet one. If a bound is wrong, change it here and say why in
the commit. `pytest -s tests/test_shape.py` prints the counts. Every check is also tried on source text that breaks it.
"""
import ast
import io
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The most lines of each file. The aims are lower: 620, 260, 150, 260, 170, 430 for the concept files and 400, 350, 330 for the
# powers. Where a file is not there yet, its ceiling is what it has today, so that it can only become shorter: with lines of 110
# characters, where they had 150, what these files promise takes so many.
CEILINGS = {"ppo_core.py": 765, "value_head.py": 295, "reference.py": 160, "rewards.py": 265, "optim.py": 170,
            "distributed.py": 465, "speed.py": 620, "checkpoint.py": 415, "checks.py": 630, "adapters.py": 245,
            "trl_names.py": 435, "decoding.py": 162, "scripts/train.py": 273,
            "scripts/run_folder.py": 350, "scripts/report.py": 355, "scripts/run_health.py": 115, "scripts/run_inputs.py": 170, "scripts/run_plan.py": 270, "scripts/run_checkpoints.py": 80}
CONCEPTS = ("ppo_core.py", "value_head.py", "reference.py", "rewards.py", "optim.py", "distributed.py")
TOOLS = ("scripts/bench.py", "scripts/bench_worker.py", "scripts/make_assets.py", "scripts/make_corpus.py", "scripts/polish_writer.py",
         "scripts/fluency.py",
         "scripts/migrate.py")     # these may be long, but not dense

LINE = 110                  # characters
FUNCTION = 50               # lines, from its first decorator to its end
CLASS = 420                 # lines
NESTING = 4                 # for, while, if, with, try inside each other; an elif counts as its if
PROSE = 0.28                # least share of the non-blank lines that are docstring or comment
# Fewer words leave fewer lines of prose. In ppo_core.py the help of each setting and the meaning of each statistic stand beside
# the code, where they are not counted.
LESS_PROSE = {"ppo_core.py": 0.23, "value_head.py": 0.23}
# Of the concept files together, as `wc -w` counts. 12,500 before the reference of adapters, gaps in responses, scores per
# token, lam_value and the warm-up of the value head.
WORDS = 13_000
ENTERED = 40                # project functions that one generate() and step() enter
SPANNED = 600               # lines of these functions
OVERRIDES = 7               # methods of PPOTrainer that FastPPOTrainer replaces
OVERRIDE = 40               # an override has fewer lines than this

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = (ast.For, ast.AsyncFor, ast.While, ast.If, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)


def source_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------- counting


def first_line(definition):
    """The line of the first decorator, or of `def` and `class` where there is none."""
    return min([definition.lineno, *(decorator.lineno for decorator in definition.decorator_list)])


def span(definition):
    return definition.end_lineno - first_line(definition) + 1


def nesting(node, depth=0):
    """The deepest block inside `node`; functions and classes within it are counted by themselves."""
    deepest = depth
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, (*FUNCTIONS, ast.ClassDef)):
                continue
            is_elif = (isinstance(node, ast.If) and field == "orelse" and len(node.orelse) == 1
                       and isinstance(child, ast.If))
            deepest = max(deepest, nesting(child, depth + (isinstance(child, BLOCKS) and not is_elif)))
    return deepest


def prose_share(source):
    """Share of the non-blank lines that belong to a string standing alone (a docstring) or hold nothing but a comment."""
    lines = source.splitlines()
    strings = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr)
               and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)]
    prose = {number for node in strings for number in range(node.lineno, node.end_lineno + 1)}
    non_blank = prose | {number for number, line in enumerate(lines, 1) if line.strip()}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and lines[token.start[0] - 1].lstrip().startswith("#"):
            prose.add(token.start[0])
    return len(prose) / max(1, len(non_blank))


def long_lines(source):
    return [f"line {number} has {len(line)} characters" for number, line in enumerate(source.splitlines(), 1)
            if len(line) > LINE]


def oversized(source):
    """-> one sentence for each function or class that is too long or too deep, and for the module's own nesting."""
    tree, complaints = ast.parse(source), []
    definitions = [node for node in ast.walk(tree) if isinstance(node, (*FUNCTIONS, ast.ClassDef))]
    for node in definitions:
        most = CLASS if isinstance(node, ast.ClassDef) else FUNCTION
        if span(node) > most:
            complaints.append(f"{node.name} has {span(node)} lines of {most}")
    for name, node in [("the module", tree), *((node.name, node) for node in definitions)]:
        if nesting(node) > NESTING:
            complaints.append(f"{name} is nested {nesting(node)} deep of {NESTING}")
    return complaints


def joined_statements(source):
    """-> lines that hold two simple statements, joined by a semicolon."""
    seen, double = set(), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt) and not hasattr(node, "body"):
            (double.append(node.lineno) if node.lineno in seen else seen.add(node.lineno))
    return double


# ---------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("name", CEILINGS)
def test_a_file_stays_below_its_ceiling(name):
    count = len(source_of(name).splitlines())
    print(f"{name}: {count} lines of {CEILINGS[name]}")
    assert count <= CEILINGS[name]


@pytest.mark.parametrize("name", [*CEILINGS, *TOOLS])
def test_lines_functions_classes_and_nesting_stay_small(name):
    source = source_of(name)
    assert long_lines(source) + oversized(source) + joined_statements(source) == []


@pytest.mark.parametrize("name", CONCEPTS)
def test_a_concept_file_explains_itself(name):
    share = prose_share(source_of(name))
    print(f"{name}: {share:.1%} prose, at least {PROSE:.0%}")
    assert share >= LESS_PROSE.get(name, PROSE)


def test_the_concept_files_can_be_read_in_an_hour():
    words = {name: len(source_of(name).split()) for name in CONCEPTS}
    print("words:", words, "together", sum(words.values()), "of", WORDS)
    assert sum(words.values()) <= WORDS


def test_every_python_file_of_the_project_has_bounds():
    """A new file must not escape them."""
    found = {path.relative_to(ROOT).as_posix() for folder in (ROOT, ROOT / "scripts") for path in folder.glob("*.py")}
    assert found == {*CEILINGS, *TOOLS}


# ---------------------------------------------------------------------------------------------- the story


def letters(source):
    """The letters of the comments `# (a) ...` in `source`, in order, each once. A range such as (a)-(f) is none."""
    comments = [token.string for token in tokenize.generate_tokens(io.StringIO(source).readline)
                if token.type == tokenize.COMMENT]
    found = [match[1] for comment in comments if (match := re.match(r"#[\s\-=]*\(([a-f])\)(?!-)", comment))]
    return [letter for number, letter in enumerate(found) if letter not in found[:number]]


def method_source(source, class_name, method_name):
    owner = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == class_name)
    method = next(node for node in owner.body if isinstance(node, FUNCTIONS) and node.name == method_name)
    # The indentation stays; an `if` above it makes the piece a program that tokenize accepts.
    return "if True:\n" + "\n".join(source.splitlines()[first_line(method) - 1:method.end_lineno]) + "\n"


def test_step_and_train_show_the_letters_of_the_loop_in_order():
    assert letters(method_source(source_of("ppo_core.py"), "PPOTrainer", "step")) == list("acdef")
    assert letters(source_of("scripts/train.py")) == list("abcdef")


def test_the_fast_trainer_overrides_few_methods_and_each_is_short():
    import ppo_core
    import speed
    plain, fast = vars(ppo_core.PPOTrainer), vars(speed.FastPPOTrainer)
    overrides = [name for name, value in fast.items() if callable(value) and name in plain]
    owner = next(node for node in ast.parse(source_of("speed.py")).body
                 if isinstance(node, ast.ClassDef) and node.name == "FastPPOTrainer")
    lengths = {node.name: span(node) for node in owner.body if isinstance(node, FUNCTIONS) and node.name in overrides}
    print("overrides:", lengths)
    assert 0 < len(overrides) <= OVERRIDES and set(lengths) == set(overrides)
    assert {name: count for name, count in lengths.items() if count >= OVERRIDE} == {}


def test_every_override_says_what_it_saves():
    """A docstring of its own; it is the place where a reader looks for the reason."""
    import ppo_core
    import speed
    overrides = [name for name in vars(speed.FastPPOTrainer) if name in vars(ppo_core.PPOTrainer)
                 and callable(getattr(speed.FastPPOTrainer, name))]
    assert [name for name in overrides if not vars(speed.FastPPOTrainer)[name].__doc__] == []


# ---------------------------------------------------------------------------------------------- one step, traced


def entered_by(call, root=ROOT):
    """-> {(file, first line): name} of the functions of the .py files below `root` that `call` enters.

    Functions with a `def` count, a nested one by itself; lambdas, comprehensions and class bodies are part of what holds
    them. Files of the virtual environment and of the tests are not the project's.
    """
    codes = set()

    def watch(frame, event, _):
        if event == "call":
            codes.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(before)
    here = [code for code in codes if not code.co_name.startswith("<") and Path(code.co_filename).is_relative_to(root)
            and Path(code.co_filename).relative_to(root).parts[0] not in (".venv", "tests")]
    return {(code.co_filename, code.co_firstlineno): code.co_name for code in here}


def lines_spanned(functions):
    """functions: {(file, first line): name} -> the number of lines that they cover; nested ones are not counted twice."""
    covered = set()
    for path in {path for path, _ in functions}:
        for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))):
            # A code object begins at its first decorator.
            if isinstance(node, FUNCTIONS) and (path, first_line(node)) in functions:
                covered.update((path, number) for number in range(first_line(node), node.end_lineno + 1))
    return len(covered)


def test_one_ppo_step_of_the_plain_trainer_is_little_code():
    """In a process of its own: where another test has called speed.tune_cpu, its functions would be entered, too."""
    done = subprocess.run([sys.executable, __file__], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                          timeout=200)
    print(done.stdout)
    assert done.returncode == 0 and "one generate() and step() enter" in done.stdout, done.stdout + done.stderr


def count_one_ppo_step():
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    import distributed
    from ppo_core import PPOConfig, PPOTrainer
    from value_head import AutoModelForCausalLMWithValueHead
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets" / "review-lm")
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=32,
                                       bos_token_id=0, eos_token_id=0))
    trainer = PPOTrainer(PPOConfig(batch_size=4, mini_batch_size=2, ppo_epochs=2),
                         AutoModelForCausalLMWithValueHead.from_pretrained(model), None, tokenizer,
                         accelerator=distributed.start())
    queries = [torch.tensor([10, 11, 12]), torch.tensor([13, 14])] * 2

    def one_step():
        responses = trainer.generate(queries, return_prompt=False, max_new_tokens=4, batch_size=4)
        trainer.step(queries, responses, [0.0, 1.0, 0.5, -1.0])

    functions = entered_by(one_step)
    for path, line in sorted(functions):
        print(f"{Path(path).name}:{line} {functions[path, line]}")
    print(f"one generate() and step() enter {len(functions)} functions of {lines_spanned(functions)} lines")
    assert {"generate", "step", "gae", "policy_loss"} <= set(functions.values())      # the tracer has seen the step
    assert len(functions) <= ENTERED
    assert lines_spanned(functions) <= SPANNED


# ---------------------------------------------------------------------------------------------- each check can fail


def test_the_counts_find_what_is_too_long_too_deep_and_too_silent():
    assert long_lines("x = 1\n" + "y" * (LINE + 1)) == [f"line 2 has {LINE + 1} characters"] and not long_lines("y" * LINE)
    body = "    x = 1\n" * (FUNCTION - 2)
    assert oversized(f"@cache\ndef f():\n{body}") == []
    assert oversized(f"@cache\ndef f():\n{body}    x = 2\n") == [f"f has {FUNCTION + 1} lines of {FUNCTION}"]
    assert oversized("class A:\n" + "    x = 1\n" * CLASS) == [f"A has {CLASS + 1} lines of {CLASS}"]
    deep = "".join("    " * depth + "if x:\n" for depth in range(NESTING + 1)) + "    " * (NESTING + 1) + "pass\n"
    assert oversized(deep) == [f"the module is nested {NESTING + 1} deep of {NESTING}"]
    inside = "def f():\n" + "".join(f"    {line}\n" for line in deep.splitlines())
    assert oversized(inside) == [f"f is nested {NESTING + 1} deep of {NESTING}"]
    assert nesting(ast.parse("if a:\n    pass\nelif b:\n    pass\nelif c:\n    pass\nelse:\n    pass\n")) == 1
    assert nesting(ast.parse("try:\n    with x:\n        for y in z:\n            pass\nexcept E:\n    pass\n")) == 3
    assert joined_statements("x = 1\ny = 2; z = 3\nif x: y = 4\n") == [2]


def test_the_share_of_prose_counts_docstrings_and_whole_comment_lines():
    source = '"""Head.\n\nMore.\n"""\n\n# a comment\nx = 1      # beside code: no prose line\ntext = """no\ndocstring"""\n'
    assert prose_share(source) == 5 / 8
    assert prose_share("x = 1\n" * 3 + "# y\n") == 1 / 4 and prose_share("") == 0


def test_the_letters_are_read_from_comments_in_their_order():
    assert letters('"""(a) no."""\n# (a)-(f) no\n# (a) x\n# ---- (b) y\nf(x)    # (d) z\n# (c) w\n# (a) again\n') == list("abdc")
    source = "class T:\n    def other(self):\n        # (b) no\n        pass\n\n    def step(self):\n        # (a) x\n        pass\n"
    assert letters(method_source(source, "T", "step")) == ["a"]


def test_the_tracer_counts_each_function_once_and_its_lines_once(tmp_path):
    path = tmp_path / "traced.py"
    path.write_text("import functools\n\n\ndef outer():\n    def inner():\n        return [x for x in map(lambda y: y, range(2))]\n"
                    "    return inner() + inner()\n\n\n@functools.lru_cache\ndef helper():\n    return 1\n\n\n"
                    "def call():\n    outer()\n    helper()\n\n\ndef unused():\n    pass\n")
    names = {}
    exec(compile(path.read_text(), str(path), "exec"), names)
    functions = entered_by(names["call"], root=tmp_path)
    assert sorted(functions.values()) == ["call", "helper", "inner", "outer"]
    assert lines_spanned(functions) == 4 + 3 + 3       # inner lies within outer; helper with its decorator


if __name__ == "__main__":
    count_one_ppo_step()
