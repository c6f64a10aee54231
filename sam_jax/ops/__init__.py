"""Pure functions on arrays, each with one definition."""
