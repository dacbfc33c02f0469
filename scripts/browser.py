"""A headless Chromium, driven over a pipe by its DevTools protocol: no package beside Python needed."""

import base64
import contextlib
import fcntl
import json
import os
import subprocess
import tempfile
from pathlib import Path

# Where the browser reads commands and writes answers (--remote-debugging-pipe).
COMMANDS, ANSWERS = 3, 4
# Above every descriptor that the pipes must not collide with on their way there.
ASIDE = 10


class Browser:
    """One page of a browser of its own, which ends with the `with` block."""

    def __init__(self, program: str, width: int = 1280, height: int = 900) -> None:
        self.profile = tempfile.TemporaryDirectory(
            prefix="reranker-browser-", ignore_cleanup_errors=True
        )
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, ASIDE) for end in (theirs_in, theirs_out)]
        command = [
            program,
            "--headless",
            "--remote-debugging-pipe",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--no-first-run",
            f"--user-data-dir={self.profile.name}",
            f"--window-size={width},{height}",
        ]
        if os.geteuid() == 0:
            # Chromium refuses to start as root with its sandbox.
            command.append("--no-sandbox")

        def place() -> None:
            os.dup2(ends[0], COMMANDS)
            os.dup2(ends[1], ANSWERS)

        self.process = subprocess.Popen(
            command, stderr=subprocess.DEVNULL, pass_fds=(COMMANDS, ANSWERS), preexec_fn=place
        )
        for end in (theirs_in, theirs_out, *ends):
            os.close(end)
        self.commands, self.answers = os.fdopen(ours_out, "wb"), os.fdopen(ours_in, "rb")
        self.buffer, self.sent, self.session = b"", 0, None
        self.events: list[dict] = []

    def __enter__(self) -> "Browser":
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        # It may end before it answers.
        with contextlib.suppress(OSError, RuntimeError):
            self.session = None
            self.call("Browser.close")
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.profile.cleanup()

    def message(self) -> dict:
        """The next message of the browser."""
        while b"\0" not in self.buffer:
            read = os.read(self.answers.fileno(), 1 << 20)
            if not read:
                raise RuntimeError(f"the browser ended with {self.process.wait()}")
            self.buffer += read
        first, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(first)

    def call(self, method: str, **params: object) -> dict:
        """Sends a command and waits for its result; events that come meanwhile are kept."""
        self.sent += 1
        command = {"id": self.sent, "method": method, "params": params}
        if self.session:
            command["sessionId"] = self.session
        self.commands.write(json.dumps(command).encode() + b"\0")
        self.commands.flush()
        while True:
            message = self.message()
            if message.get("id") == self.sent:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self.events.append(message)

    def open(self, url: str) -> None:
        """Opens a page and waits until it has loaded."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())

    def evaluate(self, expression: str) -> object:
        """The value of a JavaScript expression in the page, or of what it promises."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def complaints(self) -> list[str]:
        """What the page has reported since it was opened: exceptions, errors, warnings."""
        found = []
        for event in self.events:
            params = event.get("params", {})
            match event["method"]:
                case "Runtime.exceptionThrown":
                    found.append(json.dumps(params["exceptionDetails"])[:400])
                case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                    found.append(json.dumps(params["args"])[:400])
                case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                    found.append(params["entry"]["text"])
        return found

    def requests(self) -> list[str]:
        """The addresses that the page has asked for since it was opened."""
        sent = (event for event in self.events if event["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]

    def size(self, width: int, height: int) -> None:
        """Gives the page another size, and the time to draw itself anew."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        # What observes the size is told after the callbacks of a frame: the next frame's come after.
        self.evaluate("new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")

    def scheme(self, name: str) -> None:
        """Prefers `light` or `dark` colours."""
        feature = {"name": "prefers-color-scheme", "value": name}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def hover(self, x: float, y: float) -> None:
        """Moves the mouse there."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path: Path) -> None:
        """Writes a picture of the whole page."""
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(picture["data"]))
