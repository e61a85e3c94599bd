"""The cffi hook: everything else is in pyproject.toml."""

import platform
import sys

from setuptools import setup

if sys.platform == "linux" and platform.machine() == "x86_64":
    setup(cffi_modules=["kvm/backends/kernel/build_ffi.py:ffi"])
else:
    setup()
