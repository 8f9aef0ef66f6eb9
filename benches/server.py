"""An espalierd with one tenant, for scripts that measure. Python 3.9, no package."""

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time


class Server:
    """Runs for as long as the block: `with Server(espalierd, espalier, model) as server: server.ask("status")`."""

    def __init__(self, daemon, cli, model, flags=()):
        self.daemon, self.cli, self.model, self.flags = daemon, cli, model, flags

    def __enter__(self):
        self.dir = tempfile.TemporaryDirectory()
        path = pathlib.Path(self.dir.name)
        arguments = ["--model", self.model, "--data-dir", path / "data", "--listen", "127.0.0.1:0"]
        arguments += ["--metrics-listen", "", "--ready-file", path / "ready", "--log", "warn"]
        log = open(path / "log", "w")
        self.process = subprocess.Popen([self.daemon, *arguments, *self.flags], stdout=subprocess.DEVNULL, stderr=log)
        while not (path / "ready").exists() or not (path / "ready").read_text().strip():
            if self.process.poll() is not None:
                sys.exit((path / "log").read_text())
            time.sleep(0.05)
        self.environment = {**os.environ, "ESPALIER_SERVER": "http://" + (path / "ready").read_text().split()[0]}
        self.environment.pop("ESPALIER_API_KEY", None)
        self.environment["ESPALIER_API_KEY"] = self.ask("--quiet", "tenants", "create", "bench").strip()
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        self.dir.cleanup()

    def ask(self, *arguments, stdin="", cwd=None):
        """What the CLI prints."""
        done = subprocess.run([self.cli, *arguments], cwd=cwd, env=self.environment, input=stdin, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"espalier {' '.join(map(str, arguments))}: {done.stderr}")
        return done.stdout

    def memory(self, what):
        """`VmRSS` or `VmHWM` of the process, in bytes."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.search(rf"{what}:\s+(\d+)", status)[1])

    def forget_peak(self):
        pathlib.Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")


def moment(text):
    """Seconds of a time as the CLI's JSON writes it."""
    whole = time.mktime(time.strptime(text[:19], "%Y-%m-%dT%H:%M:%S"))
    return whole + float("0" + text[19:].rstrip("Z"))
