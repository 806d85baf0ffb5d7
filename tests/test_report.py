"""scripts/report.py: the page of a run, its numbers, what it says of odd runs, and how it looks in a browser."""
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import ppo_core
import report
import run_folder
import train
from run_folder import Evaluation
from speed import FastPPOTrainer
from value_head import AutoModelForCausalLMWithValueHead

ROOT = Path(__file__).resolve().parent.parent
WRITER = ROOT / "assets" / "review-lm"
SMALL = ["--cpu", "--steps", "2", "--batch_size", "8", "--mini_batch_size", "4", "--ppo_epochs", "1", "--max_new_tokens", "8",
         "--eval_prompts", "20", "--save_every", "0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One small run in a process of its own. -> its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    done = subprocess.run([sys.executable, ROOT / "scripts" / "train.py", *SMALL, "--output_dir", folder], capture_output=True, text=True,
                          timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run[0], tmp_path / "copy", ignore=shutil.ignore_patterns("final")))


def html_of(folder):
    report.write_report(folder)
    return (folder / "report.html").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------- numbers of a token


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(WRITER)


@pytest.mark.parametrize("trainer_class", [ppo_core.PPOTrainer, FastPPOTrainer])
def test_the_numbers_of_a_token_are_those_that_step_computes(trainer_class, tokenizer):
    torch.manual_seed(0)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(WRITER)
    trainer = trainer_class(ppo_core.PPOConfig(batch_size=4, mini_batch_size=2, ppo_epochs=1, learning_rate=1e-3), model, None, tokenizer)
    queries = [tokenizer(text, return_tensors="pt").input_ids[0] for text in ("The film", "A story that", "This is", "It never")]
    for _ in range(2):          # after the first step the policy is no longer the reference
        responses, scores = trainer.generate(queries, return_prompt=False, max_new_tokens=7), [0.5, -1.0, 2.0, 0.0]
        before = trainer.language_model.state_dict()
        rows = report.token_numbers(trainer, queries, responses, scores)
        assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.language_model.state_dict().items())
        kl_coef = trainer.kl_ctl.value
        stats = trainer.step(queries, responses, scores)
        for i, (row, response) in enumerate(zip(rows, responses)):
            for name in ("logprobs", "ref_logprobs"):
                expected = stats[f"objective/{name}"][i, :len(response)]
                assert torch.allclose(torch.tensor(row[name[:-1]]), expected, atol=1e-4)
            kl = sum(row["logprob"]) - sum(row["ref_logprob"])
            assert sum(row["reward"]) == pytest.approx(scores[i] - kl_coef * kl, abs=1e-3)
            assert len(row["value"]) == len(response)
        advantages = torch.tensor([number for row in rows for number in row["advantage"]])
        assert torch.allclose(advantages, stats["ppo/policy/advantages"], atol=2e-4)
    assert any(abs(a - b) > 0.01 for row in rows for a, b in zip(row["logprob"], row["ref_logprob"]))


@pytest.mark.parametrize("text", ["a fine film.", "\U0001f600 great \U0001f44d\U0001f3fd!", "\u0444\u0438\u043b\u044c\u043c \u0445\u043e\u0440\u043e\u0448", "\u6620\u753b\u306f\u7d20\u6674\u3089\u3057\u3044",
                                  "\u0641\u064a\u0644\u0645 \u062c\u064a\u062f"])
def test_the_pieces_of_a_response_are_its_text(text, tokenizer):
    query, response = tokenizer("The film", return_tensors="pt").input_ids[0], tokenizer(f" is {text}", return_tensors="pt").input_ids[0]
    pieces = report.pieces(tokenizer, query, response)
    assert len(pieces) == len(response) and "".join(pieces) == f" is {text}"


def test_a_response_that_ends_within_a_letter_has_a_piece_for_each_token(tokenizer):
    ids = tokenizer(" \U0001f600", return_tensors="pt").input_ids[0]
    assert len(report.pieces(tokenizer, ids[:1], ids[:-1])) == len(ids) - 1


# ---------------------------------------------------------------------------------------------- what it says


def test_a_run_leaves_a_page_that_needs_no_network(run):
    folder, out = run
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"what PPO did to its texts: {folder}/report.html" in out
    before, after = (Evaluation.read(folder / f"{name}.json") for name in ("before", "after"))
    kl = sum(sum(row["logprob"]) - sum(row["ref_logprob"]) for row in after.tokens) / 20
    assert f"on 20 held-out prompts: {before.score:.3f} before, {after.score:.3f} after, at a KL of {kl:.1f} nats" in page
    assert page.count("<svg") == 8 and "location.reload" not in page
    # the only addresses are the names of SVG's vocabularies
    links = set(re.findall(r"(?:src|href)=\"([^\"#]*)\"", page))
    assert all(link == "data:," for link in links), links
    assert page.count('class="token"') >= 2 * 16
    for heading in ("The same prompts before and after", "The largest gains", "The largest losses", "The highest KL to the reference"):
        assert heading in page
    assert "id=\"missing\"" not in page


def test_the_same_files_give_the_same_page(copy):
    assert html_of(copy) == html_of(copy)


def test_gains_losses_and_kl_are_ranked():
    columns = {"text": ["a"], "value": [0.0], "reward": [0.0], "advantage": [0.0], "ref_logprob": [-1.0]}

    def tokens(logprob):
        return {**columns, "logprob": [logprob]}

    prompts, texts = ["p0", "p1", "p2"], ["a", "a", "a"]
    before = Evaluation(prompts, texts, [0.5, 0.5, 0.5], [tokens(-1.0)] * 3)
    after = Evaluation(prompts, texts, [0.6, 0.1, 0.9], [tokens(-0.5), tokens(-0.1), tokens(-0.9)])
    sections, _ = report.responses_of({"before": before, "after": after, "newest": None, "step": 3})
    found = {section["title"]: [pair[0]["prompt"] for pair in section["pairs"]] for section in sections}
    assert found["The largest gains"] == ["p2", "p0"] and found["The largest losses"] == ["p1"]
    assert found["The highest KL to the reference"] == ["p1", "p0", "p2"]


HEALTHY = {"ppo/policy/entropy": 3.0, "ppo/val/var_explained": 0.4, "ppo/policy/clipfrac": 0.2, "objective/kl": 5.0,
           "ppo/loss/total": 0.1, "ppo/policy/approxkl": 0.02, "ppo/val/clipfrac": 0.1, "ppo/skipped_steps": 0.0,
           "ppo/mean_raw_scores": 0.5, "tokens/responses_dist": [5.0, 6.0]}
SETTINGS = {"target": 6.0, "max_new_tokens": 8}


@pytest.mark.parametrize("change, words", [
    ({"ppo/policy/entropy": 0.5}, "entropy fell from 3.00 to 0.50"), ({"ppo/val/var_explained": -0.2}, "explained variance ended at -0.20"),
    ({"ppo/policy/clipfrac": 0.6}, "clip fraction reached 0.60"), ({"tokens/responses_dist": [8.0, 8.0]}, "All 2 responses of the last step have 8"),
    ({"tokens/responses_dist": [8.0, 8.0, 5.0]}, "67% of the last responses have 8 tokens"), ({"objective/kl": -2.0}, "The KL was -2.0"),
    ({"objective/kl": 12.0}, "KL ended at 12.0 nats, far above its target of 6.0"), ({"ppo/policy/approxkl": 0.2}, "by 0.200 (approxkl)"),
    ({"ppo/val/clipfrac": 0.4}, "40% of the values"), ({"ppo/skipped_steps": 1.0}, "1 optimizer steps were skipped"),
    ({"ppo/mean_raw_scores": 0.4}, "The score fell from 0.500 to 0.400"), ({"ppo/loss/total": float("nan")}, "ppo/loss/total held NaN")])
def test_a_statistic_that_left_its_healthy_range_is_a_warning_with_an_advice(change, words):
    assert report.warnings_of([HEALTHY] * 5, SETTINGS) == report.warnings_of([], {}) == []
    found = report.warnings_of([HEALTHY] * 4 + [{**HEALTHY, **change}], SETTINGS)
    assert len(found) == 1 and words in found[0] and re.search(r"(Raise|Lower|raise|lower|Sample) ", found[0])


def test_one_nan_does_not_silence_the_other_warnings_and_batches_left_out_are_counted():
    bad = {**HEALTHY, "ppo/val/var_explained": -3.0, "ppo/policy/clipfrac": 0.9}
    found = report.warnings_of([bad] * 4 + [dict.fromkeys(HEALTHY, float("nan"))], SETTINGS, left_out=2)
    assert [any(words in sentence for sentence in found) for words in ("-3.00", "0.90", "held NaN", "2 batches led to NaN")] == [True] * 4


@pytest.mark.parametrize("name, words", [
    ("before.json", "before.json is not there"), ("after.json", "the held-out prompts are answered again after the last step"),
    ("metrics.jsonl", "there are no curves"), ("summary.json", "it is written when a run is finished"), ("config.json", "the settings of the run are not")])
@pytest.mark.parametrize("damage", ["gone", "empty", "list"])
def test_a_run_that_lost_a_file_has_a_page_that_says_so(copy, name, words, damage):
    if damage == "gone":
        (copy / name).unlink()
    else:
        (copy / name).write_text("" if damage == "empty" else "[1]")
    page = html_of(copy)
    if damage == "gone":
        assert words in page
    assert f"{name} is not there" in page or f"{name} is damaged" in page or f"{name} holds no step" in page


def test_an_unfinished_run_says_how_far_it_is_and_a_half_written_line_is_left_out(run, copy):
    for name in ("after.json", "summary.json"):
        (copy / name).unlink()
    (copy / "metrics.jsonl").write_text((copy / "metrics.jsonl").read_text() + '{"step": 3, "ppo')
    page, newest = html_of(copy), Evaluation.read(copy / "newest.json")
    assert "The run has done 2 of 2 steps, with a mean score of" in page
    assert "Responses of step 2" in page and page.count("now: score ") == 8 == len(newest.prompts)
    assert "Responses of step" not in (run[0] / "report.html").read_text(encoding="utf-8")
    for name in ("before", "newest"):       # and without either
        (copy / f"{name}.json").unlink()
        assert html_of(copy)


def test_a_run_without_a_step_and_with_one_sample_has_a_page(copy):
    (copy / "metrics.jsonl").write_text("")
    for name in ("before", "after"):
        (copy / f"{name}.json").write_text(json.dumps({"prompts": ["a"], "responses": [""], "scores": [0.5]}))
    page = html_of(copy)
    assert "metrics.jsonl holds no step" in page and "hardly changed the mean score on 1 held-out prompts: 0.500 before, 0.500 after" in page


def test_runs_of_earlier_versions_without_numbers_of_tokens_show_their_texts(copy):
    for name in ("before", "after"):
        content = json.loads((copy / f"{name}.json").read_text())
        del content["tokens"]
        (copy / f"{name}.json").write_text(json.dumps(content))
    page = html_of(copy)
    assert 'class="token"' not in page and content["responses"][0].strip().split()[0] in page


def test_one_sample_of_one_token_has_numbers(tokenizer):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(WRITER)
    trainer = ppo_core.PPOTrainer(ppo_core.PPOConfig(batch_size=1, mini_batch_size=1), model, None, tokenizer)
    rows = report.token_numbers(trainer, [torch.tensor([5, 6])], [torch.tensor([7])], [0.5])
    assert rows[0]["reward"] == [0.5] and abs(rows[0]["advantage"][0]) < 1e-3


def test_a_page_that_cannot_be_written_does_not_cost_the_run_its_model(tmp_path, monkeypatch, capsys):
    def full_disk(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "replace_file", full_disk)
    train.main([*SMALL, "--steps", "1", "--output_dir", str(tmp_path / "run")])
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file() and (tmp_path / "run" / "summary.json").is_file()
    assert "report.html was not written: No space left on device" in capsys.readouterr().out


def test_watch_writes_the_page_until_the_run_is_finished(copy):
    summary = (copy / "summary.json").rename(copy.parent / "summary.json")
    (copy / "report.html").unlink()
    watch = subprocess.Popen([sys.executable, ROOT / "scripts" / "report.py", copy, "--watch"], stdout=subprocess.PIPE, text=True)
    try:
        first = watch.stdout.readline()
        page = (copy / "report.html").read_text(encoding="utf-8")
        assert "what PPO did to its texts" in first and "location.reload" in page and "when step 2 was the newest" in page
        summary.rename(copy / "summary.json")
        out, _ = watch.communicate(timeout=60)
    finally:
        watch.kill()
    assert watch.returncode == 0 and len(out.splitlines()) == 1
    assert "location.reload" not in (copy / "report.html").read_text(encoding="utf-8")


def test_watch_ends_quietly_at_ctrl_c_and_a_page_that_is_not_written_is_exit_code_1(copy):
    (copy / "summary.json").unlink()
    # A program in the background, as these tests may be, hands on that SIGINT is ignored.
    watch = subprocess.Popen([sys.executable, ROOT / "scripts" / "report.py", copy, "--watch"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    watch.stdout.readline()
    watch.send_signal(signal.SIGINT)
    assert watch.communicate(timeout=60) == ("", "") and watch.returncode == 0
    (copy / "report.html").unlink()
    (copy / "report.html").mkdir()
    done = subprocess.run([sys.executable, ROOT / "scripts" / "report.py", copy], capture_output=True, text=True)
    assert done.returncode == 1 and "report.html was not written: Is a directory" in done.stdout


@pytest.mark.parametrize("arguments", [["nowhere"], ["--watch"]])
def test_a_folder_that_is_not_there_is_refused(arguments):
    done = subprocess.run([sys.executable, ROOT / "scripts" / "report.py", *arguments], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith(" is no folder; give that of a run: make watch RUN=runs/review-lm-1\n")


def test_watching_a_run_that_failed_before_its_first_step_does_not_block_its_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "what PPO did" in report.write_report(tmp_path)
    assert run_folder.unused(tmp_path)


ODD_ROWS = [{"step": 1}, {"step": 2, "ppo/mean_raw_scores": "x", "objective/kl": None, "tokens/responses_dist": 5},
            {"step": 3, "tokens/responses_dist": [None]}, {"step": "4"}, 5, {"step": 6, "objective/kl": float("nan"), "ppo/mean_raw_scores": float("inf")}]


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("rows", [ODD_ROWS[:count] for count in range(1, 7)])
def test_odd_metrics_give_a_page(copy, rows, finished):
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not finished:
        (copy / "after.json").unlink()
    assert "<h1>" in html_of(copy)


@pytest.mark.parametrize("tokens", [None, 5, [None] * 20, [{}] * 20, [{"text": ["a"]}] * 20,
                                    [{**{name: [float("nan")] for name in report.COLUMNS}, "text": ["\ud83d"]}] * 20])
def test_odd_numbers_of_tokens_give_a_page(copy, tokens):
    content = json.loads((copy / "after.json").read_text())
    (copy / "after.json").write_text(json.dumps({**content, "tokens": tokens}))
    page = html_of(copy)
    assert "<h1>" in page and "nan)" not in page


def test_a_run_with_more_steps_than_a_curve_shows_has_its_first_and_last_step(monkeypatch):
    from matplotlib.figure import Figure
    axes = []

    def draw_only(title, draw):
        axes.append(Figure().subplots())
        draw(axes[-1])

    monkeypatch.setattr(report, "svg", draw_only)
    report.charts([{"step": step, "ppo/mean_raw_scores": 0.5, "objective/kl": step} for step in range(1, 1301)])
    steps = list(axes[1].lines[0].get_xdata())
    assert len(axes) == 8 and len(steps) == report.POINTS and (steps[0], steps[-1]) == (1, 1300)


# -------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("chromium and chromedriver are not installed: apt-get install chromium chromium-driver")
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def show(browser, folder, width=1280):
    # The size of the page, which a window's may not fall below.
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600})
    browser.get((folder / "report.html").as_uri())
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_a_token_shows_its_numbers_and_nothing_scrolls_sideways(run, browser, width):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    show(browser, run[0], width)
    assert browser.execute_script("return document.documentElement.clientWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    tip, tokens = browser.find_element(By.ID, "tip"), browser.find_elements(By.CSS_SELECTOR, ".token")
    assert not tip.is_displayed()
    numbers = json.loads((run[0] / "before.json").read_text())["tokens"][0]
    for position in (1, len(numbers["text"]) - 1):
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", tokens[position])
        ActionChains(browser).move_to_element(tokens[position]).perform()
        shown = {name: float(number) for name, number in (line.rsplit(" ", 1) for line in tip.text.splitlines()[-6:])}
        names = ("logprob", "ref_logprob", "value", "reward", "advantage")
        logprob, ref_logprob, value, reward, advantage = (numbers[name][position] for name in names)
        assert shown == pytest.approx({"log-prob": logprob, "under the reference": ref_logprob, "log-ratio": logprob - ref_logprob,
                                       "value": value, "reward": reward, "advantage": advantage}, abs=6e-4)
        box = tip.rect
        assert 0 <= box["x"] and box["x"] + box["width"] <= width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_in_a_browser_the_colour_follows_the_choice(run, browser):
    from selenium.webdriver.common.by import By
    show(browser, run[0])
    text = browser.find_element(By.CSS_SELECTOR, ".text")
    def strongest():        # alpha of the colours
        colours = [token.value_of_css_property("background-color") for token in text.find_elements(By.CSS_SELECTOR, ".token")]
        return max(float(colour.rstrip(")").rsplit(" ", 1)[1]) if colour.startswith("rgba") else 1 for colour in colours)
    assert strongest() == 0                                   # before the training, so its log-ratios are 0
    browser.find_element(By.ID, "by-advantage").click()
    assert strongest() > 0.1
    browser.refresh()               # as make watch does
    assert browser.find_element(By.ID, "by-advantage").is_selected()
    browser.find_element(By.ID, "by-log-ratio").click()


def test_in_a_browser_the_keyboard_reaches_every_token_and_the_tip_stays_in_the_window(run, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    show(browser, run[0])
    tip, text = browser.find_element(By.ID, "tip"), browser.find_elements(By.CSS_SELECTOR, ".text")[3]
    browser.execute_script("arguments[0].scrollIntoView({block: 'end'}); arguments[0].focus({preventScroll: true})", text)
    tokens = text.find_elements(By.CSS_SELECTOR, ".token")
    for token in tokens[:3]:
        text.send_keys(Keys.ARROW_RIGHT)
        assert "shown" in token.get_attribute("class") and tip.is_displayed()
        box = browser.execute_script("const box = arguments[0].getBoundingClientRect(); return [box.top, box.bottom, innerHeight]", tip)
        assert 0 <= box[0] and box[1] <= box[2]
    text.send_keys(Keys.ESCAPE)
    assert not tip.is_displayed()


def test_in_a_browser_html_in_a_text_is_shown_and_not_executed(copy, browser):
    from selenium.webdriver.common.by import By
    attack = '<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">"\'</span>'
    for name in ("before", "after"):
        content = json.loads((copy / f"{name}.json").read_text())
        content["prompts"][0] = content["responses"][0] = content["tokens"][0]["text"][0] = attack
        content["tokens"][1] = {key: [] for key in content["tokens"][1]}
        content["responses"][1] = attack
        (copy / f"{name}.json").write_text(json.dumps(content))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "prompts": attack}))
    html_of(copy)
    show(browser, copy)
    assert browser.execute_script("return window.hacked") is None
    assert browser.find_element(By.CSS_SELECTOR, ".text").text.startswith(attack)


@pytest.mark.parametrize("text", ["\u0641\u064a\u0644\u0645 \u062c\u064a\u062f", "\u6620\u753b", "\U0001f600", "x" * 400])
def test_in_a_browser_other_alphabets_and_long_words_fit(copy, browser, text):
    from selenium.webdriver.common.by import By
    for name in ("before", "after"):
        content = json.loads((copy / f"{name}.json").read_text())
        content["tokens"], content["responses"][0] = [], text
        (copy / f"{name}.json").write_text(json.dumps(content))
    html_of(copy)
    show(browser, copy, 390)
    assert text in browser.find_element(By.CSS_SELECTOR, ".text").text
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390


# -------------------------------------------------------------------------------------------------- in a terminal


def test_in_a_terminal_one_line_is_rewritten_and_in_a_file_each_step_has_one(run, tmp_path):
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 40, 140, 0, 0))         # rows and columns
    done = subprocess.Popen([sys.executable, ROOT / "scripts" / "train.py", *SMALL, "--output_dir", tmp_path / "run"], stdout=terminal,
                            stderr=subprocess.DEVNULL)
    os.close(terminal)
    printed, deadline = b"", time.monotonic() + 200
    while time.monotonic() < deadline:
        try:
            printed += os.read(main, 10_000)
        except OSError:         # the program has ended
            break
    assert done.wait(timeout=60) == 0
    lines = [line for line in printed.decode().replace("\r\n", "\n").split("\n") if re.search(r"step +\d/2", line)]
    assert len(lines) == 1 and lines[0].count("\r") >= 2
    assert re.search(r"step 2/2  \d+:\d\d left  score +\d\.\d+  KL .* tokens/s", lines[0])
    assert len(re.findall(r"^step +\d/2  score .* left$", run[1], re.M)) == 2 and "\r" not in run[1]
