"""Builds csrc/ into one shared library that cpu.py loads with ctypes.

The library depends on no Python, no torch and no OpenMP, so one wheel serves all versions of
them, and building it takes nothing but GCC or Clang. Where that fails the package installs
without it and uses its plain PyTorch reference on CPU tensors.
"""

import hashlib
import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wextra", "-Wno-psabi"]
# Last, so that it counts more than -Ofast in CFLAGS, which in linking flushes all subnormals to 0.
EXACT = ["-fno-fast-math"]
FLAGS += EXACT + os.environ.get("LLMJEPA_CPU_FLAGS", "").split()  # for sanitizers
# By which cpu.py sees in a checkout that a library is older than the sources.
SOURCES = sorted(Path(__file__).with_name("csrc").glob("*.[ch]*"))

# Instruction sets of each machine: namespace, bytes and number of vector registers, flags. Those
# that the compiler does not know are left out; which of the others runs is decided when the library
# is loaded. To compile for another machine, name it
# in LLMJEPA_CPU_MACHINE and its compiler in CC, CXX, LDSHARED and LDCXXSHARED.
PORTABLE = ("portable", 16, 16, [])
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
X86 = (
    ("amx", 64, 32, [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-DLK_TILES"]),
    ("avx512bf16", 64, 32, [*AVX512, "-mavx512bf16"]),
    ("avx512", 64, 32, AVX512),
    ("avx2", 32, 16, ["-mavx2", "-mfma"]),
    PORTABLE,
)
ARM = (("neon", 16, 32, []), PORTABLE)
INSTRUCTION_SETS = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}


class BuildKernels(build_ext):
    """Compiles the kernels once per instruction set and links everything into one library."""

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext):
        return []

    def run(self):
        try:
            super().run()
        except Exception as error:
            for extension in self.extensions:  # an older one would not be that of these sources
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            print(
                "\n*** The CPU kernels could not be compiled; llmjepa_kernels will use plain "
                f"PyTorch on CPU tensors.\n*** They need GCC or Clang: {error}\n",
                file=sys.stderr,
            )

    def knows(self, name, flags):
        """Whether the compiler takes the flags of an instruction set, and its assembler follows."""
        if not flags:
            return True
        probe = Path(self.build_temp) / "probe.cpp"
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text('#ifdef LK_TILES\nvoid probe() { asm("tilerelease"); }\n#endif\n')
        try:
            self.compiler.compile(
                [str(probe)], output_dir=self.build_temp, extra_postargs=[*FLAGS, *flags]
            )
        except CompileError:
            print(f"the compiler knows no {name}: the CPU kernels do without it", file=sys.stderr)
            return False
        return True

    def build_extension(self, ext):
        machine = os.environ.get("LLMJEPA_CPU_MACHINE") or platform.machine().lower()
        isas = [
            (name, *rest, flags)
            for name, *rest, flags in INSTRUCTION_SETS.get(machine, (PORTABLE,))
            if self.knows(name, flags)
        ]
        defines = [f"-DLK_WITH_{name.upper()}" for name, *_ in isas]
        sources = b"".join(path.read_bytes() for path in SOURCES)
        digest = hashlib.blake2b(sources, digest_size=8).hexdigest()
        defines.append(f'-DLK_SOURCES="{digest}"')
        common = [source for source in ext.sources if not source.endswith("kernels.cpp")]
        objects = self.compiler.compile(
            common, output_dir=self.build_temp, extra_postargs=[*FLAGS, *defines]
        )
        for name, size, registers, flags in isas:
            objects += self.compiler.compile(
                ["csrc/kernels.cpp"],
                output_dir=f"{self.build_temp}/{name}",
                extra_postargs=[
                    *FLAGS,
                    *flags,
                    f"-DLK_ISA={name}",
                    f"-DLK_VECTOR_BYTES={size}",
                    f"-DLK_VECTOR_REGISTERS={registers}",
                ],
            )
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=["-pthread", *EXACT],
            target_lang="c++",
        )


class PlatformWheel(bdist_wheel):
    """The library is tied to a platform, not to a Python."""

    def get_tag(self):
        _, _, platform_tag = super().get_tag()
        return "py3", "none", platform_tag


setup(
    ext_modules=[
        Extension(
            "llmjepa_kernels.ops._cpu",
            [
                f"csrc/{name}.cpp"
                for name in ("amx", "api", "cache", "kernels", "plan", "schedule", "threads")
            ],
            depends=["csrc"],
            optional=False,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
