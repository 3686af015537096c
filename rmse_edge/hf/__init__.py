"""RMS-E checkpoints in transformers: `AutoModelForCausalLM.from_pretrained` and `generate`."""
