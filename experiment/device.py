"""The device that a run computes on, its precision, and the seeds."""

import ctypes
import platform
import re
from pathlib import Path

import numpy as np
import torch

from experiment import parallel
from experiment.errors import UserError

# The fast layout of images and filters. On a Mac's GPU, BatchNorm gets wrong gradients from
# channels-last tensors (https://github.com/pytorch/pytorch/issues/175189).
MEMORY_FORMAT = (
    torch.contiguous_format if torch.backends.mps.is_available() else torch.channels_last
)


def pick_device(name: str, amp: str) -> tuple[torch.device, torch.dtype | None]:
    """The device to run on, and the dtype of autocast; None stands for plain float32.

    `name` is auto (the accelerator that PyTorch finds, else the CPU), cpu, cuda, cuda:N, mps, xpu
    or xpu:N. `amp` is bf16, fp16, off or auto: bfloat16 where the device `has_bfloat16`, float16 on
    older CUDA GPUs, else off. Each rank of a job has a GPU of its own. Errors: UserError when there
    is no such device, PyTorch cannot use it, or it is not made for several ranks or for float16.
    """
    device = torch.device("cpu" if name == "auto" else name)
    if name == "auto" and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
    if parallel.world_size() > 1:
        if device.type not in ("cuda", "cpu"):
            raise UserError(f"torchrun is for CUDA and CPUs, not for {device.type}")
        if device.type == "cuda":
            device = torch.device("cuda", parallel.local_rank())
    if device.type != "cpu":
        backend = torch.get_device_module(device)
        count = backend.device_count() if backend.is_available() else 0
        if not 0 <= (device.index or 0) < count:  # PyTorch reads cuda:999 as cuda:-25
            raise UserError(f"--device {name}: PyTorch finds {count} {device.type} devices here")
    if amp == "fp16" and device.type not in ("cuda", "cpu"):  # the loss scaler computes in float64
        raise UserError(f"--amp fp16 is for CUDA and CPUs, not for {device.type}: use bf16 or off")
    if device.type == "cuda":
        _prepare_cuda(device)
    keep_freed_memory()
    return device, _autocast_dtype(device, amp)


def _prepare_cuda(device: torch.device) -> None:
    if device.index is not None:
        torch.cuda.set_device(device)  # streams, graphs and NCCL use the current one
    capability, kernels = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    if not has_kernels(capability, kernels):
        raise UserError(
            f"this PyTorch has no kernels for {torch.cuda.get_device_name(device)} "
            f"(sm_{capability[0]}{capability[1]}), only for {' '.join(kernels)}: install one that "
            "has them, such as the wheels for CUDA 12.6 from "
            "https://download.pytorch.org/whl/cu126, or use --device cpu"
        )
    torch.backends.cudnn.benchmark = True  # faster, and why CUDA runs do not repeat bit for bit
    torch.set_float32_matmul_precision("high")


def has_kernels(capability: tuple[int, int], kernels: list[str]) -> bool:
    """Whether a GPU of this compute capability can run one of the builds "sm_86", "compute_90".

    Machine code runs on later minor versions of its major version; PTX (compute_) on all later GPUs
    (https://docs.nvidia.com/cuda/cuda-c-programming-guide, section on compatibility).
    """
    builds = re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(kernels))
    return not builds or any(  # nothing is known of AMD's, such as gfx90a
        (int(major), int(minor)) <= capability
        and (kind == "compute" or int(major) == capability[0])
        for kind, major, minor in builds
    )


def _autocast_dtype(device: torch.device, amp: str) -> torch.dtype | None:
    if amp == "auto" and has_bfloat16(device):
        return torch.bfloat16
    if amp == "auto" and device.type == "cuda":
        return torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is known to be fast: CUDA from Ampere on, some x86 CPUs under Linux."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = set(_cpu_info("flags").split())
    return device.type == "cpu" and bool(flags & {"avx512_bf16", "amx_bf16"})


def hardware(device: torch.device) -> str:
    """The name of the CUDA GPU, or of the processor, with its threads or `mps` or `xpu`."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type != "cpu":
        name = f"{platform.processor() or platform.machine()}, {device.type}"
    else:
        threads = torch.get_num_threads()
        name = _cpu_info("model name") or platform.processor() or platform.machine()
        name = f"{name}, {threads} thread{'s' * (threads > 1)}"
    return name if parallel.world_size() == 1 else f"{parallel.world_size()} x {name}"


def _cpu_info(key: str) -> str:
    """The first value of `key` in /proc/cpuinfo; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step's activations. No effect on other systems.

    By default large blocks go back to the kernel, which hands them out again, zeroed, page by page,
    in every training step on a CPU.
    """
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another system, or another C library
        return
    # where the threshold may not be above 32 MB, in older versions, it is 32 MB
    mallopt(m_mmap_threshold, 2**31 - 1) or mallopt(m_mmap_threshold, 2**25)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 256 * 2**20)


def seed_everything(seed: int, epoch: int = 0) -> None:
    """Seed PyTorch from (seed, epoch); epoch 0 is for the weights, before training.

    Every epoch has its own seed, so a resumed run draws the same numbers as an uninterrupted one.
    The ranks of a job draw the same numbers on the CPU, for the data, and others on their GPUs,
    where a network's dropout draws.
    """
    number = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    torch.manual_seed(number)
    if parallel.rank() > 0 and torch.cuda.is_available():
        torch.cuda.manual_seed(number + parallel.rank())
