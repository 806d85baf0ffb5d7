"""Programs in the style of scripts for TRL run with other import lines alone, and scripts/migrate.py says what does not."""
import io
import math
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import migrate

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = sorted((ROOT / "tests" / "clients").glob("*.py"))
MODELS = ROOT / "tests" / "golden" / "models"


def with_other_imports(source):
    """Only the lines that import from trl are changed, as docs/migrating.md says."""
    return re.sub(r"^from trl(\.core)? import", "from trl_names import", source, flags=re.MULTILINE)


@pytest.mark.parametrize("path", CLIENTS, ids=lambda path: path.stem)
def test_a_program_for_trl_runs_with_other_import_lines(path, tmp_path, monkeypatch):
    source = path.read_text(encoding="utf-8")
    assert "from trl import" in source
    script = tmp_path / path.name
    script.write_text(with_other_imports(source), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [path.name, str(MODELS / "gpt2"), str(ROOT / "tests" / "golden" / "tokenizer"), str(tmp_path / "out"),
                                      str(ROOT / "assets")])
    printed = io.StringIO()
    with redirect_stdout(printed):
        runpy.run_path(str(script), run_name="__main__")
    numbers = re.search(r"^RESULT (\S+) (\S+)$", printed.getvalue(), re.MULTILINE)
    assert numbers and all(math.isfinite(float(number)) for number in numbers.groups()), printed.getvalue()


@pytest.mark.parametrize("path", CLIENTS, ids=lambda path: path.stem)
def test_migrate_says_that_these_programs_will_run(path, capsys):
    assert migrate.main([str(path)]) == 0, capsys.readouterr().out
    assert "found nothing to change but the import lines" in capsys.readouterr().out


OLD = {     # a line of an old script, and what has to be said about it
    "from trl import TextEnvironment": "missing  TextEnvironment: run the tool yourself",
    "AutoModelForSeq2SeqLMWithValueHead.from_pretrained(name)": "missing  AutoModelForSeq2SeqLMWithValueHead: use a causal model",
    "from trl.core import no_such_name": "missing  no_such_name: write it yourself",
    "import trl": "change   import trl: import the names themselves, from trl_names",
    "config = PPOConfig(push_to_hub_if_best_kwargs={'repo_id': 'x'})": "change   push_to_hub_if_best_kwargs: leave it out",
    "config = PPOConfig(no_such_field=1)": "change   PPOConfig has no field no_such_field",
    "trainer = PPOTrainer(config, training_data_collator=f)": "change   training_data_collator: leave it out",
    "ppo_trainer.generate(q, top_k=50)": r"change   generate(top_k=50): move it to PPOConfig(top_k=50)",
    "ppo_trainer.generate(q, temperature=0.7)": "change   generate(temperature=0.7): move it to PPOConfig(temperature=0.7)",
    "ppo_trainer.generate(q, repetition_penalty=1.1)": "change   generate(repetition_penalty=1.1): it changes the distribution",
    "ppo_trainer.generate(q, attention_mask=m)": "change   generate(attention_mask=...): leave it out",
    "kwargs = {'top_p': 0.9, 'do_sample': True}\nppo_trainer.generate(q, **kwargs)": "change   generate(top_p=0.9): move it",
    "class Mine(PPOTrainer):\n    def compute_rewards(self):\n        pass": "change   compute_rewards: nothing calls it; override step",
    "t = PPOTrainer(c)\nt.batched_forward_pass(m)": "change   t.batched_forward_pass(): it is not there",
    "t = PPOTrainer(c)\nt.push_to_hub('x')": "change   push_to_hub: upload what save_pretrained wrote",
    "p = pipeline('x', return_all_scores=True)": "change   return_all_scores: use top_k=None",
    "p = pipeline('x', load_in_8bit=True)": "change   pipeline(load_in_8bit=...)",
    "from peft import prepare_model_for_int8_training": "change   prepare_model_for_int8_training: use peft.prepare_model_for_kbit",
    "ids = tokenizer.encode_plus(text)": "change   encode_plus: call the tokenizer itself",
    "from transformers import BloomTokenizerFast": "change   BloomTokenizerFast: use AutoTokenizer",
    "from trl.extras import BestOfNSampler": "missing  BestOfNSampler: sample several responses",
    "model.push_to_hub('x')": "change   push_to_hub: upload",
    "m = AutoModelForCausalLMWithValueHead.from_pretrained(n, reward_adapter='x')": "missing  reward_adapter: load the reward model",
    "m = AutoModelForCausalLM.from_pretrained(n, load_in_8bit=True)": "change   AutoModelForCausalLM.from_pretrained(load_in_8bit=...): give",
    "config = PPOConfig(kl_penalty='k3')": "change   PPOConfig: kl_penalty",
    "config = PPOConfig(batch_size=4, mini_batch_size=3)": "change   PPOConfig: batch_size (4) must be a multiple",
    "class Mine(PPOTrainer):\n    def _kl_penalty(self):\n        pass": "change   _kl_penalty: nothing calls it; override record",
    "t: PPOTrainer = PPOTrainer(c)\nt.generate(q, top_k=50)": "generate(top_k=50): move it",
    "kw = {'do_sample': True}\nkw['top_k'] = 50\nppo_trainer.generate(q, **kw)": "generate(top_k=50): move it",
    "kw = {'do_sample': True}\nkw.update(top_k=50)\nppo_trainer.generate(q, **kw)": "generate(top_k=50): move it",
    "ppo_trainer.generate(q, generation_config=GenerationConfig(top_k=50))": "generate(top_k=50): move it",
    "from transformers import load_tool": "change   load_tool: write the tool as a function",
}


@pytest.mark.parametrize("line", OLD)
def test_what_needs_a_change_is_named_with_its_line(line, tmp_path, capsys):
    script = tmp_path / "old.py"
    script.write_text("import torch\n" + line + "\n", encoding="utf-8")
    assert migrate.main([str(script)]) == 1
    printed = capsys.readouterr().out
    assert OLD[line] in printed and re.search(r"^line +[234] ", printed, re.MULTILINE), printed


FINE = [    # nothing of these has to be changed
    "config = PPOConfig(is_encoder_decoder=False, push_to_hub_if_best_kwargs={})",
    "config = PPOConfig(top_k=50, temperature=0.7)\nppo_trainer.generate(q, top_k=50, temperature=0.7, do_sample=True)",
    "class RewardModel(Module):\n    def forward(self, x):\n        return self.loss(x), self.generate(x, top_k=50)",
    "kwargs = {key: 1 for key in names}\nppo_trainer.generate(q, **kwargs)",
    "settings = {name: 1, 'batch_size': 4}\nconfig = PPOConfig(**settings)",
    "x = {[1]: 2}",
    "model = AutoModelForCausalLMWithValueHead.from_pretrained(n, load_in_8bit=True)",
    "ppo_trainer.generate(q, do_sample=True, return_dict_in_generate=False)",
    "\ufeffconfig = PPOConfig(batch_size=n, mini_batch_size=4)",
]
ALSO = {
    "class A:\n    def f(self):\n        self.trainer = PPOTrainer(c)\n        self.trainer.generate(q, top_k=50)": "generate(top_k=50): move it",
    "from trl import PPOTrainer as T\nt = T(c)\nt.generate(q, top_k=50)": "generate(top_k=50): move it",
    "class Mine(PPOTrainer):\n    def generate(self, q):\n        return super().generate(q, top_k=50)": "generate(top_k=50): move it",
    "class Mine(PPOTrainer):\n    pass\nt = Mine(c, training_data_collator=f)": "training_data_collator: leave it out",
    "class Mine(PPOTrainer):\n    pass\nt = Mine(c)\nt.generate(q, num_beams=4)": "generate(num_beams=4): it changes",
    "p = pipeline('x', model_kwargs={'load_in_8bit': True})": "pipeline(load_in_8bit=...)",
    "ppo_trainer.generate(q, top_k=k)": "generate(top_k=...): move it",
}


@pytest.mark.parametrize("line", FINE)
def test_what_runs_is_not_reported(line, tmp_path, capsys):
    script = tmp_path / "old.py"
    script.write_text(line + "\n", encoding="utf-8")
    assert migrate.main([str(script)]) == 0, capsys.readouterr().out
    assert "without do_sample" not in capsys.readouterr().out


@pytest.mark.parametrize("line", ALSO)
def test_a_trainer_is_recognised_under_other_names(line, tmp_path, capsys):
    script = tmp_path / "old.py"
    script.write_text(line + "\n", encoding="utf-8")
    assert migrate.main([str(script)]) == 1 and ALSO[line] in capsys.readouterr().out


def test_nothing_is_executed_and_a_bad_file_is_one_sentence(tmp_path, capsys):
    script = tmp_path / "harmful.py"
    script.write_text(f"open({str(tmp_path / 'written')!r}, 'w')\n", encoding="utf-8")
    assert migrate.main([str(script)]) == 0 and not (tmp_path / "written").exists()
    script.write_text("def (:\n", encoding="utf-8")
    assert migrate.main([str(script)]) == 2 and migrate.main([str(tmp_path / "no such file")]) == 2 and migrate.main([]) == 2
    assert capsys.readouterr().err.count("cannot be read as Python") == 2


def test_the_command_of_the_page(tmp_path):
    done = subprocess.run([sys.executable, "scripts/migrate.py", str(CLIENTS[0])], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "ok       from trl_names import PPOConfig" in done.stdout
