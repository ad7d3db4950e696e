"""Fused kernels in Triton for CUDA tensors: one pass over memory where plain torch operations need ten to thirty launches.

Each has a plain twin that it is tested against, under Triton's interpreter where there is no GPU. `dispatch` is the one place that
decides whether a kernel takes a call; importing this package needs neither Triton nor a GPU. `docs/kernels.md` lists them.
"""
