"""Builds the CPU kernels of csrc/ into lozo_kernels/lib/liblozo_cpu.so: a plain C ABI, so one binary serves every Python and torch.

Without a compiler the install goes on in pure Python, slower and with the reason in ``lozo-kernels doctor``; set
LOZO_KERNELS_REQUIRE_NATIVE=1 to make that an error. CXX names the compiler. Everything else is in pyproject.toml.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
OPS = ("lowrank_update", "dense_update", "lowrank_momentum", "dense_momentum", "resample", "factor")
COMMON = ("dispatch", "threads", "tiles")
# Nothing here changes a value: results are promised in bits, so no -ffast-math and no contraction. -fno-trapping-math lets
# selects become vector code. The warnings are about the own intrinsics of GCC.
FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread"),
    *(
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wall",
        "-Wextra",
        "-Wno-ignored-attributes",
        "-Wno-maybe-uninitialized",
    ),
]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86_ISAS = {"avx512_bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"], "avx512": AVX512, "avx2": ["-mavx2", "-mfma", "-mf16c"]}
REQUIRED = os.environ.get("LOZO_KERNELS_REQUIRE_NATIVE", "0") not in ("", "0")


def find_compiler():
    """The C++ compiler as a command, or None."""
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        command = shlex.split(name)
        if shutil.which(command[0]):
            return command
    return None


def find_ninja():
    """The ninja program: that of the Python package, else the system's."""
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    return str(Path(ninja.BIN_DIR) / "ninja")


def accepts(compiler, flags):
    """Whether the compiler knows the flags."""
    command = [*compiler, *FLAGS, *flags, "-x", "c++", "-c", os.devnull, "-o", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def isas(compiler):
    """The instruction sets to compile for, with their flags; "portable" is everywhere."""
    x86 = platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32
    return {**{name: f for name, f in X86_ISAS.items() if x86 and accepts(compiler, f)}, "portable": []}


def ninja_file(compiler, library):
    """The build, as ninja reads it: every op once per instruction set, the rest once."""

    def path(p):
        return str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    chosen = isas(compiler)
    command = shlex.join([*compiler, *FLAGS, f"-I{ROOT / 'csrc' / 'include'}"])
    lines = [
        "rule compile",
        f"  command = {command.replace('$', '$$')} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = {shlex.join(compiler)} -shared -pthread $in -o $out",
        "  description = $out",
    ]
    objects = []

    def compile_one(name, object_name, flags):
        objects.append(object_name)
        lines.extend(
            [f"build {object_name}: compile {path(ROOT / 'csrc' / 'cpu' / (name + '.cpp'))}", f"  flags = {' '.join(flags)}"]
        )

    for isa, flags in chosen.items():
        for op in OPS:
            compile_one(op, f"{op}.{isa}.o", [f"-DLOZO_ISA_{isa}", *flags])
    for name in COMMON:
        compile_one(name, f"{name}.o", [f"-DLOZO_HAVE_{isa}" for isa in chosen])
    lines.append(f"build {path(library)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class BuildNative(build_ext):
    """Runs ninja instead of one compiler command after the other."""

    def get_ext_filename(self, fullname):
        """No Python version in the name: the library does not depend on one."""
        return str(Path(*fullname.split("."))) + ".so"

    def copy_extensions_to_source(self):
        """For editable installs; the folder holds nothing that git keeps."""
        (ROOT / "lozo_kernels" / "lib").mkdir(exist_ok=True)
        super().copy_extensions_to_source()

    def build_extension(self, ext):
        """Raises CompileError, which ends an optional extension's build but not the install."""
        compiler, ninja = find_compiler(), find_ninja()
        if compiler is None or ninja is None:
            raise CompileError(f"lozo_kernels: no {'C++ compiler' if compiler is None else 'ninja'} found")
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(compiler, library))
        if subprocess.run([ninja, "-C", str(build), *(["-v"] if self.verbose > 1 else [])]).returncode:
            raise CompileError("lozo_kernels: the native kernels did not compile (see above)")


class Wheel(bdist_wheel):
    """Tagged for any Python 3, and for this platform if there is a binary inside."""

    def get_tag(self):
        """Python tag, ABI tag, platform tag."""
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


def native_extensions():
    """The library, unless nothing here can build it and nobody insists."""
    if not REQUIRED and find_compiler() is None:
        print("lozo_kernels: no C++ compiler found (set CXX); installing without native CPU kernels", file=sys.stderr)
        return []
    sources = [f"csrc/cpu/{name}.cpp" for name in (*OPS, *COMMON)]
    headers = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*.h"))]
    return [Extension("lozo_kernels.lib.liblozo_cpu", sources, depends=headers, optional=not REQUIRED)]


setup(ext_modules=native_extensions(), cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel})
