"""Training: `fit` on transformers' Trainer, and recorded sweeps of it."""
