"""Builds the compiled backends; everything else about the package is in pyproject.toml.

Without a working C++ compiler the package installs all the same, without its cpu backend; an error
in our own code fails the build.
"""

import platform
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

# Never -ffast-math: NaN and -inf have a meaning here. (The last two warnings are false: they
# come from gcc 12's own headers.)
FLAGS = [
    *("-std=c++20", "-O3", "-g0", "-fvisibility=hidden"),
    *("-fno-trapping-math", "-fno-math-errno", "-ffp-contract=fast"),
    *("-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"),
]
MINIMUM_TORCH = "0x020b000000000000"  # 2.11
X86_KERNELS = {
    "row_kernels_v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "row_kernels_v3": ["-march=x86-64-v3"],
}
REASON = ".unavailable"  # a file with the reason, which `python -m kl_kernels info` shows


class BuildExtensions(build_ext):
    def run(self):
        # The base class builds as if not in place, and copies to the checkout afterwards.
        self.package_roots = [Path(self.build_lib), *([Path()] if self.inplace else [])]
        super().run()

    def build_extensions(self):
        self.extensions = [ext for ext in self.extensions if self.has_compiler(ext)]
        super().build_extensions()

    def build_extension(self, ext):
        ext.extra_objects = self.compile_row_kernels(ext)
        super().build_extension(ext)

    def has_compiler(self, ext):
        """Whether to build `ext`; if not, its place is taken by a file that says why."""
        reason_files = [root / (ext.name.replace(".", "/") + REASON) for root in self.package_roots]
        for file in reason_files:
            file.unlink(missing_ok=True)
        try:
            self.compile_nothing()
        except (BaseError, CCompilerError, OSError) as error:
            reason = f"is not built, for want of a working C++20 compiler ({error})"
            print(f"kl_kernels: the cpu backend {reason}; the package works without it.")
            for file in reason_files:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(reason + "\n")
            return False
        return True

    def compile_nothing(self):
        """Raise unless the compiler compiles and links an empty C++20 program."""
        with tempfile.TemporaryDirectory() as directory:
            source = Path(directory) / "nothing.cpp"
            source.write_text("#include <compare>\nint nothing() { return 0; }\n")
            objects = self.compiler.compile(
                [str(source)], output_dir=directory, extra_postargs=["-std=c++20", "-fPIC"]
            )
            self.compiler.link_shared_object(
                objects, str(Path(directory) / "nothing.so"), target_lang="c++"
            )

    def compile_row_kernels(self, ext):
        """row.cpp, once per instruction set."""
        kernels = {"row_kernels_base": []}
        if platform.machine().lower() in ("x86_64", "amd64"):
            kernels |= X86_KERNELS

        def compile_one(table):
            return self.compiler.compile(
                ["csrc/cpu/row.cpp"],
                output_dir=str(Path(self.build_temp) / table),
                macros=[("KL_ROW_KERNELS", table)],
                extra_postargs=FLAGS + kernels[table],
                depends=ext.depends,
            )

        with ThreadPoolExecutor() as pool:
            return [name for objects in pool.map(compile_one, kernels) for name in objects]


def cpu_extension():
    from torch.utils.cpp_extension import include_paths, library_paths

    return Extension(
        "kl_kernels._C_cpu",
        sources=["csrc/cpu/bindings.cpp", "csrc/cpu/instruction_set.cpp"],
        depends=[str(path) for path in Path("csrc").rglob("*.h")],
        include_dirs=include_paths(),
        library_dirs=library_paths(),
        libraries=["torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", MINIMUM_TORCH), ("Py_LIMITED_API", "0x030a0000")],
        extra_compile_args=FLAGS,
        language="c++",
        py_limited_api=True,
    )


setup(
    ext_modules=[cpu_extension()],
    cmdclass={"build_ext": BuildExtensions},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
