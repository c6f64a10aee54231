from folders import expected, model, photos, run  # noqa: F401
