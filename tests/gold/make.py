"""Records the golden traces: ``.venv/bin/python tests/gold/make.py``.

One file for each scenario, by the engine that is installed. Tests replay and check them where
there is no vLLM. Make them again when the schema or a scenario changes.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from vllm_trace import hooks, runner, scenario
from vllm_trace.options import Options
from vllm_trace.trace import read_trace

GOLD = Path(__file__).parent


def main() -> None:
    os.environ |= runner.quiet_environment()
    import vllm  # noqa: F401 - before attach, so that it is imported quietly

    for name in sys.argv[1:] or scenario.names():
        folder = Path(tempfile.mkdtemp())
        hooks.attach(Options(dir=str(folder)))
        llm, _ = runner.start_engine(scenario.load(name))
        runner.run_workload(llm, scenario.load(name))
        hooks.detach()
        (made,) = folder.glob("*.vtrace")
        shutil.copy(made, GOLD / f"{name}.vtrace")
        shutil.rmtree(folder)
        print(name, sum(1 for _ in read_trace(GOLD / f"{name}.vtrace").events()), "events")


if __name__ == "__main__":
    main()
