"""report.html of a run: what PPO did to the score and to the texts, on one page that needs no network.

    python scripts/report.py runs/review-lm-1           # write it again from the files of the run
    python scripts/report.py runs/review-lm-1 --watch   # and every few seconds while it goes on: make watch

Why: a score that rises does not say what the policy learned. A person sees it when the same prompts are
answered before and after, each token coloured by how the training changed it, beside the KL that this cost.
The page is made from the files that every run leaves: a run that stopped early, or that has lost a file, has
a page too, which says what is missing. scripts/train.py calls `token_numbers` and `write_report`.
Tested by tests/test_report.py.
"""
import argparse
import io
import json
import math
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jinja2
import torch

import ppo_core
import rewards
from run_folder import Evaluation, replace_file
from run_health import NAN, is_number, is_numbers, lengths_of, warnings_of

TEMPLATE = Path(__file__).with_name("report.html.jinja")
PROMPTS = 16            # that are shown before and after
EXTREMES = 5            # responses with the largest gain, the largest loss, the highest KL
POINTS = 500            # steps that a curve shows, at most
RELOAD = 5              # seconds between two versions of the page of a run that goes on
COLUMNS = ("logprob", "ref_logprob", "value", "reward", "advantage")


# ----------------------------------------------------------------------------------- numbers of each token


@torch.no_grad()
def token_numbers(trainer, queries, responses, scores):
    """-> for each response a dict of lists (R_i,): "text", and COLUMNS, under the policy as it is now.

    queries, responses: lists of (Q_i,), (R_i,). Rewards and advantages are computed as in `step`, with the
    scores as they came (neither scaled nor clipped); advantages are whitened over these responses.
    """
    device, config = trainer.accelerator.device, trainer.config
    batch = ppo_core.collate([q.to(device) for q in queries], [r.to(device) for r in responses], None,
                             trainer.tokenizer.pad_token_id)
    logprobs, values, ref_logprobs, kl = trainer.record(batch)                                  # (B, R) each
    token_rewards, _ = rewards.token_rewards(torch.tensor(scores, device=device), kl, batch["mask"],
                                             trainer.kl_ctl.value)
    advantages, _ = ppo_core.gae(token_rewards, values, batch["mask"], config.gamma, config.lam)
    advantages = ppo_core.masked_whiten(advantages, batch["mask"])
    columns = torch.stack([logprobs, ref_logprobs, values, token_rewards, advantages]).double()    # (5, B, R)
    rows = []
    for i, response in enumerate(responses):
        numbers = columns[:, i, :len(response)].tolist()
        rows.append({"text": pieces(trainer.tokenizer, queries[i], response),
                     **{name: [round(x, 4) for x in row] for name, row in zip(COLUMNS, numbers)}})
    return rows


def pieces(tokenizer, query, response):
    """-> the text of each token of `response` (R,). A letter that takes several tokens is in the last one."""
    found, before, pending = [], query.tolist()[-1:], []
    for token in response.tolist():
        pending.append(token)
        # A token is decoded together with the one before it: alone, it may lose the space at its start.
        start = tokenizer.decode(before)
        text = tokenizer.decode(before + pending)[len(start):]
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(pending) < 8:
            found.append("")            # the first bytes of a letter
            continue
        found.append(text)
        before, pending = [token], []
    return found


# ------------------------------------------------------------------------------------- the files of a run


def read_run(folder):
    """-> dict: name, config, rows and left_out (of metrics.jsonl), step, before, after, newest (Evaluation or
    None), summary; and "missing": sentences about what could not be read."""
    folder, missing = Path(folder), []

    def read(name, how, why):
        try:
            found = how(folder / name)
        except (OSError, ValueError):
            found = None
        if found is None:
            missing.append(f"{name} {'is damaged' if (folder / name).is_file() else 'is not there'}: {why}.")
        return found

    config = read("config.json", read_dict, "the settings of the run are not known") or {}
    lines = read("metrics.jsonl", read_metrics, "there are no curves") or []
    rows = [line for line in lines if not line.get("ppo/bad_batch")]
    before = read("before.json", Evaluation.read, "there are no texts from before the training")
    after = read("after.json", Evaluation.read, "the held-out prompts are answered again after the last step")
    summary = read("summary.json", read_dict, "it is written when a run is finished") or {}
    if not rows and not any("metrics.jsonl" in sentence for sentence in missing):
        missing.append("metrics.jsonl holds no step: there are no curves.")
    if before is not None and after is not None and before.prompts != after.prompts:
        missing.append("before.json and after.json hold other prompts: their texts cannot be compared.")
        after = None
    path = folder / "newest.json"       # written at each step, and of use only while the run goes on
    newest = Evaluation.read(path) if after is None and path.is_file() else None
    return {"name": folder.resolve().name, "config": config, "rows": rows, "left_out": len(lines) - len(rows),
            "step": lines[-1]["step"] if lines else 0, "before": before, "after": after, "newest": newest,
            "summary": summary, "missing": missing}


def read_dict(path):
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else None


def read_metrics(path):
    """-> a dict of numbers and lists of numbers for each step. A line that is cut, because it is just being
    written, is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and is_number(row.get("step")):
            rows.append({name: value for name, value in row.items() if is_number(value) or is_numbers(value)})
    return rows


# ------------------------------------------------------------------------------- what the page says of a run


def outcome(run):
    """-> one sentence."""
    rows, before, after, summary = run["rows"], run["before"], run["after"], run["summary"]
    if before is None or after is None:
        scores = summary.get("score before"), summary.get("score after")
        if all(map(is_number, scores)):
            return f"The mean score on the held-out prompts went from {scores[0]:.3f} to {scores[1]:.3f}."
        newest = f", with a mean score of {rows[-1].get('ppo/mean_raw_scores', NAN):.3f}" if rows else ""
        return f"The run has done {run['step']} of {run['config'].get('steps', '?')} steps{newest}."
    gains = [b - a for a, b in zip(before.scores, after.scores)]
    # Twice the standard error of the mean gain: a smaller change may be chance.
    noise = 2 * statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
    gain = statistics.fmean(gains)
    verb = "hardly changed" if abs(gain) <= noise else "raised" if gain > 0 else "lowered"
    tokens = [columns for columns in map(columns_of, after.tokens or ()) if columns]
    kl = f", at a KL of {statistics.fmean(map(log_ratio, tokens)):.1f} nats per response" if tokens else ""
    return (f"{run['step']} steps of PPO {verb} the mean score on {len(gains)} held-out prompts: "
            f"{before.score:.3f} before, {after.score:.3f} after{kl}; distinct bigrams "
            f"{before.distinct_bigrams:.2f} before, {after.distinct_bigrams:.2f} after.")


def responses_of(run):
    """-> [{"title": ..., "pairs": [[before, after], ...]}, ...], and the scales of the two colours."""
    before, after, newest = run["before"], run["after"], run["newest"]
    sides = [("before", before), ("after", after)] if after is not None else [("before", before)]

    def pairs_of(indices):
        return [[response_of(name, side, i) for name, side in sides] for i in indices]

    sections = []
    if newest is not None:
        sections.append((f"Responses of step {run['step']}",
                         [[response_of("now", newest, i)] for i in range(len(newest.prompts))]))
    if before is not None:
        sections.append(("The same prompts before and after" if after else "Before the training",
                         pairs_of(range(len(before.prompts))[:PROMPTS])))
    if before is not None and after is not None:
        gains = {i: b - a for i, (a, b) in enumerate(zip(before.scores, after.scores))}
        ranked = sorted(gains, key=gains.get, reverse=True)
        sections += [("The largest gains", pairs_of([i for i in ranked[:EXTREMES] if gains[i] > 0])),
                     ("The largest losses", pairs_of([i for i in ranked[::-1][:EXTREMES] if gains[i] < 0]))]
        columns = list(map(columns_of, after.tokens or ()))
        ratios = {i: log_ratio(found) for i, found in enumerate(columns) if found}
        far = sorted(ratios, key=ratios.get, reverse=True)
        sections.append(("The highest KL to the reference", pairs_of(far[:EXTREMES])))
    tokens = [token for _, pairs in sections for pair in pairs for response in pair
              for token in response["tokens"]]
    scales = {name: percentile([abs(token[name]) for token in tokens]) for name in ("advantage", "log_ratio")}
    return [{"title": title, "pairs": pairs} for title, pairs in sections if pairs], scales


def columns_of(found):
    """-> what token_numbers made for a response, or {} if it is damaged or not there."""
    whole = (isinstance(found, dict) and isinstance(found.get("text"), list)
             and all(isinstance(text, str) for text in found["text"])
             and all(is_numbers(found.get(name)) for name in COLUMNS)
             and len({len(found[name]) for name in ("text", *COLUMNS)}) == 1)
    return found if whole else {}


def response_of(name, side, i):
    """-> what the page shows of response i of an Evaluation."""
    columns = columns_of(side.tokens[i]) if side.tokens else {}
    rows = zip(*(columns[key] for key in ("text", *COLUMNS))) if columns else ()
    tokens = [dict(zip(("text", *COLUMNS), row)) for row in rows]
    for token in tokens:
        token["log_ratio"] = token["logprob"] - token["ref_logprob"]
    return {"name": name, "prompt": side.prompts[i], "response": side.responses[i], "score": side.scores[i],
            "tokens": tokens, "log_ratio": round(log_ratio(columns), 1) + 0.0 if columns else None}


def log_ratio(columns):
    """Sum over the tokens of log pi - log pi_ref, in nats: its mean over responses is the KL."""
    return sum(columns["logprob"]) - sum(columns["ref_logprob"])


def percentile(values, share=0.95):
    """-> the value that `share` of all do not exceed; 1 if there are none, or only zeros."""
    ordered = sorted(value for value in values if math.isfinite(value))
    return (ordered[int(share * (len(ordered) - 1))] if ordered else 0.0) or 1.0


# ---------------------------------------------------------------------------------------------- the page


def charts(rows):
    """-> [(title, sentence, svg)]: score against KL, and the curves over the steps."""
    if not rows:
        return []
    if len(rows) > POINTS:      # evenly spread, with the first and the last step
        rows = [rows[round(i * (len(rows) - 1) / (POINTS - 1))] for i in range(POINTS)]
    steps = [row["step"] for row in rows]

    def column(name):
        return [row.get(name, NAN) for row in rows]

    score, kl = column("ppo/mean_raw_scores"), column("objective/kl")

    def trade_off(axis):
        axis.plot(kl, score, color="#9aa5b1", linewidth=0.8)
        axis.scatter(kl, score, c=steps, cmap="viridis_r", s=14, zorder=2)
        axis.set_xlabel("KL to the reference, nats per response")
        axis.set_ylabel("mean score")

    def over_steps(**lines):
        def draw(axis):
            for label, values in lines.items():
                axis.plot(steps, values, label=label.replace("_", " "), linewidth=1.2,
                          marker="." if len(steps) == 1 else None)
            axis.set_xlabel("step")
            axis.xaxis.get_major_locator().set_params(integer=True)
            if len(lines) > 1:
                axis.legend(fontsize=8, frameon=False)
        return draw

    lengths = list(map(lengths_of, rows))
    losses = over_steps(policy=column("ppo/loss/policy"), value=column("ppo/loss/value"))
    spread = over_steps(longest=list(map(max, lengths)), mean=column("tokens/responses_len_mean"),
                        shortest=list(map(min, lengths)))
    panels = [
        ("Score against KL", "The points are steps, light at first, dark at the end. The score is what the "
         "reward gives, the KL is what it costs.", trade_off),
        ("Score", "Mean of the batch; it should rise.", over_steps(score=score)),
        ("KL", "To the reference, nats per response.", over_steps(KL=kl)),
        ("Entropy", "Nats per token. A sudden fall: the policy collapses.",
         over_steps(entropy=column("ppo/policy/entropy"))),
        ("Losses", "The value loss should fall.", losses),
        ("Clip fraction", "Share of tokens that had moved as far as a step may; 0.05 to 0.3 is usual.",
         over_steps(clip_fraction=column("ppo/policy/clipfrac"))),
        ("Explained variance", "Of the values: 1 = they predict the returns, 0 = no better than a mean.",
         over_steps(explained=column("ppo/val/var_explained"))),
        ("Response length", "Tokens.", spread)]
    return [(title, sentence, svg(title, draw)) for title, sentence, draw in panels]


def svg(title, draw):
    """-> the picture that draw(axis) makes, as an <svg> element whose letters stay letters."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif",
                                "axes.spines.top": False, "axes.spines.right": False}):
        figure, axis = pyplot.subplots(figsize=(4.6, 2.9), layout="constrained")
        draw(axis)
        axis.grid(alpha=0.25)
        file = io.StringIO()
        # without a date, the same run gives the same page
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    text = file.getvalue()
    return text[text.index("<svg"):]


def page(run, reload=None):
    """-> the page as HTML. reload: seconds after which the browser loads it again; None = never."""
    # autoescape: the texts of a policy may look like HTML, and are shown, not executed
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    sections, scales = responses_of(run)
    colours = any(response["tokens"] for section in sections for pair in section["pairs"]
                  for response in pair)
    written = time.strftime("%H:%M:%S") if reload else None
    return template.render(run=run, outcome=outcome(run), charts=charts(run["rows"]), sections=sections,
                           warnings=warnings_of(run["rows"], run["config"], run["left_out"]), scales=scales,
                           colours=colours, reload=reload, written=written, isfinite=math.isfinite)


def write_report(folder, reload=None):
    """Write report.html into the folder of a run. -> a sentence: where it is, or why it was not written."""
    path = Path(folder) / "report.html"
    try:
        # "replace": half a letter, which a policy may write, is no UTF-8
        replace_file(path, page(read_run(folder), reload).encode("utf-8", "replace"))
    except OSError as error:        # the model is in final/ and the numbers are in summary.json
        return f"{path} was not written: {error.strerror}; make watch RUN={folder} writes it again"
    return f"what PPO did to its texts: {path}"


def watch(folder):
    """Write the page again and again, until the run is finished. -> the last sentence of write_report."""
    while True:
        finished = (folder / "summary.json").is_file()
        sentence = write_report(folder, None if finished else RELOAD)
        if finished:
            return sentence
        print(f"{time.strftime('%H:%M:%S')} {sentence}", flush=True)
        time.sleep(RELOAD)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="folder of a run: make watch RUN=runs/review-lm-1")
    parser.add_argument("--watch", action="store_true", help="write it again until the run is finished")
    arguments = parser.parse_args()
    if arguments.run is None or not arguments.run.is_dir():
        sys.exit(f"error: {arguments.run} is no folder; give that of a run: make watch RUN=runs/review-lm-1")
    try:
        sentence = watch(arguments.run) if arguments.watch else write_report(arguments.run)
    except KeyboardInterrupt:
        return
    print(sentence)
    sys.exit(1 if "was not written" in sentence else 0)


if __name__ == "__main__":
    main()
