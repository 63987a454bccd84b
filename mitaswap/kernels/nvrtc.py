"""Kernels in CUDA C++, compiled when first called: for what Triton cannot say (rows gathered from
shared memory). The compiler and the driver's interface come with torch 2.10 and later.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from importlib import resources
from typing import Any

import torch

#: an argument of a kernel and how C passes it
Argument = tuple[Any, Any]


@functools.cache
def available() -> bool:
    """Whether such kernels can be compiled here."""
    if torch.version.cuda is None:
        return False
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401

        _checked(nvrtc.nvrtcVersion())
    except (ImportError, RuntimeError):  # a torch before 2.10, or one without the compiler
        return False
    return True


def serves(device: int) -> bool:
    """Whether they can be compiled for, and loaded on, a device: the compiler knows it, and is not
    of a later CUDA than the driver.
    """
    if not available():
        return False
    from cuda.bindings import driver, nvrtc

    major, minor = torch.cuda.get_device_capability(device)
    known = 10 * major + minor in _checked(nvrtc.nvrtcGetSupportedArchs())
    compiler, _ = _checked(nvrtc.nvrtcVersion())
    return known and compiler <= _checked(driver.cuDriverGetVersion()) // 1000


@functools.cache
def source(file: str) -> tuple[str, dict[str, str]]:
    """The text of a file beside this one, and the headers there, by name."""
    folder = resources.files(__package__)
    headers = {x.name: x.read_text("utf-8") for x in folder.iterdir() if x.name.endswith(".cuh")}
    return (folder / file).read_text("utf-8"), headers


def _checked(answer: tuple[Any, ...]) -> Any:
    status, *rest = answer
    if int(status):
        raise RuntimeError(f"CUDA: {status.name}")
    return rest[0] if len(rest) == 1 else rest


def compiled(file: str, arch: str, fixed: tuple[tuple[str, int], ...]) -> bytes:
    """Machine code for an architecture (`sm_90`) of a file with the whole numbers `fixed`.

    Raises:
        RuntimeError: with the compiler's words.
    """
    from cuda.bindings import nvrtc

    text, headers = source(file)
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            text.encode(), file.encode(), len(headers),
            [x.encode() for x in headers.values()], [x.encode() for x in headers],
        )
    )  # fmt: skip
    options = ["--std=c++17", f"--gpu-architecture={arch}"]
    options += [f"-D{key}={value}" for key, value in fixed]
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [x.encode() for x in options])
        if int(status):
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"{file} does not compile: {log.decode(errors='replace')}")
        image = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc.nvrtcGetCUBIN(program, image))
    finally:
        _checked(nvrtc.nvrtcDestroyProgram(program))
    return image


def _bind(device: int) -> None:
    """Give this thread the device's context, if it has none: a new one's first call may be ours."""
    from cuda.bindings import driver

    if not int(_checked(driver.cuCtxGetCurrent())):
        context = _checked(driver.cuDevicePrimaryCtxRetain(_checked(driver.cuDeviceGet(device))))
        _checked(driver.cuCtxSetCurrent(context))


@functools.lru_cache(maxsize=256)
def kernel(
    file: str, fixed: tuple[tuple[str, int], ...], shared: int, device: int
) -> Callable[[int, int, list[Argument]], None]:
    """The kernel of a file, which has the file's name, for a device: called as (blocks, threads,
    arguments), it is launched on torch's current stream. What falls out of the cache stays loaded,
    as graphs may hold it. Before a capture it must have been called once, as Triton's.

    Args:
        fixed: whole numbers that it is compiled for.
        shared: bytes of shared memory of a block.
        device: index of the CUDA device, the current one.
    """
    from cuda.bindings import driver

    _bind(device)
    major, minor = torch.cuda.get_device_capability(device)
    image = compiled(file, f"sm_{major}{minor}", fixed)
    module = _checked(driver.cuModuleLoadData(image))
    function = _checked(driver.cuModuleGetFunction(module, file.removesuffix(".cu").encode()))
    wanted = driver.CUfunction_attribute
    for attribute, value in (
        (wanted.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared),
        (wanted.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
    ):
        _checked(driver.cuFuncSetAttribute(function, attribute, value))

    def launch(blocks: int, threads: int, arguments: list[Argument]) -> None:
        _bind(device)
        values, types = zip(*arguments, strict=True)
        stream = torch.cuda.current_stream(device).cuda_stream
        size = (blocks, 1, 1, threads, 1, 1)
        _checked(driver.cuLaunchKernel(function, *size, shared, stream, (values, types), 0))

    return launch


NOWHERE: Argument = (0, ctypes.c_void_p)


def pointer(tensor: torch.Tensor) -> Argument:
    return tensor.data_ptr(), ctypes.c_void_p


def whole(number: int) -> Argument:
    return number, ctypes.c_int


def real(number: float) -> Argument:
    return number, ctypes.c_float
