"""Memory plan and scaling model, computed from configs alone. Not part of the package that trains."""
