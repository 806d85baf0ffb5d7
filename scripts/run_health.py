"""Which statistics of a run left their healthy range, and what to do about it: the warnings of report.html.

Why: a score that rises hides most of what can go wrong. docs/metrics.md says what is healthy for each number;
here that table speaks when a number is not.
Tested by tests/test_report.py.
"""
import math
import statistics

NAN = float("nan")

# The name of a statistic; which of its values counts; the lowest and the highest healthy one; what is said.
RANGES = (
    ("objective/kl", "least", -1, math.inf,
     "The KL was {:.1f}, and a KL is never below 0. Sample from the distribution that is trained: no top_k, "
     "top_p or other temperature."),
    ("ppo/val/var_explained", "last", 0, math.inf,
     "The explained variance ended at {:.2f}, below 0: the values predict the returns worse than one "
     "constant would. Usual where the scores rise fast or hardly differ any more; elsewhere raise vf_coef or "
     "value_learning_rate, or train longer."),
    ("ppo/policy/clipfrac", "largest", 0, 0.5,
     "The clip fraction reached {:.2f}, above 0.5: most tokens had moved as far as a step may. Lower "
     "learning_rate or ppo_epochs."),
    ("ppo/policy/approxkl", "largest", 0, 0.1,
     "One step moved the policy by {:.3f} (approxkl), above 0.1. Lower learning_rate or ppo_epochs."),
    ("ppo/val/clipfrac", "largest", 0, 0.3,
     "In one step {:.0%} of the values were clipped, more than 30 %. Raise cliprange_value, or lower "
     "value_learning_rate."),
    ("ppo/skipped_steps", "largest", 0, 0,
     "In one step {:.0f} optimizer steps were skipped. Lower learning_rate, and see ppo/skipped_steps in "
     "docs/metrics.md."))


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_numbers(value):
    return isinstance(value, list) and all(map(is_number, value))


def lengths_of(row):
    """-> the lengths of a step's responses; [NaN] if they are not known."""
    lengths = row.get("tokens/responses_dist")
    return lengths if lengths and is_numbers(lengths) else [NAN]


def series(rows, name):
    """-> the finite values of a statistic; [NaN], with which every comparison is False, if there are none."""
    values = [row[name] for row in rows if is_number(row.get(name)) and math.isfinite(row[name])]
    return values or [NAN]


def at_start(rows, name):
    """-> the mean of a statistic over the first fifth of the steps."""
    values = series(rows, name)
    return statistics.fmean(values[:max(1, len(values) // 5)])


def at_end(rows, name):
    """-> the same over the last fifth."""
    values = series(rows, name)
    return statistics.fmean(values[-max(1, len(values) // 5):])


def warnings_of(rows, config, left_out=0):
    """-> sentences, each with an advice.

    rows: the lines of metrics.jsonl. left_out: batches that led to NaN or infinity and are not in rows.
    """
    value_of = {"least": lambda name: min(series(rows, name)), "last": lambda name: at_end(rows, name),
                "largest": lambda name: max(series(rows, name))}
    values = [(value_of[which](name), low, high, sentence) for name, which, low, high, sentence in RANGES]
    found = [sentence.format(value) for value, low, high, sentence in values if value < low or value > high]
    return (found + warnings_of_learning(rows, config) + warnings_of_lengths(rows, config)
            + warnings_of_bad_numbers(rows, left_out))


def warnings_of_learning(rows, config):
    found, target, kl = [], config.get("target"), at_end(rows, "objective/kl")
    for name, share, sentence in (
            ("ppo/mean_raw_scores", 1.0,
             "The score fell from {:.3f} to {:.3f}. Lower learning_rate, and see what the reward prefers."),
            ("ppo/policy/entropy", 0.3,
             "The entropy fell from {:.2f} to {:.2f} nats per token: the policy says nearly the same each "
             "time. Raise init_kl_coef, or stop earlier.")):
        first, last = at_start(rows, name), at_end(rows, name)
        if last < first - (1 - share) * abs(first):
            found.append(sentence.format(first, last))
    if is_number(target) and kl > 1.5 * target:
        found.append(f"The KL ended at {kl:.1f} nats, far above its target of {target}. Read the texts: do "
                     "they please only the reward? If so, raise init_kl_coef, or stop earlier.")
    return found


def warnings_of_lengths(rows, config):
    lengths, largest = lengths_of(rows[-1] if rows else {}), config.get("max_new_tokens")
    cut = sum(length == largest for length in lengths) / len(lengths)
    if len(lengths) > 1 and len(set(lengths)) == 1:
        return [f"All {len(lengths)} responses of the last step have {lengths[0]:.0f} tokens. Look at where "
                "they end, and lower the score of texts that end too soon or not at all."]
    if cut > 0.5:
        return [f"{cut:.0%} of the last responses have {largest} tokens, the most that is allowed. Raise "
                "max_new_tokens, or lower the score of unfinished texts."]
    return []


def warnings_of_bad_numbers(rows, left_out):
    names = sorted({name for row in rows for name, value in row.items()
                    if is_number(value) and not math.isfinite(value)})
    found = [f"{', '.join(names)} held NaN or infinity."] if names else []
    if left_out:
        found.append(f"{left_out} batches led to NaN or infinity and were left out.")
    return [f"{sentence} Lower learning_rate, and see docs/reliability.md." for sentence in found]
