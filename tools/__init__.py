"""The memory plan and the scaling model: on paper, from configs. Not part of the package that trains."""
