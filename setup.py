"""Builds the compiled backends; everything else about the package is in pyproject.toml.

cpu: without a working C++ compiler the package installs all the same, without it; an error in our
own code fails the build.

cuda: KL_KERNELS_CUDA=1 builds it or fails, 0 leaves it out. Unset, it is built where there are
both nvcc and a torch with CUDA; the build says so where it is not. No GPU is needed.
TORCH_CUDA_ARCH_LIST says for which ("9.0 10.0+PTX"); without it, those of CUDA_ARCHITECTURES that
nvcc knows.
"""

import os
import platform
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info
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
# -ftz: a weight below 2^-126 is 0, and 2^x is one instruction.
NVCC_FLAGS = ["-std=c++17", "-O3", "-ftz=true", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_ARCHITECTURES = ("80", "90", "100")


class BuildExtensions(build_ext):
    def run(self):
        # The base class builds as if not in place, and copies to the checkout afterwards.
        self.package_roots = [Path(self.build_lib), *([Path()] if self.inplace else [])]
        if CUDA.reason:
            self.leave_out("cuda", CUDA.reason)
        super().run()

    def build_extensions(self):
        self.extensions = [ext for ext in self.extensions if self.has_compiler(ext)]
        super().build_extensions()

    def build_extension(self, ext):
        cuda = ext.name.endswith("cuda")
        ext.extra_objects = self.compile_cuda_kernels() if cuda else self.compile_row_kernels(ext)
        super().build_extension(ext)

    def has_compiler(self, ext):
        """Whether to build `ext`."""
        name = ext.name.rpartition("_")[2]
        for file in self.reason_files(name):
            file.unlink(missing_ok=True)
        try:
            self.compile_nothing()
        except (BaseError, CCompilerError, OSError) as error:
            if name == "cuda" and CUDA.required:
                raise
            self.leave_out(name, f"for want of a working C++20 compiler ({error})")
            return False
        return True

    def reason_files(self, name):
        """Where `python -m kl_kernels info` looks for the reason why a backend is not built."""
        return [root / "kl_kernels" / f"_C_{name}.unavailable" for root in self.package_roots]

    def leave_out(self, name, why):
        reason = f"is not built, {why}"
        print(f"kl_kernels: the {name} backend {reason}; the package works without it.")
        for file in self.reason_files(name):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(reason + "\n")
            file.with_suffix(".abi3.so").unlink(missing_ok=True)  # of an earlier build

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

    def compile_cuda_kernels(self):
        """Each csrc/cuda/*.cu, for all architectures."""
        directory = Path(self.build_temp) / "cuda"
        directory.mkdir(parents=True, exist_ok=True)
        flags = NVCC_FLAGS + CUDA.architecture_flags()

        def compile_one(source):
            target = str(directory / f"{source.stem}.o")
            self.spawn([CUDA.nvcc, *flags, "-c", str(source), "-o", target])
            return target

        with ThreadPoolExecutor() as pool:
            return list(pool.map(compile_one, sorted(Path("csrc/cuda").glob("*.cu"))))


class Cuda:
    """Whether to build the cuda backend, and with what."""

    def __init__(self):
        wish = os.environ.get("KL_KERNELS_CUDA", "")
        if wish not in ("", "0", "1"):
            raise SystemExit(f"KL_KERNELS_CUDA is {wish!r}; accepted: 0, 1 or nothing")
        self.required = wish == "1"
        self.home = self.find_home()
        self.reason = self.reason_against(wish)
        if self.required and self.reason:
            raise SystemExit(
                f"KL_KERNELS_CUDA=1, but the cuda backend cannot be built: {self.reason}"
            )

    @staticmethod
    def find_home():
        """The CUDA toolkit's directory, or None."""
        nvcc = shutil.which("nvcc")
        candidates = [
            os.environ.get("CUDA_HOME"),
            os.environ.get("CUDA_PATH"),
            nvcc and Path(nvcc).resolve().parent.parent,
            "/usr/local/cuda",
        ]
        files = ("bin/nvcc", "include/cuda_runtime_api.h")
        homes = (Path(home) for home in candidates if home)
        return next((home for home in homes if all((home / f).exists() for f in files)), None)

    def reason_against(self, wish):
        """Why it is not to be built, or None."""
        import torch

        if wish == "0":
            return "as KL_KERNELS_CUDA=0 asks"
        if self.home is None:
            return "for want of nvcc (set CUDA_HOME)"
        if wish == "" and torch.version.cuda is None:
            return "this torch being one without CUDA (KL_KERNELS_CUDA=1 builds it all the same)"
        return None

    @property
    def nvcc(self):
        return str(self.home / "bin" / "nvcc")

    def version(self):
        """The toolkit's, as PyTorch writes it ("130")."""
        told = subprocess.run([self.nvcc, "--version"], check=True, capture_output=True, text=True)
        return "".join(re.search(r"release (\d+)\.(\d+)", told.stdout).groups())

    def architecture_flags(self):
        """-gencode flags for TORCH_CUDA_ARCH_LIST, or for CUDA_ARCHITECTURES."""
        wanted = re.split(r"[\s;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
        if wanted == [""]:
            query = [self.nvcc, "--list-gpu-code"]
            known = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()
            wanted = [sm for sm in CUDA_ARCHITECTURES if f"sm_{sm}" in known]
            wanted[-1] += "+PTX"
        flags = []
        for architecture in wanted:
            match = re.fullmatch(r"(\d+)\.?(\d[af]?)(\+PTX)?", architecture)
            if match is None:
                raise SystemExit(
                    f"TORCH_CUDA_ARCH_LIST holds {architecture!r}; accepted: numbers such as "
                    "9.0, 9.0a or 10.0+PTX"
                )
            sm = match[1] + match[2]
            codes = [f"sm_{sm}", f"compute_{sm}"] if match[3] else [f"sm_{sm}"]
            flags += [f"-gencode=arch=compute_{sm},code=[{','.join(codes)}]"]
        return flags


CUDA = Cuda()


class NameVersion(egg_info):
    def finalize_options(self):
        if CUDA.required:  # the wheel's name tells it from the one without: 0.1.0+cu130
            self.tag_build = f"+cu{CUDA.version()}"
        super().finalize_options()


def extension(name, sources, **arguments):
    from torch.utils.cpp_extension import include_paths, library_paths

    return Extension(
        f"kl_kernels._C_{name}",
        sources=[f"csrc/{name}/{source}" for source in sources],
        depends=[str(path) for path in Path("csrc").rglob("*") if path.is_file()],
        include_dirs=include_paths() + arguments.pop("include_dirs", []),
        library_dirs=library_paths() + arguments.pop("library_dirs", []),
        libraries=["torch_cpu", *arguments.pop("libraries", [])],
        define_macros=[
            ("TORCH_TARGET_VERSION", MINIMUM_TORCH),
            ("Py_LIMITED_API", "0x030a0000"),
            *arguments.pop("define_macros", []),
        ],
        extra_compile_args=FLAGS,
        language="c++",
        py_limited_api=True,
        **arguments,
    )


def extensions():
    yield extension("cpu", ["bindings.cpp", "instruction_set.cpp"])
    if not CUDA.reason:
        yield extension(
            "cuda",
            ["bindings.cpp"],
            include_dirs=[str(CUDA.home / "include")],
            # The static runtime, kept to ourselves: this library loads on machines without CUDA.
            library_dirs=[str(CUDA.home / directory) for directory in ("lib64", "lib")],
            libraries=["cudart_static", "dl", "pthread", "rt"],
            extra_link_args=["-Wl,--exclude-libs,ALL"],
            define_macros=[("USE_CUDA", None)],
        )


setup(
    ext_modules=list(extensions()),
    cmdclass={"build_ext": BuildExtensions, "egg_info": NameVersion},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
