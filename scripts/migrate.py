"""Reads a script that was written for TRL's classic PPOTrainer, and says line by line what has to be changed.

    python scripts/migrate.py path/to/script.py

It prints one line for each import, argument, method and setting that matters: `ok`, `change` with what to
write instead, or `missing`. The exit status is 0 if it found nothing to change but the import lines (see
docs/migrating.md), 1 if something else has to be changed, 2 if the file cannot be read. Nothing of it is
executed: it is read with `ast`, so what is put together only while it runs is not seen.
Tested by tests/test_migrate.py.
"""
import ast
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import trl_names
from ppo_core import HARMLESS, NEUTRAL

SEQ2SEQ = "AutoModelForSeq2SeqLMWithValueHead"
CONFIG_CHANGES = {"push_to_hub_if_best_kwargs": "leave it out; upload what save_pretrained wrote",
                  "is_encoder_decoder": "leave it out; only causal models can be trained"}
GENERATE_ARGUMENTS = {"length_sampler", "batch_size", "return_prompt", "generate_ref_response",
                      "remove_padding", "generation_config", "allow_other_distribution"}
TRAINER_CHANGES = {"training_data_collator": "leave it out; ppo_core.collate pads"}
# What transformers 5 and new peft took away, whatever PPO library is used.
OTHER_CHANGES = {"return_all_scores": "use top_k=None, and read the scores by label",
                 "encode_plus": "call the tokenizer itself", "batch_encode_plus": "call the tokenizer itself",
                 "prepare_model_for_int8_training": "use peft.prepare_model_for_kbit_training",
                 "load_tool": "write the tool as a function", "BloomTokenizerFast": "use AutoTokenizer",
                 "use_auth_token": "use token="}


UNKNOWN = object()      # a value that is no literal


class Report(ast.NodeVisitor):
    """Collects (line, "ok" | "change" | "missing", text) while it walks over a script."""

    def __init__(self, tree):
        # kinds: {variable, attribute or subclass: the name of TRL's that made it}; config: of PPOConfig(...)
        self.lines, self.kinds, self.dicts, self.config = [], {}, {}, {}
        self.aliases, self.inside = {}, []          # inside: the classes around the current node
        nodes = list(ast.walk(tree))
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and is_trl(node.module):
                self.aliases.update({alias.asname: alias.name for alias in node.names if alias.asname})
        for node in nodes:
            if isinstance(node, ast.ClassDef) and "PPOTrainer" in map(self.called, node.bases):
                self.kinds[node.name] = "PPOTrainer"
        for node in nodes:
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                self.note_assignment(target, node.value)
            elif isinstance(node, ast.Call) and name_of(node.func) == "update":     # kwargs.update(top_k=50)
                self.note_entries(owner_of(node.func), self.arguments_of(node)[0])
        for node in nodes:
            if isinstance(node, ast.Call) and self.called(node.func) == "PPOConfig":
                self.config.update(self.arguments_of(node)[0])
        self.visit(tree)

    def note_assignment(self, target, value):
        if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
            # kwargs["top_k"] = 50
            self.note_entries(name_of(target.value), {target.slice.value: literal(value)})
        elif name_of(target) and value is not None:
            if isinstance(value, ast.Call):
                called = self.called(value.func)
                self.kinds[name_of(target)] = self.kinds.get(called, called)
            self.note_entries(name_of(target), entries_of(value))

    def note_entries(self, name, entries):
        """A dict that is made in several places has the entries of all of them."""
        known = self.dicts.get(name)
        self.dicts[name] = known if entries is None else {**(known or {}), **entries}

    def called(self, node):
        """-> the name of a function or class, without its alias."""
        return self.aliases.get(name_of(node), name_of(node))

    def say(self, node, status, text):
        if (node.lineno, status, text) not in self.lines:
            self.lines.append((node.lineno, status, text))

    def visit_Import(self, node):
        for alias in node.names:
            if is_trl(alias.name):
                self.say(node, "change", f"import {alias.name}: import the names themselves, from trl_names")

    def visit_ImportFrom(self, node):
        for alias in node.names:
            if is_trl(node.module) and alias.name not in vars(trl_names):
                remedy = trl_names.MISSING.get(alias.name, "write it yourself")
                self.say(node, "missing", f"{alias.name}: {remedy}")
            elif is_trl(node.module):
                self.say(node, "ok", f"from trl_names import {alias.name}")
            self.check_other(node, alias.name)

    def visit_ClassDef(self, node):
        if node.name in self.kinds:
            for item in node.body:
                if getattr(item, "name", None) in trl_names.TRL_METHODS:
                    self.say(item, "change", f"{item.name}: nothing calls it; override "
                                             f"{trl_names.TRL_METHODS[item.name]}")
        self.inside.append(node.name)
        self.generic_visit(node)
        self.inside.pop()

    def visit_Call(self, node):
        called, owner = self.called(node.func), owner_of(node.func)
        arguments, complete = self.arguments_of(node)
        if called == "PPOConfig":
            self.check_config(node, arguments)
        elif "PPOTrainer" in (called, self.kinds.get(called)) and owner is None:
            self.check_each(node, arguments, TRAINER_CHANGES)
        elif called == "generate" and self.is_trainer(node.func):
            self.check_generate(node, arguments, complete)
        elif called in {**TRAINER_CHANGES, **trl_names.TRL_METHODS} and self.is_trainer(node.func):
            remedy = TRAINER_CHANGES.get(called, "it is not there; call step()")
            self.say(node, "change", f"{owner}.{called}(): {remedy}")
        elif called == "from_pretrained":
            self.check_model(node, self.aliases.get(owner, owner), arguments)
        elif called == "push_to_hub" or arguments.get("push_to_hub"):
            self.say(node, "change", "push_to_hub: upload what save_pretrained wrote")
        more = arguments.get("model_kwargs")
        names = {*arguments, *(more if isinstance(more, dict) else ())}
        if called == "pipeline" and "load_in_8bit" in names:
            self.say(node, "change", "pipeline(load_in_8bit=...): load the model yourself, with "
                                     "quantization_config=")
        for name in (called, *arguments):
            self.check_other(node, name)
        self.generic_visit(node)

    def check_model(self, node, owner, arguments):
        bits = [name for name in ("load_in_8bit", "load_in_4bit") if arguments.get(name)]
        if owner == SEQ2SEQ:
            self.say(node, "missing", f"{owner}: use a causal model")
        elif "reward_adapter" in arguments:
            self.say(node, "missing", "reward_adapter: load the reward model as a model of its own")
        elif bits and (owner or "").startswith("AutoModel") and "ValueHead" not in owner:
            self.say(node, "change", f"{owner}.from_pretrained({bits[0]}=...): give quantization_config= "
                                     "(transformers 5, not PPO)")

    def is_trainer(self, method):
        """Whether `method`, of a call a.b.method(), belongs to a PPOTrainer or to a subclass of it."""
        owner = owner_of(method)
        if owner in ("self", "super"):
            return bool(self.inside) and self.inside[-1] in self.kinds
        return owner == "ppo_trainer" or self.kinds.get(owner) == "PPOTrainer"

    def arguments_of(self, call):
        """-> {keyword: its value, or UNKNOWN}, and whether these are all: of `**name` only a dict literal is
        known."""
        found, complete = {}, True
        for keyword in call.keywords:
            if keyword.arg is not None:
                found[keyword.arg] = literal(keyword.value)
                continue
            entries = entries_of(keyword.value) or self.dicts.get(name_of(keyword.value))
            complete = complete and entries is not None
            found.update(entries or {})
        return found, complete

    def check_each(self, node, arguments, changes):
        for name, value in arguments.items():
            if name in changes and (value is UNKNOWN or value):
                self.say(node, "change", f"{name}: {changes[name]}")

    def check_config(self, node, arguments):
        fields = {field.name for field in dataclasses.fields(trl_names.PPOConfig)}
        for name in arguments:
            if name not in fields:
                self.say(node, "change", f"PPOConfig has no field {name}; leave it out")
        self.check_each(node, arguments, CONFIG_CHANGES)
        if UNKNOWN not in arguments.values() and set(arguments) <= fields - set(CONFIG_CHANGES):
            try:
                trl_names.PPOConfig(**arguments)
            except (ValueError, TypeError) as error:
                self.say(node, "change", f"PPOConfig: {error}")
        self.say(node, "ok", f"PPOConfig with {len(arguments)} settings")

    def check_generate(self, node, arguments, complete):
        entries = arguments.get("generation_config")
        for name, value in {**(entries if isinstance(entries, dict) else {}), **arguments}.items():
            shown = "..." if value is UNKNOWN else value
            if name in ("top_k", "top_p", "temperature"):
                expected = self.config.get(name, {"top_k": 0}.get(name, 1.0))
                if value not in (None, expected):
                    self.say(node, "change", f"generate({name}={shown}): move it to PPOConfig({name}="
                                             f"{shown}), so that this distribution is also trained")
            elif name == "attention_mask":
                self.say(node, "change", "generate(attention_mask=...): leave it out; the lengths tell it")
            elif name in NEUTRAL and value not in (None, *NEUTRAL[name]):
                self.say(node, "change", f"generate({name}={shown}): it changes the distribution that is "
                                         "sampled; leave it out")
            elif name not in {*NEUTRAL, *HARMLESS, *GENERATE_ARGUMENTS} and (
                    value is UNKNOWN or value not in trl_names.NO_EFFECT.get(name, ())):
                self.say(node, "change", f"generate({name}=...): leave it out, or evaluate with "
                                         "allow_other_distribution=True")
        if not complete:
            self.say(node, "ok", "generate(**...): some of these arguments are not known before it runs")
        elif "do_sample" not in arguments:
            self.say(node, "ok", "generate() without do_sample: it samples here, and was greedy in TRL")

    def check_other(self, node, name):
        if name in OTHER_CHANGES:
            self.say(node, "change", f"{name}: {OTHER_CHANGES[name]} (transformers 5 and peft, not PPO)")


def is_trl(module):
    return (module or "").split(".")[0] == "trl"


def name_of(node):
    """a.b.c -> "c"; None for what has no name."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)


def owner_of(node):
    """a.b.c -> "b"; a().c -> "a"; None for a plain name."""
    owner = node.value if isinstance(node, ast.Attribute) else None
    return name_of(owner.func if isinstance(owner, ast.Call) else owner)


def literal(node):
    if isinstance(node, ast.Call) and name_of(node.func) == "GenerationConfig":
        return entries_of(node)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):     # TypeError: such as a set of lists
        return UNKNOWN


def entries_of(node):
    """A dict display or a call of dict() -> {name: its value, or UNKNOWN}; anything else -> None."""
    if isinstance(node, ast.Dict):
        return {key.value: literal(value) for key, value in zip(node.keys, node.values)
                if isinstance(key, ast.Constant)}
    if isinstance(node, ast.Call) and name_of(node.func) in ("dict", "GenerationConfig"):
        return {keyword.arg: literal(keyword.value) for keyword in node.keywords if keyword.arg is not None}
    return None


def main(arguments):
    """-> the exit status."""
    if len(arguments) != 1:
        print("usage: python scripts/migrate.py path/to/script.py", file=sys.stderr)
        return 2
    try:
        tree = ast.parse(Path(arguments[0]).read_text(encoding="utf-8-sig"))       # with or without a mark
    except (OSError, ValueError, SyntaxError) as error:
        print(f"error: {arguments[0]} cannot be read as Python: {error}; of a notebook, give what jupyter "
              "nbconvert --to script makes", file=sys.stderr)
        return 2
    lines = sorted(Report(tree).lines)
    for number, status, text in lines:
        print(f"line {number:4d}  {status:7s}  {text}")
    to_do = sum(status != "ok" for _, status, _ in lines)
    print(f"{to_do} thing{'s' * (to_do != 1)} to change" if to_do else
          "found nothing to change but the import lines, see docs/migrating.md")
    return 1 if to_do else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
