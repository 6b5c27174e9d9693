"""Compiles the CPU kernels, where there is a compiler; everything else is in pyproject.toml."""

import platform
from pathlib import Path

from setuptools import Extension, setup

FOLDER = Path("shared/engine/native")
FLAGS = [
    "-std=gnu11",
    "-O3",
    "-fopenmp",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
]
# One library for each kind of CPU; `library.py` loads the best that the CPU can run.
BUILDS = {"generic": []}
if platform.machine() in ("x86_64", "AMD64"):
    BUILDS |= {
        "avx2": ["-march=x86-64-v3"],
        "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    }

setup(
    ext_modules=[
        Extension(
            f"shared.engine.native._kernels_{name}",
            sources=sorted(str(path) for path in FOLDER.glob("*.c")),
            depends=sorted(str(path) for path in FOLDER.glob("*.h")),
            extra_compile_args=FLAGS + flags,
            extra_link_args=["-fopenmp", "-lm"],
            optional=True,
        )
        for name, flags in BUILDS.items()
    ]
)
