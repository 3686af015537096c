#!/usr/bin/env bash
# transformers 5.24.0 calls the cache of a model `cache`, and says that the old name `past_key_values` is deprecated until 5.40.0. But a
# model class that was written for 5.23.0 then generates other tokens, without an error: `generate` gives the cache as `cache`, which
# the class's `**kwargs` take and nobody reads; so each token is computed from the one before it alone. Without **kwargs it is a
# TypeError. Tokens are right with use_cache=False, and when the class's `forward` calls its argument `cache`.
#
# Seen, Linux x86-64, Python 3.11:
#   5.23.0: with the cache [32, 19, 41, 10, 19, 41, 10, 20], without [32, 19, 41, 10, 19, 41, 10, 20]
#   5.24.0: with the cache [32, 46, 25, 28, 35, 10, 46, 25], without [32, 19, 41, 10, 19, 41, 10, 20]
# Valid input: a class on top of LlamaModel by public names only, with the arguments and the output that 5.23.0 asks for.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "transformers==5.23.0" "numpy>=2,<3"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --target "$folder/new" "transformers==5.24.0"
cat > "$folder/show.py" <<'PY'
import sys

import torch
import transformers
from transformers import GenerationMixin, LlamaConfig, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class Written(LlamaPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None, **kwargs):
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, use_cache=use_cache
        )
        return CausalLMOutputWithPast(logits=self.head(out.last_hidden_state), past_key_values=out.past_key_values)


torch.manual_seed(0)
sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
model = Written(LlamaConfig(**sizes)).eval()
with torch.no_grad():
    for weight in model.parameters():
        weight.normal_(std=0.3)
prompt = torch.arange(1, 9)[None]
settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
found, right = (model.generate(prompt, use_cache=on, **settings)[0, 8:].tolist() for on in (True, False))
print(f"{transformers.__version__}: with the cache {found}, without {right}")
sys.exit(transformers.__version__ != sys.argv[1] or (found == right) != (sys.argv[2] == "right"))
PY
"$folder/venv/bin/python" "$folder/show.py" 5.23.0 right 2>/dev/null
PYTHONPATH="$folder/new" "$folder/venv/bin/python" "$folder/show.py" 5.24.0 wrong 2>/dev/null
