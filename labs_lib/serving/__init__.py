"""Multi-adapter serving: one base model, many LoRA adapters, chosen per request and batched together."""
