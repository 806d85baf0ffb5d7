"""FastPPOTrainer: the numbers of PPOTrainer in less time and memory; and tune_cpu() for its process.

Why: the plain trainer computes what the maths says, also where the result is known already (layers that
policy and reference share), where nobody looks at it (padding, responses that have ended), and with all
logits of a mini-batch. That is the clearest code.
Levers; `make levers` switches each alone off and prints what it saves on each workload of the benchmark:

@TABLE@

Differs from the plain trainer in: nothing but the order in which float32 numbers are added up.
tests/test_speed.py compares every override with the method that it replaces, and whole runs of both trainers.
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
from ppo_core import HARMLESS, PPOTrainer, logprobs_from_logits, sampling_arguments

LOGITS_AT_ONCE = 2 ** 24        # numbers: 64 MB in float32

# ------------------------------------------------------------------------- the process


def tune_cpu():
    """Settings of the process for training on a CPU; nothing with a GPU. Call it before models are made."""
    if not torch.accelerator.is_available():
        use_onednn_for_float32()
        # ZeRO-3 makes and frees every weight all the time, and would need a third more memory.
        if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") != "3":
            keep_freed_memory()


def use_onednn_for_float32(force=False):
    """On AMD processors with AVX-512, multiply float32 matrices by oneDNN: MKL uses half their width.

    Elsewhere it does nothing (force: for the test). It replaces 2-D products, which is every linear layer.
    -> True if oneDNN multiplies from now on.
    """
    cpuinfo = Path("/proc/cpuinfo")
    amd = cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text(encoding="utf-8")
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    if "library" in vars(use_onednn_for_float32):
        return True
    if not force and not (amd and wide and torch.backends.mkldnn.is_available()):
        return False
    # _linear_pointwise: what torch's compiler calls for a linear layer
    aten, linear = torch.ops.aten, torch.ops.mkldnn._linear_pointwise

    def stays_with_mkl(a, b):
        # oneDNN builds and keeps a kernel for each size, so it gets only multiples of 8, which even_size
        # makes, and fewer than 8 rows: a rollout of few prompts, for which MKL takes twice as long.
        varied = any(n % 8 and least < n < 4096 for n, least in zip(a.shape, (8, 0)))
        return varied or a.dtype != torch.float32 or b.dtype != torch.float32 or 0 in (a.numel(), b.numel())

    def mm(a, b):                                                               # (M, K), (K, N) -> (M, N)
        if stays_with_mkl(a, b):        # the replaced kernel, by its other name
            return aten.mm.out(a, b, out=a.new_empty(a.shape[0], b.shape[1]))
        return linear(a, b.t(), None, "none", [], "")

    def addmm(bias, a, b, *, beta=1, alpha=1):
        usual_bias = bias.dtype == torch.float32 and bias.ndim == 1 and len(bias) == b.shape[1]
        if stays_with_mkl(a, b) or not usual_bias or beta != 1 or alpha != 1:
            out = a.new_empty(a.shape[0], b.shape[1])
            return aten.addmm.out(bias, a, b, beta=beta, alpha=alpha, out=out)
        return linear(a, b.t(), bias, "none", [], "")

    library = torch.library.Library("aten", "IMPL")
    use_onednn_for_float32.library = library        # it is in force while this object lives
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        library.impl("mm", mm, "CPU", allow_override=True)
        library.impl("addmm", addmm, "CPU", allow_override=True)
    return True


def keep_freed_memory():
    """Let glibc keep the memory of freed tensors for the next ones, and not ask the system page by page."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "gnu_get_libc_version"):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3         # malloc.h
        libc.mallopt(M_MMAP_THRESHOLD, 2 ** 30)
        libc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)


# ------------------------------------------------------------------------- passes over a batch


def even_size(n):
    """n rounded up to one of few sizes, by 7 or by an eighth at most: 8, 16, ... 128, 144, ... 256, 288, ...

    oneDNN builds a kernel for each size of a product: half a millisecond, and half a megabyte that is never
    given back. With ragged responses every mini-batch would bring new sizes.
    """
    step = max(8, 2 ** ((n - 1).bit_length() - 4))
    return -(-n // step) * step


class LogprobsAndEntropy(torch.autograd.Function):
    """Log-prob of the label and entropy from one pass over the logits: (n, V), (n,) -> (n,), (n,).

    It keeps one tensor of the logits' size, the probabilities, where autograd would keep several. Only the
    log-prob has a gradient; an entropy bonus needs ppo_core.entropy_from_logits.
    """

    @staticmethod
    def forward(ctx, logits, labels):
        probabilities = logits.softmax(-1)                                                          # (n, V)
        # The largest probability is at least 1 / V, so its logarithm is exact to the last digits.
        normaliser = logits.amax(-1) - probabilities.amax(-1).log()                  # log sum exp, (n,)
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
        # d log p(label) / d logits = onehot(label) - p
        gradient = gradient.unsqueeze(1)
        return probabilities.mul_(-gradient).scatter_add_(1, labels.unsqueeze(1), gradient), None


def forward_with_score(self, *args, score=None, **kwargs):
    """`forward` of a value-head model that can also be asked for what `score` makes of the logits."""
    if score is None:
        return type(self).forward(self, *args, **kwargs)
    return score_tokens(self, score, *args, **kwargs)


def score_tokens(model, score, input_ids, attention_mask, positions, mask, chunk):
    """-> what `score` gives, and values: each (B, R, ...), 0 where mask (B, R) is 0.

    score: function(logits (n, V) float32, index (n,)) -> tuple of tensors (n, ...); index: the places of the
    tokens among the B * R. chunk: tokens whose logits may be held at once, or None for all. With more than
    one chunk the logits are computed again in the backward pass.
    """
    position_ids = {}
    if model.takes_position_ids:
        position_ids["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)          # (B, T)
    output = model.pretrained_model.base_model(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **position_ids)
    hidden = output.last_hidden_state                                                              # (B, T, H)
    index = mask.flatten().nonzero().squeeze(1)                                                     # (n,)
    first = torch.arange(len(positions), device=hidden.device)[:, None] * hidden.shape[1]           # (B, 1)
    count = len(index)
    index = pad(index, (0, even_size(max(1, count)) - count))   # the padding is computed and then left out
    hidden = hidden.flatten(0, 1)[(positions + first).flatten()[index]]                             # (n, H)

    def score_chunk(hidden, index):
        logits, values = language_model_head(model, output, hidden)
        return (*score(logits, index), values)

    chunks = list(zip(hidden.split(chunk or len(hidden)), index.split(chunk or len(hidden))))
    if len(chunks) > 1 and torch.is_grad_enabled():
        results = [checkpoint(score_chunk, *part, use_reentrant=False, preserve_rng_state=False)
                   for part in chunks]
    else:
        results = [score_chunk(*part) for part in chunks]
    placed = []
    for pieces in zip(*results):
        column = torch.cat(pieces)[:count]                                                          # (n, ...)
        zeros = column.new_zeros(mask.numel(), *column.shape[1:])
        placed.append(zeros.index_copy(0, index[:count], column).unflatten(0, mask.shape))
    return placed


def language_model_head(model, output, hidden):
    """The language model after its trunk: hidden (n, H) -> logits (n, V), values (n,), both float32.

    The model itself runs, on a trunk that returns `hidden` at once, because families differ in what they do
    around `lm_head` (soft-caps, scales, biases).
    """
    inputs, lm_head = [], model.pretrained_model.get_output_embeddings()
    answer = type(output)(**{**output, "last_hidden_state": hidden.unsqueeze(0)})
    reader = lm_head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        with replaced_forward([model.pretrained_model.base_model], answer):
            logits = model.pretrained_model().logits.squeeze(0)
    finally:
        reader.remove()
    return logits.float(), model.v_head(inputs[0]).view(-1).float()


@contextmanager
def replaced_forward(modules, output):
    """Within it these modules compute nothing and return `output`."""
    before = [vars(module).get("forward") for module in modules]    # accelerate's hooks put one there
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
    """GPT-2's GELU, in place, as one operation instead of eight, without seven more tensors of its size."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


# ------------------------------------------------------------------------- shared layers


class SharedTrunk:
    """The first blocks of two models that share them: run once per batch, and their output used again.

    Everything in these blocks and below them is frozen, so their output is the same in both models and in
    every epoch. With nothing shared, `record` and `replay` do nothing.
    """

    def __init__(self, model, ref_model):
        self.blocks, self.rest = [], None                   # blocks: of both models, the policy's first
        frozen = {id(p) for p in ref_model.parameters() if not p.requires_grad}
        ref_modules = dict(ref_model.named_modules())
        for name, layers in model.named_modules():
            # In some families later blocks read the keys of earlier ones (Gemma 3n): every block has to run.
            if not isinstance(layers, torch.nn.ModuleList) or any(map(reads_keys_of_others, layers)):
                continue
            count = 0
            while count < len(layers) and is_frozen(layers[count], frozen):
                count += 1
            below = {id(p) for p in reference.parameters_below(model, name, count)}
            if count and below | unplaced(model, name) <= frozen:
                self.blocks, self.last = [*layers[:count], *ref_modules[name][:count]], layers[count - 1]
                break

    @contextmanager
    def record(self):
        """The policy runs within it, once. -> dict that then has "trunk", their output (b, T, H)."""
        recorded = {}

        def keep(_, inputs, output):
            # GPT-2's blocks give a tensor, Bloom's a tuple with attention weights
            hidden, *rest = output if isinstance(output, tuple) else (output,)
            if hidden.ndim != 3 or not all(value is None or is_attention(value, hidden) for value in rest):
                self.blocks = []        # more than hidden states goes on: these blocks compute as usual
                return
            self.rest = (None,) * len(rest) if isinstance(output, tuple) else None
            recorded["trunk"] = hidden

        with self.last.register_forward_hook(keep) if self.blocks else nullcontext():
            yield recorded

    def replay(self, hidden=None):
        """Within it the blocks of both models only give `hidden` (b, T, H); None = they compute as usual."""
        # Only their forward is replaced, because some models read each block's number or kind.
        output = hidden if self.rest is None else (hidden, *self.rest)
        return replaced_forward([] if hidden is None else self.blocks, output)


def is_frozen(layer, frozen):
    """True if the layer has parameters and each of them is one of `frozen`, a set of their ids."""
    ids = {id(p) for p in layer.parameters()}
    return bool(ids) and ids <= frozen


def reads_keys_of_others(layer):
    return getattr(getattr(layer, "self_attn", None), "is_kv_shared_layer", False)


def unplaced(model, layers_name):
    """-> ids of parameters that are registered after the blocks, but may be used before them."""
    trunk = layers_name[:layers_name.rfind(".") + 1]
    parameters = [(name, p) for name, p in model.named_parameters() if trunk and name.startswith(trunk)]
    last = max((i for i, (name, _) in enumerate(parameters) if name.startswith(layers_name + ".")), default=0)
    return {id(p) for name, p in parameters[last + 1:] if not reference.after_the_layers(name[len(trunk):])}


def is_attention(value, hidden):
    """True for attention weights (b, heads, T, T or more keys) of hidden states (b, T, H)."""
    return getattr(value, "ndim", 0) == 4 and hidden.shape[1] == value.shape[2] <= value.shape[3]


# ------------------------------------------------------------------------- sampling


def draw(probabilities):
    """One token from each row: (B, V) -> (B,), by the inverse distribution function at a random number.

    In float64: a token of probability 1e-9 is drawn as often as it should be, and one of 0 never is.
    """
    steps = probabilities.double().cumsum(-1)                                                       # (B, V)
    point = torch.rand(len(steps), 1, dtype=torch.float64, device=steps.device) * steps[:, -1:]
    return torch.searchsorted(steps, point, right=True).squeeze(1).clamp(max=steps.shape[1] - 1)


class RoomyLayer(DynamicLayer):
    """One layer of a key-value cache with all its memory from the start, so that no token copies it."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens

    def update(self, keys, values, *args, **kwargs):                                  # (b, heads, new, width)
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.room = [new.new_empty(*new.shape[:2], self.tokens, new.shape[3]) for new in (keys, values)]
        start = self.get_seq_length()
        for room, new in zip(self.room, (keys, values)):
            room[:, :, start:start + new.shape[2]] = new
        return self.use(start + keys.shape[2])

    def use(self, tokens):
        self.keys, self.values = (room[:, :, :tokens] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        self.room = [room[indices] for room in self.room]
        self.use(self.get_seq_length())


def roomy_cache(config, tokens):
    """-> a cache for so many tokens; None if a layer does not keep the keys and values of each one."""
    cache = DynamicCache(config=config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [RoomyLayer(tokens) for _ in cache.layers]
    return cache


class Rollout:
    """Responses as they are written token by token, and what the policy computed for each token."""

    def __init__(self, queries, new_tokens, pad_token_id, device):
        width = even_size(max(len(q) for q in queries))
        self.queries, self.width, self.trunk = queries, width, None
        left = functools.partial(pad_sequence, batch_first=True, padding_side="left")
        input_ids = left(list(queries), padding_value=pad_token_id)
        attention_mask = left([torch.ones_like(q) for q in queries])
        missing = (width - input_ids.shape[1], 0)
        self.input_ids = pad(input_ids, missing).to(device)                                           # (b, Q)
        self.attention_mask = pad(attention_mask, missing).to(device)                             # (b, Q + t)
        self.rows = torch.arange(len(queries), device=device)       # (b,), those that go on
        self.tokens = self.input_ids.new_zeros(len(queries), new_tokens)                            # (B, R)
        self.lengths = torch.full_like(self.rows, new_tokens)                                       # (B,)
        self.logprobs, self.values = torch.zeros((2, *self.tokens.shape), device=device)         # (B, R) each

    def keep(self, t, drawn, probabilities, values, hidden):
        """Of step t: tokens drawn (b,) from (b, V), values (b,), hidden states (b, width, H) or None."""
        self.tokens[self.rows, t], self.values[self.rows, t] = drawn, values
        self.logprobs[self.rows, t] = probabilities.gather(1, drawn.unsqueeze(1)).squeeze(1).log()
        if hidden is not None:
            end = self.width + t
            if self.trunk is None:
                columns = self.width + self.tokens.shape[1]
                self.trunk = hidden.new_zeros(len(self.tokens), columns, hidden.shape[2])
            self.trunk[self.rows, end - hidden.shape[1]:end] = hidden

    def drop_finished(self, t, drawn, stop, cache):
        """After step t, leave out rows that have ended, if the batch gets smaller. -> True when all have."""
        new_tokens = self.tokens.shape[1]
        ended = torch.isin(drawn, stop) & (self.lengths[self.rows] == new_tokens)
        self.lengths[self.rows[ended]] = t + 1
        finished = self.lengths[self.rows] < new_tokens                                             # (b,)
        # As many rows stay as even_size says: those that go on, and a few that have ended.
        stay = finished.long().argsort(stable=True)[:even_size(int((~finished).sum()))]
        if len(stay) <= 0.75 * len(self.rows) and not finished.all():
            self.rows, drawn, self.attention_mask = self.rows[stay], drawn[stay], self.attention_mask[stay]
            cache.batch_select_indices(stay)
        self.input_ids = drawn.unsqueeze(1)
        self.attention_mask = pad(self.attention_mask, (0, 1), value=1)
        return bool(finished.all())

    def of_row(self, i, length):
        """What is remembered of a response. Clones, as a view would keep the whole batch in memory."""
        found = {"logprobs": self.logprobs[i, :length].clone(), "values": self.values[i, :length].clone()}
        if self.trunk is not None:
            first = self.width - len(self.queries[i])
            found["trunk"] = self.trunk[i, first:self.width + length - 1].clone()
        return found


# ------------------------------------------------------------------------- the trainer


class FastPPOTrainer(PPOTrainer):
    """PPOTrainer in less time and memory; the same arguments, the same numbers, the same methods."""

    def prepare(self, model, ref_model, optimizer, num_shared_layers):
        """Lever: fused activations. Both models also get score_tokens, on which `forward` is built."""
        for network in (model, ref_model):
            if network is not None:
                network.forward = types.MethodType(forward_with_score, network)
                if not distributed.quantized(network):
                    fuse_activations(network)
        super().prepare(model, ref_model, optimizer, num_shared_layers)
        policy = self.language_model
        self.trunk = SharedTrunk(policy, distributed.unwrap(self.ref_model))
        # One chunk under ZeRO-3, where every use of `lm_head` is an exchange: as many on each process.
        vocabulary = policy.pretrained_model.get_output_embeddings().out_features
        tokens = max(8, LOGITS_AT_ONCE // vocabulary // 8 * 8)
        self.chunk = None if distributed.zero_stage(self.accelerator) == 3 else tokens
        float32 = all(p.dtype == torch.float32 for p in policy.parameters())
        self.exact = self.accelerator.mixed_precision == "no" and float32
        self.sampled, self.sampled_by = {}, None            # see remember

    def generate_batch(self, language_model, queries, arguments):
        """Levers: rows that have ended leave the batch, where `generate` computes them to the end; the cache
        is not copied at each token; a token costs one random number, where torch.multinomial draws one for
        each entry of the vocabulary. The distribution is the same; the samples are not, as random numbers are
        used differently. All but pure sampling is left to `generate`.
        """
        watches = arguments.get("logits_processor") or ()
        ignored = HARMLESS | {"synced_gpus", "logits_processor"}
        settings = {name: value for name, value in arguments.items() if name not in ignored}
        pure = (settings == sampling_arguments(self.config.temperature, {}) and not arguments["synced_gpus"]
                and not {"max_length", "bos_token_id", "use_cache"} & set(arguments)
                and "max_new_tokens" in arguments
                and all(getattr(watch, "changes_nothing", False) for watch in watches))
        tokens = even_size(max(len(q) for q in queries)) + arguments.get("max_new_tokens", 0)
        cache = roomy_cache(language_model.config, tokens) if pure else None
        if cache is None:
            return super().generate_batch(language_model, queries, arguments)
        language_model.eval()
        with self.accelerator.autocast():
            return self.sample(language_model, queries, arguments, cache, watches)

    def sample(self, language_model, queries, arguments, cache, watches):
        """Pure sampling at config.temperature. -> list of responses (R_i,). watches: checks.WatchLogits."""
        device = self.accelerator.device
        stop = arguments.get("eos_token_id", self.tokenizer.eos_token_id)
        stop = torch.as_tensor(stop, device=device).view(-1)
        rollout = Rollout(queries, arguments["max_new_tokens"], self.tokenizer.pad_token_id, device)
        remembers = self.recalls() and language_model is self.language_model
        for t in range(arguments["max_new_tokens"]):
            last = torch.full_like(rollout.input_ids[:, :1], rollout.input_ids.shape[1] - 1)
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
        """Lever: rows of like length together, and without the columns that are padding in all of them.

        The sum over the tokens of an optimizer step stays what it is.
        """
        index = index[batch["lengths"][index].argsort(stable=True)]
        for part, rows in super().mini_batches(batch, index):
            # Without the last token's column: nothing is scored from it.
            T = even_size(max(1, int(rows["lengths"].max()) - 1))
            R = max(1, int(rows["response_lengths"].max()))
            for name, tensor in rows.items():
                if name in ("input_ids", "attention_mask", "trunk"):
                    missing = max(0, T - tensor.shape[1])
                    rows[name] = pad(tensor[:, :T], (*[0, 0] * (tensor.ndim - 2), 0, missing))
                elif tensor.ndim > 1:
                    rows[name] = tensor[:, :R]
            # Of short rows they point into the padding.
            rows["positions"] = rows["positions"].clamp(max=T - 1)
            yield part, rows

    def forward(self, model, rows, keep_logits=False):
        """Levers: logits in chunks, of response tokens alone; log-prob and entropy in one pass; the trunk."""
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
        """Levers: shared layers run once, and their output is kept in batch["trunk"] (B, T, H) for all
        epochs; what the sampler computed is used again, which saves a whole pass of the policy."""
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
                columns = min(trunk.shape[1], hidden.shape[1])
                trunk[index, :columns] = hidden[:, :columns]    # beyond is padding, which no real token sees
        if trunk is not None:
            batch["trunk"] = trunk
        return results.unbind(0)

    # What the sampler computed: kept for the step that follows, and used if it still holds.

    def recalls(self):
        """Whether the sampler's results may be used again. Asked each time, as a config may change.

        Not for the full KL, which needs all logits; not in TF32, a GPU's float32 with a mantissa of 10 bits;
        not in several processes, where a run is to be the same, to the bit, with and without DeepSpeed.
        """
        one_process = self.accelerator.num_processes == 1 and distributed.zero_stage(self.accelerator) == 0
        return (self.exact and one_process and self.config.kl_penalty != "full"
                and torch.backends.cuda.matmul.fp32_precision != "tf32")

    def weights_now(self):
        """Equal at two moments if no weight was changed in between.

        torch counts what is written into a tensor, but not what an optimizer writes in one kernel (Adam with
        fused=True, bitsandbytes). So the trained weights are also added up: a step changes some sum.
        """
        parameters = list(self.language_model.parameters())
        sums = torch.stack([p.detach().sum() for p in parameters if p.requires_grad]).tolist()
        return self.config.temperature, sums, [(p.data_ptr(), p._version) for p in parameters]

    def remember(self, rollout, responses):
        """Keep what the sampler computed for these responses, and for no more than the last batch_size."""
        weights = self.weights_now()
        if weights != self.sampled_by:
            self.sampled, self.sampled_by = {}, weights
        for i, (query, response) in enumerate(zip(rollout.queries, responses)):
            key = (len(query), *query.tolist(), *response.tolist())
            self.sampled.pop(key, None)             # the newest comes last
            self.sampled[key] = rollout.of_row(i, len(response))
        for oldest in list(self.sampled)[:-self.config.batch_size]:
            del self.sampled[oldest]

    def recall(self, batch):
        """-> {"logprobs": (B, R), "values": (B, R)[, "trunk": (B, T - 1, H)]} of the sampler; or {}.

        They hold if each of these very tokens was sampled from these very weights; each is used once.
        """
        known, weights, self.sampled, self.sampled_by = self.sampled, self.sampled_by, {}, None
        if not known or not batch["mask"].any() or not self.recalls() or weights != self.weights_now():
            return {}
        query_lengths = batch["lengths"] - batch["response_lengths"]
        lengths = zip(query_lengths.tolist(), batch["lengths"].tolist(), batch["input_ids"].tolist())
        rows = [known.get((query, *tokens[:length]), {}) for query, length, tokens in lengths]
        names = ("logprobs", "values", "trunk") if self.trunk.blocks else ("logprobs", "values")
        if not all(name in row for row in rows for name in names):
            return {}
        return {name: pad_sequence([row[name] for row in rows], batch_first=True) for name in names}


if __name__ == "__main__":
    logits = torch.randn(1000, 4096, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.arange(1000)
    logprobs, entropy = LogprobsAndEntropy.apply(logits, labels)                                # (1000,) each
    gradient, = torch.autograd.grad(logprobs.sum(), logits)
    plain = logprobs_from_logits(logits, labels)
    plain_gradient, = torch.autograd.grad(plain.sum(), logits)
    print("largest difference of a log-prob", f"{(logprobs - plain).detach().abs().max():.1e}")
    print("largest difference of its gradient", f"{(gradient - plain_gradient).abs().max():.1e}")
    print("mean entropy", round(entropy.mean().item(), 4), "nats")
    drawn = torch.cat([draw(torch.tensor([[0.1, 0.0, 0.9]]).expand(1000, -1)) for _ in range(10)])
    print("drawn with probabilities 0.1, 0, 0.9:", torch.bincount(drawn, minlength=3).tolist(), "of 10000")
    print("even sizes of 5, 60, 130:", even_size(5), even_size(60), even_size(130))
