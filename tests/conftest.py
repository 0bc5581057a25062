"""What has to be so before anything imports vLLM: its cache, its threads, its silence."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from vllm_trace.compiled import is_compiled
from vllm_trace.hooks.source import VllmSource
from vllm_trace.options import OTHER_VARIABLES, cache_dir

# A developer's own settings must not decide what the tests see.
SOURCE_0_20 = os.environ.get("VTRACE_SOURCE_0_20", "")
SOURCE_0_33 = os.environ.get("VTRACE_SOURCE_0_33", "")
for name in [name for name in os.environ if name.startswith("VTRACE_")]:
    if name not in OTHER_VARIABLES:
        del os.environ[name]

os.environ.setdefault("VLLM_CACHE_ROOT", str(cache_dir() / "vllm"))
os.environ |= {
    "OMP_NUM_THREADS": "1",  # two spinning threads on shared cores take 20 times as long
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

# A shell has what it runs in the background ignore Ctrl-C, and so does all that is started from there.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# So does nohup with the end of the terminal.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The same examples each time; VTRACE_HYPOTHESIS_EXAMPLES asks for more of them.
settings.register_profile(
    "steady",
    max_examples=int(os.environ.get("VTRACE_HYPOTHESIS_EXAMPLES", "100")),
    derandomize=True,
    deadline=None,
    database=None,
)
settings.load_profile("steady")


def pytest_runtest_setup(item):
    if is_compiled() and item.get_closest_marker("plain"):
        pytest.skip("for the checkout, not for the compiled package: `make test` runs it there")


def source_of(release, folder):
    """A vLLM of that release: unpacked in the folder, or the one that is installed."""
    source = VllmSource.at(Path(folder)) if folder else VllmSource.installed()
    if source is None or not source.version.startswith(f"{release}."):
        variable = f"VTRACE_SOURCE_{release.replace('.', '_')}"
        pytest.skip(f"no vLLM {release}: {variable} may name the folder of an unpacked wheel")
    return source


@pytest.fixture(scope="session")
def source_0_33():
    return source_of("0.33", SOURCE_0_33)


@pytest.fixture(scope="session")
def source_0_20():
    return source_of("0.20", SOURCE_0_20)


@pytest.fixture(scope="session")
def source_0_32():
    """The installed vLLM 0.32."""
    source = VllmSource.installed()
    if source is None or not source.version.startswith("0.32."):
        found = "no vLLM" if source is None else f"vLLM {source.version}"
        pytest.skip(f"{found} is installed, not 0.32")
    return source
