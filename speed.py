"""FastPPOTrainer gives the numbers of PPOTrainer in less time and memory; tune_cpu() is for its process.

Why: the plain trainer is the clearest code. It also computes what is known already (layers that policy and
reference share) and what nobody reads (padding, responses that have ended), and holds all logits at once.
Levers, with what each saves of the time (of memory: m): `make levers ARGS="--rounds 3"`, on 2 AMD cores.

    float32 products by oneDNN       W1 5 %, W3 15 %; m W3 5 %             tune_cpu
    freed memory kept                W1 9 %, W3 19 %                       tune_cpu
    fused activations                W1 7 %, W6 12 %; m 10 %, 13 %         prepare
    lean sampling loop               W1 16 %, W4 21 %                      generate_batch, sample
    one random number per token      W1 4 %                                draw
    cache with room                  W4 -3 %, W7 15 %                      roomy_cache
    finished rows dropped            W6 3 %; m -4 %                        drop_finished
    sampler's results used again     W1 1 %, W2 11 %                       record, recall
    shared layers run once           W2 24 %, W4 36 %                      record, SharedTrunk
    rows of like length              W6 2 % (-3 to 6 %); m -11 %           mini_batches
    even sizes                       W6 2 %; m 18 %                        even_size
    mini-batches halved              W6 0 %, on Intel a tenth; m -5 %      mini_batches, halved
    logits in chunks                 W7 5 %                                forward, score_tokens
    log-prob, entropy in one pass    nothing; m W1 3 %, W2 4 %             LogprobsAndEntropy

Differs from the plain trainer in: only the order in which float32 numbers are added, and how random numbers
are used. tests/test_speed.py compares each override with the method that it replaces, and whole runs.
Shapes: as in ppo_core.py; n = tokens that are scored, of all rows of a mini-batch.
Copy me: needs ppo_core.py and what that needs. Tested by tests/test_speed.py.
"""
import ctypes
import functools
import os
import sys
import types
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers.activations import NewGELUActivation
from transformers.cache_utils import DynamicCache, DynamicLayer

import distributed
import reference
import rewards
from ppo_core import PPOTrainer, logprobs_from_logits, sampling_arguments

LOGITS_AT_ONCE = 2 ** 24        # numbers: 64 MB in float32

# ------------------------------------------------------------------------- the process


def tune_cpu():
    """Set this process up to train on a CPU. Call it before models are made. With a GPU it does nothing."""
    if not torch.accelerator.is_available():
        use_onednn_for_float32()
        # ZeRO-3 makes and frees every weight again and again, and would need a third more memory.
        if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") != "3":
            keep_freed_memory()


def use_onednn_for_float32(force=False):
    """On AMD processors with AVX-512, multiply float32 matrices by oneDNN: MKL uses half their width there.

    A forward and a backward pass then take half the time. Only 2-D products change: all linear layers use
    them. force: on any processor, for the test. -> True if oneDNN multiplies from now on.
    """
    if "library" in vars(use_onednn_for_float32):
        return True
    cpuinfo = Path("/proc/cpuinfo")
    amd = cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text(encoding="utf-8")
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    if not (force or (amd and wide and torch.backends.mkldnn.is_available())):
        return False
    # _linear_pointwise: what torch's compiler calls for a linear layer
    aten, linear = torch.ops.aten, torch.ops.mkldnn._linear_pointwise

    def stays_with_mkl(a, b):
        # oneDNN builds and keeps a kernel for each new size. What even_size gives is a multiple of 8.
        # Fewer than 8 rows are a rollout of few prompts: few sizes, for which MKL takes twice as long.
        rows, inner = a.shape
        varied = (rows % 8 and 8 < rows < 4096) or (inner % 8 and inner < 4096)
        return varied or {a.dtype, b.dtype} != {torch.float32} or 0 in (a.numel(), b.numel())

    def mm(a, b):                                                               # (M, K), (K, N) -> (M, N)
        if stays_with_mkl(a, b):        # `out` still calls the kernel that is replaced here
            return aten.mm.out(a, b, out=a.new_empty(len(a), b.shape[1]))
        return linear(a, b.t(), None, "none", [], "")

    def addmm(bias, a, b, *, beta=1, alpha=1):
        usual = beta == alpha == 1 and bias.dtype == torch.float32 and bias.shape == b.shape[1:]
        if stays_with_mkl(a, b) or not usual:
            return aten.addmm.out(bias, a, b, beta=beta, alpha=alpha, out=a.new_empty(len(a), b.shape[1]))
        return linear(a, b.t(), bias, "none", [], "")

    library = use_onednn_for_float32.library = torch.library.Library("aten", "IMPL")    # in force while kept
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        library.impl("mm", mm, "CPU", allow_override=True)
        library.impl("addmm", addmm, "CPU", allow_override=True)
    return True


def keep_freed_memory():
    """Let glibc keep freed memory (Linux): a step takes an eighth less time, and at most 3 % more memory."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "gnu_get_libc_version"):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3         # malloc.h
        libc.mallopt(M_MMAP_THRESHOLD, 2 ** 30)             # smaller tensors get no pages of their own
        libc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)         # free bytes that are not given back


# ------------------------------------------------------------------------- passes over a batch


def even_size(n):
    """n rounded up to one of few sizes, by 7 or by an eighth at most: 8, 16, ... 128, 144, ... 256, 288, ...

    A matrix product uses a kernel that is built for its sizes. On a CPU each costs half a millisecond, and
    half a megabyte for good. With ragged responses every mini-batch would need new ones.
    """
    step = max(8, 2 ** ((n - 1).bit_length() - 4))
    return -(-n // step) * step


def halved(lengths, part):
    """Row numbers `part` (b,), sorted by length -> list of pieces of it, so that less of each is padding.

    A piece of 16 rows or more is halved if this leaves out more than 15 % of it: for less, one pass over all
    rows takes less time than two. lengths: (B,) tokens.
    """
    length, half = lengths[part], len(part) // 2
    if half < 8 or half * int(length[-1] - length[half - 1]) <= 0.15 * len(part) * int(length[-1]):
        return [part]
    return [*halved(lengths, part[:half]), *halved(lengths, part[half:])]


def trimmed(rows):
    """Rows of every tensor of a batch, without the columns that are padding in all of them."""
    # The last token of a row is scored from the column before it, and its own column scores nothing.
    T = even_size(max(1, int(rows["lengths"].max()) - 1))
    R = max(1, int(rows["response_lengths"].max()))
    for name, tensor in rows.items():
        if name in ("input_ids", "attention_mask", "trunk"):
            behind = (0, 0) * (tensor.ndim - 2)         # the trunk (b, T, H) keeps its H
            rows[name] = pad(tensor, (*behind, 0, T - tensor.shape[1]))     # below 0, pad cuts off
        elif tensor.ndim > 1:
            rows[name] = tensor[:, :R]
    rows["positions"] = rows["positions"].clamp(max=T - 1)      # those of padding may lie beyond
    return rows


class LogprobsAndEntropy(torch.autograd.Function):
    """Log-prob of the label and entropy from one pass over the logits: (n, V), (n,) -> (n,), (n,).

    It keeps one tensor of their size, the probabilities; autograd would keep several. Only the log-prob has a
    gradient; an entropy bonus needs ppo_core.entropy_from_logits.
    """

    @staticmethod
    def forward(ctx, logits, labels):
        probabilities = logits.softmax(-1)                                                          # (n, V)
        # Any token gives log(sum(exp(logits))): its logit - its log-prob. The most likely one, with a
        # probability of at least 1 / V, gives it exactly.
        normaliser = logits.amax(-1) - probabilities.amax(-1).log()                                 # (n,)
        logprobs = logits.gather(1, labels.unsqueeze(1)).squeeze(1) - normaliser
        # A logit of -inf has probability 0 and adds 0, but 0 * -inf would be NaN.
        entropy = normaliser - torch.linalg.vecdot(probabilities, logits)
        if not entropy.isfinite().all():
            finite = logits.clamp(min=torch.finfo(logits.dtype).min)
            entropy = normaliser - torch.linalg.vecdot(probabilities, finite)
        ctx.save_for_backward(probabilities, labels)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, gradient, _):
        probabilities, labels = ctx.saved_tensors
        gradient = gradient.unsqueeze(1)        # d log p(label) / d logits = onehot(label) - p
        return probabilities.mul_(-gradient).scatter_add_(1, labels.unsqueeze(1), gradient), None


def forward_with_score(self, *args, score=None, **kwargs):
    """`forward` of a value-head model; with a function `score` it is score_tokens instead."""
    if score is None:
        return type(self).forward(self, *args, **kwargs)
    return score_tokens(self, score, *args, **kwargs)


def score_tokens(model, score, input_ids, attention_mask, positions, mask, chunk):
    """-> the tensors of `score`, and the values; each (B, R, ...), and 0 where mask (B, R) is 0.

    score: function(logits (n, V) float32, index (n,)) -> tuple of tensors (n, ...); index: where these tokens
    stand in the flattened mask (B * R,). chunk: tokens whose logits are held at once; None = all. With more
    than one chunk, the backward pass computes the logits again: more time, less memory.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}                     # (B, T) each
    if model.takes_position_ids:
        inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    output = without_wrapper(model.pretrained_model).base_model(**inputs, use_cache=False)
    hidden = output.last_hidden_state                                                              # (B, T, H)
    index = mask.flatten().nonzero().squeeze(1)                                                     # (n,)
    count = len(index)
    index = pad(index, (0, even_size(max(1, count)) - count))   # the padding is computed and then left out
    row_starts = torch.arange(len(positions), device=hidden.device)[:, None] * hidden.shape[1]      # (B, 1)
    hidden = hidden.flatten(0, 1)[(positions + row_starts).flatten()[index]]                        # (n, H)
    size = chunk or len(hidden)

    def score_chunk(hidden, index):
        logits, values = language_model_head(model, output, hidden)
        return (*score(logits, index), values)

    compute = score_chunk
    if len(hidden) > size and torch.is_grad_enabled():
        compute = functools.partial(checkpoint, score_chunk, use_reentrant=False, preserve_rng_state=False)
    results = [compute(*part) for part in zip(hidden.split(size), index.split(size))]
    placed = []
    for pieces in zip(*results):
        column = torch.cat(pieces)[:count]                                                          # (n, ...)
        zeros = column.new_zeros(mask.numel(), *column.shape[1:])
        placed.append(zeros.index_copy(0, index[:count], column).unflatten(0, mask.shape))
    return placed


def without_wrapper(language_model):
    """-> the transformers model inside peft's wrapper. Its adapters are inside its layers, and in force."""
    return language_model.get_base_model() if hasattr(language_model, "get_base_model") else language_model


def language_model_head(model, output, hidden):
    """What follows the base model: hidden (n, H) -> logits (n, V), values (n,), both float32.

    Families differ in what they do around `lm_head` (soft-caps, scales, biases). So the whole model runs, and
    its base model only returns `hidden`. output: what the base model itself has returned.
    """
    inputs, language_model = [], without_wrapper(model.pretrained_model)
    lm_head = language_model.get_output_embeddings()
    output = type(output)(**{**output, "last_hidden_state": hidden.unsqueeze(0)})
    with (lm_head.register_forward_pre_hook(lambda _, args: inputs.append(args[0])),
          replaced_forward([language_model.base_model], output)):
        logits = language_model().logits.squeeze(0)
    return logits.float(), model.v_head(inputs[0]).view(-1).float()


@contextmanager
def replaced_forward(modules, output):
    """Inside the `with` block these modules compute nothing and return `output`."""
    before = [vars(module).get("forward") for module in modules]    # accelerate's hooks set one
    for module in modules:
        module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        for module, forward in zip(modules, before):
            del module.forward
            if forward is not None:
                module.forward = forward


def fuse_activations(model):
    """Replace GPT-2's GELU by torch's: one operation for eight, and seven tensors of its size fewer."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


class SharedTrunk:
    """The first blocks of two models that share them: they run once per batch, and their output is reused.

    These blocks and all that comes before them are frozen, so their output is the same in both models and in
    every epoch. If the models share no block, `record` and `replay` do nothing.
    """

    def __init__(self, model, ref_model):
        self.blocks, self.rest = [], None                   # blocks: of both models, the policy's first
        frozen = {id(p) for p in ref_model.parameters() if not p.requires_grad}
        ref_modules = dict(ref_model.named_modules())
        for name, layers in model.named_modules():
            if not isinstance(layers, torch.nn.ModuleList):
                continue
            ids = [{id(p) for p in layer.parameters()} for layer in layers]
            count = 0
            while count < len(layers) and ids[count] and ids[count] <= frozen:
                count += 1
            # All parameters that may be used before block number `count`, wherever they are registered.
            trunk = name[:name.rfind(".") + 1]              # such as "pretrained_model.transformer."
            later = tuple(f"{name}.{number}." for number in range(count, len(layers)))
            before = {id(p) for key, p in model.named_parameters() if key.startswith(trunk)
                      and not key.startswith(later) and not reference.after_the_layers(key[len(trunk):])}
            if count and before <= frozen and not any(map(reads_other_keys, layers)):
                self.blocks, self.last = [*layers[:count], *ref_modules[name][:count]], layers[count - 1]
                break

    @contextmanager
    def record(self):
        """Inside the `with` block run the policy, once. -> dict, which then has "trunk": (b, T, H)."""
        recorded = {}

        def keep(_, inputs, output):
            # GPT-2's blocks give a tensor; Bloom's give a tuple with attention weights, which nobody reads.
            hidden, *rest = output if isinstance(output, tuple) else (output,)
            if hidden.ndim != 3 or not all(value is None or is_attention(value, hidden) for value in rest):
                self.blocks = []        # the next block reads more than hidden states: compute as usual
                return
            self.rest = (None,) * len(rest) if isinstance(output, tuple) else None
            recorded["trunk"] = hidden

        with self.last.register_forward_hook(keep) if self.blocks else nullcontext():
            yield recorded

    def replay(self, hidden=None):
        """Inside the `with` block the blocks only return `hidden` (b, T, H); with None they compute."""
        # Only their forward is replaced, as some models read a block's number or kind from the list.
        output = hidden if self.rest is None else (hidden, *self.rest)
        return replaced_forward([] if hidden is None else self.blocks, output)


def reads_other_keys(layer):
    """True for a block that reads the keys and values of an earlier one (Gemma 3n): that one has to run."""
    return getattr(getattr(layer, "self_attn", None), "is_kv_shared_layer", False)


def is_attention(value, hidden):
    """True for attention weights (b, heads, T, T or more keys) of hidden states (b, T, H)."""
    return getattr(value, "ndim", 0) == 4 and hidden.shape[1] == value.shape[2] <= value.shape[3]


# ------------------------------------------------------------------------- sampling


def draw(probabilities):
    """One token of each row: (B, V) -> (B,). One random number is looked up in the row's running sums."""
    if torch.are_deterministic_algorithms_enabled() and probabilities.device.type != "cpu":
        # There torch refuses running sums of floats. This takes a random number for each entry of the row.
        return torch.multinomial(probabilities, 1).squeeze(1)
    # In float64, so that a token of probability 1e-9 is drawn as often as it should be, and one of 0 never.
    steps = probabilities.double().cumsum(-1)                                                       # (B, V)
    point = torch.rand(len(steps), 1, dtype=torch.float64, device=steps.device) * steps[:, -1:]
    return torch.searchsorted(steps, point, right=True).squeeze(1).clamp(max=steps.shape[1] - 1)


class RoomyLayer(DynamicLayer):
    """One layer of a key-value cache that has its memory from the start: a new token does not copy it."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens

    def update(self, keys, values, *args, **kwargs):                                  # (b, heads, new, width)
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.room = [new.new_empty(*new.shape[:2], self.tokens, new.shape[3]) for new in (keys, values)]
        start = self.get_seq_length()
        end = start + keys.shape[2]
        for room, new in zip(self.room, (keys, values)):
            room[:, :, start:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        end = self.get_seq_length()
        self.room = [room[indices] for room in self.room]
        self.keys, self.values = (room[:, :, :end] for room in self.room)


def roomy_cache(config, tokens):
    """-> a cache for this many tokens, or None if a layer does not keep the keys and values of all tokens."""
    cache = DynamicCache(config=config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [RoomyLayer(tokens) for _ in cache.layers]
    return cache


class Rollout:
    """Responses while they are sampled, and what the policy computes for their tokens on the way."""

    def __init__(self, queries, new_tokens, pad_token_id, device):
        self.queries, self.width, self.trunk = queries, even_size(max(len(q) for q in queries)), None
        left = functools.partial(pad_sequence, batch_first=True, padding_side="left")
        input_ids = left(list(queries), padding_value=pad_token_id)
        attention_mask = left([torch.ones_like(q) for q in queries])
        missing = (self.width - input_ids.shape[1], 0)
        self.input_ids = pad(input_ids, missing).to(device)                                           # (b, Q)
        self.attention_mask = pad(attention_mask, missing).to(device)                             # (b, Q + t)
        self.rows = torch.arange(len(queries), device=device)       # (b,), the rows still in the batch
        self.tokens = self.input_ids.new_zeros(len(queries), new_tokens)                            # (B, R)
        self.lengths = torch.full_like(self.rows, new_tokens)                                       # (B,)
        self.logprobs, self.values = torch.zeros((2, *self.tokens.shape), device=device)         # (B, R) each

    def keep(self, t, drawn, probabilities, values, hidden):
        """Store step t: tokens drawn (b,) from (b, V), values (b,), hidden states (b, width, H) or None."""
        self.tokens[self.rows, t], self.values[self.rows, t] = drawn, values
        self.logprobs[self.rows, t] = probabilities.gather(1, drawn.unsqueeze(1)).squeeze(1).log()
        if hidden is not None:
            end = self.width + t
            if self.trunk is None:
                columns = self.width + self.tokens.shape[1]
                self.trunk = hidden.new_zeros(len(self.tokens), columns, hidden.shape[2])
            self.trunk[self.rows, end - hidden.shape[1]:end] = hidden

    def drop_finished(self, t, drawn, stop, cache):
        """After step t, drop rows that have ended, if that makes the batch smaller. -> True if all have."""
        new_tokens = self.tokens.shape[1]
        ended = torch.isin(drawn, stop) & (self.lengths[self.rows] == new_tokens)
        self.lengths[self.rows[ended]] = t + 1
        finished = self.lengths[self.rows] < new_tokens                                             # (b,)
        # The rows that go on stay, and as many ended ones as make their number an even size.
        stay = finished.long().argsort(stable=True)[:even_size(int((~finished).sum()))]
        if len(stay) <= 0.75 * len(self.rows) and not finished.all():
            self.rows, drawn, self.attention_mask = self.rows[stay], drawn[stay], self.attention_mask[stay]
            cache.batch_select_indices(stay)
        self.input_ids = drawn.unsqueeze(1)
        self.attention_mask = pad(self.attention_mask, (0, 1), value=1)
        return bool(finished.all())

    def of_row(self, i, length):
        """-> dict of what was stored for response i. Clones: a view would keep the whole batch in memory."""
        results = {"logprobs": self.logprobs[i, :length].clone(), "values": self.values[i, :length].clone()}
        if self.trunk is not None:
            first = self.width - len(self.queries[i])
            results["trunk"] = self.trunk[i, first:self.width + length - 1].clone()
        return results


# ------------------------------------------------------------------------- the trainer


class FastPPOTrainer(PPOTrainer):
    """PPOTrainer in less time and memory; the same arguments, the same numbers, the same methods."""

    def prepare(self, model, ref_model, optimizer, num_shared_layers):
        """Lever: fused activations: one operation for eight. No number changes: the formula is the same."""
        for network in (model, ref_model):
            if hasattr(network, "pretrained_model"):        # not an AdapterReference, which calls the model
                network.forward = types.MethodType(forward_with_score, network)     # self.forward needs it
                if not distributed.quantized(network):
                    fuse_activations(network)
        super().prepare(model, ref_model, optimizer, num_shared_layers)
        self.trunk = SharedTrunk(self.language_model, distributed.unwrap(self.ref_model))
        # Under ZeRO-3 every use of `lm_head` is an exchange, and processes need equally many: one chunk.
        vocabulary = self.language_model.pretrained_model.get_output_embeddings().out_features
        tokens = max(8, LOGITS_AT_ONCE // vocabulary // 8 * 8)
        self.chunk = None if distributed.zero_stage(self.accelerator) == 3 else tokens
        self.sampled, self.sampled_by = {}, None            # see remember

    def generate_batch(self, language_model, queries, arguments):
        """Lever: the lean sampling loop, `sample`, for pure sampling; `generate` does all else.

        It drops rows that have ended, where `generate` computes them to the end; it does not copy the cache
        for each token; and a token takes one random number, where torch.multinomial takes one for each entry
        of the vocabulary. So other samples are drawn, but from the same distribution.
        """
        watches = arguments.get("logits_processor") or ()
        handled = {"max_new_tokens", "eos_token_id", "pad_token_id", "synced_gpus", "logits_processor"}
        settings = {name: value for name, value in arguments.items() if name not in handled}
        pure = (settings == sampling_arguments(self.config.temperature, {}) and "max_new_tokens" in arguments
                and not arguments["synced_gpus"]
                and all(getattr(watch, "changes_nothing", False) for watch in watches))
        tokens = even_size(max(len(q) for q in queries)) + arguments.get("max_new_tokens", 0)
        cache = roomy_cache(language_model.config, tokens) if pure else None
        if cache is None:
            return super().generate_batch(language_model, queries, arguments)
        language_model.eval()
        with self.accelerator.autocast():
            return self.sample(language_model, queries, arguments, cache, watches)

    def sample(self, language_model, queries, arguments, cache, watches):
        """Pure sampling. -> list of responses (R_i,). watches: list of checks.WatchLogits."""
        device = self.accelerator.device
        stop = torch.as_tensor(arguments.get("eos_token_id", self.tokenizer.eos_token_id), device=device)
        rollout = Rollout(queries, arguments["max_new_tokens"], self.tokenizer.pad_token_id, device)
        remembers = self.recalls() and language_model is self.language_model
        for t in range(arguments["max_new_tokens"]):
            last = torch.full_like(rollout.input_ids[:, :1], rollout.input_ids.shape[1] - 1)        # (b, 1)
            with self.trunk.record() if remembers else nullcontext({}) as recorded:
                logits, _, values = language_model(
                    input_ids=rollout.input_ids, attention_mask=rollout.attention_mask, past_key_values=cache,
                    logit_positions=last, use_cache=True)
            for watch in watches:
                watch.samples = rollout.rows
                watch(None, logits[:, 0])
            probabilities = (logits[:, 0] / self.config.temperature).softmax(-1)                    # (b, V)
            drawn = draw(probabilities)                                                             # (b,)
            rollout.keep(t, drawn, probabilities, values[:, 0], recorded.get("trunk"))
            if rollout.drop_finished(t, drawn, stop, cache):
                break
        responses = [row[:n] for row, n in zip(rollout.tokens, rollout.lengths.tolist())]
        if remembers:
            self.remember(rollout, responses)
        return responses

    def mini_batches(self, batch, index):
        """Levers: rows of like length together, in halves if they differ much, without columns of padding.

        An optimizer step has the same rows in another order, and its loss is a sum over their tokens.
        """
        lengths = batch["lengths"]
        index = index[lengths[index].argsort(stable=True)]
        several = self.accelerator.num_processes > 1        # all of them must do equally many passes
        for part in index.split(self.config.mini_batch_size):
            for piece in [part] if several else halved(lengths, part):
                yield piece, trimmed({name: tensor[piece] for name, tensor in batch.items()})

    def forward(self, model, rows, keep_logits=False):
        """Levers: logits in chunks, of response tokens alone; log-prob and entropy in one pass; the trunk.

        Chunks save memory and cost time; the other levers compute less. No number changes: a token's logits
        depend on no logits of others, padding is masked in any case, and the trunk's output is already known.
        """
        labels, temperature = rows["labels"].flatten(), self.config.temperature

        def score(logits, index):                                            # (n, V), (n,) -> two of (n, ...)
            logits = logits if temperature == 1.0 else logits / temperature
            if keep_logits:
                return logprobs_from_logits(logits, labels[index]), logits
            return LogprobsAndEntropy.apply(logits, labels[index])

        inputs = {name: rows[name] for name in ("input_ids", "attention_mask", "positions", "mask")}
        with self.accelerator.autocast(), self.trunk.replay(rows.get("trunk")):
            logprobs, rest, values = model(score=score, chunk=self.chunk, **inputs)
        return logprobs, values, rest

    @torch.no_grad()
    def record(self, batch):
        """Levers: shared layers run once for all epochs; the sampler's results save a pass of the policy.

        No number changes: shared layers are frozen, and the weights are still the sampler's (see recall).
        """
        mask, trunk, full = batch["mask"], None, self.config.kl_penalty == "full"
        results = torch.zeros((4, *mask.shape), device=mask.device)                                # (4, B, R)
        self.model.eval()
        recalled = self.recall(batch)
        batch.update(recalled)
        for index, rows in self.mini_batches(batch, torch.arange(len(mask), device=mask.device)):
            recorded = {}
            if recalled:
                logprobs, values = rows["logprobs"] * rows["mask"], rows["values"] * rows["mask"]
                logits = None
            else:
                with self.trunk.record() as recorded:
                    logprobs, values, logits = self.forward(self.model, rows, keep_logits=full)
                rows.update(recorded)
            ref_logprobs, _, ref_logits = self.forward(self.ref_model, rows, keep_logits=full)
            kl = (rewards.full_kl(logits, ref_logits).masked_fill(rows["mask"] == 0, 0.0) if full else
                  rewards.kl_penalty(logprobs, ref_logprobs, self.config.kl_penalty))
            del logits, ref_logits      # (b, r, V) each, not to be kept through the next forward pass
            results[:, index, :logprobs.shape[1]] = torch.stack([logprobs, values, ref_logprobs, kl])
            for hidden in recorded.values():                                                       # (b, t, H)
                if trunk is None:
                    trunk = hidden.new_zeros(*batch["input_ids"].shape, hidden.shape[-1])
                columns = min(trunk.shape[1], hidden.shape[1])      # columns beyond them are padding
                trunk[index, :columns] = hidden[:, :columns]
        if trunk is not None:
            batch["trunk"] = trunk
        return results.unbind(0)

    def recalls(self):
        """Whether the sampler's results may be used again. Asked each time, as a config may change.

        Not for the full KL, which needs all logits; not in TF32, a GPU's float32 with a mantissa of 10 bits;
        and not in several processes, where a run is to be the same with and without DeepSpeed, to the bit.
        """
        float32 = all(p.dtype == torch.float32 for p in self.language_model.parameters())
        exact = (float32 and self.accelerator.mixed_precision == "no"
                 and torch.backends.cuda.matmul.fp32_precision != "tf32")
        one_process = self.accelerator.num_processes == 1 and distributed.zero_stage(self.accelerator) == 0
        return exact and one_process and self.config.kl_penalty != "full"

    def weights_now(self):
        """-> the same at two moments if no weight has changed in between.

        torch counts what is written into a tensor, but not what an optimizer writes in one kernel (Adam with
        fused=True, bitsandbytes). So the trained weights are also added up: a step changes some sum.
        """
        parameters = list(self.language_model.parameters())
        sums = torch.stack([p.detach().sum() for p in parameters if p.requires_grad]).tolist()
        return self.config.temperature, sums, [(p.data_ptr(), p._version) for p in parameters]

    def remember(self, rollout, responses):
        """Keep the sampler's results for these responses. In all, only the last batch_size are kept."""
        weights = self.weights_now()
        if weights != self.sampled_by:
            self.sampled, self.sampled_by = {}, weights
        for i, (query, response) in enumerate(zip(rollout.queries, responses)):
            key = (len(query), *query.tolist(), *response.tolist())
            self.sampled.pop(key, None)             # the newest comes last
            self.sampled[key] = rollout.of_row(i, len(response))
        self.sampled = dict(list(self.sampled.items())[-self.config.batch_size:])

    def recall(self, batch):
        """-> {"logprobs": (B, R), "values": (B, R)[, "trunk": (B, T - 1, H)]} of the sampler; or {}: compute.

        They hold if these very tokens were sampled from these very weights, and are used once.
        """
        sampled, weights, self.sampled, self.sampled_by = self.sampled, self.sampled_by, {}, None
        if not sampled or not batch["mask"].any() or not self.recalls() or weights != self.weights_now():
            return {}
        query_lengths = batch["lengths"] - batch["response_lengths"]
        lengths = zip(query_lengths.tolist(), batch["lengths"].tolist(), batch["input_ids"].tolist())
        rows = [sampled.get((query, *tokens[:length]), {}) for query, length, tokens in lengths]
        names = ("logprobs", "values", "trunk") if self.trunk.blocks else ("logprobs", "values")
        if not all(name in row for row in rows for name in names):
            return {}
        return {name: pad_sequence([row[name] for row in rows], batch_first=True) for name in names}


if __name__ == "__main__":
    logits = torch.randn(1000, 4096, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(1000)
    logprobs, entropy = LogprobsAndEntropy.apply(logits, labels)                                # (1000,) each
    difference = (logprobs - logprobs_from_logits(logits, labels)).abs().max()
    print("largest difference of a log-prob", f"{difference:.1e}")
    print("mean entropy", round(entropy.mean().item(), 4), "nats")
    drawn = torch.cat([draw(torch.tensor([[0.1, 0.0, 0.9]]).expand(1000, -1)) for _ in range(10)])
    print("drawn with probabilities 0.1, 0, 0.9:", torch.bincount(drawn, minlength=3).tolist(), "of 10000")
    print("even sizes of 5, 60, 130:", even_size(5), even_size(60), even_size(130))
