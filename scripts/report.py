"""report.html of a run: what PPO did to the score and to the texts, on one page that needs no network.

    python scripts/report.py runs/review-lm-1           # write it again from the files of the run
    python scripts/report.py runs/review-lm-1 --watch   # and every few seconds while it goes on: make watch

Why: a score that rises does not say what the policy learned. A person sees it when the same prompts are
answered before and after, each token in the colour of what it earned, beside the KL that the score has cost.
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

TEMPLATE = Path(__file__).with_name("report.html.jinja")
PROMPTS = 16            # that are shown before and after
EXTREMES = 5            # responses with the largest gain, the largest loss, the highest KL
POINTS = 500            # at most, of a curve
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
    """-> the text of each token of `response` (R,). A letter of several tokens is at the last of them."""
    found, before, pending = [], query.tolist()[-1:], []
    for token in response.tolist():
        pending.append(token)
        # With the token before it, because alone it may lose its space.
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
    """-> dict: config, rows (of metrics.jsonl), before, after, summary; and "missing": sentences."""
    folder, missing = Path(folder), []

    def read(name, how, why):
        try:
            found = how(folder / name)
        except (OSError, ValueError):
            found = None
        if found is None:
            missing.append(f"{name} {'is damaged' if (folder / name).is_file() else 'is not there'}: {why}.")
        return found

    def load(path):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None

    config = read("config.json", load, "the settings of the run are not known") or {}
    rows = read("metrics.jsonl", read_metrics, "there are no curves") or []
    before = read("before.json", Evaluation.read, "there are no texts from before the training")
    after = read("after.json", Evaluation.read, "the held-out prompts are answered again after the last step")
    summary = read("summary.json", load, "the run is not finished") or {}
    if not rows and not any("metrics.jsonl" in sentence for sentence in missing):
        missing.append("metrics.jsonl holds no step: there are no curves.")
    path = folder / "newest.json"       # written at each step, and of use only while the run goes on
    newest = Evaluation.read(path) if after is None and path.is_file() else None
    return {"name": folder.resolve().name, "config": config, "rows": rows, "before": before, "after": after,
            "newest": newest, "summary": summary, "missing": missing}


def read_metrics(path):
    """-> dicts of the steps whose batch was not left out. Of a line that is being written nothing is read."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row and not row.get("ppo/bad_batch"):
            rows.append(row)
    return rows


# ------------------------------------------------------------------------------- what the page says of a run


def outcome(run):
    """-> one sentence."""
    rows, before, after = run["rows"], run["before"], run["after"]
    steps = run["config"].get("steps", "?")
    if after is None or before is None:
        newest = f", with a mean score of {rows[-1]['ppo/mean_raw_scores']:.3f}" if rows else ""
        return f"The run has done {rows[-1]['step'] if rows else 0} of {steps} steps{newest}."
    verb = "raised" if after.score >= before.score else "lowered"
    kl = f", at a KL of {rows[-1]['objective/kl']:.1f} nats per response to the reference" if rows else ""
    return (f"{steps} steps of PPO {verb} the mean score on {len(after.scores)} held-out prompts from "
            f"{before.score:.3f} to {after.score:.3f}{kl}; distinct bigrams went from "
            f"{before.distinct_bigrams:.2f} to {after.distinct_bigrams:.2f}.")


def warnings_of(rows):
    """-> sentences about statistics that left the healthy range of docs/metrics.md, each with an advice."""
    def series(name):
        return [row[name] for row in rows if isinstance(row.get(name), (int, float))]

    def end(name):              # the mean of the last fifth of the steps
        values = series(name)
        return statistics.fmean(values[-max(1, len(values) // 5):]) if values else math.nan

    found, entropy = [], series("ppo/policy/entropy")
    if entropy and end("ppo/policy/entropy") < 0.3 * entropy[0]:
        found.append(f"The entropy fell from {entropy[0]:.2f} to {end('ppo/policy/entropy'):.2f} nats per "
                     "token: the policy says nearly the same each time. Raise init_kl_coef, or stop earlier.")
    explained = end("ppo/val/var_explained")
    if explained < 0:
        found.append(f"The explained variance ended at {explained:.2f}, below 0: the values are worse than "
                     "their mean. Raise vf_coef or value_learning_rate, or train for more steps.")
    clipped = max(series("ppo/policy/clipfrac"), default=0.0)
    if clipped > 0.5:
        found.append(f"The clip fraction reached {clipped:.2f}, above 0.5: most tokens had moved as far as a "
                     "step may. Lower learning_rate or ppo_epochs.")
    lengths = rows[-1].get("tokens/responses_dist", []) if rows else []
    if len(lengths) > 1 and len(set(lengths)) == 1:
        found.append(f"All {len(lengths)} responses of the last step have {lengths[0]:.0f} tokens. If that "
                     "is max_new_tokens, none ends by itself: raise it, or score unfinished texts lower.")
    kl = end("objective/kl")
    if kl < -1:
        found.append(f"The KL ended at {kl:.1f}, and a KL is never below 0. Sample from the distribution "
                     "that is trained: no top_k, top_p or other temperature.")
    not_finite = [name for name in ("ppo/loss/total", "objective/kl")
                  if not all(map(math.isfinite, series(name)))]
    if not_finite:
        found.append(f"{' and '.join(not_finite)} held NaN or infinity. Lower learning_rate, and see "
                     "docs/reliability.md.")
    return found


def responses_of(run):
    """-> [{"title": ..., "pairs": [[before, after], ...]}, ...], and the scales of the two colours."""
    before, after, newest = run["before"], run["after"], run["newest"]
    sections = []
    if newest is not None:
        pairs = [[response_of("now", newest, i)] for i in range(len(newest.prompts))]
        sections.append({"title": "Of the newest step", "pairs": pairs})
    if before is None:
        return sections, {}
    sides = [before] if after is None or len(after.prompts) != len(before.prompts) else [before, after]

    def pair(i):
        return [response_of(name, side, i) for name, side in zip(("before", "after"), sides)]

    indices = range(len(before.prompts))
    sections += [{"title": "The same prompts before and after" if len(sides) == 2 else "Before the training",
                  "pairs": [pair(i) for i in indices[:PROMPTS]]}]
    if len(sides) == 2:
        def gain(i):
            return after.scores[i] - before.scores[i]

        ranked = sorted(indices, key=gain, reverse=True)
        sections += [{"title": "The largest gains",
                      "pairs": [pair(i) for i in ranked[:EXTREMES] if gain(i) > 0]},
                     {"title": "The largest losses",
                      "pairs": [pair(i) for i in ranked[::-1][:EXTREMES] if gain(i) < 0]}]
        if after.tokens:
            far = sorted(indices, key=lambda i: kl_of(after.tokens[i]), reverse=True)
            sections.append({"title": "The highest KL to the reference",
                             "pairs": [pair(i) for i in far[:EXTREMES]]})
    tokens = [t for section in sections for two in section["pairs"] for one in two for t in one["tokens"]]
    scales = {name: percentile([abs(token[name]) for token in tokens]) for name in ("advantage", "log_ratio")}
    return [section for section in sections if section["pairs"]], scales


def response_of(name, side, i):
    """-> what the page shows of response i of an Evaluation."""
    columns = side.tokens[i] if side.tokens else {}
    rows = zip(*(columns[key] for key in ("text", *COLUMNS))) if columns else ()
    tokens = [dict(zip(("text", *COLUMNS), row)) for row in rows]
    for token in tokens:
        token["log_ratio"] = token["logprob"] - token["ref_logprob"]
    return {"name": name, "prompt": side.prompts[i], "response": side.responses[i], "score": side.scores[i],
            "tokens": tokens, "kl": kl_of(columns) if columns else None}


def kl_of(columns):
    """Sum over the tokens of log pi - log pi_ref, in nats."""
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
    rows = rows[::-(-len(rows) // POINTS)]
    steps = [row["step"] for row in rows]

    def column(name):
        return [row.get(name, math.nan) for row in rows]

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

    lengths = [row.get("tokens/responses_dist") or [math.nan] for row in rows]
    losses = over_steps(policy=column("ppo/loss/policy"), value=column("ppo/loss/value"))
    spread = over_steps(longest=list(map(max, lengths)), mean=column("tokens/responses_len_mean"),
                        shortest=list(map(min, lengths)))
    panels = [
        ("Score against KL", "Each point is a step, light at first, dark at the end. The score is what the "
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
    return template.render(run=run, outcome=outcome(run), warnings=warnings_of(run["rows"]),
                           charts=charts(run["rows"]), sections=sections, scales=scales, reload=reload)


def write_report(folder, reload=None):
    """Write report.html into the folder of a run. -> a sentence: where it is, or why it was not written."""
    path = Path(folder) / "report.html"
    try:
        replace_file(path, page(read_run(folder), reload))
    except OSError as error:        # the model is in final/ and the numbers are in summary.json
        return f"{path} was not written: {error.strerror}; make watch RUN={folder} writes it again"
    return f"what PPO did to its texts: {path}"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--watch", action="store_true", help="write it again until the run is finished")
    arguments = parser.parse_args()
    if not arguments.run.is_dir():
        sys.exit(f"error: {arguments.run} is no folder; give the folder of a run, such as runs/review-lm-1")
    goes_on = arguments.watch
    while goes_on:
        goes_on = not (arguments.run / "summary.json").is_file()
        sentence = write_report(arguments.run, RELOAD if goes_on else None)
        print(f"{time.strftime('%H:%M:%S')} {sentence}", flush=True)
        if goes_on:
            time.sleep(RELOAD)
    if not arguments.watch:
        print(write_report(arguments.run))


if __name__ == "__main__":
    main()
