"""A headless Chromium that a test drives, by the DevTools protocol through a pipe: no package needed."""

import base64
import json
import os
import select
import shutil
import subprocess
import time

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    " --disable-background-networking --disable-component-update --remote-debugging-pipe"
).split()
_KEYS = {"Enter": dict(windowsVirtualKeyCode=13, text="\r"), "Tab": dict(windowsVirtualKeyCode=9)}


class Browser:
    """A page, what its console holds of errors, and the addresses that it asked for.

    Args:
      profile: an empty folder.
    """

    def __init__(self, profile, seconds=60):
        read, self._to = os.pipe()
        self._from, write = os.pipe()
        # Where Chromium expects them.
        line = f'exec "$0" "$@" 3<&{read} 4>&{write}'
        arguments = [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._process = subprocess.Popen(
            ["bash", "-c", line, *arguments], pass_fds=(read, write), **quiet
        )
        os.close(read), os.close(write)
        self.seconds, self.errors, self.addresses = seconds, [], []
        self._rest, self._count, self._session = b"", 0, {}
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = dict(sessionId=attached["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method, **parameters):
        """Return what a command of the protocol returns."""
        self._count += 1
        message = dict(id=self._count, method=method, params=parameters, **self._session)
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._count:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self):
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], self.seconds)
            chunk = os.read(self._from, 1 << 20) if ready else b""
            assert chunk, "Chromium has ended, or does not answer"
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\0")
        event = json.loads(line)
        about = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(about["exceptionDetails"])
            case "Log.entryAdded" if about["entry"]["level"] in ("error", "warning"):
                self.errors.append(about["entry"])
            case "Runtime.consoleAPICalled" if about["type"] in ("error", "warning", "assert"):
                self.errors.append(about)
            case "Network.requestWillBeSent":
                self.addresses.append(about["request"]["url"])
        return event

    def run(self, script):
        """Return what an expression of JavaScript gives."""
        options = dict(expression=script, awaitPromise=True, returnByValue=True)
        result = self.send("Runtime.evaluate", **options)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, script):
        """Return what an expression gives once that is true."""
        end = time.monotonic() + self.seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, (script, self.run("document.body.innerText"))
            time.sleep(0.05)
        return value

    def write(self, name, text):
        """Put the focus into the element of this id, and type a text."""
        self.run(f"document.getElementById({name!r}).focus()")
        self.send("Input.insertText", text=text)

    def press(self, key):
        """Press a key, and let it go."""
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, **_KEYS[key])

    def picture(self, path, width, theme="light"):
        """Save the whole page as it is at this width."""
        for height in (900, None):
            height = height or self.run("document.documentElement.scrollHeight")
            size = dict(width=width, height=height, deviceScaleFactor=1, mobile=False)
            self.send("Emulation.setDeviceMetricsOverride", **size)
        feature = dict(name="prefers-color-scheme", value=theme)
        self.send("Emulation.setEmulatedMedia", features=[feature])
        content = self.send("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(content))

    def close(self):
        """End it."""
        self._session = {}
        self.send("Browser.close")
        self._process.wait(timeout=self.seconds)
        os.close(self._to), os.close(self._from)
