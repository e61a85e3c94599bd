"""The cffi hook: everything else is in pyproject.toml."""
