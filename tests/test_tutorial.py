"""docs/tutorial.ipynb runs in a fresh kernel and prints again what is committed.

The words have to be equal, and the numbers to 1e-4. What the notebook computes is checked by its own asserts.
"""
import ast
import copy
import json
import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "docs" / "tutorial.ipynb"
NUMBER = re.compile(r"(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)")
TOLERANCE = 1.01e-4         # 1e-4, the last printed digit, and the rounding of the decimal numbers themselves


def committed():
    return nbformat.read(PATH, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


# ------------------------------------------------------------------------------------------ comparing outputs


def pieces(cell):
    """-> the outputs of a cell as (kind, text): of a stream, of a result, of an error; "" for an image."""
    found = []
    for output in cell.outputs:
        if output.output_type == "stream":
            if found and found[-1][0] == output.name:       # the kernel may send one text in several parts
                found[-1] = (output.name, found[-1][1] + output.text)
            else:
                found.append((output.name, output.text))
        elif output.output_type == "error":
            found.append(("error", f"{output.ename}: {output.evalue}"))
        else:
            is_image = "image/png" in output.data
            found += [(kind, "" if is_image else text) for kind, text in sorted(output.data.items())]
    return found


def same_number(one, other):
    if "." not in one + other:
        return one == other             # a token id, a shape
    return abs(float(one) - float(other)) <= TOLERANCE * max(1.0, abs(float(other)))


def text_difference(one, other):
    """-> a sentence, or None if the texts are equal but for white space and small differences of numbers."""
    parts, other_parts = (NUMBER.split(" ".join(text.split())) for text in (one, other))
    for index, (part, other_part) in enumerate(zip(parts, other_parts)):
        # NUMBER.split gives text, number, text, number, ...
        equal = same_number(part, other_part) if index % 2 else part == other_part
        if not equal:
            return f"{''.join(parts[max(0, index - 4):index + 1])!r} was {other_part!r}"
    if len(parts) != len(other_parts):
        return f"{len(parts) // 2} numbers, before {len(other_parts) // 2}"
    return None


def differences(notebook, other):
    """-> one sentence for each code cell whose outputs differ from those of `other`."""
    found = []
    cells, other_cells = code_cells(notebook), code_cells(other)
    if [cell.source for cell in cells] != [cell.source for cell in other_cells]:
        return ["the code differs"]
    for number, (cell, other_cell) in enumerate(zip(cells, other_cells), start=1):
        outputs, other_outputs = pieces(cell), pieces(other_cell)
        kinds, other_kinds = ([kind for kind, _ in part] for part in (outputs, other_outputs))
        if kinds != other_kinds:
            found.append(f"code cell {number}: outputs {kinds}, before {other_kinds}")
            continue
        for (_, text), (_, other_text) in zip(outputs, other_outputs):
            sentence = text_difference(text, other_text)
            found += [f"code cell {number}: {sentence}"] if sentence else []
    return found


# ---------------------------------------------------------------------------------------------------- it runs


@pytest.mark.long
@pytest.mark.parametrize("folder", ["docs", "."])
def test_the_notebook_prints_what_is_committed(folder, tmp_path, monkeypatch):
    """In a copy of the modules, assets/ and docs/; started in docs/, as Jupyter does, or one folder above."""
    project = tmp_path / "copy"
    for name in ("docs", "assets"):
        shutil.copytree(ROOT / name, project / name)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, project)
    # The kernel is this Python, even if the user has another kernel named python3. The user's start-up files
    # are not read.
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "Python 3", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = committed()
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    where = {"metadata": {"path": str(project / folder)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    assert differences(notebook, committed()) == []


# ----------------------------------------------------------------------------------------- the committed file


def test_the_cells_are_few_and_short():
    cells = code_cells(committed())
    lines = [cell.source.splitlines() for cell in cells]
    print(len(cells), "code cells, lines:", [len(part) for part in lines])
    assert 15 <= len(cells) <= 25
    assert [part[0] for part in lines if len(part) > 12] == []
    assert [line for part in lines for line in part if len(line) > 110] == []


def test_every_cell_was_run_in_order_and_shows_something_unless_it_only_defines():
    cells = code_cells(committed())
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef)
    silent = [cell.source for cell in cells if not cell.outputs
              and not all(isinstance(statement, definitions) for statement in ast.parse(cell.source).body)]
    assert silent == []


def absolute_paths(text):
    folders = "home|root|tmp|work|usr|opt|mnt|var|Users"
    return re.findall(rf"(?<![\w.:/])/(?:{folders})/[^\s\"]*|[A-Z]:\\\\[^\s\"]*|file://[^\s\"]*", text)


def test_the_file_holds_two_plots_no_errors_no_paths_and_no_metadata():
    notebook, text = committed(), PATH.read_text(encoding="utf-8")
    kinds = [kind for cell in code_cells(notebook) for kind, _ in pieces(cell)]
    assert kinds.count("image/png") == 2 and set(kinds) == {"stdout", "image/png", "text/plain"}
    assert absolute_paths(text) == []
    assert absolute_paths('"/home/me/x.py", "C:\\\\x" file:///x') == ["/home/me/x.py", "C:\\\\x", "file:///x"]
    for cell in notebook.cells:
        assert all(not part.get("metadata") for part in (cell, *cell.get("outputs", [])))
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert len(text.encode()) < 250_000


def test_the_notebook_calls_the_functions_of_the_core_and_asserts():
    code = "\n".join(cell.source for cell in code_cells(committed()))
    for name in ("collate", "logprobs_from_logits", "entropy_from_logits", "masked_whiten", "gae",
                 "policy_loss", "value_loss", "kl_penalty", "token_rewards", "score_texts", "trainer.record",
                 "trainer.minibatch_loss", "trainer.step"):
        assert re.search(rf"(?<![\w.]){re.escape(name)}\(", code), name
    assert len(re.findall(r"^\s*assert", code, re.M)) >= 25


def test_links_lead_to_files():
    text = "\n".join(cell.source for cell in committed().cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    assert links and [link for link in links if not (PATH.parent / link.split("#")[0]).exists()] == []


# ------------------------------------------------------------------------------------ the comparison can fail


def with_text_changed(change):
    """-> the committed notebook with `change` applied to the first stream output that it alters."""
    notebook = committed()
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if output.output_type == "stream" and change(output.text) != output.text:
                output.text = change(output.text)
                return notebook
    raise AssertionError("nothing was changed")


def number_plus(amount):
    """-> a function that adds `amount` to the first number with four decimals in a text."""
    def change(text):
        return re.sub(r"-?\d+\.\d{4}", lambda match: f"{float(match[0]) + amount:.4f}", text, count=1)
    return change


def test_the_comparison_finds_a_changed_number_a_changed_word_and_a_lost_image():
    before = committed()
    assert differences(committed(), before) == []
    for amount, found in ((1e-3, 1), (-1e-3, 1), (2e-4, 1), (1e-4, 0)):
        assert len(differences(with_text_changed(number_plus(amount)), before)) == found, amount
    for old, new in (("259", "260"), ("fine", "poor"), ("shape (3, 7)", "shape (3, 8)"),
                     ("-2.", "2."), ("logprobs,", "0.0000 logprobs,")):
        changed = with_text_changed(lambda text: text.replace(old, new, 1))
        assert len(differences(changed, before)) == 1, old
    lost, failed, other_code = committed(), committed(), committed()
    next(cell for cell in code_cells(lost) if ("image/png", "") in pieces(cell)).outputs = []
    code_cells(failed)[-1].outputs.append(nbformat.v4.new_output("stream", name="stderr", text="a warning"))
    code_cells(other_code)[-1].source += "\npass"
    assert [len(differences(notebook, before)) for notebook in (lost, failed, other_code)] == [1, 1, 1]


def test_the_comparison_allows_other_white_space_large_numbers_and_streams_in_parts():
    assert text_difference("a  -0.0000 1.5", "a 0.0000\n1.50005") is None
    assert text_difference("123456.1", "123457.0") is None and text_difference("12.3", "12.4") is not None
    notebook, before = committed(), committed()
    cell = next(cell for cell in code_cells(notebook) if cell.outputs)
    first, second = copy.deepcopy(cell.outputs[0]), copy.deepcopy(cell.outputs[0])
    first.text, second.text = first.text[:5], second.text[5:]
    cell.outputs = [first, second]
    assert differences(notebook, before) == []
