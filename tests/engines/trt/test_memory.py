"""Device memory on a make-believe GPU: arrays, the pool that they come from, the arena that plans share."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from latentrt.engines.device import DeviceArray
from latentrt.engines.errors import EngineError, EngineMemoryError, InvalidRequestError
from latentrt.engines.trt import Arena, CudaArray, SessionOptions, share_arena
from latentrt.engines.trt.cudart import Cuda
from latentrt.engines.trt.memory import Pool, aligned

# --- arrays and their pool


def array_of(cuda: Any, pool: Pool, values: Any) -> CudaArray:
    array = CudaArray(cuda, pool.take(values.nbytes), 0, values.shape, str(values.dtype))
    array.write(values)
    return array


def test_arrays(cuda: Any) -> None:
    """An array has dtype, shape and values, and goes to numpy only when asked."""
    pool = Pool(cuda, "x")
    values = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float16)
    array = array_of(cuda, pool, values)
    assert isinstance(array, DeviceArray)
    assert (array.dtype, array.shape, array.nbytes) == ("float16", (2, 3), 12)
    np.testing.assert_array_equal(array.numpy(), values)
    assert array.__dlpack_device__() == (2, 0)
    assert "dltensor" in repr(array.__dlpack__(stream=1, max_version=(1, 0)))
    for options in ({"copy": True}, {"dl_device": (1, 0)}):
        with pytest.raises(BufferError, match="without a copy"):
            array.__dlpack__(**options)
    with pytest.raises(EngineError, match="numpy has no bfloat16"):
        CudaArray(cuda, pool.take(2), 0, (1,), "bfloat16").numpy()
    assert CudaArray(cuda, pool.take(0), 0, (0, 3), "float32").numpy().shape == (0, 3)


def test_a_capsule_keeps_the_memory(cuda: Any) -> None:
    """Memory that another framework may look at is not handed out again."""
    pool = Pool(cuda, "x")
    array = array_of(cuda, pool, np.ones(4, np.float32))
    address, capsule = array.address, array.__dlpack__()
    del array
    gc.collect()
    other = pool.take(16)
    assert other.address != address
    del capsule
    gc.collect()
    assert pool.take(16).address == address


def test_memory_comes_back_to_the_pool(cuda: Any) -> None:
    """Blocks are used again for their size, kept up to a bound, and freed when the pool is closed."""
    pool = Pool(cuda, "x")
    block = pool.take(1000)
    address = block.address
    assert block.nbytes == aligned(1000) == 1024
    del block
    again = pool.take(900)
    assert again.address == address
    large = [pool.take(50 << 20) for _ in range(3)]
    del large
    assert cuda.module.used <= 1024 + (64 << 20)
    pool.close()
    assert cuda.module.leaks == {"device": 1}
    del again
    assert cuda.module.leaks == {}


def test_kept_memory_is_given_up_for_more(cuda: Any) -> None:
    """Memory that is kept for later does not stand in the way of what is needed now."""
    cuda.module.total = 5 << 20
    pool = Pool(cuda, "x")
    block = pool.take(3 << 20)
    del block
    assert cuda.module.used == 3 << 20
    assert pool.take(4 << 20).nbytes == 4 << 20
    with pytest.raises(EngineMemoryError, match=r"inputs and outputs of x need 6.0 MiB of device memory"):
        pool.take(6 << 20)


def test_many_threads_take_and_drop(cuda: Any) -> None:
    """No block is ever held twice, and none is lost."""
    pool = Pool(cuda, "x")
    held: set[int] = set()
    lock = threading.Lock()

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(200):
            block = pool.take(int(rng.integers(1, 4)) * 256)
            with lock:
                assert block.address not in held
                held.add(block.address)
            with lock:
                held.remove(block.address)
            del block

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(work, seed) for seed in range(8)]:
            done.result()
    pool.close()
    assert cuda.module.leaks == {}


# --- the arena


def test_arena_is_sized_to_the_largest(gpu: Any) -> None:
    """Two plans share one piece of memory, as large as the larger needs, and free it when both are closed."""
    arena = Arena()
    needs = {"small": 10_000, "large": 70_000}
    engines = [
        gpu.engine(gpu.plan(name, activations=lambda shapes, need=need: need), arena=arena)
        for name, need in needs.items()
    ]
    sizes = []
    for engine in [*engines, *engines]:
        engine.open()
        outputs = engine.run(gpu.feeds())
        np.testing.assert_allclose(outputs["y"].numpy(), gpu.expected(gpu.feeds()), rtol=1e-6)
        sizes.append(arena.nbytes)
    assert sizes == [aligned(10_000), *[aligned(70_000)] * 3]
    engines[1].close()
    assert arena.nbytes == aligned(70_000)
    np.testing.assert_allclose(engines[0].run(gpu.feeds())["y"].numpy(), gpu.expected(gpu.feeds()), rtol=1e-6)
    engines[0].close()
    assert arena.nbytes == 0


def test_one_run_at_a_time_in_the_arena(gpu: Any) -> None:
    """Plans that share an arena never compute in it at the same time, also while it grows; the fake one would fault."""
    gpu.module.slow = 0.001
    engines = [gpu.engine(gpu.plan(name)) for name in ("text_encoder", "unet", "vae")]
    share_arena(engines)
    for engine in engines:
        engine.open()

    def work(seed: int) -> None:
        feeds = gpu.feeds(1 + seed % 4, (8, 16, 64)[seed % 3], seed=seed) | {"rows": np.array([0])}
        outputs = engines[seed % 3].run(feeds)
        np.testing.assert_allclose(outputs["y"].numpy(), gpu.expected(feeds), rtol=1e-6)

    with ThreadPoolExecutor(6) as threads:
        for done in [threads.submit(work, seed) for seed in range(60)]:
            done.result()
    assert engines[0].arena.nbytes >= 4 * 64 * 1000
    for engine in engines:
        engine.close()


def test_plans_without_an_arena_in_common_would_overlap(gpu: Any) -> None:
    """What the last test relies on: the make-believe GPU notices two runs in the same memory."""
    together: threading.Barrier | None = None

    def compute(feeds: Any, weights: Any) -> Any:
        if together is not None:
            together.wait(timeout=60)
        return {"y": feeds["x"], "picked": feeds["x"][feeds["rows"]].astype(np.float16)}

    engines = [gpu.engine(gpu.plan(name, compute=compute)).open() for name in ("one", "two")]
    engines[0].run(gpu.feeds())
    shared = engines[0].arena._address, engines[0].arena.nbytes
    free = engines[1].arena._free
    engines[1].run(gpu.feeds())
    free()
    engines[1].arena._address, engines[1].arena.nbytes = shared
    together = threading.Barrier(2)
    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(engine.run, gpu.feeds()) for engine in engines]
        errors = [run.exception() for run in runs]
    assert any("illegaladdress" in str(error) for error in errors)
    engines[1].arena._address = engines[1].arena.nbytes = 0
    gpu.cuda.fault = None
    for engine in engines:
        engine.close()


def test_an_arena_is_on_one_device(fake_gpu: Any) -> None:
    """Plans on different devices cannot share one."""
    arena, cuda = Arena(), fake_gpu.FakeCuda()
    arena.join(Cuda(cuda, 0))
    with pytest.raises(InvalidRequestError, match="an arena on device 0 cannot serve device 1"):
        arena.join(Cuda(cuda, 1))
    arena.leave()
    arena.join(Cuda(cuda, 1))


def test_share_arena(gpu: Any) -> None:
    """Closed plans on one device get one arena, each device its own; an open plan is refused."""
    engines = [gpu.engine(gpu.plan(name)) for name in ("one", "two")]
    other = gpu.engine(options=SessionOptions(device=1))
    share_arena([*engines, other])
    assert engines[0].arena is engines[1].arena
    assert other.arena is not engines[0].arena
    with engines[0], pytest.raises(InvalidRequestError, match=r"one.plan \(.*\) is open already"):
        share_arena(engines)
