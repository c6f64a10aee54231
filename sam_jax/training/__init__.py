"""Fine-tuning: pure functions for your own training loop or for `examples/finetune.py`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
