"""The settings: dataclasses with their defaults, and the checks beside them."""
