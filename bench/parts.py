"""Work in several processes, in time, and kept: what ended is not done again, and what did not is.

One JSON file holds all of it, by the name of the work: the code that it was done for, and what each part printed.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINES = 40  # of a failed part's output


@dataclass
class Parts:
    path: Path
    code: str  # a hash of it: what was done for other code is done again
    count: int
    workers: int  # processes at a time
    say: Callable[[str], None]
    running: set[subprocess.Popen[str]] = field(default_factory=set)

    def run(
        self,
        name: str,
        until: float,  # time.monotonic()
        command: Callable[[int], list[str]],
        read: Callable[[str], Any],  # what a part printed; raises ValueError
        own: dict[str, str] | None = None,  # of the environment
    ) -> dict[str, Any]:
        """{"0": {"status", "found", "tail" of one that failed}, ...} of those that ended in time, now or earlier."""
        content = self.load()
        done: dict[str, Any] = content.setdefault(name, {})

        def one(i: int) -> tuple[int, dict[str, Any] | None]:
            left = until - time.monotonic()
            return i, self.part(command(i), left, read, own or {}) if left > 0 else None

        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for future in as_completed([pool.submit(one, i) for i in range(self.count) if str(i) not in done]):
                    i, result = future.result()
                    if result is None:
                        continue
                    done[str(i)] = result
                    self.save(content)
                    if result["status"]:
                        self.say(f"{name} {i + 1} of {self.count}: status {result['status']}\n{result['tail']}")
            except BaseException:  # Ctrl-C too
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self.running):
                    end(process)
                raise
        return done

    def part(
        self, command: list[str], left: float, read: Callable[[str], Any], own: dict[str, str]
    ) -> dict[str, Any] | None:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment() | own,
            start_new_session=True,  # so that its children can be ended with it
        )
        self.running.add(process)
        try:
            out, err = process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            end(process)
            process.communicate()
            return None
        finally:
            self.running.discard(process)
        tail = "\n".join((out + err).splitlines()[-LINES:])
        try:
            found = read(out)
        except ValueError:
            return {"status": process.returncode or 1, "found": [], "tail": tail}
        return {"status": process.returncode, "found": found, **({"tail": tail} if process.returncode else {})}

    def load(self) -> dict[str, Any]:
        """Of an earlier run for the same code in as many parts."""
        new = {"code": self.code, "count": self.count}
        earlier = json.loads(self.path.read_text()) if self.path.exists() else new
        return earlier if new.items() <= earlier.items() else new

    def save(self, content: dict[str, Any]) -> None:
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(content, indent=1))
        os.replace(partial, self.path)


def end(process: subprocess.Popen[str]) -> None:
    """With its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has just ended
        pass


def environment() -> dict[str, str]:
    """Of the processes: this checkout's packages, each compiling by itself."""
    folders = [str(ROOT / "kernels"), str(ROOT), str(ROOT / "tests")]
    inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    own = {"PYTHONPATH": os.pathsep.join(folders + inherited), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return os.environ | own
