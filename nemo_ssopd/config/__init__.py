"""Settings: dataclasses with their defaults, and the checks next to them."""
