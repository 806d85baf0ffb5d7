"""CompiledPPOTrainer samples with one compiled decoding step of fixed shape: for small models on a GPU.

Why: a token of a small model needs some hundred kernels, and Python takes longer to launch them than the GPU
to run them. A CUDA graph launches all of them at once, but only for shapes and addresses that never change:
hence a cache of fixed size. All other code of the sampler is that of speed.py, and it draws the same tokens.
What it costs: the first rollout of each shape waits for the compiler, and the cache stays in memory. Under
bf16 autocast the weights are converted again for each token, so there is less to gain.
Source: a fixed cache and one compiled step, as in gpt-fast (Accelerating Generative AI II, PyTorch 2023).

Differs from FastPPOTrainer in: rows that have ended are computed to the end of the batch, though they leave
the sampler as before; the order in which numbers are added. No GPU was at hand to measure what it saves.
Shapes: B = rows of the batch, b = those that the sampler still holds, C = columns of the cache, H = hidden.
Copy me: needs speed.py and what that needs. Tested by tests/test_decoding.py, on a GPU by tests/test_gpu.py.
"""
import logging

import torch
from transformers.cache_utils import Cache, StaticLayer

import distributed
from speed import FastPPOTrainer, even_size, language_model_head
from value_head import AutoModelForCausalLMWithValueHead

COLUMNS = 64            # the cache has a multiple of these, so that prompts of many lengths make few shapes
MOST_SHAPES = 4         # compiled for one trainer; each keeps a cache in memory
logger = logging.getLogger(__name__)


class StaticDecoder:
    """The policy while it samples batches of one shape: `forward` in place of its own, and its cache.

    model: a value-head model. layers: of its cache. settings: arguments of torch.compile.
    """

    def __init__(self, model, layers, rows, columns, device, settings):
        self.model, base_model = model, model.pretrained_model.base_model
        self.cache = Cache(layers=[StaticLayer(columns) for _ in range(layers)])
        self.mask = torch.zeros(rows, columns, dtype=torch.long, device=device)                     # (B, C)
        self.input_ids = self.mask.new_zeros(rows, 1)                                               # (B, 1)

        def run(input_ids, attention_mask, cache, **position_ids):
            return base_model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache,
                              use_cache=True, **position_ids)

        # fullgraph: what cannot be one graph is an error, not a slow mixture. dynamic=False: a new shape is
        # compiled for itself, because a CUDA graph has fixed shapes.
        self.run, self.step = run, torch.compile(run, fullgraph=True, dynamic=False,
                                                isolate_recompiles=True, **settings)

    def restart(self):
        """Forget the last batch. The cache keeps its memory, whose addresses are part of the CUDA graph."""
        self.cache.reset()
        self.mask.zero_()
        self.rows, self.filled = torch.arange(len(self.mask), device=self.mask.device), 0           # (b,)

    def forward(self, input_ids, attention_mask, past_key_values, logit_positions, use_cache):
        """What `sample` asks of the policy: logits of the last column, (b, 1, V), None, values (b, 1).

        input_ids: the prompts (B, Q) at first, and then the newest tokens (b, 1).
        """
        start, self.filled = self.filled, self.filled + input_ids.shape[1]
        if start == 0:          # the prompts are one pass in many, and of many lengths: they are not compiled
            step, tokens = self.run, input_ids
            self.mask[:, :self.filled] = attention_mask
            positions = (self.mask[:, :self.filled].cumsum(-1) - 1).clamp(min=0)                    # (B, Q)
        else:
            # A row that the sampler has dropped repeats its last token, masked, at its last position: so it
            # stays finite and within the model's positions. Nobody reads its results.
            step, tokens = self.step, self.input_ids
            tokens[self.rows] = input_ids
            self.mask[self.rows, start] = 1
            positions = self.mask.sum(1, keepdim=True) - 1                                          # (B, 1)
            # Without this a CUDA graph takes the last step's output to be still in use.
            torch.compiler.cudagraph_mark_step_begin()
        position_ids = {"position_ids": positions} if self.model.takes_position_ids else {}
        output = step(tokens, self.mask, self.cache, **position_ids)
        # The head is outside of the compiled step: it differs between families, and is one large product.
        hidden = output.last_hidden_state[self.rows, -1]                                            # (b, H)
        logits, values = language_model_head(self.model, output, hidden)
        return logits.unsqueeze(1), None, values.unsqueeze(1)

    def batch_select_indices(self, indices):
        """The sampler goes on with these of its rows. Here all are kept, as the shapes are fixed."""
        self.rows = self.rows[indices]


class CompiledPPOTrainer(FastPPOTrainer):
    """FastPPOTrainer whose decoding step is compiled on a GPU; the same arguments, the same numbers."""

    compile_settings = {"mode": "reduce-overhead"}      # CUDA graphs
    compiled_on = "cuda"            # other devices have no launches to save; the tests set "cpu"

    def prepare(self, *arguments):
        super().prepare(*arguments)
        self.decoders, self.reported = {}, set()

    def sample(self, language_model, queries, arguments, cache, watches):
        """The plain loop runs, and only the policy's `forward` and its cache are others.

        So the same random numbers give the same tokens, and what the sampler has computed is used again.
        """
        tokens = even_size(max(len(q) for q in queries)) + arguments["max_new_tokens"]
        shape = len(queries), -(-tokens // COLUMNS) * COLUMNS
        reason = self.why_not_compiled(language_model, shape)
        if reason is not None:
            if reason not in self.reported:
                logger.warning("decoding is not compiled: %s", reason)
            self.reported.add(reason)
            return super().sample(language_model, queries, arguments, cache, watches)
        if shape not in self.decoders:
            self.decoders[shape] = StaticDecoder(language_model, len(cache.layers), *shape,
                                                 self.accelerator.device, self.compile_settings)
        decoder, forward = self.decoders[shape], language_model.forward
        decoder.restart()
        language_model.forward = decoder.forward
        try:
            return super().sample(language_model, queries, arguments, decoder, watches)
        finally:
            language_model.forward = forward

    def why_not_compiled(self, language_model, shape):
        """-> why the plain loop has to sample this batch, or None. Sliding windows never come as far as here.

        A shape is refused only after MOST_SHAPES of them, and costs time but no correctness.
        """
        inner, device = language_model.pretrained_model, self.accelerator.device.type
        attention = getattr(inner.config, "_attn_implementation", None)
        reasons = {
            f"the device is {device!r}, and it is made for {self.compiled_on!r}": device != self.compiled_on,
            "only the policy's is, and the reference samples": language_model is not self.language_model,
            "adapters put layers of their own into the model": language_model.is_peft_model,
            "kernels of quantized layers are not made for it": distributed.quantized(language_model),
            "DeepSpeed may move the weights": distributed.zero_stage(self.accelerator) > 0,
            # Recording reads the hidden states by a hook that exists for one pass.
            "the layers shared with the reference are recorded": bool(self.trunk.blocks) and self.recalls(),
            f"transformers says that {type(inner).__name__} cannot be": not inner._can_compile_fullgraph,
            f"attention {attention!r} may not take a cache of fixed size": attention not in ("sdpa", "eager"),
            f"{MOST_SHAPES} shapes of a batch are already, and this is another one: (rows, columns) {shape}":
                shape not in self.decoders and len(self.decoders) >= MOST_SHAPES}
        return next((reason for reason, holds in reasons.items() if holds), None)


def fast_trainer(compiled):
    """-> the class of the fast trainer, with a decoding step that is compiled or not: --compile_decoding."""
    return CompiledPPOTrainer if compiled else FastPPOTrainer


if __name__ == "__main__":
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = AutoModelForCausalLMWithValueHead(LlamaForCausalLM(LlamaConfig(vocab_size=50, **size)).eval())
    tokens, mask = torch.randint(1, 50, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    mask[0, :2] = 0                                                                 # padded on the left
    decoder = StaticDecoder(model, 2, 3, COLUMNS, "cpu", {"backend": "eager"})
    decoder.restart()
    with torch.no_grad():
        expected, _, _ = model(tokens, mask)                                                     # (3, 6, 50)
        for column, new in ((3, tokens[:, :4]), (4, tokens[:, 4:5]), (5, tokens[:, 5:])):
            logits, _, _ = decoder.forward(new, mask[:, :column + 1], None, None, True)
            difference = (logits[:, 0] - expected[:, column]).abs().max()
            print(f"token {column + 1}: largest difference of a logit from a pass over all {difference:.1e}")
