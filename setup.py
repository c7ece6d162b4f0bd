"""Builds the kernels of csrc/ into lozo_kernels/lib: a plain C ABI, so one binary serves every Python and torch.

liblozo_cpu.so needs a C++ compiler (CXX names it, LDFLAGS adds to its link). Without one the install goes on, and a slower path
serves. liblozo_cuda.so is compiled only on request, by nvcc (NVCC, CUDA_HOME or PATH): GPUs are served by Triton without it.

    LOZO_KERNELS_NATIVE=0            compile nothing: the wheel is py3-none-any
    LOZO_KERNELS_REQUIRE_NATIVE=1    a build without the CPU library is an error
    LOZO_KERNELS_CUDA=1              compile the CUDA library too, if nvcc is there
    LOZO_KERNELS_REQUIRE_CUDA=1      the same, and a build without it is an error
    LOZO_KERNELS_CUDA_ARCHS="90;100" the GPUs that are compiled for

Everything else is in pyproject.toml, except the text of the README, whose links are made absolute here.
"""

import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
COMMON = ("dispatch", "threads", "tiles")
"""What is compiled once; every other file of csrc/cpu is an op, compiled once per instruction set."""
CPU_OPS = sorted(path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp") if path.stem not in COMMON)
# Nothing here changes a value: results are promised in bits, so no -ffast-math and no contraction. -fno-trapping-math lets
# selects become vector code. The warnings that are off are about the own intrinsics of GCC, or one compiler alone knows them.
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
        "-Wno-uninitialized",
        "-Wno-unused-lambda-capture",
        "-Wno-unknown-warning-option",
    ),
]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86_ISAS = {"avx512_bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"], "avx512": AVX512, "avx2": ["-mavx2", "-mfma", "-mf16c"]}
ISAS = {"x86_64": X86_ISAS, "amd64": X86_ISAS, "aarch64": {"neon": []}, "arm64": {"neon": []}}
"""The instruction sets of a processor with their flags, beside "portable", which is everywhere."""
CUDA_FILES = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
CUDA_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static"]


def is_set(variable, default="0"):
    """Whether an environment variable says yes."""
    return os.environ.get(variable, default) not in ("", "0")


NATIVE = is_set("LOZO_KERNELS_NATIVE", default="1")
REQUIRED = is_set("LOZO_KERNELS_REQUIRE_NATIVE")
CUDA_REQUIRED = is_set("LOZO_KERNELS_REQUIRE_CUDA")


def say(text):
    """One line about what is built. pip shows it with -v."""
    print(f"lozo_kernels: {text}", flush=True)


def find_compiler():
    """The C++ compiler as a command, or None."""
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        command = shlex.split(name)
        if shutil.which(command[0]):
            return command
    return None


def find_nvcc():
    """The CUDA compiler, or None."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    for name in (os.environ.get("NVCC"), str(Path(home) / "bin" / "nvcc"), "nvcc"):
        if name and shutil.which(name):
            return shutil.which(name)
    return None


def cuda_archs(nvcc):
    """Compute capabilities to compile for: those asked for, else those of ours that this nvcc knows."""
    asked = [arch for arch in os.environ.get("LOZO_KERNELS_CUDA_ARCHS", "").replace(",", ";").split(";") if arch.strip()]
    if asked:
        return [arch.strip().replace(".", "") for arch in asked]
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    return [arch for arch in CUDA_ARCHS if f"sm_{arch}" in known]


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


def asked(compiler, option):
    """What the compiler answers to an option, or "" if it does not know it."""
    return subprocess.run([*compiler, option], capture_output=True, text=True).stdout.strip()


def isas(compiler):
    """The instruction sets to compile for, with their flags. The compiler knows for which processor: it may not be this one."""
    processor = asked(compiler, "-dumpmachine").partition("-")[0]
    return {**{name: f for name, f in ISAS.get(processor, {}).items() if accepts(compiler, f)}, "portable": []}


def escape(path):
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def rules(name, compile_command, link_command):
    """How ninja compiles and links one library."""
    return [
        f"rule compile_{name}",
        f"  command = {compile_command.replace('$', '$$')} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        f"rule link_{name}",
        f"  command = {link_command.replace('$', '$$')} $in -o $out",
        "  description = $out",
    ]


def cpu_ninja_file(compiler, chosen, library):
    """The CPU library's build: every op once per instruction set, the rest once."""
    include = ROOT / "csrc" / "include"
    command = shlex.join([*compiler, *FLAGS, f"-I{include}"])
    lines = rules("cpu", command, f"{shlex.join(compiler)} -shared -pthread {os.environ.get('LDFLAGS', '')}")
    # GCC reads the intrinsics as slowly as it compiles a small op: they are compiled once per instruction set.
    precompiled = "Free Software Foundation" in asked(compiler, "--version")
    objects = []

    def compile_one(source, made, flags, needs=""):
        lines.append(f"build {made}: compile_cpu {escape(source)}{needs}")
        lines.append(f"  flags = {' '.join(flags)}")

    for isa, isa_flags in chosen.items():
        # Few machines run nothing better than portable code, and all compile it: with -O2 in two thirds of the time.
        quick = ["-O2"] if isa == "portable" and len(chosen) > 1 else []
        flags, needs = [f"-DLOZO_ISA_{isa}", *isa_flags, *quick], ""
        if precompiled:
            compile_one(include / "lozo" / "vec.h", f"{isa}.h.gch", ["-x", "c++-header", *flags])
            flags, needs = ["-include", f"{isa}.h", *flags], f" || {isa}.h.gch"
        for op in CPU_OPS:
            objects.append(f"{op}.{isa}.o")
            compile_one(ROOT / "csrc" / "cpu" / f"{op}.cpp", objects[-1], flags, needs)
    for name in COMMON:
        objects.append(f"{name}.o")
        compile_one(ROOT / "csrc" / "cpu" / f"{name}.cpp", objects[-1], [f"-DLOZO_HAVE_{isa}" for isa in chosen])
    lines.append(f"build {escape(library)}: link_cpu {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def cuda_ninja_file(nvcc, archs, library):
    """The CUDA library's build: every file once, for all GPUs; PTX of the newest serves those to come."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    macro = f'-DLOZO_CUDA_ARCHITECTURES="{" ".join(archs)}"'
    command = shlex.join([nvcc, *CUDA_FLAGS, *targets, macro, f"-I{ROOT / 'csrc' / 'include'}"])
    lines = rules("cuda", command, f"{shlex.join([nvcc])} -shared -cudart static")
    for name in CUDA_FILES:
        lines.append(f"build {name}.cuda.o: compile_cuda {escape(ROOT / 'csrc' / 'cuda' / (name + '.cu'))}")
    lines.append(f"build {escape(library)}: link_cuda {' '.join(f'{name}.cuda.o' for name in CUDA_FILES)}")
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
        if ext.name.endswith("_cuda"):
            self.build_cuda(ext)
            return
        compiler = find_compiler()
        if compiler is None:
            raise CompileError("lozo_kernels: no C++ compiler found")
        chosen = isas(compiler)
        version = (asked(compiler, "--version") or "of no name").splitlines()[0]
        say(f"compiling the CPU kernels for {', '.join(chosen)} with {shlex.join(compiler)} ({version}), a minute on two cores")
        self.run_ninja("cpu", cpu_ninja_file(compiler, chosen, self.library(ext)))

    def build_cuda(self, ext):
        """One line where it fails: most machines have no GPU to miss it for."""
        nvcc = find_nvcc()
        try:
            archs = cuda_archs(nvcc) if nvcc else []
            if not archs:
                raise CompileError(f"{nvcc} knows none of the GPUs {', '.join(CUDA_ARCHS)}" if nvcc else "no nvcc found (set NVCC)")
            say(f"compiling the CUDA kernels for compute capabilities {', '.join(archs)} with {nvcc}, some minutes for each")
            self.run_ninja("cuda", cuda_ninja_file(nvcc, archs, self.library(ext)))
        except CompileError as error:
            if CUDA_REQUIRED:
                raise
            say(f"going on without the CUDA kernels, Triton serves GPUs: {error}")

    def library(self, ext):
        """Where the linker is to put it."""
        path = Path(self.get_ext_fullpath(ext.name)).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def run_ninja(self, name, text):
        """Builds what the text of a ninja file describes, on all cores."""
        ninja = find_ninja()
        if ninja is None:
            raise CompileError("no ninja found")
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        (build / f"{name}.ninja").write_text(text)
        start = time.monotonic()
        command = [ninja, "-C", str(build), "-f", f"{name}.ninja", "-v" if self.verbose > 1 else "--quiet"]
        if subprocess.run(command).returncode:
            raise CompileError(f"the {name} kernels did not compile (see above)")
        say(f"compiled the {name} kernels in {time.monotonic() - start:.0f} s")


class Wheel(bdist_wheel):
    """Tagged for any Python 3, and for this platform if there is a binary inside."""

    def run(self):
        """Says why there is no binary inside, where there is none."""
        if self.root_is_pure:
            why = "no C++ compiler found (set CXX)" if NATIVE else "LOZO_KERNELS_NATIVE=0"
            say(f"going on without the compiled kernels, a slower path serves CPUs: {why}")
        super().run()

    def get_tag(self):
        """Python tag, ABI tag, platform tag."""
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


def native_extensions():
    """The libraries to build. None where nothing here can build one and nobody insists."""
    if not NATIVE:
        return []
    headers = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*.h"))]
    found = []
    if REQUIRED or find_compiler() is not None:
        cpu = [f"csrc/cpu/{name}.cpp" for name in (*CPU_OPS, *COMMON)]
        found.append(Extension("lozo_kernels.lib.liblozo_cpu", cpu, depends=headers, optional=not REQUIRED))
    if CUDA_REQUIRED or is_set("LOZO_KERNELS_CUDA"):
        cuda = [f"csrc/cuda/{name}.cu" for name in CUDA_FILES]
        found.append(Extension("lozo_kernels.lib.liblozo_cuda", cuda, depends=headers, optional=not CUDA_REQUIRED))
    return found


def readme():
    """README.md with absolute links, which a page of the package index needs: to the files of this version's tag."""

    def setting(file, name):
        return re.search(rf'^{name} = "(.+)"$', (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)[1]

    home, version = setting("pyproject.toml", "Repository"), setting("lozo_kernels/kernels/version.py", "__version__")

    def absolute(link):
        picture = link[1].startswith("!")
        return f"{link[1]}({home}/{'raw' if picture else 'blob'}/v{version}/{link[2]})"

    return re.sub(r"(!?\[[^\]]*\])\((?![a-z]+:|#)([^)]+)\)", absolute, (ROOT / "README.md").read_text(encoding="utf-8"))


setup(
    ext_modules=native_extensions(),
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    long_description=readme(),
    long_description_content_type="text/markdown",
)
