"""Gluon's names, as Triton 3.6 has them and as Triton 3.9 renamed them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

arrive_when_copied = hopper.async_copy.mbarrier_arrive
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy_async = getattr(hopper.async_copy, "async_load", None) or hopper.async_copy.async_copy_global_to_shared
fence_async_shared = hopper.fence_async_shared
mbarrier = hopper.mbarrier
mma = hopper.warpgroup_mma
mma_start = hopper.warpgroup_mma_init
mma_wait = hopper.warpgroup_mma_wait

__all__ = [
    "arrive_when_copied",
    "barrier",
    "copy_async",
    "fence_async_shared",
    "gl",
    "gluon",
    "mbarrier",
    "mma",
    "mma_start",
    "mma_wait",
]
