"""The one part that pyproject.toml has no stable word for: the C library of specnorm_fx/cpu_kernels.py."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "specnorm_fx._cpu_kernels",
            ["specnorm_fx/cpu_kernels.c"],
            extra_compile_args=["-O3", "-fopenmp"],
            extra_link_args=["-fopenmp"],
            optional=True,  # without a compiler the package works, and goes by the reference on the CPU
        )
    ]
)
