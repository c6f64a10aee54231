"""Fine-tuning: small files of pure functions, for one's own loop or for `examples/finetune.py`."""
