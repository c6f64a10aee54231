"""Automatic mask generation ("everything mode"): of one image, and of many in a folder."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
