"""python -m torch_ext: what this installation is and what it uses."""

import torch

from ._library import build_info, cmake_prefix_path, folder


def cuda():
    if not build_info.cuda:
        return "not built"
    # CMake's "90-real" is machine code for 9.0; without "-real" it is also PTX, for GPUs to come.
    names = [
        a.removesuffix("-real") if "-real" in a else a + "+PTX"
        for a in build_info.cuda_architectures
    ]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return (
        f"CUDA {build_info.cuda}, architectures {' '.join(names)}; GPU: {', '.join(gpus) or 'none'}"
    )


def cpu():
    try:
        from . import _C
    except ImportError as e:
        return f"not known, {e}"
    return f"{' '.join(_C.isas())} built, {_C.isa()} in use, compiler {_C.build_info()['compiler']}"


def main():
    rows = {
        "torch_ext": f"{build_info.version}, {folder}",
        "torch": f"built for {build_info.torch}, running {torch.__version__}",
        "CUDA kernels": cuda(),
        "CPU kernels": cpu(),
        "threads": torch.get_num_threads(),
        "C++": f"cmake -DCMAKE_PREFIX_PATH={cmake_prefix_path}",
    }
    for name, value in rows.items():
        print(f"{name:<14}{value}")


if __name__ == "__main__":
    main()
