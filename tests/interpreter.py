"""Groups of checks under Triton's interpreter (``triton_checks.py``): processes of their own, beside the tests of this one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
CODE = "import sys; sys.argv = ['triton_checks.py', *sys.argv[1:]]; import runpy; runpy.run_path(%r, run_name='__main__')"


def import_paths() -> str:
    """What a process of ours may import from, as PYTHONPATH: all but the repository's root."""
    return os.pathsep.join(p for p in sys.path if p and Path(p).resolve() != HERE.parent.resolve())


class Checks:
    """Runs groups one at a time, in the order in which they are first named."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._found: dict[str, Future[subprocess.CompletedProcess[str]]] = {}
        self._running: list[subprocess.Popen[str]] = []
        self._environment = dict(os.environ)  # as it is now: tests change it while these run

    def start(self, names: Iterable[str]) -> None:
        """Run these as soon as those before them have ended."""
        for name in names:
            if name not in self._found:
                self._found[name] = self._pool.submit(self._run, name)

    def result(self, name: str) -> subprocess.CompletedProcess[str]:
        """Waits for it."""
        self.start([name])
        return self._found[name].result()

    def stop(self) -> None:
        """Give up what has not ended."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._running:
            process.kill()

    def _run(self, name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", CODE % str(HERE / "triton_checks.py"), name]
        env = self._environment | {"TRITON_INTERPRET": "1", "PYTHONPATH": import_paths(), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        with tempfile.TemporaryDirectory() as cache:  # its own: tests look at what is in theirs
            env |= {"SKVQ_CACHE": cache, "HF_HUB_OFFLINE": "1"}
            with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=HERE, env=env) as process:
                self._running.append(process)
                out, err = process.communicate()
                self._running.remove(process)
        return subprocess.CompletedProcess(command, process.returncode, out, err)


CHECKS = Checks()
